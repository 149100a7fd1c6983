"""Calibration error: by hand, against loops, against torchmetrics where it is right."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_calibration_error

from softlabels.metrics import calibration_error, reliability_curve


def two_classes(confidence, correct, dtype=torch.float64):
    """Predictions of class 0 of two, and labels that make them right or wrong."""
    c = torch.tensor(confidence, dtype=dtype)
    return torch.stack([c, 1 - c], 1), torch.tensor([0 if right else 1 for right in correct])


@pytest.mark.parametrize(
    ("confidence", "correct", "n_bins", "l1", "largest"),
    [
        ([1.0, 1.0], [True, True], 15, 0.0, 0.0),
        ([1.0, 1.0], [False, False], 15, 1.0, 1.0),
        ([0.75, 0.75, 1.0, 1.0], [True, False, True, True], 4, 0.125, 0.25),  # on the edge 0.75: with the bin below
        ([0.7, 0.8], [True, False], 10, (0.3 + 0.8) / 2, 0.8),  # two bins
        ([0.7, 0.8], [True, False], 5, 0.25, 0.25),  # (0.6, 0.8] holds both
        ([0.75, 0.8], [True, False], 4, (0.25 + 0.8) / 2, 0.8),
        ([0.76, 0.8], [True, False], 4, 0.28, 0.28),
        ([0.6, 0.9, 0.95], [True, True, False], 1, abs(2 / 3 - 2.45 / 3), abs(2 / 3 - 2.45 / 3)),
    ],
)
def test_by_hand(confidence, correct, n_bins, l1, largest):
    p, y = two_classes(confidence, correct)
    assert calibration_error(p, y, n_bins=n_bins, from_logits=False).item() == pytest.approx(l1)
    assert calibration_error(p, y, n_bins=n_bins, norm="max", from_logits=False).item() == pytest.approx(largest)


def test_norms_by_hand():
    p, y = two_classes([0.55, 0.95, 0.95, 0.95], [True, True, True, False])
    gaps = [(0.25, 0.45), (0.75, 0.95 - 2 / 3)]
    l2 = math.sqrt(sum(w * g**2 for w, g in gaps))
    assert calibration_error(p, y, norm="l2", from_logits=False).item() == pytest.approx(l2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("edge", range(5, 10))
def test_confidence_on_an_edge_is_in_the_lower_bin(edge, dtype):
    p, y = two_classes([edge / 10 if edge > 5 else 0.5], [True], dtype)
    count = reliability_curve(p, y, n_bins=10, from_logits=False).count
    assert count.nonzero().item() == edge - 1


def test_uniform_logits():
    curve = reliability_curve(torch.zeros(10, 10), torch.arange(10), n_bins=10)
    assert curve.count.tolist() == [10] + [0] * 9  # 0.1 is in (0, 0.1]
    assert curve.error().item() == pytest.approx(0.0, abs=1e-12)


def test_curve():
    p, y = two_classes([0.55, 0.95, 0.95, 1.0], [True, True, False, False])
    curve = reliability_curve(p, y, n_bins=5, from_logits=False)
    assert curve.count.tolist() == [0, 0, 1, 0, 3]
    assert curve.count.dtype == torch.int64
    assert curve.edges.tolist() == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    nan = math.nan
    assert curve.accuracy.tolist() == pytest.approx([nan, nan, 1.0, nan, 1 / 3], nan_ok=True)
    assert curve.confidence.tolist() == pytest.approx([nan, nan, 0.55, nan, 2.9 / 3], nan_ok=True)
    with pytest.raises(ValueError, match="norm must be one of 'l1', 'l2', 'max', got 'l3'"):
        curve.error("l3")


def test_no_rows_is_nan():
    for norm in ("l1", "l2", "max"):
        for binning in ("equal-width", "equal-mass"):
            options = {"norm": norm, "binning": binning}
            assert calibration_error(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), **options).isnan()
            assert calibration_error(torch.zeros(2, 3), torch.tensor([-100, -100]), **options).isnan()


def test_nan_is_not_hidden():
    logits = torch.randn(5, 3)
    logits[2, 1] = math.nan
    for norm in ("l1", "l2", "max"):
        assert calibration_error(logits, torch.zeros(5, dtype=torch.long), norm=norm).isnan()
    ignored = torch.tensor([0, 1, -100, 2, 0])
    assert calibration_error(logits, ignored).isfinite()


cases = st.lists(
    st.tuples(st.one_of(st.floats(0.51, 1.0), st.sampled_from([0.6, 0.7, 0.8, 0.9, 1.0])), st.booleans()),
    min_size=1,
    max_size=30,
)


@given(cases, st.sampled_from([1, 2, 5, 10, 15]), st.sampled_from(["l1", "l2", "max"]))
def test_equal_width_equals_the_reference(rows, n_bins, norm):
    confidence, correct = zip(*rows, strict=True)
    p, y = two_classes(confidence, correct)
    bins = reference.reliability_bins(confidence, correct, [b / n_bins for b in range(n_bins + 1)])
    error = calibration_error(p, y, n_bins=n_bins, norm=norm, from_logits=False).item()
    assert error == pytest.approx(reference.calibration_error(bins, norm), abs=1e-12)


@given(cases, st.sampled_from([1, 2, 5, 10, 15]), st.sampled_from(["l1", "l2", "max"]))
def test_equal_mass_equals_the_reference(rows, n_bins, norm):
    confidence, correct = zip(*rows, strict=True)
    n = len(rows)
    ascending = sorted(confidence)
    edges = [0.0, *(ascending[max(b * n // n_bins - 1, 0)] for b in range(1, n_bins)), 1.0]
    bins = reference.reliability_bins(confidence, correct, edges)
    curve = reliability_curve(*two_classes(confidence, correct), n_bins=n_bins, binning="equal-mass", from_logits=False)
    assert curve.count.tolist() == [n for n, _, _ in bins]
    assert curve.edges.tolist() == edges
    assert curve.error(norm).item() == pytest.approx(reference.calibration_error(bins, norm), abs=1e-12)


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("binning", ["equal-width", "equal-mass"])
@pytest.mark.parametrize("from_logits", [True, False])
def test_classwise_equals_the_reference(from_logits, binning, norm):
    logits, target = 2 * torch.randn(40, 3, dtype=torch.float64), torch.randint(3, (40,))
    p, errors = logits.softmax(1), []
    for c in range(3):
        of_class, is_class = p[:, c].tolist(), (target == c).tolist()
        edges = [b / 4 for b in range(5)]
        if binning == "equal-mass":
            edges = [0.0, *(sorted(of_class)[10 * b - 1] for b in (1, 2, 3)), 1.0]
        errors.append(reference.calibration_error(reference.reliability_bins(of_class, is_class, edges), norm))
    options = {"n_bins": 4, "norm": norm, "binning": binning, "classwise": True, "from_logits": from_logits}
    error = calibration_error(logits if from_logits else p, target, **options)
    assert error.item() == pytest.approx(sum(errors) / 3, abs=1e-12)


def test_classwise_curves_are_those_of_each_class_against_the_rest():
    logits, target = torch.randn(500, 4, 2), torch.randint(4, (500, 2))
    target[:50] = -100
    curves = reliability_curve(logits, target, classwise=True)
    assert curves.count.shape == (4, 15)
    assert curves.count.sum(1).tolist() == [900] * 4
    p = logits.double().softmax(1)
    for c in range(4):
        inside = (p[50:, c] > 0.2) & (p[50:, c] <= 4 / 15)
        assert curves.count[c, 3] == inside.sum()
        torch.testing.assert_close(curves.accuracy[c, 3], (target[50:] == c)[inside].double().mean())
    equal_mass = reliability_curve(logits, target, n_bins=5, binning="equal-mass", classwise=True)
    assert equal_mass.edges.shape == (4, 6)
    assert equal_mass.count.tolist() == [[180] * 5] * 4
    with pytest.raises(TypeError, match="classwise must be True or False, got 4"):
        calibration_error(logits, target, classwise=4)


@given(cases, st.sampled_from([1, 3, 15]), st.sampled_from(["l1", "l2", "max"]), st.integers(0, 10**6))
def test_weights_equal_the_reference(rows, n_bins, norm, seed):
    confidence, correct = zip(*rows, strict=True)
    weights = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    bins = reference.reliability_bins(confidence, correct, [b / n_bins for b in range(n_bins + 1)], weights.tolist())
    p, y = two_classes(confidence, correct)
    curve = reliability_curve(p, y, n_bins=n_bins, sample_weight=weights, from_logits=False)
    assert curve.weight.tolist() == pytest.approx([n for n, _, _ in bins])
    assert curve.count.sum() == len(rows)
    assert curve.error(norm).item() == pytest.approx(reference.calibration_error(bins, norm), abs=1e-12)


def test_equal_mass_bins_hold_the_same_weight():
    logits, target, weights = torch.randn(6000, 7), torch.randint(7, (6000,)), torch.rand(6000)
    curve = reliability_curve(logits, target, n_bins=6, binning="equal-mass", sample_weight=weights)
    torch.testing.assert_close(curve.weight, (weights.double().sum() / 6).expand(6), rtol=2e-3, atol=0.0)


def test_equal_mass_bins_hold_as_many_samples_each():
    logits, target = torch.randn(600, 7), torch.randint(7, (600,))
    curve = reliability_curve(logits, target, n_bins=6, binning="equal-mass")
    assert curve.count.tolist() == [100] * 6
    assert curve.error("l1") <= curve.error("l2") <= curve.error("max")


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("n_bins", [10, 15])
def test_equals_torchmetrics_where_it_is_right(norm, n_bins):
    """That is: no confidence at an edge, none that rounds to 1."""
    logits, target = 2 * torch.randn(3000, 7), torch.randint(7, (3000,))
    p = logits.double().softmax(1)
    assert p.max() < 1.0
    theirs = multiclass_calibration_error(p, target, 7, n_bins=n_bins, norm=norm).item()  # in float32
    options = {"n_bins": n_bins, "norm": norm}
    assert calibration_error(logits, target, **options).item() == pytest.approx(theirs, rel=1e-5)
    assert calibration_error(p, target, from_logits=False, **options).item() == pytest.approx(theirs, rel=1e-5)


def test_the_case_of_torchmetrics_3510():
    """Confidences of 0.95 and 1.0 share the last bin; torchmetrics gives the latter a bin of its own."""
    p, y = two_classes([0.95, 1.0], [True, False])
    assert calibration_error(p, y, from_logits=False).item() == pytest.approx(0.475)
    assert multiclass_calibration_error(p, y, 2, n_bins=15).item() == pytest.approx(0.525)


def test_never_guesses():
    """Logits inside [0, 1] are logits: torchmetrics takes them for probabilities."""
    logits, target = torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 0])
    sure = 1 - (0.5 / (1 + math.exp(-0.8)) + 0.5 / (1 + math.exp(-0.6)))
    assert calibration_error(logits, target, n_bins=1).item() == pytest.approx(sure)
    assert calibration_error(logits, target, n_bins=1, from_logits=False).item() == pytest.approx(0.15)


def test_dense_predictions_and_ignored_rows():
    logits, target = torch.randn(4, 5, 6, 2), torch.randint(5, (4, 6, 2))
    target[target == 3] = 255
    rows, labels = logits.movedim(1, 3).reshape(-1, 5), target.flatten()
    for binning in ("equal-width", "equal-mass"):
        expected = calibration_error(rows[labels < 255], labels[labels < 255], binning=binning)
        error = calibration_error(logits, target, ignore_index=255, binning=binning)
        torch.testing.assert_close(error, expected, rtol=1e-12, atol=0)
    assert calibration_error(torch.tensor([1.0, 3.0]), torch.tensor(1)) < 0.2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_bins": 0}, ValueError, "n_bins must be an int of at least 1, got 0"),
        ({"n_bins": 2.5}, ValueError, "n_bins must be an int of at least 1, got 2.5"),
        ({"norm": "L1"}, ValueError, "norm must be one of 'l1', 'l2', 'max', got 'L1'"),
        ({"binning": "quantile"}, ValueError, "binning must be one of 'equal-width', 'equal-mass', got 'quantile'"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got 1.5"),
        ({"from_logits": False}, ValueError, "with from_logits=False, input must hold class probabilities"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        calibration_error(torch.randn(4, 3) + 5, torch.zeros(4, dtype=torch.long), **options)
