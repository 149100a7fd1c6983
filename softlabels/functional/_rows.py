"""From a caller's arguments to rows, and from terms of a soft label to a reduced loss: what all functions share."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softlabels import kernels
from softlabels.functional import _checks
from softlabels.kernels import Amount

NO_LABEL = -(2**63)  # ignore_index where no row can be ignored


@dataclass
class Rows:
    """Checked arguments of one call, classes in dimension 1."""

    logits: Tensor  # (N, K, d1, ...) in the caller's dtype
    target: Tensor  # class indices (N, d1, ...) with ignored ones replaced by 0, or probabilities like the logits
    kept: Tensor | None  # (N, d1, ...) False for ignored rows; None where no row can be ignored
    class_weight: Tensor | None  # (K,) in the working dtype
    sample_weight: Tensor | None  # (N, d1, ...) in the working dtype
    reduction: str
    single: bool  # the caller's input was one row without a batch dimension
    settled_weight: Tensor | None = None  # what `weight` gives, where it is known

    @property
    def num_classes(self) -> int:
        """K."""
        return self.logits.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return kernels.working_dtype(self.logits)

    @property
    def counted(self) -> Tensor | None:
        """False for rows that are ignored or of weight 0, which no statistic over rows may know of; None: all count."""
        if self.sample_weight is None:
            return self.kept
        counted = self.sample_weight != 0
        return counted if self.kept is None else counted & self.kept

    def row_argument(self, name: str, value: Tensor) -> Tensor:
        """Check an argument that has one value per row of the caller and bring it to (N, d1, ...)."""
        shape = self.logits.shape[2:] if self.single else self.logits.shape[:1] + self.logits.shape[2:]
        _checks.check_like_rows(name, value, self._callers_logits, shape)
        return value.unsqueeze(0) if self.single else value

    def teacher_argument(self, teacher_logits: Tensor, *, check: bool = True) -> Tensor:
        """Check teacher logits, if they are the caller's, and bring them to (N, K, d1, ...) without their graph."""
        if check:
            _checks.check_like_logits("teacher_logits", teacher_logits, self._callers_logits)
            _warn_of_probabilities(teacher_logits.unsqueeze(0) if self.single else teacher_logits)
        return teacher_logits.detach().unsqueeze(0) if self.single else teacher_logits.detach()

    def spread_argument(self, spread: Tensor) -> Tensor:
        """Check the caller's spread and bring it to (N, K, d1, ...) without its graph."""
        _checks.check_like_logits("spread", spread, self._callers_logits)
        if kernels.peek((spread < 0).any()):
            raise ValueError(f"spread must hold numbers of at least 0, got {spread.min().item():g}")
        return spread.detach().unsqueeze(0) if self.single else spread.detach()

    @property
    def _callers_logits(self) -> Tensor:
        return self.logits.squeeze(0) if self.single else self.logits

    def statistics(self) -> kernels.Statistics:
        """What is known of the rows before their soft label."""
        return kernels.statistics(self.logits, reduce=self.reduction != "none")

    def label(self, amount: Amount) -> kernels.Term:
        """An amount of the target."""
        if self.target.is_floating_point():
            return kernels.Given(amount, self.target, class_weight=self.class_weight)
        if self.class_weight is not None:
            amount = amount * self.class_weight[self.target]
        return kernels.Label(amount, self.target)

    def even(self, amount: Amount) -> kernels.Term:
        """An amount that is spread evenly over the classes."""
        return kernels.Even(amount, class_weight=self.class_weight)

    def spread(self, amount: Amount, source: Tensor, index: Tensor | None = None) -> kernels.Term:
        """An amount that goes to the classes besides the label, as rows of the logits' shape or of a table say."""
        label = None if self.target.is_floating_point() else self.target
        return kernels.Spread(amount, source, index, label, class_weight=self.class_weight)

    def prediction(
        self, amount: Amount, teacher_logits: Tensor, temperature: float, keep: int | None = None, shift: float = 0.0
    ) -> kernels.Term:
        """An amount of a teacher's prediction."""
        return kernels.Prediction(amount, teacher_logits, temperature, keep, shift, class_weight=self.class_weight)

    def loss(self, *terms: kernels.Term, total: float | None = None, known: kernels.Statistics | None = None) -> Tensor:
        """The reduced cross-entropy against the sum of the terms, in the caller's shape.

        ``total`` is the mass of that sum where a label has mass 1 and classes have no weights.
        """
        if self.class_weight is not None or self.target.is_floating_point():
            total = None
        label = kernels.SoftLabel(_present(terms), self.weight(), total)
        return self.finish(kernels.cross_entropy(label, self.logits, reduce=self.reduction != "none", known=known))

    def finish(self, loss: Tensor) -> Tensor:
        """The loss in the caller's shape."""
        return loss.squeeze(0) if self.single and self.reduction == "none" else loss

    def soft_label(self, *terms: kernels.Term) -> Tensor:
        """The sum of the terms, in the shape of the caller's logits."""
        soft = kernels.SoftLabel(_present(terms), 1.0)
        dense = soft.dense(torch.zeros_like(self.logits, dtype=self.dtype))
        return dense.squeeze(0) if self.single else dense

    def weight(self) -> Amount:
        """What the loss of each row is multiplied by to become its part of the result.

        ``"mean"`` divides by the summed sample weight times, for class indices, the class weight of the label, as
        nn.CrossEntropyLoss does, except that nothing to learn from gives 0.
        """
        if self.settled_weight is not None:
            return self.settled_weight
        of_label = None if self.target.is_floating_point() else self.class_weight
        number = self.logits.shape[0] * self.logits.shape[2:].numel()
        return _weight(self.target, self.kept, self.sample_weight, of_label, self.reduction, number, self.dtype)


