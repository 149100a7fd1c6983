"""Cross-entropy against one fixed soft-label value for the true class and one for the others."""

from __future__ import annotations

from torch import Tensor

from softlabels import kernels
from softlabels.functional._rows import prepare, reduce, run


def two_level_loss(
    input: Tensor,
    target: Tensor,
    true_class: float,
    *,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    counts: bool = False,
) -> Tensor:
    """Give ``true_class`` to the label and share the rest among the other classes.

    ``true_class = 1`` is nn.CrossEntropyLoss. ``counts`` admits whole-number label counts as the target.
    """
    rows = prepare(input, target, weight, sample_weight, ignore_index, reduction, counts=counts)
    off = 0.0 if rows.num_classes <= 1 else (1.0 - true_class) / (rows.num_classes - 1)
    return reduce(run(kernels.two_level, rows, true_class, off), rows, reduction)
