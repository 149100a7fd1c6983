"""From a caller's arguments to rows, through a row kernel, to a reduced loss: what all functional losses share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softlabels import kernels
from softlabels.functional import _checks


class Rows(NamedTuple):
    """Checked arguments of one call, classes in dimension 1."""

    logits: Tensor  # (N, K, d1, ...) in the caller's dtype
    target: Tensor  # class indices (N, d1, ...) with ignored ones replaced by 0, or probabilities like the logits
    kept: Tensor | None  # (N, d1, ...) False for ignored rows; None where no row can be ignored
    class_weight: Tensor | None  # (K,) in the working dtype
    sample_weight: Tensor | None  # (N, d1, ...) in the working dtype
    single: bool  # the caller's input was one row without a batch dimension

    @property
    def shape(self) -> torch.Size:
        """Shape of a row-shaped tensor, batch dimension included."""
        return self.logits.shape[:1] + self.logits.shape[2:]

    @property
    def num_classes(self) -> int:
        """K."""
        return self.logits.shape[1]

    def row_argument(self, name: str, value: Tensor) -> Tensor:
        """Check an argument that has one value per row of the caller and bring it to (N, d1, ...)."""
        _checks.check_like_rows(name, value, self._callers_logits, self.shape[1:] if self.single else self.shape)
        return value.unsqueeze(0) if self.single else value

    def teacher_argument(self, teacher_logits: Tensor) -> Tensor:
        """Check the caller's teacher logits and bring them to (N, K, d1, ...) without their graph."""
        _checks.check_teacher_logits(teacher_logits, self._callers_logits)
        teacher_logits = teacher_logits.detach().to(kernels.working_dtype(self.logits))
        teacher_logits = teacher_logits.unsqueeze(0) if self.single else teacher_logits
        if self.kept is not None:  # whatever a teacher says of ignored rows, be it nan
            teacher_logits = teacher_logits.masked_fill(~self.kept.unsqueeze(1), 0.0)
        return teacher_logits

    @property
    def _callers_logits(self) -> Tensor:
        return self.logits.squeeze(0) if self.single else self.logits


def prepare(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    *,
    counts: bool = False,
) -> Rows:
    """Check what every loss is given and bring it into the form that the kernels take.

    Args:
        input: Logits (K), (N, K) or (N, K, d1, ...).
        target: Class indices (), (N) or (N, d1, ...), or class probabilities of the shape of ``input``.
        weight: Class weights (K,), or None.
        sample_weight: One weight per row, or None.
        ignore_index: Label of the rows that count for nothing.
        reduction: Checked here, applied by [`reduce`][].
        counts: Whether whole-number targets of the shape of ``input`` are label counts (otherwise an error).
    """
    _checks.check_reduction(reduction)
    _checks.check_ignore_index(ignore_index)
    _checks.check_input(input)
    dtype = kernels.working_dtype(input)
    if counts and isinstance(target, Tensor) and target.shape == input.shape and not target.is_complex():
        target = target.to(dtype)
    _checks.check_target(input, target, ignore_index)

    single = input.dim() == 1
    row_shape = input.shape[:1] + input.shape[2:] if not single else torch.Size(())
    num_classes = input.shape[0 if single else 1]
    _checks.check_class_weight(weight, num_classes)
    if weight is not None:
        _checks.check_device("weight", weight, input)
        weight = weight.to(dtype)

    kept = None
    if target.shape == input.shape:
        target = target.to(dtype)
    else:
        target = target.reshape(row_shape).long()
        ignored = target == ignore_index
        target = target.masked_fill(ignored, 0)
        kept = ~ignored
    if single:
        input, target = input.unsqueeze(0), target.unsqueeze(0)
        kept = None if kept is None else kept.unsqueeze(0)
    rows = Rows(input, target, kept, weight, None, single)
    if sample_weight is not None:
        sample_weight = rows.row_argument("sample_weight", sample_weight).to(dtype)
        rows = rows._replace(sample_weight=sample_weight)
    return rows


def run(kernel: Callable[..., Tensor], rows: Rows, *args: Any, **kwargs: Any) -> Tensor:
    """Apply a row kernel; a label that no class has is reported as an IndexError that names it.

    On the CPU the kernels' gather fails on such a label, and the reason is looked for only then; on an accelerator
    the gather is a device-side assertion, as in torch.
    """
    try:
        return kernel(rows.logits, rows.target, *args, class_weight=rows.class_weight, **kwargs)
    except RuntimeError:
        if not rows.target.is_floating_point():
            check_labels(rows.target, rows.num_classes, " or ignore_index")
        raise


def check_labels(target: Tensor, num_classes: int, alternative: str = "") -> None:
    """Raise an IndexError for labels outside [0, num_classes), where reading them costs nothing."""
    bad = (target < 0) | (target >= num_classes)
    if _checks.peek(bad.any()):
        raise IndexError(
            f"target must hold class indices in [0, {num_classes}){alternative}, got {target[bad][0].item()}"
        ) from None


def reduce(losses: Tensor, rows: Rows, reduction: str) -> Tensor:
    """Weight the rows and reduce them as nn.CrossEntropyLoss does, except that nothing to learn from gives 0.

    ``"mean"`` divides by the summed sample weight times, for class indices, the class weight of the label.
    """
    if rows.sample_weight is not None:
        impossible = losses.isinf() & (rows.sample_weight == 0)  # 0 * inf is 0 here
        losses = losses.masked_fill(impossible, 0.0) * rows.sample_weight
    if rows.kept is not None:
        losses = torch.where(rows.kept, losses, 0.0)
    if reduction == "none":
        return losses.squeeze(0) if rows.single else losses
    total = losses.sum()
    if reduction == "sum":
        return total
    if rows.kept is None and rows.sample_weight is None:
        return total / max(losses.numel(), 1)
    divisor = _row_weights(rows).sum()
    return torch.where(divisor == 0, 0.0, total / torch.where(divisor == 0, 1.0, divisor))


def _row_weights(rows: Rows) -> Tensor:
    """What each row counts in the mean, row-shaped, in the working dtype."""
    weights = rows.sample_weight
    if rows.kept is None:
        assert weights is not None
        return weights
    if rows.class_weight is not None:
        of_label = rows.class_weight[rows.target]
        weights = of_label if weights is None else weights * of_label
    if weights is None:
        return rows.kept.to(kernels.working_dtype(rows.logits))
    return torch.where(rows.kept, weights, 0.0)