def _present(terms: Sequence[kernels.Term]) -> list[kernels.Term]:
    """The terms that add something."""
    return [term for term in terms if not term.is_absent]


def _weight(
    target: Tensor,
    kept: Tensor | None,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    reduction: str,
    number: int,
    dtype: torch.dtype,
) -> Amount:
    weight = sample_weight
    if kept is not None:
        weight = kept.to(dtype) if weight is None else torch.where(kept, weight, 0.0)
    if reduction != "mean":
        return 1.0 if weight is None else weight
    of_label = None if class_weight is None else class_weight[target]
    if weight is None and of_label is None:
        return 1.0 / max(number, 1)
    if weight is None:
        assert of_label is not None
        weight = torch.ones_like(of_label)
    counts = weight if of_label is None else weight * of_label
    divisor = (counts if kept is None else torch.where(kept, counts, 0.0)).sum()
    return torch.where(divisor == 0, 0.0, weight / torch.where(divisor == 0, 1.0, divisor))


def prepare(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = NO_LABEL,
    reduction: str = "none",
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
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        counts: Whether whole-number targets of the shape of ``input`` are label counts (otherwise an error).
    """
    reduction = _checks.check_reduction(reduction)
    ignore_index = _checks.check_ignore_index(ignore_index)
    _checks.check_input(input)
    if counts and isinstance(target, Tensor) and target.shape == input.shape and not target.is_complex():
        target = target.to(kernels.working_dtype(input))
        check_counts(target)
    _checks.check_target(input, target, ignore_index)
    dtype = kernels.working_dtype(input)
    single = input.dim() == 1
    num_classes = input.shape[0 if single else 1]
    if weight is not None:
        _checks.check_class_weight(weight, num_classes)
        _checks.check_device("weight", weight, input)
        weight = weight.to(dtype)
    if target.shape == input.shape:
        target = target.to(dtype)
    else:
        if target.dtype != torch.int64 or target.dim() != max(input.dim() - 1, 0):
            target = target.reshape(input.shape[:1] + input.shape[2:] if not single else ()).long()
    if single:
        input, target = input.unsqueeze(0), target.unsqueeze(0)
    rows = Rows(input, target, None, weight, None, reduction, single)
    if sample_weight is not None:
        rows = replace(rows, sample_weight=rows.row_argument("sample_weight", sample_weight).to(dtype))
    return rows if target.is_floating_point() else _with_labels(rows, ignore_index)


def _with_labels(rows: Rows, ignore_index: int) -> Rows:
    """The rows with ignored labels replaced by 0, and which are kept: None where that is known to be all.

    A label that no class has is an IndexError where labels can be read for nothing; a compiled program checks them
    when it runs; on an accelerator the kernels' gather is a device-side assertion, as in torch.
    """
    target = rows.target
    ends = kernels.least_and_greatest(target)
    if ends is None:
        target, kept, weight = kernels.fused(
            _labels_and_weight,
            target,
            ignore_index,
            rows.sample_weight,
            rows.class_weight,
            rows.reduction,
            rows.dtype,
        )
        rows = replace(rows, target=target, kept=kept, settled_weight=weight)
    elif ends[0] <= ignore_index <= ends[1]:
        kept = target != ignore_index
        target = target.masked_fill(~kept, 0)
        rows, ends = replace(rows, target=target, kept=kept), kernels.least_and_greatest(target)
    if ends is None or ends[0] < 0 or ends[1] >= rows.num_classes:
        check_labels(target, rows.num_classes, " or ignore_index")
    return rows


def _labels_and_weight(
    target: Tensor,
    ignore_index: int,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    reduction: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Amount]:
    """The labels, which rows are kept and what each counts, all from one look at the labels."""
    kept = target != ignore_index
    target = target.masked_fill(~kept, 0)
    return target, kept, _weight(target, kept, sample_weight, class_weight, reduction, target.numel(), dtype)


def check_labels(target: Tensor, num_classes: int, alternative: str = "") -> None:
    """Raise an IndexError for labels outside [0, num_classes), where reading them costs nothing."""
    if not kernels.can_check(target):
        return
    valid = (target >= 0) & (target < num_classes)
    all_valid = valid.all()
    wanted = f"target must hold class indices in [0, {num_classes}){alternative}"
    if kernels.peek(all_valid) is False:
        raise IndexError(f"{wanted}, got {target[~valid][0].item()}")
    kernels.check_when_run(all_valid, wanted)


def check_counts(counts: Tensor) -> None:
    """Raise a ValueError for label counts below 0, where reading them costs nothing."""
    if not kernels.can_read(counts):
        return
    valid = counts >= 0
    wanted = "target must hold label counts of at least 0 (sample_weight=0 leaves a row out)"
    if not bool(valid.all()):
        negative = counts[~valid & ~counts.isnan()]
        if negative.numel():
            raise ValueError(f"{wanted}, got {negative[0].item():g}")


def _warn_of_probabilities(teacher_logits: Tensor) -> None:
    """Warn of probabilities in the place of logits, where looking is free: one number tells nearly always."""
    if teacher_logits.numel() == 0 or teacher_logits.shape[1] == 1 or not kernels.can_read(teacher_logits):
        return
    if not 0.0 <= teacher_logits[(0,) * teacher_logits.dim()].item() <= 1.0:
        return
    sums = teacher_logits.sum(1, dtype=torch.float32)
    if bool((sums - 1.0).abs().amax() < 1e-2) and bool((teacher_logits >= 0).all()):
        warnings.warn(
            "teacher_logits look like probabilities: none is negative and each row sums to 1. Pass logits, or "
            "teacher_logits=probabilities.log(), whose softmax at temperature=1 is the probabilities",
            stacklevel=2,
        )
