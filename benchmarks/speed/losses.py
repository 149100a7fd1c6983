"""Forward and backward of the losses alone, against torch's own and the usual recipes."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import os
import statistics
import tempfile
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import softlabels
from benchmarks.speed.timing import Measurement, Run, compare, keep_freed_memory, peak_allocated, seconds
from softlabels import functional, tuning

TITLE = "Losses"
SHAPES = ("128x10", "128x100", "256x1000", "256x10000", "2048x32000")
ALPHA, TEMPERATURE = 0.6, 4.0
BACKENDS = ("eager", "compile")
MALLOC = "system"  # by default: what a plain Python process has
FEATURES = 256  # of the linear layer before the loss, where one is measured too
MINIMUM_SECONDS = 0.005  # a run repeats its work until it takes about this long

Loss = Callable[[Tensor], Tensor]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="NxK", help="rows x classes")
    parser.add_argument(
        "--linear-shapes", nargs="*", default=["256x10000"], metavar="NxK", help="with a linear layer before the loss"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the logits")
    parser.add_argument("--rounds", type=int, default=21, help="repetitions")


def describe(options: argparse.Namespace) -> str:
    """What was measured."""
    return (
        f"Forward and backward of the mean loss of {options.dtype} logits, each timed {options.rounds} times between "
        "two of the base. Limit: the time in which this machine copies the least bytes, the logits (and a teacher's) "
        "read once and the gradient written once. Memory: the most that is allocated at any time beyond the logits, "
        "their gradient included. First call: how much longer than the median, compiling included. BetaSmoothingLoss "
        "ranks given confidences and draws anew in each call, or with ranking='batch' ranks by the logits; "
        "LabelSmoothingMAPLoss has the soft labels of the base."
    )


def measure(options: argparse.Namespace) -> dict[str, dict[str, Measurement]]:
    """Every loss at every shape: label smoothing and its kin, then distillation."""
    if options.malloc == "keep":
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as cache:
        # An empty cache, so that first calls are first calls; and a profiler that does not announce itself.
        quiet = {"TORCHINDUCTOR_CACHE_DIR": cache, "KINETO_LOG_LEVEL": "99"}
        with mock.patch.dict(os.environ, quiet), softlabels.backend(softlabels.get_backend()):
            return _measure_all(options)


def _measure_all(options: argparse.Namespace) -> dict[str, dict[str, Measurement]]:
    dtype = getattr(torch, options.dtype)
    results = {}
    for shape in options.shapes:
        rows, classes = map(int, shape.split("x"))
        logits, target = _data(rows, classes, classes, dtype, options.device)
        teacher = torch.randn(rows, classes, device=options.device, dtype=dtype)
        for kind, losses, least in (
            ("label smoothing", smoothing_losses(target, classes, dtype, options.device), 2),
            ("distillation", distillation_losses(target, teacher), 3),
        ):
            copied = logits.numel() * least // 2  # a copy reads and writes
            results[f"{shape}, {kind}"] = _measure(losses, logits, copied, options.rounds, options.device)
    for shape in options.linear_shapes:
        rows, classes = map(int, shape.split("x"))
        features, target = _data(rows, FEATURES, classes, dtype, options.device)
        losses = linear_losses(target, classes, dtype, options.device)
        results[f"{shape}, linear layer and loss"] = _measure(losses, features, 0, options.rounds, options.device)
    return results


def _data(rows: int, columns: int, classes: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    inputs = torch.randn(rows, columns, device=device, dtype=dtype).requires_grad_()
    return inputs, torch.randint(classes, (rows,), device=device)


def smoothing_losses(target: Tensor, classes: int, dtype: torch.dtype, device: torch.device) -> dict[str, Loss]:
    """Losses of one kind of soft label that is the same for all wrong classes; torch's own first."""
    confidence = torch.rand(target.shape, device=target.device)
    soft = functional.beta_smoothing_targets(target, classes, confidence).to(dtype)
    plain, smoothed = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)
    losses: dict[str, Loss] = {
        "nn.CrossEntropyLoss(label_smoothing=0.1)": lambda x: smoothed(x, target),
        "nn.CrossEntropyLoss()": lambda x: plain(x, target),
        "nn.CrossEntropyLoss(), dense soft targets": lambda x: plain(x, soft),
        "timm's SoftTargetCrossEntropy (formula)": lambda x: torch.sum(-soft * F.log_softmax(x, -1), -1).mean(),
    }
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_cross_entropy

        own = torch.randn(target.shape[0], classes, device=device, dtype=dtype).requires_grad_()

        def liger(_: Tensor) -> Tensor:  # on logits of its own, since it writes their gradient over them
            own.grad = None
            return liger_cross_entropy(own, target, label_smoothing=0.1)

        losses["Liger-Kernel's cross-entropy, smoothed"] = liger
    by_itself = softlabels.BetaSmoothingLoss(ranking="batch")
    for backend in BACKENDS:
        losses[f"softlabels.LabelSmoothingMAPLoss, {backend}"] = _on(
            backend, lambda x: functional.label_smoothing_map_loss(x, target, beta=tuning.smoothing_to_beta(0.1))
        )
        losses[f"softlabels.BetaSmoothingLoss, {backend}"] = _on(
            backend, lambda x: functional.beta_smoothing_loss(x, target, confidence)
        )
        losses[f"softlabels.BetaSmoothingLoss(ranking='batch'), {backend}"] = _on(
            backend, lambda x: by_itself(x, target)
        )
    return losses


