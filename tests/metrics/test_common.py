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
    with pytest.raises(
        TypeError, match=r"target must hold class indices of shape \(30,\), got torch.bool.*target.long"
    ):
        metrics.calibration_error(logits, target > 1)
    with pytest.raises(TypeError, match=r"got torch.float32 of shape \(30,\); pass target.long\(\)"):
        metrics.calibration_error(logits, target.float())
    with pytest.raises(TypeError, match=r"got torch.float32 of shape \(30, 4\); .* pass target.argmax\(1\)"):
        metrics.calibration_error(logits, logits.softmax(1))
    with pytest.raises(ValueError, match=r"shape \(30,\) for input of shape \(30, 4\), got shape \(30, 1\)"):
        metrics.calibration_error(logits, target[:, None])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_list_is_no_tensor(name):
    with pytest.raises(TypeError, match="input must be a Tensor, got list"):
        FUNCTIONS[name]([[0.0, 1.0]], torch.tensor([0]))
    for metric in (metrics.AveragePredictiveUncertainty, metrics.CalibrationError, metrics.ConfidenceDiversity):
        with pytest.raises(TypeError, match="input must be a Tensor, got list"):
            metric().update([[0.0, 1.0]], torch.tensor([0]))


def test_requires_grad_is_no_obstacle():
    logits = torch.randn(20, 4, requires_grad=True)
    for function in FUNCTIONS.values():
        function(logits, torch.randint(4, (20,)))
        function(logits.softmax(1), torch.randint(4, (20,)), from_logits=False)


def with_labels(name):
    return name != "predictive_entropy"


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", ["average_predictive_uncertainty", "calibration_error"])
def test_traced_and_eager_agree_on_ties(name, backend):
    """A collapsed model, and logits after a relu: a label that ties for the top counts as argmax says."""
    function = FUNCTIONS[name]
    torch.compiler.reset()
    compiled = torch.compile(function, backend=backend)
    for logits in (torch.zeros(300, 3), torch.randn(300, 3).relu(), torch.randint(0, 3, (300, 3)).bfloat16()):
        target = torch.arange(300) % 3
        eager = function(logits, target)
        torch.testing.assert_close(compiled(logits, target), eager, rtol=0.0, atol=1e-12)
        mapped = torch.vmap(lambda x, y=target: function(x, y))(logits[None])
        torch.testing.assert_close(mapped[0], eager, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("name", ["average_predictive_uncertainty", "calibration_error"])
@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("label", [3, -1])
@pytest.mark.parametrize("way", ["eager", "inductor", "vmap"])
def test_labels_out_of_range_fail_where_they_cannot_be_read(way, label, from_logits, name):
    input, target = torch.full((8, 3), 1 / 3), torch.tensor([0, 1, 2, 0, 1, 2, 0, label])

    def function(x, y):
        return FUNCTIONS[name](x, y, from_logits=from_logits)

    torch.compiler.reset()
    if way == "vmap":
        function, input, target = torch.vmap(function), input[None], target[None]
    else:
        function = torch.compile(function, backend=way)
    with pytest.raises((RuntimeError, IndexError), match=r"out of (range|bounds)|class indices in \[0, 3\)"):
        function(input, target)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "mass" not in name and "diversity" not in name])
@pytest.mark.parametrize("way", ["eager", "inductor", "vmap"])
def test_no_probabilities_are_nan_where_they_cannot_be_read(way, name):
    def function(x):
        return FUNCTIONS[name](x, torch.zeros(8, dtype=torch.long), from_logits=False)

    good = torch.full((8, 2), 0.5)
    bad = good.clone()
    bad[3] = torch.tensor([0.9, 0.9])
    with pytest.raises(ValueError, match="class probabilities that sum to 1"):
        function(bad)
    torch.compiler.reset()
    traced = torch.compile(function, backend=way) if way != "vmap" else lambda x: torch.vmap(function)(x[None])[0]
    assert traced(bad).isnan().any()
    torch.testing.assert_close(traced(good), function(good))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_logit_is_told_how_to_become_two(name):
    for shape, rows in (((100, 1), (100,)), ((2, 1, 8, 8), (2, 8, 8)), ((1,), ())):
        with pytest.raises(ValueError, match=r"torch\.cat\(\[torch\.zeros_like\(z\), z\], 1\)"):
            FUNCTIONS[name](torch.zeros(shape), torch.zeros(rows, dtype=torch.long))


