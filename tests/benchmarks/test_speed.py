"""The timing code: pairs, medians of ratios, and one tiny run of the command."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

import softlabels
from benchmarks.speed import __main__ as command
from benchmarks.speed import linear, losses, metrics
from benchmarks.speed.timing import busy, interleave, peak_allocated, ratio
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


def test_other_processes_compute_meanwhile(monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args: started.append(popen(*args)) or started[-1])
    with busy(2):
        assert [process.poll() for process in started] == [None, None]
    assert all(process.poll() for process in started)


def test_published_parameter_count():
    assert sum(p.numel() for p in resnet18(10).parameters()) == pytest.approx(11.17e6, rel=1e-3)


def test_command_line(tmp_path, capsys):
    common = ["--rounds", "1", "--threads", "1", "--malloc", "system", "--out", str(tmp_path)]
    command.main(["train-step", "--batch-size", "2", *common])
    printed = capsys.readouterr().out
    for name in LOSSES:
        assert f"| {name} |" in printed
    assert set(LOSSES) < set(json.loads((tmp_path / "records.json").read_text())["results"]["step, or part of one"])

    command.main(["metrics", "--samples", "500", *common])
    printed = capsys.readouterr().out
    assert "ratio to scipy.spatial.cKDTree" in printed
    assert "ratio to torchmetrics multiclass_calibration_error (quartiles) | memory (MiB)" in printed
    records = json.loads((tmp_path / "records.json").read_text())
    assert records["command"].startswith("python -m benchmarks.speed metrics --samples 500 --rounds 1 --device cpu")
    assert len(records["results"]["calibration error"]["softlabels.metrics.calibration_error"]["seconds"]) == 1

    command.main(["losses", "--shapes", "8x10", "--linear-shapes", "4x20", *common])
    printed = capsys.readouterr().out
    assert "| 8x10, label smoothing | median (ms) | ratio to nn.CrossEntropyLoss(label_smoothing=0.1)" in printed
    assert "| 8x10, distillation | median (ms) | ratio to F.kl_div + F.cross_entropy (quartiles)" in printed
    assert "(quartiles) | times the limit | memory (MiB) | first call (s) |" in printed
    assert "| nn.LinearCrossEntropyLoss(label_smoothing=0.1) |" in printed
    assert "--shapes 8x10 --linear-shapes 4x20 --dtype float32 --rounds 1" in printed

    command.main(["linear", "--shapes", "6x4x60", *common])
    printed = capsys.readouterr().out
    assert "| 6x4x60, labels | median (ms) | ratio to F.linear, F.cross_entropy(label_smoothing=0.1)" in printed
    assert "| LinearLogits, SelfDistillationLoss, teacher's top 50, bucket |" in printed

    command.main(["import", *common])
    assert "| import torch, softlabels |" in capsys.readouterr().out


def test_rivals_compute_the_same_losses():
    logits, teacher, target = torch.randn(16, 7), torch.randn(16, 7), torch.randint(7, (16,))
    distillation = losses.distillation_losses(target, teacher)
    with softlabels.backend("auto"):  # which the losses change
        recipe, *own = (loss(logits).item() for loss in distillation.values())
    entropy = torch.distributions.Categorical(logits=teacher / losses.TEMPERATURE).entropy().mean().item()
    assert own == pytest.approx([recipe + (1 - losses.ALPHA) * entropy] * 2, rel=1e-5)  # KL is less by a constant
    smoothing = losses.smoothing_losses(target, 7, torch.float32, torch.device("cpu"))
    base = smoothing["nn.CrossEntropyLoss(label_smoothing=0.1)"](logits)
    with softlabels.backend("auto"):  # which the losses change
        for backend in losses.BACKENDS:
            own = smoothing[f"softlabels.LabelSmoothingMAPLoss, {backend}"](logits)
            torch.testing.assert_close(0.9 * own, base)
    dense = smoothing["nn.CrossEntropyLoss(), dense soft targets"](logits)
    torch.testing.assert_close(smoothing["timm's SoftTargetCrossEntropy (formula)"](logits), dense)


def test_rivals_of_a_layer_compute_the_same_losses():
    hidden, weight, target = torch.randn(8, 4), torch.randn(60, 4), torch.randint(60, (8,))
    values = [loss(hidden, weight).item() for loss in linear.label_losses(target).values()]
    smoothed, ours, in_blocks, _, *hard = values
    assert [0.9 * ours, 0.9 * in_blocks] == pytest.approx([smoothed] * 2, rel=1e-5)
    assert hard == pytest.approx([torch.nn.functional.cross_entropy(hidden @ weight.T, target).item()] * len(hard))
    _, dense, layer, *tops = [f(hidden, weight).item() for f in linear.teacher_losses(target, hidden, weight).values()]
    assert dense == pytest.approx(layer, rel=1e-5)
    assert tops == pytest.approx([dense] * 2, rel=1e-1)


def test_peak_memory_counts_what_is_held_at_once():
    x = torch.randn(64, 1024)  # a quarter of a MiB
    assert peak_allocated(lambda: x.exp().sin(), torch.device("cpu")) == pytest.approx(0.5)
    assert peak_allocated(lambda: [x.exp().sum() for _ in range(3)], torch.device("cpu")) == pytest.approx(
        0.25, rel=1e-2
    )
    assert peak_allocated(lambda: x.detach().requires_grad_().square().sum().backward(), torch.device("cpu")) > 0.25


def test_the_k_d_tree_estimates_the_same():
    logits, target = torch.randn(300, 10), torch.randint(10, (300,))
    expected = confidence_diversity(logits, target, n_neighbors=metrics.NEIGHBORS).item()
    assert metrics.k_d_tree(logits, target, threads=1) == pytest.approx(expected)
