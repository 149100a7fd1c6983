"""A linear layer and a loss of its logits, forward and backward: all logits at once, and LinearLogits."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import softlabels
from benchmarks.speed.timing import Measurement, Run, compare, keep_freed_memory, peak_allocated
from softlabels import LinearLogits, TopKLogits, functional, tuning

TITLE = "A linear layer and its loss"
SHAPES = ("2048x512x32000", "1024x1024x128256", "4096x256x8000")
KINDS = ("labels", "teacher")
ALPHA, TEMPERATURE, TOP = 0.6, 4.0, 50
MALLOC = "system"

Loss = Callable[[Tensor, Tensor], Tensor]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="NxDxK", help="rows x width x classes")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="whose losses")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the layer")
    parser.add_argument("--rounds", type=int, default=7, help="repetitions")


def describe(options: argparse.Namespace) -> str:
    """What was measured."""
    return (
        f"Forward and backward of a {options.dtype} layer of N rows, width D and K classes with the mean loss of its "
        f"logits, to the gradients of its input and weight; each timed {options.rounds} times between two of the base. "
        "Memory: the most that is allocated at any time beyond inputs and their gradients. BetaSmoothingLoss has "
        "ranking='batch', which computes the logits a second time. A teacher's logits are given as a tensor, as a "
        f"layer of the same width, or as its top {TOP}."
    )


def measure(options: argparse.Namespace) -> dict[str, dict[str, Measurement]]:
    """Every loss at every shape: label smoothing and its kin, then distillation."""
    if options.malloc == "keep":
        keep_freed_memory()
    dtype = getattr(torch, options.dtype)
    results = {}
    for shape in options.shapes:
        rows, width, classes = map(int, shape.split("x"))
        torch.manual_seed(0)
        hidden = torch.randn(rows, width, device=options.device).to(dtype).requires_grad_()
        weight = (torch.randn(classes, width, device=options.device) / width**0.5).to(dtype).requires_grad_()
        target = torch.randint(classes, (rows,), device=options.device)
        for kind in options.kinds:
            losses = label_losses(target) if kind == "labels" else teacher_losses(target, hidden, weight)
            results[f"{shape}, {kind}"] = _measure(losses, hidden, weight, options)
    return results


def label_losses(target: Tensor) -> dict[str, Loss]:
    """Losses of labels: torch's own of all logits first."""
    by_itself = softlabels.BetaSmoothingLoss(ranking="batch")
    beta = tuning.smoothing_to_beta(0.1)
    losses: dict[str, Loss] = {
        "F.linear, F.cross_entropy(label_smoothing=0.1)": lambda h, w: F.cross_entropy(
            F.linear(h, w), target, label_smoothing=0.1
        ),
        "F.linear, LabelSmoothingMAPLoss": lambda h, w: functional.label_smoothing_map_loss(
            F.linear(h, w), target, beta=beta
        ),
        "LinearLogits, LabelSmoothingMAPLoss": lambda h, w: functional.label_smoothing_map_loss(
            LinearLogits(h, w), target, beta=beta
        ),
        "LinearLogits, BetaSmoothingLoss": lambda h, w: by_itself(LinearLogits(h, w), target),
        "LinearLogits, hard labels": lambda h, w: functional.label_smoothing_map_loss(
            LinearLogits(h, w), target, beta=0.0
        ),
    }
    if hasattr(F, "linear_cross_entropy"):
        chunks = torch.nn.LinearCrossEntropyOptions()  # without options it computes all logits
        losses["F.linear_cross_entropy in chunks, hard labels"] = lambda h, w: F.linear_cross_entropy(
            h, w, target, options=chunks
        )
    if target.is_cuda and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        losses["Liger-Kernel's fused layer and loss"] = lambda h, w: liger(h, w, target, label_smoothing=0.1)
    return losses


def teacher_losses(target: Tensor, hidden: Tensor, weight: Tensor) -> dict[str, Loss]:
    """Cross-entropy mixed with a teacher's softmax at temperature; the usual recipe first."""
    layer = LinearLogits(torch.randn_like(hidden), torch.randn_like(weight) / weight.shape[1] ** 0.5).detach()
    dense, top = layer.dense(), TopKLogits.of(layer, TOP, temperature=TEMPERATURE)

    def recipe(h: Tensor, w: Tensor) -> Tensor:
        x = F.linear(h, w)
        soft = F.kl_div(F.log_softmax(x, 1), F.softmax(dense / TEMPERATURE, 1), reduction="batchmean")
        return ALPHA * F.cross_entropy(x, target) + (1.0 - ALPHA) * soft

    def ours(teacher: Tensor | LinearLogits | TopKLogits) -> Loss:
        return lambda h, w: functional.self_distillation_loss(
            LinearLogits(h, w), target, teacher, alpha=ALPHA, temperature=TEMPERATURE
        )

    bucket = dataclasses.replace(top, tail="bucket")
    return {
        "F.linear, F.kl_div + F.cross_entropy": recipe,
        "LinearLogits, SelfDistillationLoss, teacher's logits": ours(dense),
        "LinearLogits, SelfDistillationLoss, teacher's layer": ours(layer),
        f"LinearLogits, SelfDistillationLoss, teacher's top {TOP}, uniform": ours(top),
        f"LinearLogits, SelfDistillationLoss, teacher's top {TOP}, bucket": ours(bucket),
    }


def _measure(
    losses: dict[str, Loss], hidden: Tensor, weight: Tensor, options: argparse.Namespace
) -> dict[str, Measurement]:
    def step(loss: Loss) -> None:
        hidden.grad = weight.grad = None
        loss(hidden, weight).backward()  # type: ignore[no-untyped-call]

    def step_and_forget(loss: Loss) -> None:
        step(loss)
        hidden.grad = weight.grad = None  # or it would be freed within the next measurement, and hide as much

    gradients = (hidden.numel() + weight.numel()) * weight.element_size() / 2**20
    runs: dict[str, Run] = {name: lambda loss=loss: step(loss) for name, loss in losses.items()}
    rows = compare(runs, options.rounds, options.device, warmup=0)
    return {
        name: dataclasses.replace(
            row,
            peak=peak_allocated(lambda loss=losses[name]: step_and_forget(loss), options.device) - gradients,
        )
        for name, row in rows.items()
    }
