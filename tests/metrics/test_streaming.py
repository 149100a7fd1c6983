"""The torchmetrics classes: any split equals one call, over processes too; the habits of torchmetrics and Lightning."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys

import matplotlib.figure
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import spawn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

import softlabels
from softlabels import metrics
from softlabels.metrics import AveragePredictiveUncertainty, CalibrationError, ConfidenceDiversity

PAIRS = {
    "uncertainty": (AveragePredictiveUncertainty, metrics.average_predictive_uncertainty),
    "diversity": (ConfidenceDiversity, metrics.confidence_diversity),
    "calibration": (CalibrationError, metrics.calibration_error),
}
OPTIONS = [
    ("uncertainty", {}),
    ("uncertainty", {"from_logits": False}),
    ("diversity", {"n_neighbors": 1}),
    ("diversity", {"n_neighbors": 5, "from_logits": False}),
    ("calibration", {"n_bins": 20, "norm": "l2"}),
    ("calibration", {"n_bins": 3, "norm": "max", "from_logits": False}),
    ("calibration", {"n_bins": 7, "binning": "equal-mass"}),
    ("calibration", {"n_bins": 5, "classwise": True}),
    ("calibration", {"n_bins": 5, "classwise": True, "binning": "equal-mass", "from_logits": False}),
]


def data(rows=200, classes=6):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, classes, generator=generator)
    target = torch.randint(classes, (rows,), generator=generator)
    target[::7] = 255
    return logits, target


LOGITS, TARGET = data()


def predictions(options):
    return LOGITS.softmax(1) if options.get("from_logits") is False else LOGITS


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@given(cuts=st.lists(st.integers(0, 200), max_size=6))
def test_any_split_equals_one_call(name, options, cuts):
    make, function = PAIRS[name]
    classes = {"num_classes": 6} if options.get("classwise") else {}
    metric = make(ignore_index=255, **options, **classes)
    ends = [0, *sorted(cuts), 200]
    for a, b in itertools.pairwise(ends):
        metric.update(predictions(options)[a:b], TARGET[a:b])
    expected = function(predictions(options), TARGET, ignore_index=255, **options)
    torch.testing.assert_close(metric.compute(), expected, rtol=0.0, atol=1e-12)
    metric.reset()
    metric.update(predictions(options)[:50], TARGET[:50])
    expected = function(predictions(options)[:50], TARGET[:50], ignore_index=255, **options)
    torch.testing.assert_close(metric.compute(), expected, rtol=0.0, atol=1e-12)


def test_memory_does_not_grow():
    calibration, uncertainty, diversity = CalibrationError(), AveragePredictiveUncertainty(), ConfidenceDiversity()
    for _ in range(3):
        for metric in (calibration, uncertainty, diversity):
            metric.update(LOGITS, TARGET.clamp(max=5))
        sizes = [sum(t.numel() for t in m.metric_state.values()) for m in (calibration, uncertainty)]
        assert sizes == [4 * 15, 2]
    assert sum(t.numel() for t in diversity.rows) == 3 * 2 * 200


@pytest.mark.parametrize("name", PAIRS)
def test_weights_and_keywords_of_torchmetrics(name):
    make, function = PAIRS[name]
    weights = torch.rand(200)
    mixed = MetricCollection([make(ignore_index=255), MulticlassAccuracy(6, ignore_index=255)])
    for rows in torch.arange(200).split(30):
        mixed(preds=LOGITS[rows], target=TARGET[rows], sample_weight=weights[rows])
    expected = function(LOGITS, TARGET, sample_weight=weights, ignore_index=255)
    torch.testing.assert_close(mixed.compute()[make.__name__], expected, rtol=0.0, atol=1e-12)
    assert not expected.isclose(function(LOGITS, TARGET, ignore_index=255))


@pytest.mark.parametrize("name", PAIRS)
def test_a_metric_in_a_training_step_keeps_no_graph(name):
    model = torch.nn.Linear(4, 6)
    model.metric = PAIRS[name][0](ignore_index=255)
    weights = torch.rand(200, requires_grad=True)
    value = model.metric(model(torch.randn(200, 4)), TARGET, weights)
    assert not value.requires_grad
    for state in model.metric.metric_state.values():
        assert not any(x.requires_grad for x in (state if isinstance(state, list) else [state]))
    copy.deepcopy(model)
    criterion = softlabels.BetaSmoothingLoss().attach(model)
    criterion.detach()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("start", ["reset", "update"])
def test_evaluated_in_inference_mode_and_fed_outside(name, start):
    make, function = PAIRS[name]
    metric = make(ignore_index=255)
    with torch.inference_mode():
        metric.update(LOGITS[:100], TARGET[:100])
        metric.compute()
        if start == "reset":
            metric.reset()
    metric.update(LOGITS[100:], TARGET[100:])
    seen = slice(100 if start == "reset" else 0, 200)
    expected = function(LOGITS[seen], TARGET[seen], ignore_index=255)
    torch.testing.assert_close(metric.compute(), expected, rtol=0.0, atol=1e-12)


def to_a_device_without_float64(tensor):
    if tensor.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
    return tensor.to("meta")


def test_a_model_with_metrics_goes_where_there_is_no_float64():
    model = torch.nn.Linear(4, 6)
    model.metrics = collection()
    model.metrics.update(LOGITS[:90], TARGET[:90])
    model._apply(to_a_device_without_float64)
    assert model.weight.device.type == "meta"
    model.metrics.update(LOGITS[90:], TARGET[90:])
    for make, function in PAIRS.values():
        expected = function(LOGITS, TARGET, ignore_index=255)
        torch.testing.assert_close(model.metrics.compute()[make.__name__], expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_update(backend):
    torch.compiler.reset()
    logits = LOGITS.round()
    for name in ("uncertainty", "calibration"):
        make, function = PAIRS[name]
        metric = make(ignore_index=255)
        torch.compile(metric.update, backend=backend)(logits, TARGET)
        torch.testing.assert_close(metric.compute(), function(logits, TARGET, ignore_index=255), rtol=0.0, atol=1e-12)


def test_forward_gives_the_value_of_the_batch():
    metric = CalibrationError(ignore_index=255)
    first = metric(LOGITS[:80], TARGET[:80])
    second = metric(LOGITS[80:], TARGET[80:])
    torch.testing.assert_close(first, metrics.calibration_error(LOGITS[:80], TARGET[:80], ignore_index=255))
    torch.testing.assert_close(second, metrics.calibration_error(LOGITS[80:], TARGET[80:], ignore_index=255))
    torch.testing.assert_close(metric.compute(), metrics.calibration_error(LOGITS, TARGET, ignore_index=255))
    tiny = ConfidenceDiversity(n_neighbors=3)
    assert tiny(LOGITS[:2], TARGET[:2].clamp(max=5)).isnan()  # the last batch of an epoch must not end a training


def collection():
    return MetricCollection([make(ignore_index=255) for make, _ in PAIRS.values()])


def test_collection_clone_pickle_and_state(tmp_path):
    both = collection()
    both.update(LOGITS[:100], TARGET[:100])
    for twin in (both.clone(), copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        twin.update(LOGITS[100:], TARGET[100:])
        values = twin.compute()
        for make, function in PAIRS.values():
            expected = function(LOGITS, TARGET, ignore_index=255)
            torch.testing.assert_close(values[make.__name__], expected, rtol=0.0, atol=1e-12)
    saved = CalibrationError()
    saved.persistent(True)
    saved.update(LOGITS, TARGET.clamp(max=5))
    torch.save(saved.state_dict(), tmp_path / "metric.pt")
    loaded = CalibrationError()
    loaded.persistent(True)
    loaded.load_state_dict(torch.load(tmp_path / "metric.pt", weights_only=True))
    assert loaded.sums.equal(saved.sums)


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.type(torch.float32),
    ],
)
def test_converting_a_model_leaves_its_metrics_in_float64(convert):
    model = torch.nn.Module()
    model.metrics = collection()
    convert(model)
    for batch in torch.arange(200).split(10):
        model.metrics.update(LOGITS[batch], TARGET[batch])
        convert(model)
    model.metrics.reset()
    for batch in torch.arange(200).split(10):
        model.metrics.update(LOGITS[batch], TARGET[batch])
        convert(model)
    values = model.metrics.compute()
    for make, function in PAIRS.values():
        expected = function(LOGITS, TARGET, ignore_index=255)
        torch.testing.assert_close(values[make.__name__], expected, rtol=0.0, atol=1e-12)


def test_plots():
    for name, (make, _) in PAIRS.items():
        metric = make(ignore_index=255)
        metric.update(LOGITS, TARGET)
        own = matplotlib.figure.Figure().subplots()
        _, ax = metric.plot(ax=own)
        assert ax is own
        metric.plot([metric.compute(), metric.compute()], ax=matplotlib.figure.Figure().subplots())
        drawn = ax.lines[0].get_ydata() if ax.lines else ax.collections[0].get_offsets()
        assert len(drawn) > 0, name


def test_a_plot_is_not_upside_down():
    """Diversity of 200 uniform confidences is 0.05, and above 0 by the error of estimation."""
    metric = ConfidenceDiversity()
    p = torch.rand(200, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    metric.update(torch.stack([p.logit(), 0 * p], 1), torch.zeros(200, dtype=torch.long))
    assert metric.compute() > 0
    for values in (None, [metric.compute(), metric.compute() + 0.1]):
        _, ax = metric.plot(values, ax=matplotlib.figure.Figure().subplots())
        low, high = ax.get_ylim()
        assert low < metric.compute() < high


def test_options_are_checked():
    with pytest.raises(ValueError, match="n_bins must be an int of at least 1, got 0"):
        CalibrationError(n_bins=0)
    with pytest.raises(ValueError, match="norm must be one of"):
        CalibrationError(norm="l0")
    with pytest.raises(ValueError, match="n_neighbors must be an int of at least 1, got 0"):
        ConfidenceDiversity(n_neighbors=0)
    with pytest.raises(ValueError, match="binning must be one of 'equal-width', 'equal-mass', got 'quantile'"):
        CalibrationError(binning="quantile")
    with pytest.raises(ValueError, match="num_classes must be an int of at least 1, got None"):
        CalibrationError(classwise=True)
    with pytest.raises(ValueError, match=r"preds must have num_classes=5 classes, got shape \(200, 6\)"):
        CalibrationError(classwise=True, num_classes=5, ignore_index=255).update(LOGITS, TARGET)
    with pytest.raises(TypeError, match="from_logits must be True or False, got 'yes'"):
        AveragePredictiveUncertainty(from_logits="yes")


def test_curve_of_the_class_is_that_of_the_function():
    metric = CalibrationError(ignore_index=255)
    metric.update(LOGITS, TARGET)
    expected = metrics.reliability_curve(LOGITS, TARGET, ignore_index=255)
    torch.testing.assert_close(vars(metric.reliability_curve()), vars(expected), equal_nan=True)
    metric = CalibrationError(ignore_index=255, classwise=True, num_classes=6, binning="equal-mass")
    metric.update(LOGITS, TARGET)
    expected = metrics.reliability_curve(LOGITS, TARGET, ignore_index=255, classwise=True, binning="equal-mass")
    torch.testing.assert_close(vars(metric.reliability_curve()), vars(expected), equal_nan=True)


def own_rows(rank, uneven):
    cut = {"uneven": 130, "nothing": 200}[uneven]
    return (slice(0, cut), slice(cut, 200))[rank]


MADE = {
    **{name: (make, function, {}) for name, (make, function) in PAIRS.items()},
    "equal-mass": (CalibrationError, metrics.calibration_error, {"binning": "equal-mass"}),
    "class-wise": (CalibrationError, metrics.calibration_error, {"classwise": True}),
    "class-wise equal-mass": (
        CalibrationError,
        metrics.calibration_error,
        {"classwise": True, "binning": "equal-mass"},
    ),
}
WEIGHTS = torch.rand(200, generator=torch.Generator().manual_seed(1))


def worker(rank):
    values = {}
    for uneven, name, weighted in itertools.product(("uneven", "nothing"), MADE, (False, True)):
        make, _, options = MADE[name]
        metric = make(ignore_index=255, **options, **({"num_classes": 6} if "classwise" in options else {}))
        for batch in torch.arange(200)[own_rows(rank, uneven)].split(30):
            metric.update(LOGITS[batch], TARGET[batch], WEIGHTS[batch] if weighted else None)
        if name == "calibration":
            values[uneven, "samples"] = metric.reliability_curve().count.sum().item()
        metric._update_count += metric._update_count == 0  # no warning about the process without data
        values[uneven, name, weighted] = metric.compute().item()
    return values


def test_two_processes_with_uneven_data_equal_one():
    ranks = spawn(worker)
    for values in ranks:
        for uneven in ("uneven", "nothing"):
            assert values[uneven, "samples"] == (TARGET != 255).sum()
            for name, (_, function, options) in MADE.items():
                for weighted in (False, True):
                    weights = WEIGHTS if weighted else None
                    expected = function(LOGITS, TARGET, sample_weight=weights, ignore_index=255, **options).item()
                    assert values[uneven, name, weighted] == pytest.approx(expected, abs=1e-12), (uneven, name)


LIGHTNING = """
import warnings

