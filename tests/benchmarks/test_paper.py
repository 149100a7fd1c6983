"""The benchmark code that results depend on: models, data, metrics, intervals, and one small run of everything."""

from __future__ import annotations

import json

import pytest
import torch
from scipy import stats
from torch import nn

from benchmarks.paper import __main__ as command
from benchmarks.paper import report
from benchmarks.paper.comparison import Comparison, run_seed
from benchmarks.paper.data import digits, random_shift
from benchmarks.paper.methods import METHODS
from benchmarks.paper.models import CIFARResNet
from benchmarks.paper.recipe import Recipe, evaluate
from softlabels.metrics import reliability_curve


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (56, 0.85)])
def test_published_parameter_counts(depth, millions):
    model = CIFARResNet(depth, 10)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == pytest.approx(millions, abs=0.01)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 2"):
        CIFARResNet(18, 10)


def test_digits_split():
    data, again = digits(), digits()
    parts = [data.train, data.validation, data.test]
    assert [len(p.labels) for p in parts] == [809, 90, 898]
    assert all(torch.equal(getattr(data, n).images, getattr(again, n).images) for n in ("train", "validation", "test"))
    images = torch.cat([p.images.flatten(1) for p in parts])
    assert len(images.unique(dim=0)) == 1797  # no image is in two splits
    assert all(len(p.labels.unique()) == 10 for p in parts)


def test_random_shift_moves_whole_images():
    images = torch.randn(64, 2, 5, 5)
    shifted = random_shift(images, 1, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(images, [1] * 4)
    for before, after in zip(padded, shifted, strict=True):
        crops = [before[:, i : i + 5, j : j + 5] for i in range(3) for j in range(3)]
        assert any(torch.equal(after, crop) for crop in crops)
    assert torch.equal(random_shift(images, 0, torch.Generator()), images)


def test_evaluation_is_in_the_units_of_the_table():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 4.0], [3.0, 0.0], [1.0, 0.0]]), torch.zeros(5).long()
    values = evaluate(logits, labels)
    assert set(values) == set(report.METRICS) == set(report.DIGITS)
    assert values["accuracy"] == pytest.approx(60.0)
    assert values["ece"] == pytest.approx(100 * reliability_curve(logits, labels).error().item())
    assert values["nll"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item())


def test_pooled_curves_are_those_of_all_predictions():
    seeds = [(torch.randn(60, 4), torch.randint(4, (60,))) for _ in range(3)]
    curves = [vars(reliability_curve(*seed)) for seed in seeds]
    records = [{"method": "a", "curve": {name: values.tolist() for name, values in c.items()}} for c in curves]
    (pooled,) = report.pooled_curves(records).values()
    logits, labels = (torch.cat(parts) for parts in zip(*seeds, strict=True))
    torch.testing.assert_close(vars(pooled), vars(reliability_curve(logits, labels)), equal_nan=True)


def test_interval_is_student_t():
    values = [97.1, 98.4, 96.9, 97.7]
    mean, half = report.mean_interval(values)
    low, high = stats.t.interval(0.95, 3, loc=mean, scale=stats.sem(values))
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))


def test_runs_repeat_and_are_paired():
    config = Comparison(width=4, recipe=Recipe(epochs=1))
    first, second = (run_seed(config, 3) for _ in range(2))
    strip = lambda records: [{k: v for k, v in r.items() if k not in ("seconds", "curve")} for r in records]  # noqa: E731
    assert strip(first) == strip(second)
    assert [r["method"] for r in first] == list(METHODS)
    torch.manual_seed(3)
    teacher, models = CIFARResNet(8, 10, 1, 4), []
    for make in METHODS.values():
        torch.manual_seed(3)
        models.append(CIFARResNet(8, 10, 1, 4))
        make(models[-1], teacher, digits(), 0.99)
    for model in models[1:]:  # no criterion touches the weights, and making one draws nothing
        assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), model.parameters(), strict=True))


def test_command_line(tmp_path, capsys):
    command.main(["comparison", "--epochs", "1", "--seeds", "2", "--width", "4", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for method in METHODS:
        assert f"| {method} |" in printed
    saved = json.loads((tmp_path / "records.json").read_text())
    assert len(saved["records"]) == 2 * len(METHODS)
    for name in ("figure.png", "reliability.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert saved["command"] in (tmp_path / "table.md").read_text()
    with pytest.raises(SystemExit):
        command.main(["comparison", "--seeds", "0"])
