"""Conversions, both ways and against the paper's numbers."""

from __future__ import annotations

import math
from decimal import Context, Decimal, localcontext

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from softlabels import functional, tuning


@given(e=st.floats(0, 0.999), k=st.integers(2, 10**6))
def test_smoothing_round_trips(e, k):
    assert tuning.label_smoothing_for(tuning.true_class_for(e, k), k) == pytest.approx(e, abs=1e-9)
    assert tuning.beta_to_smoothing(tuning.smoothing_to_beta(e)) == pytest.approx(e, abs=1e-12)


@given(alpha=st.floats(0, 0.9), share=st.floats(0.001, 0.999))
def test_concentration_gives_the_mean(alpha, share):
    true_class = alpha + (1 - alpha) * share
    a = tuning.beta_concentration(true_class, alpha)
    assert alpha + (1 - alpha) * a / (a + 1) == pytest.approx(true_class)


def test_paper_numbers():
    assert tuning.beta_concentration(0.85, alpha=0.4) == pytest.approx(3.0)
    assert tuning.beta_concentration(1.0, alpha=0.4) == math.inf
    assert tuning.label_smoothing_for(1.0, 10) == 0.0
    assert tuning.label_smoothing_for(0.1, 10) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tuning.beta_concentration(0.3, 0.4), "true_class must be greater than alpha=0.4"),
        (lambda: tuning.beta_concentration(1.2, 0.4), r"true_class must be in \[0, 1\], got 1.2"),
        (lambda: tuning.beta_concentration(0.9, 1.0), r"alpha must be in \[0, 1\), got 1.0"),
        (lambda: tuning.label_smoothing_for(0.05, 10), r"true_class must be in \[0.1, 1\], got 0.05"),
        (lambda: tuning.label_smoothing_for(0.5, 1), "num_classes must be an int of at least 2, got 1"),
        (lambda: tuning.true_class_for(0.1, 2.0), "num_classes must be an int of at least 1, got 2.0"),
        (lambda: tuning.smoothing_to_beta(1.0), r"label_smoothing must be in \[0, 1\), got 1.0"),
        (lambda: tuning.beta_to_smoothing(math.inf), r"beta must be in \[0, inf\), got inf"),
        (lambda: tuning.beta_to_smoothing(math.nan), r"beta must be in \[0, inf\), got nan"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@given(true_class=st.floats(0.41, 0.999), alpha=st.floats(0, 0.4))
def test_beta_true_class_inverts_beta_concentration(true_class, alpha):
    assert tuning.beta_true_class(tuning.beta_concentration(true_class, alpha), alpha) == pytest.approx(true_class)
    assert tuning.beta_true_class(math.inf, alpha) == 1.0


@pytest.mark.parametrize("beta", [1e-3, 0.02, 0.1, 0.5, 1.0, 3.0, 100.0, 1e3])
@pytest.mark.parametrize("k", [2, 3, 10, 1000, 10**6])
def test_confidence_penalty_optimum_is_one(beta, k):
    """App. 9.1: at the optimum the gradient of -log z + beta sum z log z vanishes on the simplex.

    With z = (z, (1 - z) / (k - 1), ...): -1 / z + beta (log z - log((1 - z) / (k - 1))) = 0, in Decimal's 50 digits,
    changes sign within float64's rounding of the answer.
    """
    z = tuning.confidence_penalty_optimum(beta, k)
    assert 1 / k <= z <= 1
    with localcontext(Context(prec=2000 if beta < 0.01 else 50)):
        b = Decimal(beta)

        def slope(z):
            return -1 / z + b * (z.ln() - ((1 - z) / (k - 1)).ln())

        below = Decimal(z) * (1 - Decimal("1e-12"))
        above = Decimal(z) + min(Decimal(z) * Decimal("1e-12"), (1 - Decimal(z)) * Decimal("0.5"))
        above = above if above < 1 else 1 - (-2 / b).exp() / k
        assert slope(below) < 0 < slope(above)


def test_confidence_penalty_optimum_minimises_the_loss():
    """The loss itself, as the package computes it, has no better point nearby."""
    for beta, k in [(0.1, 10), (0.5, 4), (2.0, 3)]:
        z = tuning.confidence_penalty_optimum(beta, k)

        def loss(z, beta=beta, k=k):
            p = torch.tensor([z] + [(1 - z) / (k - 1)] * (k - 1), dtype=torch.float64)
            return functional.confidence_penalty_loss(p.log(), torch.tensor(0), beta=beta).item()

        assert all(loss(z) < loss(z + share * (1 - z)) for share in (-0.5, -0.01, 0.01, 0.5))


def test_confidence_penalty_optimum_at_the_ends():
    assert tuning.confidence_penalty_optimum(0.0, 5) == 1.0
    assert tuning.confidence_penalty_optimum(0.7, 1) == 1.0
    assert tuning.confidence_penalty_optimum(1e300, 4) == pytest.approx(0.25)
    assert tuning.confidence_penalty_optimum(1e-300, 4) == 1.0


@pytest.fixture(scope="module")
def digits():
    """Teachers' logits on their training digits, from one that is right about most to one that knows all by heart."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images / 16.0), torch.from_numpy(labels)
    logits = {}
    for regularisation in (1e-3, 1e-1, 10.0, 1e6):
        model = LogisticRegression(C=regularisation, max_iter=300).fit(x, y)
        logits[regularisation] = torch.from_numpy(model.decision_function(x))
    return logits, y


def average(logits, y, alpha, temperature):
    soft = functional.distillation_targets(y, logits, alpha=alpha, temperature=temperature)
    return soft[torch.arange(len(y)), y].mean().item()


@pytest.mark.parametrize("wanted", [0.7, 0.85, 0.93])
def test_match_temperature_on_digits(digits, wanted):
    logits, y = digits
    for teacher in logits.values():
        temperature = tuning.match_temperature(teacher, y, alpha=0.6, true_class=wanted)
        assert average(teacher, y, 0.6, temperature) == pytest.approx(wanted, abs=1e-6)
        assert average(teacher, y, 0.6, 1.05 * temperature) < wanted  # the softest that does
    low_precision = tuning.match_temperature(logits[10.0].float(), y, alpha=0.6, true_class=wanted)
    assert low_precision == pytest.approx(
        tuning.match_temperature(logits[10.0], y, alpha=0.6, true_class=wanted), rel=1e-5
    )


def test_match_temperature_of_dense_logits_and_ignored_rows():
    logits, y = 5 * torch.randn(4, 3, 50), torch.randint(3, (4, 50))
    logits.scatter_add_(1, y.unsqueeze(1), torch.full((4, 1, 50), 6.0))
    rows, labels = logits.movedim(1, 2).reshape(-1, 3), y.flatten().clone()
    dense = tuning.match_temperature(logits, y, alpha=0.1, true_class=0.6)
    assert dense == pytest.approx(tuning.match_temperature(rows, labels, alpha=0.1, true_class=0.6))
    labels[:100] = -100
    half = tuning.match_temperature(rows, labels, alpha=0.1, true_class=0.6)
    assert half == pytest.approx(tuning.match_temperature(rows[100:], labels[100:], alpha=0.1, true_class=0.6))


def peaked():
    """One sample sure and right, one unsure and wrong: softening helps the second before it hurts the first."""
    return torch.tensor([[4.0, 0.0], [0.0, 0.4]], dtype=torch.float64), torch.tensor([0, 0])


def test_match_temperature_takes_the_softer_of_two():
    logits, y = peaked()
    hard, soft = average(logits, y, 0.0, 0.05), average(logits, y, 0.0, 1.0)
    assert hard < 0.6 < soft
    temperature = tuning.match_temperature(logits, y, alpha=0.0, true_class=0.6)
    assert temperature > 1.0
    assert average(logits, y, 0.0, temperature) == pytest.approx(0.6, abs=1e-9)


def test_match_temperature_finds_a_peak_between_its_grid_and_names_the_range():
    logits, y = peaked()
    peak = max(average(logits, y, 0.0, t / 1000) for t in range(100, 3000))
    close = peak - 1e-6
    temperature = tuning.match_temperature(logits, y, alpha=0.0, true_class=close)
    assert average(logits, y, 0.0, temperature) == pytest.approx(close, abs=1e-9)
    with pytest.raises(ValueError, match=rf"true_class=0.9 cannot be reached with alpha=0.0: .* to {peak:.5f}"):
        tuning.match_temperature(logits, y, alpha=0.0, true_class=0.9)
    with pytest.raises(ValueError, match=r"true_class=0.45 cannot be reached with alpha=0.2"):
        tuning.match_temperature(logits, y, alpha=0.2, true_class=0.45)


def test_match_temperature_finds_a_peak_on_the_softer_side_of_a_harder_root():
    """Two crossings less than a factor 2 apart, and a third far below: the softest is returned."""
    mostly_wrong, right = torch.zeros(70, 10).double(), torch.zeros(30, 10).double()
    mostly_wrong[:, 0], mostly_wrong[:, 1], right[:, 0] = 1000.0, 800.0, 1.0
    logits = torch.cat([mostly_wrong, right])
    y = torch.cat([torch.ones(70), torch.zeros(30)]).long()
    temperature = tuning.match_temperature(logits, y, alpha=0.0, true_class=0.22909337)
    assert temperature == pytest.approx(314, abs=2)
    assert average(logits, y, 0.0, temperature) == pytest.approx(0.22909337, abs=1e-9)


def sure_teacher():
    logits, y = torch.randn(300, 10, dtype=torch.float64), torch.randint(10, (300,))
    logits[torch.arange(300), y] += 12
    return logits, y


@pytest.mark.parametrize("fill", [-1e9, torch.finfo(torch.float32).min, torch.finfo(torch.float64).min, -torch.inf])
def test_match_temperature_with_masked_classes(fill):
    logits, y = sure_teacher()
    logits[:, 9] = torch.where(y == 9, logits[:, 9], fill)
    temperature = tuning.match_temperature(logits, y, alpha=0.0, true_class=0.5)
    assert 3 < temperature < 10
    assert average(logits, y, 0.0, temperature) == pytest.approx(0.5, abs=1e-9)


def test_match_temperature_with_offsets_and_outliers():
    logits, y = sure_teacher()
    expected = tuning.match_temperature(logits, y, alpha=0.0, true_class=0.5)
    shifted = logits + 1e5 * torch.randn(300, 1)
    assert tuning.match_temperature(shifted, y, alpha=0.0, true_class=0.5) == pytest.approx(expected, rel=1e-9)
    ignored = torch.cat([logits, torch.tensor([[1e12] + [torch.nan] * 9])])
    labels = torch.cat([y, torch.tensor([-100])])
    assert tuning.match_temperature(ignored, labels, alpha=0.0, true_class=0.5) == pytest.approx(expected)
    logits[7] *= 1e6
    assert tuning.match_temperature(logits, y, alpha=0.0, true_class=0.5) == pytest.approx(expected, rel=0.05)


def test_match_temperature_near_the_ends_of_what_can_be_reached():
    logits = torch.zeros(8, 5)
    logits[:, 0] = 10.0
    y = torch.zeros(8, dtype=torch.long)
    for wanted in (0.2000005, 0.9999999, 1.0):
        temperature = tuning.match_temperature(logits, y, alpha=0.0, true_class=wanted)
        assert average(logits.double(), y, 0.0, temperature) == pytest.approx(wanted, abs=1e-9)
    with pytest.raises(ValueError, match=r"give the true class 0.2 to 1 on average"):
        tuning.match_temperature(logits, y, alpha=0.0, true_class=0.19)
    constant = torch.full((4, 5), 7.0)
    assert tuning.match_temperature(constant, y[:4], alpha=0.0, true_class=0.2) > 1.0  # any is right
    with pytest.raises(ValueError, match=r"give the true class 0.2 to 0.2 on average"):
        tuning.match_temperature(constant, y[:4], alpha=0.0, true_class=0.5)


def test_match_temperature_with_a_class_that_is_ruled_out():
    logits, y = 3 * torch.randn(50, 4), torch.zeros(50, dtype=torch.long)
    logits[:, 0] += 12
    logits[:, 3] = -torch.inf
    temperature = tuning.match_temperature(logits, y, alpha=0.0, true_class=0.8)
    assert average(logits, y, 0.0, temperature) == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: tuning.match_temperature(x, y, alpha=1.0, true_class=0.9), r"alpha must be in \[0, 1\), got 1.0"),
        (lambda x, y: tuning.match_temperature(x, y, alpha=0.5, true_class=2.0), r"true_class must be in \[0, 1\]"),
        (lambda x, y: tuning.match_temperature(x * torch.nan, y, alpha=0.5, true_class=0.9), "and 15 nan"),
        (lambda x, y: tuning.match_temperature(x / 0, y, alpha=0.5, true_class=0.9), "5 rows that count"),
        (lambda x, y: tuning.match_temperature(x, y - 100, alpha=0.5, true_class=0.9), "0 rows that count"),
        (lambda x, y: tuning.match_temperature(x * 0, y, alpha=0.5, true_class=0.9), "0.666667 to 0.666667"),
        (lambda x, y: tuning.beta_true_class(0.0, 0.5), "concentration must be in"),
        (lambda x, y: tuning.confidence_penalty_optimum(-0.1, 10), r"beta must be in \[0, inf\), got -0.1"),
        (lambda x, y: tuning.confidence_penalty_optimum(0.1, 0), "num_classes must be an int of at least 1, got 0"),
    ],
)
def test_bad_matching(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(5, 3), torch.zeros(5, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "fit", [tuning.fit_temperature, lambda x, y: tuning.match_temperature(x, y, alpha=0, true_class=0.5)]
)
def test_the_least_number_of_a_dtype_masks_like_minus_infinity(fit, dtype):
    logits, y = sure_teacher()
    logits[::3] = logits[::3].flip(1)
    logits, y = logits.to(dtype), y % 9
    masked = {fill: logits.clone() for fill in (-torch.inf, torch.finfo(dtype).min)}
    for fill, values in masked.items():
        values[:, 9] = fill
    assert fit(masked[torch.finfo(dtype).min], y) == pytest.approx(fit(masked[-torch.inf], y), rel=1e-9)


def test_match_temperature_takes_little_memory():
    """Of 40 MiB of logits, no copy: less than a fifth on top."""
    logits, y = torch.randn(20_000, 256, dtype=torch.float64), torch.randint(256, (20_000,))
    logits[torch.arange(20_000), y] += 8
    with torch.profiler.profile(profile_memory=True) as profile:
        tuning.match_temperature(logits, y, alpha=0.0, true_class=0.5)
    largest = held = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            largest = max(largest, held)
    assert largest < 0.2 * logits.nbytes


def calibrated_at(temperature, rows=3000, classes=10):
    logits = 4 * torch.randn(rows, classes, dtype=torch.float64)
    return logits, torch.distributions.Categorical(logits=logits / temperature).sample()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5, 20.0])
def test_fit_temperature_minimises_the_negative_log_likelihood(temperature):
    logits, y = calibrated_at(temperature)
    fitted = tuning.fit_temperature(logits, y)

    def loss(log_temperature):
        return torch.nn.functional.cross_entropy(logits / math.exp(log_temperature), y).item()

    found = scipy.optimize.minimize_scalar(loss, bounds=(-5, 8), method="bounded", options={"xatol": 1e-10})
    assert fitted == pytest.approx(math.exp(found.x), rel=1e-6)
    assert fitted == pytest.approx(temperature, rel=0.15)  # the error of 3000 samples
    leaf = torch.tensor(fitted, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits / leaf, y), leaf)
    assert abs(slope.item()) < 1e-10
    assert isinstance(fitted, float)


def test_fit_temperature_of_dense_masked_ignored_and_scaled_logits():
    logits, y = calibrated_at(2.5)
    expected = tuning.fit_temperature(logits, y)
    dense = logits.reshape(30, 100, 10).movedim(2, 1)
    assert tuning.fit_temperature(dense, y.reshape(30, 100)) == pytest.approx(expected, rel=1e-12)
    for fill in (-1e9, -3e38, -torch.inf):
        masked = torch.cat([logits, torch.full((3000, 1), fill, dtype=torch.float64)], 1)
        assert tuning.fit_temperature(masked, y) == pytest.approx(expected, rel=1e-12)
    ignored = torch.cat([logits, torch.full((5, 10), torch.nan, dtype=torch.float64)])
    labels = torch.cat([y, torch.full((5,), 255)])
    assert tuning.fit_temperature(ignored, labels, ignore_index=255) == pytest.approx(expected, rel=1e-12)
    for scale in (1e-300, 1e-9, 1e9, 1e300):
        assert tuning.fit_temperature(scale * logits, y) / scale == pytest.approx(expected, rel=1e-9)
    assert tuning.fit_temperature(logits.requires_grad_(), y) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, x.argmax(1)), "each label has the largest logit of its row"),
        (lambda x, y: (0 * x, y), "each label has the largest logit of its row"),
        (lambda x, y: (x, x.argmin(1)), "on average no larger than the mean logit"),
        (lambda x, y: (x * torch.nan, y), "3000 rows that count and 30000 nan"),
        (lambda x, y: (x, y * 0 - 100), "got 0 rows that count and 0 nan"),
        (lambda x, y: (x.masked_fill(torch.arange(10) == 3, -torch.inf), y), "logit that is not masked"),
        (lambda x, y: (x.masked_fill(x > 8, torch.inf), y), r"neither nan nor \+inf"),
        (lambda x, y: (x[:, :1], 0 * y), r"logits must have at least two classes, got shape \(3000, 1\)"),
    ],
)
def test_fit_temperature_says_why_there_is_none(change, message):
    logits, y = change(*calibrated_at(1.0))
    with pytest.raises(ValueError, match=message):
        tuning.fit_temperature(logits, y)


def test_counts_of_numpy():
    for kind in (np.int64, np.int32, np.uint8):
        assert tuning.true_class_for(0.1, kind(10)) == tuning.true_class_for(0.1, 10)
        assert tuning.label_smoothing_for(0.9, kind(10)) == tuning.label_smoothing_for(0.9, 10)
        assert tuning.confidence_penalty_optimum(0.5, kind(10)) == tuning.confidence_penalty_optimum(0.5, 10)
    assert type(tuning.true_class_for(0.1, np.int64(10))) is float
