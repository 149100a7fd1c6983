"""What one block of `LinearLogits` does on a GPU: its products, and the kernels between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

import softlabels
from benchmarks.speed.gpu_code.recorder import Recorder, ours
from softlabels import LinearLogits, TopKLogits, functional
from softlabels.kernels.linear import ACCELERATOR_BLOCK, FEWEST_ROWS

WIDTH = 1024  # of the layer's input
TOP = 50
PRODUCTS = ("mm", "addmm", "addmm_")

Loss = Callable[[LinearLogits, Tensor], Tensor]


@dataclass(frozen=True)
class Work:
    """What is done for one block of rows, or once for all blocks.

    Args:
        products: Of matrices.
        kernels: All others that are started, at least.
        waits: How often the processor waits for the device.
        moved: Bytes to and from memory beside the products, of tensors that have at least an eighth of the numbers of a
            block's logits: these, and the layer's weights.
    """

    products: int
    kernels: int
    waits: int
    moved: float

    def __sub__(self, other: Work) -> Work:
        """What is left without the other."""
        return Work(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


def rows_of(classes: int) -> int:
    """Rows of a block."""
    return max(ACCELERATOR_BLOCK // classes, FEWEST_ROWS)


def blocks(classes: int, dtype: torch.dtype) -> dict[str, Work]:
    """Forward and backward of each kind of loss: for each block, and besides."""
    results = {}
    for name, loss in CALLS.items():
        one, two = (_work(loss, blocks, classes, dtype) for blocks in (1, 2))
        results[f"{name}: each block"], results[f"{name}: once"] = two - one, one - (two - one)
    return results


def _work(loss: Loss, blocks: int, classes: int, dtype: torch.dtype) -> Work:
    from torch._subclasses.fake_tensor import FakeTensorMode

    rows = rows_of(classes)
    with FakeTensorMode(allow_non_fake_inputs=True), softlabels.backend("compile"):
        layer = _layer(blocks * rows, classes, dtype)
        target = torch.empty(blocks * rows, dtype=torch.int64, device="cuda")
        events = ours(lambda: loss(layer, target), Recorder(rows, classes)).events
    others = [event for event in events if event.name not in PRODUCTS]
    return Work(
        len(events) - len(others),
        sum(event.kernels for event in others),
        sum(event.waits for event in events),
        sum(event.bytes for event in others) * rows * classes,
    )


def _layer(rows: int, classes: int, dtype: torch.dtype) -> LinearLogits:
    hidden, weight = (torch.empty(size, WIDTH, dtype=dtype, device="cuda") for size in (rows, classes))
    return LinearLogits(hidden, weight, block=rows_of(classes))


def _top(logits: LinearLogits) -> TopKLogits:
    shape = (logits.shape[0], TOP)
    values, indices = (torch.empty(shape, dtype=dtype, device="cuda") for dtype in (torch.float16, torch.int32))
    sums = torch.empty(shape[0], device="cuda")
    return TopKLogits(values, indices, logits.shape[1], sums, temperature=2.0)


CALLS: dict[str, Loss] = {
    "label smoothing": lambda x, y: functional.label_smoothing_map_loss(x, y, beta=0.1),
    "Beta smoothing, batch": lambda x, y: softlabels.BetaSmoothingLoss(ranking="batch")(x, y),
    "self-distillation, the teacher's layer": lambda x, y: functional.self_distillation_loss(
        x, y, _layer(*x.shape, x.dtype), temperature=2.0
    ),
    f"self-distillation, the teacher's top {TOP}": lambda x, y: functional.self_distillation_loss(
        x, y, _top(x), temperature=2.0
    ),
}
