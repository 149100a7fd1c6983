"""Forward and backward of the losses alone, against torch's own and the usual recipes."""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import softlabels
from benchmarks.speed.timing import Measurement, Run, compare, keep_freed_memory, synchronize
from softlabels import functional

TITLE = "Losses"
SHAPES = ("128x10", "128x100", "256x1000", "256x10000", "2048x32000")
ALPHA, TEMPERATURE = 0.6, 4.0
BACKENDS = ("eager", "compile")
MINIMUM_SECONDS = 0.005  # a run repeats its work until it takes about this long

Loss = Callable[[Tensor], Tensor]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="NxK", help="rows x classes")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the logits")
    parser.add_argument("--rounds", type=int, default=21, help="repetitions")


def describe(options: argparse.Namespace) -> str:
    """What was measured."""
    return (
        f"Forward and backward of the mean loss of {options.dtype} logits, each timed {options.rounds} times between "
        "two of the base. Limit: the time in which this machine copies the least bytes, the logits (and a teacher's) "
        "read once and the gradient written once. Memory: what autograd saves for the backward pass, beyond the logits."
    )


def measure(options: argparse.Namespace) -> dict[str, dict[str, Measurement]]:
    """Every loss at every shape: label smoothing and its kin, then distillation."""
    if options.malloc == "keep":
        keep_freed_memory()
    dtype = getattr(torch, options.dtype)
    results = {}
    for shape in options.shapes:
        rows, classes = map(int, shape.split("x"))
        torch.manual_seed(0)
        logits = torch.randn(rows, classes, device=options.device, dtype=dtype).requires_grad_()
        teacher = torch.randn(rows, classes, device=options.device, dtype=dtype)
        target = torch.randint(classes, (rows,), device=options.device)
        for kind, losses, least in (
            ("label smoothing", smoothing_losses(target, classes, dtype), 2),
            ("distillation", distillation_losses(target, teacher), 3),
        ):
            results[f"{shape}, {kind}"] = _measure(losses, logits, least, options.rounds, options.device)
    return results


def smoothing_losses(target: Tensor, classes: int, dtype: torch.dtype) -> dict[str, Loss]:
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
    for backend in BACKENDS:
        losses[f"softlabels.BetaSmoothingLoss, {backend}"] = _on(
            backend, lambda x: functional.beta_smoothing_loss(x, target, confidence)
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
    def run(x: Tensor) -> Tensor:
        with softlabels.backend(backend):
            return loss(x)

    return run


def _measure(
    losses: dict[str, Loss], logits: Tensor, least: int, rounds: int, device: torch.device
) -> dict[str, Measurement]:
    def step(loss: Loss) -> None:
        logits.grad = None
        loss(logits).backward()

    def copy() -> None:
        torch.empty_like(source).copy_(source)

    source = logits.detach().new_empty(logits.numel() * least // 2)  # a copy reads and writes it
    repeats = _repeats(lambda: step(losses[next(iter(losses))]), device)
    runs: dict[str, Run] = {
        name: lambda loss=loss: [step(loss) for _ in range(repeats)] for name, loss in losses.items()
    }
    runs["limit"] = lambda: [copy() for _ in range(repeats)]
    measured = {
        name: dataclasses.replace(row, seconds=[s / repeats for s in row.seconds])
        for name, row in compare(runs, rounds, device).items()
    }
    saved = {name: saved_mebibytes(loss, logits) for name, loss in losses.items()}
    return {name: dataclasses.replace(row, peak=saved.get(name, 0.0)) for name, row in measured.items()}


def _repeats(run: Run, device: torch.device) -> int:
    for _ in range(3):
        run()
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return math.ceil(MINIMUM_SECONDS / (time.perf_counter() - start))


def saved_mebibytes(loss: Loss, logits: Tensor) -> float:
    """Size of what autograd keeps for the backward pass, but for the logits themselves; each storage once."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() != logits.untyped_storage().data_ptr():
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept_alive = loss(logits)
    del kept_alive
    return sum(saved.values()) / 2**20
