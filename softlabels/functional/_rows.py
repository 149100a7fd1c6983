"""From a caller's arguments to rows, through a row kernel, to a reduced loss: what all functional losses share."""

from __future__ import annotations

from typing import NamedTuple

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
    readable: bool  # the numbers of the target can be read, and that costs nothing

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
        return teacher_logits.detach().unsqueeze(0) if self.single else teacher_logits.detach()

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
        reduction: Checked here, applied by [`factor`][].
        counts: Whether whole-number targets of the shape of ``input`` are label counts (otherwise an error).
    """
    _checks.check_reduction(reduction)
    _checks.check_ignore_index(ignore_index)
    _checks.check_input(input)
    if counts and isinstance(target, Tensor) and target.shape == input.shape and not target.is_complex():
        target = target.to(kernels.working_dtype(input))
    _checks.check_target(input, target, ignore_index)
    readable = kernels.can_be_numpy(target)
    if weight is None and sample_weight is None and target.dtype == torch.int64 and input.dim() == 2:  # mostly so
        target, kept = _labels(target, input.shape[1], ignore_index, readable)
        return Rows(input, target, kept, None, None, False, readable)

    dtype = kernels.working_dtype(input)
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
        target, kept = _labels(target.reshape(row_shape).long(), num_classes, ignore_index, readable)
    if single:
        input, target = input.unsqueeze(0), target.unsqueeze(0)
        kept = None if kept is None else kept.unsqueeze(0)
    rows = Rows(input, target, kept, weight, None, single, readable)
    if sample_weight is not None:
        sample_weight = rows.row_argument("sample_weight", sample_weight).to(dtype)
        rows = rows._replace(sample_weight=sample_weight)
    return rows


def _labels(target: Tensor, num_classes: int, ignore_index: int, readable: bool) -> tuple[Tensor, Tensor | None]:
    """Class indices with ignored ones replaced by 0, and which rows are kept: None where that is known to be all.

    A label that no class has is an IndexError where labels can be read for nothing; on an accelerator the kernels'
    gather is a device-side assertion, as in torch.
    """
    ends = _range(target) if readable else None
    kept = None
    if ends is None or ends[0] <= ignore_index <= ends[1]:
        kept = target != ignore_index
        target = target.masked_fill(~kept, 0)
        ends = ends and _range(target)
    if ends is not None and (ends[0] < 0 or ends[1] >= num_classes):
        check_labels(target, num_classes, " or ignore_index")
    return target, kept


def _range(values: Tensor) -> tuple[int, int] | None:
    """The least and the greatest of whole numbers, if there are any."""
    if values.numel() == 0:
        return None
    least, greatest = values.aminmax()
    return int(least.item()), int(greatest.item())


def check_labels(target: Tensor, num_classes: int, alternative: str = "") -> None:
    """Raise an IndexError for labels outside [0, num_classes), where reading them costs nothing."""
    bad = (target < 0) | (target >= num_classes)
    if _checks.peek(bad.any()):
        raise IndexError(
            f"target must hold class indices in [0, {num_classes}){alternative}, got {target[bad][0].item()}"
        ) from None


def factor(rows: Rows, reduction: str) -> kernels.Coefficient:
    """What the log-likelihood of each row is multiplied by to become its part of the result: minus its weight.

    ``"mean"`` divides by the summed sample weight times, for class indices, the class weight of the label, as
    nn.CrossEntropyLoss does, except that nothing to learn from gives 0.
    """
    weight = rows.sample_weight
    if rows.kept is not None:
        kept = rows.kept.to(kernels.working_dtype(rows.logits))
        weight = kept if weight is None else torch.where(rows.kept, weight, 0.0)
    if reduction != "mean":
        return -1.0 if weight is None else -weight
    of_label = None
    if rows.class_weight is not None and not rows.target.is_floating_point():
        of_label = rows.class_weight[rows.target]
    if weight is None and of_label is None:
        return -1.0 / max(rows.shape.numel(), 1)
    if weight is None:
        assert of_label is not None
        weight = torch.ones_like(of_label)
    counts = weight if of_label is None else weight * of_label
    divisor = (counts if rows.kept is None else torch.where(rows.kept, counts, 0.0)).sum()
    return torch.where(divisor == 0, 0.0, -(weight / torch.where(divisor == 0, 1.0, divisor)))


def finish(result: Tensor, rows: Rows, reduction: str) -> Tensor:
    """The result of a row kernel in the caller's shape."""
    return result.squeeze(0) if rows.single and reduction == "none" else result
