"""Cross-entropy against one fixed soft-label value for the true class and one for the others."""

from __future__ import annotations

from torch import Tensor

from softlabels import kernels
from softlabels.functional._rows import Rows, factor, finish, prepare


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
    uniform = 0.0 if rows.num_classes <= 1 else (1.0 - true_class) / (rows.num_classes - 1)
    return uniform_prior_loss(rows, true_class - uniform, uniform, reduction)


def uniform_prior_loss(rows: Rows, hard: float, uniform: float, reduction: str) -> Tensor:
    """Cross-entropy against ``hard`` times the label plus ``uniform`` for every class."""
    weight = factor(rows, reduction)
    result = kernels.two_level(
        rows.logits,
        rows.target,
        kernels.times(weight, hard),
        kernels.times(weight, uniform),
        rows.class_weight,
        reduce=reduction != "none",
    )
    return finish(result, rows, reduction)