def linear_losses(target: Tensor, classes: int, dtype: torch.dtype, device: torch.device) -> dict[str, Loss]:
    """A linear layer and a loss of its logits, beside torch's loss that never holds all logits at once."""
    layer = nn.Linear(FEATURES, classes, bias=False, device=device, dtype=dtype)
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)
    losses: dict[str, Loss] = {
        "nn.Linear and nn.CrossEntropyLoss(label_smoothing=0.1)": lambda x: smoothed(layer(x), target)
    }
    if hasattr(nn, "LinearCrossEntropyLoss"):
        joint = nn.LinearCrossEntropyLoss(FEATURES, classes, label_smoothing=0.1, device=device, dtype=dtype)
        losses["nn.LinearCrossEntropyLoss(label_smoothing=0.1)"] = lambda x: joint(x, target)
    for backend in BACKENDS:
        losses[f"nn.Linear and softlabels.LabelSmoothingMAPLoss, {backend}"] = _on(
            backend, lambda x: functional.label_smoothing_map_loss(layer(x), target, beta=tuning.smoothing_to_beta(0.1))
        )
    return losses


def distillation_losses(target: Tensor, teacher: Tensor) -> dict[str, Loss]:
    """Cross-entropy mixed with a teacher's softmax at temperature; the usual recipe first."""

    def recipe(x: Tensor) -> Tensor:
        soft = F.kl_div(F.log_softmax(x, 1), F.softmax(teacher / TEMPERATURE, 1), reduction="batchmean")
        return ALPHA * F.cross_entropy(x, target) + (1.0 - ALPHA) * soft

    losses: dict[str, Loss] = {"F.kl_div + F.cross_entropy": recipe}
    for backend in BACKENDS:
        losses[f"softlabels.SelfDistillationLoss, {backend}"] = _on(
            backend,
            lambda x: functional.self_distillation_loss(x, target, teacher, alpha=ALPHA, temperature=TEMPERATURE),
        )
    return losses


def _on(backend: str, loss: Loss) -> Loss:
    """A loss that chooses its backend and leaves it chosen: a ``with`` block would be part of each step's time."""

    def run(x: Tensor) -> Tensor:
        softlabels.set_backend(backend)
        return loss(x)

    return run


def _measure(
    losses: dict[str, Loss], inputs: Tensor, copied: int, rounds: int, device: torch.device
) -> dict[str, Measurement]:
    def step(loss: Loss) -> None:
        inputs.grad = None
        loss(inputs).backward()

    def step_and_forget(loss: Loss) -> None:
        step(loss)
        inputs.grad = None  # or it would be freed within the next measurement, and hide as much

    def copy() -> None:
        torch.empty_like(source).copy_(source)

    first = {name: seconds(lambda loss=loss: step(loss), device) for name, loss in losses.items()}
    source = inputs.detach().new_empty(copied)
    repeats = _repeats(lambda: step(losses[next(iter(losses))]), device)
    runs: dict[str, Run] = {
        name: lambda loss=loss: [step(loss) for _ in range(repeats)] for name, loss in losses.items()
    }
    if copied:
        runs["limit"] = lambda: [copy() for _ in range(repeats)]
    rows = {}
    for name, row in compare(runs, rounds, device).items():
        own = [s / repeats for s in row.seconds]
        rows[name] = dataclasses.replace(row, seconds=own)
        if name in losses:
            late = max(first[name] - statistics.median(own), 0.0)
            peak = peak_allocated(lambda loss=losses[name]: step_and_forget(loss), device)
            rows[name] = dataclasses.replace(rows[name], first=late, peak=peak)
    return rows


def _repeats(run: Run, device: torch.device) -> int:
    for _ in range(3):
        run()
    return math.ceil(MINIMUM_SECONDS / seconds(run, device))
