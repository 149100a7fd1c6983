"""Confidence diversity: known entropies, saturated models, ties, the laws of differential entropy."""

from __future__ import annotations

import math
from decimal import Decimal

import numpy as np
import pytest
import reference
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from softlabels.metrics import confidence_diversity


def of_confidences(confidence, k=3):
    """Diversity of given true-class probabilities: those of class 0 of two."""
    confidence = torch.as_tensor(np.asarray(confidence, dtype=np.float64))
    target = torch.zeros(len(confidence), dtype=torch.long)
    return confidence_diversity(
        torch.stack([confidence, 1 - confidence], 1), target, n_neighbors=k, from_logits=False
    ).item()


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("parameters", [(2, 5), (0.7, 0.7), (5, 1), (30, 2)])
def test_entropy_of_beta_distributions(parameters, k):
    beta = scipy.stats.beta(*parameters)
    confidence = beta.rvs(20_000, random_state=np.random.default_rng(0))
    assert of_confidences(confidence, k) == pytest.approx(beta.entropy(), abs=0.05)
    logits = torch.from_numpy(np.log(confidence) - np.log1p(-confidence)).float()
    both = torch.stack([logits, torch.zeros_like(logits)], 1)
    estimate = confidence_diversity(both, torch.zeros(20_000, dtype=torch.long), n_neighbors=k)
    assert estimate.item() == pytest.approx(beta.entropy(), abs=0.05)


def test_agrees_with_an_independent_estimator():
    """Vasicek's spacing estimator of scipy, which is biased by about the same 0.05."""
    confidence = scipy.stats.beta(3, 2).rvs(5000, random_state=np.random.default_rng(1))
    assert of_confidences(confidence, 5) == pytest.approx(scipy.stats.differential_entropy(confidence), abs=0.05)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_equals_the_reference(k):
    generator = torch.Generator().manual_seed(k)
    logits = 20 * torch.randn(40, 4, generator=generator, dtype=torch.float64)
    target = torch.randint(4, (40,), generator=generator)
    logits[5:9], target[5:9] = logits[5], target[5]  # four equal
    logits[20], target[20] = logits[21], target[21]  # two equal
    exact = [reference.true_class_probability(row, y) for row, y in zip(logits.tolist(), target.tolist(), strict=True)]
    estimate = confidence_diversity(logits, target, n_neighbors=k).item()
    assert estimate == pytest.approx(reference.differential_entropy(exact, k), rel=1e-9)


@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.875, 1.0]), min_size=4, max_size=12),
    st.integers(1, 3),
)
def test_ties_equal_the_reference(confidence, k):
    expected = reference.differential_entropy([Decimal(c) for c in confidence], k)
    assert of_confidences(confidence, k) == pytest.approx(expected, abs=1e-12)


