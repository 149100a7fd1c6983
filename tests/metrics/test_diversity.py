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
from torchmetrics.wrappers import BootStrapper

from softlabels.metrics import ConfidenceDiversity, confidence_diversity


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


def of_weighted(confidence, weights, k=3):
    c = torch.as_tensor(np.asarray(confidence, dtype=np.float64))
    rows, target = torch.stack([c, 1 - c], 1), torch.zeros(len(c), dtype=torch.long)
    weights = torch.as_tensor(np.asarray(weights))
    return confidence_diversity(rows, target, n_neighbors=k, sample_weight=weights, from_logits=False).item()


@pytest.mark.parametrize("kind", ["repeats", "weights", "one atom", "grid", "many of few"])
@pytest.mark.parametrize("k", [1, 3])
def test_repeats_mass_and_weights_equal_the_reference(kind, k):
    rng = np.random.default_rng(0)
    c, weights = rng.random(80), np.ones(80)
    if kind == "weights":
        weights = rng.integers(1, 9, 80) / 8
    elif kind == "repeats":
        c, weights = rng.choice(c, 160), np.ones(160)
    elif kind == "one atom":
        c[:30] = 1.0
    elif kind == "grid":
        c = np.round(c * 64) / 64
    elif kind == "many of few":
        c = rng.choice(rng.random(9), 80)
    expected = reference.differential_entropy([Decimal(x) for x in c.tolist()], k, weights.tolist())
    assert of_weighted(c, weights, k) == pytest.approx(expected, abs=1e-9)


DRAWS = scipy.stats.beta(2, 5).rvs(5000, random_state=np.random.default_rng(3))


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("times", [2, 3, 4, 10, 16])
def test_samples_seen_again_do_not_change_the_value(times, k):
    assert of_confidences(np.repeat(DRAWS, times), k) == pytest.approx(of_confidences(DRAWS, k), abs=1e-9)


def test_samples_drawn_with_replacement_have_the_entropy_of_the_distribution():
    """Five draws: their mean is off by 0.002, as that of five new samples is; without counting repeats, by 0.45."""
    rng = np.random.default_rng(0)
    uniform = [of_confidences(rng.choice(rng.random(5000), 5000)) for _ in range(5)]
    assert np.mean(uniform) == pytest.approx(0.0, abs=0.02)
    peaked = [of_confidences(rng.choice(DRAWS, 5000)) for _ in range(5)]
    assert np.mean(peaked) == pytest.approx(scipy.stats.beta(2, 5).entropy(), abs=0.03)


def test_oversampling_and_weights_are_worth_new_samples():
    """A tenth of the samples has half of the weight: by weights, by repeats, and by a sampler that draws by weight."""
    rng = np.random.default_rng(0)
    common, rare = scipy.stats.beta(8, 2), scipy.stats.beta(2, 8)
    c = np.concatenate([common.rvs(4500, random_state=rng), rare.rvs(500, random_state=rng)])
    weights = np.repeat([1, 9], [4500, 500])
    x = (np.arange(100_000) + 0.5) / 100_000
    density = 0.5 * common.pdf(x) + 0.5 * rare.pdf(x)
    exact = -(density * np.log(density)).mean()
    weighted = of_weighted(c, weights)
    assert weighted == pytest.approx(exact, abs=0.05)
    assert of_confidences(np.repeat(c, weights)) == pytest.approx(weighted, abs=1e-9)
    drawn = rng.choice(c, 5000, p=weights / weights.sum())
    assert of_confidences(drawn) == pytest.approx(exact, abs=0.05)


def test_a_bootstrap_interval_holds_the_value():
    logits = torch.from_numpy(np.log(DRAWS) - np.log1p(-DRAWS))
    both, target = torch.stack([logits, torch.zeros_like(logits)], 1), torch.zeros(5000, dtype=torch.long)
    bootstrap = BootStrapper(ConfidenceDiversity(), num_bootstraps=20)
    for rows in torch.arange(5000).split(500):
        bootstrap.update(both[rows], target[rows])
    values = bootstrap.compute()
    assert values["std"] < 0.04
    assert abs(values["mean"] - confidence_diversity(both, target)) < values["std"]


def test_equal_weights_and_no_weights_are_the_same_and_weight_0_is_absence():
    confidence = np.random.default_rng(0).random(300)
    assert of_weighted(confidence, np.full(300, 0.3)) == of_confidences(confidence)
    weights = np.ones(300)
    weights[::3] = 0
    assert of_weighted(confidence, weights) == of_confidences(confidence[weights > 0])


@pytest.mark.parametrize(
    ("values", "shares", "expected"),
    [
        ([0, 1], [0.5, 0.5], 0.0),
        ([0, 1], [0.1, 0.9], -0.1 * math.log(0.2) - 0.9 * math.log(1.8)),
        ([0, 0.5, 1], [1 / 3, 1 / 3, 1 / 3], -(2 * math.log(4 / 3) + math.log(2 / 3)) / 3),  # cells 1/4, 1/2, 1/4
        ([0.2, 0.3, 0.5], [0.5, 0.25, 0.25], -0.5 * math.log(0.5 / 0.1) - 0.25 * (math.log(0.25**2 / 0.15 / 0.2))),
    ],
)
def test_few_values_fill_the_cells_between_midpoints(values, shares, expected):
    counts = np.round(np.array(shares) * 1200).astype(int)
    assert of_confidences(np.repeat(values, counts)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("n", [60, 300, 3000])
@pytest.mark.parametrize("levels", [2, 3, 5, 11, 21])
def test_few_values_are_never_above_0(levels, n, k):
    """The leaves of a tree, votes of a forest, bins of a calibration map: even, random, and of any counts."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        even, random = np.linspace(0, 1, levels), rng.random(levels)
        for leaves in (even, random):
            for shares in (None, rng.dirichlet(np.ones(levels))):
                assert of_confidences(rng.choice(leaves, n, p=shares), k) <= 1e-12


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
    """h(s C + t) = h(C) + log s, ties and all, where no cell is cut at 0 or 1."""
    c = 0.25 + 0.5 * np.random.default_rng(seed).beta(0.5, 0.5, 50).round(2)
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


@pytest.mark.parametrize("repeated", [1, 3, 8])
def test_a_few_repeats_decide_nothing(repeated):
    """One sample that is seen twice leaves two gaps beside it, which may be even by chance."""
    for seed in range(40):
        c = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        once, again = (of_confidences(values) for values in (c, torch.cat([c, c[:repeated]])))
        assert abs(once - again) < 0.02