warnings.filterwarnings("ignore")
import lightning.pytorch as pl
import torch
from softlabels.metrics import CalibrationError, ConfidenceDiversity, calibration_error, confidence_diversity

generator = torch.Generator().manual_seed(0)
x, y = torch.randn(90, 5, generator=generator), torch.randint(3, (90,), generator=generator)


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Linear(5, 3)
        self.ece, self.diversity = CalibrationError(), ConfidenceDiversity()

    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, _):
        logits = self.model(batch[0])
        self.ece(logits, batch[1])
        self.diversity.update(logits, batch[1])
        self.log("ece", self.ece)
        self.log("diversity", self.diversity)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32)
trainer = pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False)
module = Classifier()
trainer.fit(module, loader, loader)
with torch.no_grad():
    logits = module.model(x)
for name, function in (("ece", calibration_error), ("diversity", confidence_diversity)):
    torch.testing.assert_close(trainer.callback_metrics[name].double(), function(logits, y), rtol=1e-5, atol=1e-6)
print("logged")
"""


def test_lightning_logs_them():
    pytest.importorskip("lightning", reason="needs lightning, which the dev extra installs")
    ran = subprocess.run([sys.executable, "-c", LIGHTNING], capture_output=True, text=True)
    assert ran.stdout.endswith("logged\n"), ran.stderr


MISSING = """
import sys

sys.modules["torchmetrics"] = None
import inspect
import softlabels.metrics as metrics
import torch

assert metrics.calibration_error(torch.zeros(2, 3), torch.tensor([0, 1])).isfinite()
assert not hasattr(metrics, "CalibrationError")
assert getattr(metrics, "CalibrationError", None) is None
inspect.getmembers(metrics)
help(metrics)
from softlabels.metrics import *
assert "CalibrationError" not in metrics.__all__ + dir(metrics)
try:
    metrics.CalibrationError()
except AttributeError as error:
    print(error)
try:
    from softlabels.metrics import CalibrationError
except ImportError as error:
    print(error)
"""


def test_without_torchmetrics_the_error_names_the_extra():
    printed = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True, check=True).stdout
    remedy = "softlabels.metrics.CalibrationError needs torchmetrics: pip install 'softlabels[metrics]'"
    assert printed.count(remedy) == 2
    with pytest.raises(AttributeError, match="has no attribute 'Calibration'"):
        _ = metrics.Calibration
    assert "CalibrationError" in dir(metrics)
    assert "CalibrationError" in metrics.__all__