def saturated(rows=2000):
    """Float32 logits of a trained model: 60% of the confidences round to 1."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, 10, generator=generator)
    target = torch.randint(10, (rows,), generator=generator)
    margin = torch.where(torch.arange(rows) < 0.65 * rows, 28.0, 4.0) + 3 * torch.randn(rows, generator=generator)
    logits[torch.arange(rows), target] += margin
    return logits, target


def test_saturated_models():
    logits, target = saturated()
    rounded = logits.softmax(1).gather(1, target[:, None]).squeeze(1)
    assert (rounded == 1.0).double().mean() > 0.6
    for k in (1, 3):
        diversity = confidence_diversity(logits, target, n_neighbors=k)
        in_float64 = confidence_diversity(logits.double(), target, n_neighbors=k)
        assert diversity.isfinite()
        torch.testing.assert_close(diversity, in_float64, rtol=1e-12, atol=0.0)
    few, labels = logits[::20], target[::20]
    exact = [reference.true_class_probability(row, y) for row, y in zip(few.tolist(), labels.tolist(), strict=True)]
    assert confidence_diversity(few, labels).item() == pytest.approx(reference.differential_entropy(exact, 3), rel=1e-9)


def test_rounded_confidences_are_finite_and_do_not_vanish():
    logits, target = saturated()
    rounded = confidence_diversity(logits.softmax(1), target, from_logits=False)
    assert rounded.isfinite()
    kept = logits.softmax(1).gather(1, target[:, None]).squeeze(1) < 1.0
    without = confidence_diversity(logits[kept].softmax(1), target[kept], from_logits=False)
    assert rounded < without - 1.0


def test_all_equal():
    for n in (5, 500):
        assert of_confidences(np.full(n, 0.3)) == pytest.approx(math.log(2.0**-52))
        assert of_confidences(np.ones(n)) == pytest.approx(math.log(2.0**-52))
    beyond = torch.tensor([[1e4, 0.0], [2e4, 0.0], [3e4, 0.0], [4e4, 0.0]])  # closer to 1 than float64 can say
    assert confidence_diversity(beyond, torch.zeros(4, dtype=torch.long)).item() == pytest.approx(math.log(2.0**-52))


def test_equal_up_to_rounding_is_equal():
    """The order of the wrong classes, and a constant added to a row, change log-odds in the last digits alone."""
    torch.manual_seed(0)
    row, first = torch.randn(50), torch.zeros(1000, dtype=torch.long)
    shuffled = torch.stack([torch.cat([row[:1], row[1:][torch.randperm(49)]]) for _ in range(1000)])
    assert confidence_diversity(shuffled, first).item() == pytest.approx(math.log(2.0**-52))
    offsets = torch.tensor([0.0, 1, 2, 3, 4, 64, 128, 1024])
    shifted = torch.tensor([2.0, 0.0, 0.0]) + offsets[:, None]
    assert confidence_diversity(shifted, first[:8]).item() == pytest.approx(math.log(2.0**-52))
    coarse, target = (3 * torch.randn(2000, 3)).round(), torch.zeros(2000, dtype=torch.long)
    swapped = coarse[:, [0, 2, 1]]
    assert confidence_diversity(swapped, target) == confidence_diversity(coarse, target)
    mixed = torch.where(torch.arange(2000)[:, None] % 2 == 0, coarse, swapped)
    torch.testing.assert_close(
        confidence_diversity(mixed, target), confidence_diversity(coarse, target), rtol=1e-9, atol=0.0
    )


@pytest.mark.parametrize("k", [1, 3])
def test_rounding_to_a_grid_hardly_changes_the_value(k):
    """What bf16 does to confidences: many equal values, whose cells stand for the density."""
    draws = scipy.stats.beta(2, 5).rvs(20_000, random_state=np.random.default_rng(0))
    assert of_confidences(np.round(draws * 256) / 256, k) == pytest.approx(scipy.stats.beta(2, 5).entropy(), abs=0.05)


values = st.lists(st.floats(0.0, 1.0), min_size=6, max_size=40, unique=True)


@given(values, st.randoms())
def test_order_of_samples_does_not_matter(confidence, random):
    shuffled = list(confidence)
    random.shuffle(shuffled)
    assert of_confidences(shuffled) == of_confidences(confidence)


@given(st.integers(0, 10**6), st.floats(0.05, 1.0), st.floats(0.0, 1.0))
def test_shift_and_scale(seed, scale, place):
    """h(s C + t) = h(C) + log s, ties and all."""
    c = np.random.default_rng(seed).beta(0.5, 0.5, 50).round(2)
    shift = place * (1.0 - scale)
    moved = of_confidences(scale * c + shift)
    assert moved == pytest.approx(of_confidences(c) + math.log(scale), abs=1e-6)


@given(values)
def test_mirror_images_are_alike(confidence):
    c = np.round(confidence, 6)
    assert of_confidences(1.0 - c) == pytest.approx(of_confidences(c), abs=1e-6)


def test_dense_predictions_and_ignored_rows():
    logits, target = torch.randn(4, 5, 6), torch.randint(5, (4, 6))
    target[target == 3] = -1
    rows, labels = logits.movedim(1, 2).reshape(-1, 5), target.flatten()
    expected = confidence_diversity(rows[labels >= 0], labels[labels >= 0])
    assert confidence_diversity(logits, target, ignore_index=-1) == expected


def test_nan_is_not_hidden():
    logits = torch.randn(9, 3)
    logits[4, 1] = math.nan
    assert confidence_diversity(logits, torch.zeros(9, dtype=torch.long)).isnan()


@pytest.mark.parametrize("k", [0, -1, 2.0, True])
def test_bad_neighbors(k):
    with pytest.raises(ValueError, match=f"n_neighbors must be an int of at least 1, got {k!r}"):
        confidence_diversity(torch.randn(9, 3), torch.zeros(9, dtype=torch.long), n_neighbors=k)


def test_too_few_samples():
    target = torch.tensor([0, 1, -100, 2])
    with pytest.raises(ValueError, match="n_neighbors=3 needs at least 4 samples, got 3 that count"):
        confidence_diversity(torch.randn(4, 3), target)
    assert confidence_diversity(torch.randn(4, 3), target, n_neighbors=2).isfinite()
