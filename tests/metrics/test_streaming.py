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
    metric = make(ignore_index=255, **options)
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
        assert sizes == [3 * 15, 2]
    assert sum(t.numel() for t in diversity.log_odds) == 3 * 200


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


def test_options_are_checked():
    with pytest.raises(ValueError, match="n_bins must be an int of at least 1, got 0"):
        CalibrationError(n_bins=0)
    with pytest.raises(ValueError, match="norm must be one of"):
        CalibrationError(norm="l0")
    with pytest.raises(ValueError, match="n_neighbors must be an int of at least 1, got 0"):
        ConfidenceDiversity(n_neighbors=0)
    with pytest.raises(TypeError, match="from_logits must be True or False, got 'yes'"):
        AveragePredictiveUncertainty(from_logits="yes")


def test_curve_of_the_class_is_that_of_the_function():
    metric = CalibrationError(ignore_index=255)
    metric.update(LOGITS, TARGET)
    expected = metrics.reliability_curve(LOGITS, TARGET, ignore_index=255)
    torch.testing.assert_close(vars(metric.reliability_curve()), vars(expected), equal_nan=True)


def own_rows(rank, uneven):
    cut = {"uneven": 130, "nothing": 200}[uneven]
    return (slice(0, cut), slice(cut, 200))[rank]


def worker(rank):
    values = {}
    for uneven in ("uneven", "nothing"):
        rows = own_rows(rank, uneven)
        for batch in torch.arange(200)[rows].split(30):
            for name, (make, _) in PAIRS.items():
                metric = values.setdefault((uneven, name), make(ignore_index=255))
                metric.update(LOGITS[batch], TARGET[batch])
        for name, (make, _) in PAIRS.items():
            metric = values.setdefault((uneven, name), make(ignore_index=255))
            if name == "calibration":
                curve = metric.reliability_curve()
                values[uneven, "samples"] = curve.count.sum().item()
            metric._update_count += metric._update_count == 0  # no warning about the process without data
            values[uneven, name] = metric.compute().item()
    return values


def test_two_processes_with_uneven_data_equal_one(tmp_path):
    ranks = spawn(worker, tmp_path)
    assert len(ranks) == 2
    for values in ranks.values():
        for uneven in ("uneven", "nothing"):
            assert values[uneven, "samples"] == (TARGET != 255).sum()
            for name, (_, function) in PAIRS.items():
                expected = function(LOGITS, TARGET, ignore_index=255).item()
                assert values[uneven, name] == pytest.approx(expected, abs=1e-12), (uneven, name)


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
import softlabels.metrics
import torch

assert softlabels.metrics.calibration_error(torch.zeros(2, 3), torch.tensor([0, 1])).isfinite()
try:
    softlabels.metrics.CalibrationError()
except ImportError as error:
    print(error)
"""


def test_without_torchmetrics_the_error_names_the_extra():
    printed = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True, check=True).stdout
    assert "softlabels.metrics.CalibrationError needs torchmetrics: pip install 'softlabels[metrics]'" in printed
    with pytest.raises(AttributeError, match="has no attribute 'Calibration'"):
        _ = metrics.Calibration
    assert "CalibrationError" in dir(metrics)
