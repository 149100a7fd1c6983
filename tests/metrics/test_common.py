"""What all metrics promise: they leave their arguments alone, and argmax decides ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from softlabels import metrics

FUNCTIONS = {
    "predictive_entropy": lambda x, y, **o: metrics.predictive_entropy(x, **o),
    "average_predictive_uncertainty": metrics.average_predictive_uncertainty,
    "confidence_diversity": metrics.confidence_diversity,
    "calibration_error": metrics.calibration_error,
    "equal-mass calibration_error": lambda x, y, **o: metrics.calibration_error(x, y, binning="equal-mass", **o),
}


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_are_not_changed(name, dtype, from_logits):
    input = torch.randn(20, 4, 3, dtype=dtype)
    input = input if from_logits else input.softmax(1)
    target = torch.randint(4, (20, 3))
    target[0] = -100
    before = input.clone(), target.clone()
    FUNCTIONS[name](input, target, from_logits=from_logits)
    assert torch.equal(input, before[0])
    assert torch.equal(target, before[1])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_do_not_depend_on_the_memory_format(name):
    input, target = torch.randn(6, 5, 4, 3), torch.randint(5, (6, 4, 3))
    value = FUNCTIONS[name](input, target)
    torch.testing.assert_close(FUNCTIONS[name](input.to(memory_format=torch.channels_last), target), value)


@pytest.mark.parametrize("dims", [(), (7,)])
def test_ties_are_decided_as_argmax_does(dims):
    """Coarse logits, as bfloat16 makes them, have several largest classes in most rows."""
    logits = torch.randint(0, 3, (400, 5, *dims)).float()
    target = torch.randint(5, (400, *dims))
    accuracy = (logits.argmax(1) == target).double().mean()
    curve = metrics.reliability_curve(logits, target, n_bins=1)
    torch.testing.assert_close(curve.accuracy[0], accuracy)
    curve = metrics.reliability_curve(logits.softmax(1), target, n_bins=1, from_logits=False)
    torch.testing.assert_close(curve.accuracy[0], accuracy)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_ignored_rows_may_hold_anything(name):
    if name == "predictive_entropy":
        pytest.skip("has no labels")
    logits, target = torch.randn(20, 4), torch.randint(4, (20,))
    padding, labels = torch.full((3, 4), torch.nan), torch.full((3,), -100)
    padding[1] = 0.0
    for from_logits, input in ((True, logits), (False, logits.softmax(1))):
        padded = FUNCTIONS[name](torch.cat([input, padding]), torch.cat([target, labels]), from_logits=from_logits)
        torch.testing.assert_close(padded, FUNCTIONS[name](input, target, from_logits=from_logits))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_from_logits_is_a_flag(name):
    with pytest.raises(TypeError, match="from_logits must be True or False, got 'no'"):
        FUNCTIONS[name](torch.randn(4, 3), torch.zeros(4, dtype=torch.long), from_logits="no")


def test_labels_of_any_integer_dtype_and_counts_of_numpy():
    logits, target = torch.randn(30, 4), torch.randint(4, (30,))
    value = metrics.calibration_error(logits, target)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert metrics.calibration_error(logits, target.to(dtype)) == value
    assert metrics.calibration_error(logits, target, n_bins=np.int64(15)) == value
    assert metrics.confidence_diversity(logits, target, n_neighbors=np.int64(3)).isfinite()
    with pytest.raises(TypeError, match=r"target must hold class indices of shape \(30,\), got torch.bool"):
        metrics.calibration_error(logits, target > 1)
    with pytest.raises(ValueError, match=r"shape \(30,\) for input of shape \(30, 4\), got shape \(30, 1\)"):
        metrics.calibration_error(logits, target[:, None])


def test_requires_grad_is_no_obstacle():
    logits = torch.randn(20, 4, requires_grad=True)
    for function in FUNCTIONS.values():
        function(logits, torch.randint(4, (20,)))
        function(logits.softmax(1), torch.randint(4, (20,)), from_logits=False)
