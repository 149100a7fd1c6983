"""The timing code: pairs, medians of ratios, and one tiny run of the command."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.speed import __main__ as command
from benchmarks.speed import metrics
from benchmarks.speed.timing import interleave, ratio
from benchmarks.speed.train_step import LOSSES, resnet18
from softlabels.metrics import confidence_diversity


def test_every_rival_runs_between_two_of_the_base():
    calls = []
    base_seconds, pairs = interleave(
        lambda: calls.append("base"),
        {name: lambda name=name: calls.append(name) for name in "ab"},
        5,
        torch.device("cpu"),
        warmup=2,
    )
    neighbours = {(calls[i - 1], calls[i + 1]) for i, name in enumerate(calls) if name != "base"}
    assert neighbours == {("base", "base")}
    assert calls.count("a") == calls.count("b") == 7
    assert [len(pairs[name]) for name in "ab"] == [5, 5]
    assert len(base_seconds) == 10


def test_ratio_is_the_median_of_pairs():
    paired = ratio([(2.0, 1.0), (30.0, 10.0), (400.0, 100.0)])
    assert (paired.median, paired.low, paired.high) == (3.0, 2.0, 4.0)
    assert ratio([(1.0, 1.0), (9.0, 9.0), (9.0, 1.0)]).median == 1.0  # the ratio of medians would be 9


def test_published_parameter_count():
    assert sum(p.numel() for p in resnet18(10).parameters()) == pytest.approx(11.17e6, rel=1e-3)


def test_command_line(tmp_path, capsys):
    common = ["--rounds", "1", "--threads", "1", "--malloc", "system", "--out", str(tmp_path)]
    command.main(["train-step", "--batch-size", "2", *common])
    printed = capsys.readouterr().out
    for name in LOSSES:
        assert f"| {name} |" in printed
    assert set(LOSSES) < set(json.loads((tmp_path / "records.json").read_text())["results"])

    command.main(["metrics", "--samples", "500", *common])
    printed = capsys.readouterr().out
    assert "ratio to scipy.spatial.cKDTree" in printed
    assert "ratio to torchmetrics multiclass_calibration_error (quartiles) | memory (MiB)" in printed
    records = json.loads((tmp_path / "records.json").read_text())
    assert records["command"].startswith("python -m benchmarks.speed metrics --samples 500 --rounds 1 --device cpu")
    assert len(records["results"]["softlabels.metrics.calibration_error"]["seconds"]) == 1


def test_the_k_d_tree_estimates_the_same():
    logits, target = torch.randn(300, 10), torch.randint(10, (300,))
    expected = confidence_diversity(logits, target, n_neighbors=metrics.NEIGHBORS).item()
    assert metrics.k_d_tree(logits, target, threads=1) == pytest.approx(expected)