def test_a_sigmoid_head_as_two_classes():
    z = torch.randn(50, 1, 3, dtype=torch.float64)
    p = z.sigmoid()
    two = torch.cat([torch.zeros_like(z), z], 1)
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).squeeze(1)
    torch.testing.assert_close(metrics.predictive_entropy(two), entropy)
    target = (torch.rand(50, 3) < 0.5).long()
    for function in (metrics.calibration_error, metrics.confidence_diversity):
        of_probabilities = function(torch.cat([1 - p, p], 1), target, from_logits=False)
        torch.testing.assert_close(function(two, target), of_probabilities)


ROUNDED = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("num_classes", [2, 3, 129, 1000, 32000])
def test_rounded_probabilities_are_probabilities(num_classes, dtype):
    """The largest errors are of equal probabilities, all rounded alike, and of sums of few rounded ones."""
    logits = torch.randn(30, num_classes) * torch.linspace(0, 10, 30)[:, None]
    for p in (logits.softmax(1).to(dtype), logits.to(dtype).softmax(1)):
        assert metrics.predictive_entropy(p, from_logits=False).isfinite().all()
        mean = (p + p.flip(0)) / 2  # of an ensemble, in the dtype
        assert metrics.predictive_entropy(mean, from_logits=False).isfinite().all()


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize(("value", "num_classes"), [(0.0, 2000), (2e-4, 1000), (1e-5, 32000), (0.52, 2), (0.48, 2)])
def test_other_sums_are_not(value, num_classes, dtype):
    input = torch.full((2, num_classes), value, dtype=dtype)
    with pytest.raises(ValueError, match="probabilities that sum to 1, got a row whose smallest value is"):
        metrics.predictive_entropy(input, from_logits=False)


@pytest.mark.parametrize("weight", [-1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if with_labels(name)])
def test_bad_weights(name, weight):
    logits, target = torch.randn(9, 3), torch.randint(3, (9,))
    weights = torch.ones(9)
    with pytest.raises(ValueError, match=r"sample_weight must have one value per row, shape \(9,\)"):
        FUNCTIONS[name](logits, target, sample_weight=weights[:8])
    weights[4] = weight
    with pytest.raises(ValueError, match=f"sample_weight must be finite and not negative, got {weight:g}"):
        FUNCTIONS[name](logits, target, sample_weight=weights)


@pytest.mark.parametrize("name", ["average_predictive_uncertainty", "confidence_diversity", "calibration_error"])
def test_whole_weights_are_repeats(name):
    """Of equal-mass bins too, but where a bin ends inside of what a sample weighs."""
    logits, target = torch.randn(60, 4), torch.randint(4, (60,))
    weights = torch.randint(0, 4, (60,))
    weighted = FUNCTIONS[name](logits, target, sample_weight=weights)
    repeated = FUNCTIONS[name](logits.repeat_interleave(weights, 0), target.repeat_interleave(weights))
    torch.testing.assert_close(weighted, repeated)
    fractions = FUNCTIONS[name](logits, target, sample_weight=weights.half() / 8)
    torch.testing.assert_close(fractions, weighted)


def test_inference_tensors_may_be_measured_outside():
    with torch.inference_mode():
        logits, target = torch.randn(60, 4), torch.randint(4, (60,))
    for function in FUNCTIONS.values():
        function(logits, target)
        function(logits.softmax(1), target, from_logits=False)
