"""Predictive entropy: float64 truth over the whole range of logits, limits, dtypes, layouts."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from softlabels.metrics import _rows, average_predictive_uncertainty, predictive_entropy


def plain(logits):
    """-sum p log p, as the issue and Eq. 4 have it, in float64."""
    return torch.special.entr(logits.double().softmax(1)).sum(1)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_formula_in_float64(scale, dtype):
    logits = ((torch.rand(507, 123, dtype=torch.float64) * 2 - 1) * scale).to(dtype)
    entropy = predictive_entropy(logits)
    assert entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(entropy.double(), plain(logits), rtol=1e-7, atol=1e-14)


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=6))
def test_equals_the_reference(row):
    entropy = predictive_entropy(torch.tensor([row], dtype=torch.float64)).item()
    assert entropy == pytest.approx(reference.entropy(reference.softmax(row)), rel=1e-9, abs=1e-14)
    assert 0.0 <= entropy <= math.log(len(row)) + 1e-12


def test_limits():
    for k in (2, 10, 1000):
        torch.testing.assert_close(predictive_entropy(torch.full((3, k), -7.5)), torch.full((3,), math.log(k)))
    one_hot = torch.full((2, 5), -1e4)
    one_hot[0, 2] = one_hot[1, 4] = 1e4
    assert predictive_entropy(one_hot).tolist() == [0.0, 0.0]
    assert predictive_entropy(torch.tensor([[0.0, -math.inf], [-math.inf, 3.0]])).tolist() == [0.0, 0.0]
    assert predictive_entropy(torch.eye(3), from_logits=False).tolist() == [0.0, 0.0, 0.0]


def test_small_entropies_keep_their_digits():
    gap = torch.tensor([40.0, 100.0, 600.0], dtype=torch.float64)
    entropy = predictive_entropy(torch.stack([gap, torch.zeros(3)], 1))
    torch.testing.assert_close(entropy, torch.exp(-gap) * (1 + gap), rtol=1e-13, atol=0.0)


def test_undefined_stays_undefined():
    assert predictive_entropy(torch.tensor([[0.0, math.nan], [0.0, 0.0]])).isnan().tolist() == [True, False]
    assert average_predictive_uncertainty(torch.zeros(0, 3)).isnan()
    assert average_predictive_uncertainty(torch.zeros(2, 3), torch.tensor([-100, -100])).isnan()


def test_gradient():
    logits = torch.randn(5, 4, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(predictive_entropy, logits)
    torch.autograd.gradcheck(lambda x: predictive_entropy(x.softmax(1), from_logits=False), logits)


def test_dense_predictions_ignored_rows_and_chunks(monkeypatch):
    logits, target = torch.randn(6, 5, 4, 3), torch.randint(5, (6, 4, 3))
    target[target == 0] = 255
    rows = logits.movedim(1, -1).reshape(-1, 5)
    entropy = predictive_entropy(logits)
    torch.testing.assert_close(entropy.flatten(), predictive_entropy(rows))
    expected = entropy[target != 255].double().mean()
    torch.testing.assert_close(average_predictive_uncertainty(logits, target, ignore_index=255), expected)
    torch.testing.assert_close(average_predictive_uncertainty(logits), entropy.double().mean())
    for chunk in (1, 7, 100, 1000):
        monkeypatch.setattr(_rows, "CHUNK", {"cpu": chunk, "other": chunk})
        torch.testing.assert_close(predictive_entropy(logits), entropy)
        assert predictive_entropy(logits[:0]).shape == (0, 4, 3)
        assert predictive_entropy(logits[..., :0]).shape == (6, 4, 0)


def test_weights_multiply_and_weight_0_is_absence():
    logits, weight = torch.randn(9, 4, 2), torch.rand(9, 2)
    entropy = predictive_entropy(logits.double())
    value = average_predictive_uncertainty(logits, sample_weight=weight)
    torch.testing.assert_close(value, (entropy * weight).sum() / weight.sum().double(), rtol=1e-6, atol=0.0)
    target = torch.randint(4, (9, 2))
    logits[0], weight[0] = torch.nan, 0.0
    logits[1], target[1], weight[1] = torch.nan, -100, torch.nan
    value = average_predictive_uncertainty(logits, target, sample_weight=weight)
    torch.testing.assert_close(value, average_predictive_uncertainty(logits[2:], target[2:], sample_weight=weight[2:]))


def test_one_row_and_probabilities():
    logits = torch.randn(7)
    assert predictive_entropy(logits).shape == ()
    torch.testing.assert_close(predictive_entropy(logits), predictive_entropy(logits[None])[0])
    torch.testing.assert_close(predictive_entropy(logits.softmax(0), from_logits=False), predictive_entropy(logits))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: predictive_entropy([1.0]), TypeError, "input must be a Tensor, got list"),
        (lambda: predictive_entropy(torch.ones(3, 2, dtype=torch.long)), NotImplementedError, "floating dtype"),
        (lambda: predictive_entropy(torch.ones(3, 0)), ValueError, r"at least two classes, got shape \(3, 0\)"),
        (
            lambda: predictive_entropy(torch.zeros(3, 2).to(torch.float8_e4m3fn)),
            NotImplementedError,
            r"pass input.float\(\)",
        ),
        (
            lambda: predictive_entropy(torch.tensor([[2.0, -1.0]]), from_logits=False),
            ValueError,
            "class probabilities that sum to 1, got a row whose smallest value is -1 and whose sum is 1",
        ),
        (
            lambda: predictive_entropy(torch.tensor([[0.5, 0.2]]), from_logits=False),
            ValueError,
            "and whose sum is 0.7; logits need from_logits=True",
        ),
        (
            lambda: average_predictive_uncertainty(torch.zeros(2, 3), torch.tensor([0, 3])),
            IndexError,
            r"class indices in \[0, 3\) or ignore_index=-100, got 3",
        ),
        (
            lambda: average_predictive_uncertainty(torch.zeros(2, 3), torch.tensor([0])),
            ValueError,
            r"class indices of shape \(2,\) for input of shape \(2, 3\), got shape \(1,\)",
        ),
        (
            lambda: average_predictive_uncertainty(torch.zeros(2, 3), torch.zeros(2, 3)),
            TypeError,
            r"class indices of shape \(2,\), got torch.float32 of shape \(2, 3\).*argmax",
        ),
        (
            lambda: average_predictive_uncertainty(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long)),
            ValueError,
            r"class indices of shape \(2,\) for input of shape \(2, 3\), got shape \(2, 3\)",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("ignore_index", [-100, 0, 1])
def test_all_rows_count_without_a_target(ignore_index):
    """Also where the ignored label is a class."""
    logits = torch.zeros(3, 4)
    log_4 = torch.tensor(4.0, dtype=torch.float64).log()
    torch.testing.assert_close(average_predictive_uncertainty(logits, ignore_index=ignore_index), log_4)
