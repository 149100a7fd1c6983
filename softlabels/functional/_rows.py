"""From a caller's arguments to rows, and from terms of a soft label to a reduced loss: what all functions share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from softlabels import _checks, kernels
from softlabels._reading import least_and_greatest
from softlabels.functional import _logits
from softlabels.kernels import Amount, LinearLogits, TopKLogits

AnyRows = TypeVar("AnyRows", bound="Rows")

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
    settled_weight: Amount | None = None  # what `weight` gives, where it is known

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

    @property
    def row_shape(self) -> torch.Size:
        """The caller's."""
        return self.logits.shape[2:] if self.single else self.logits.shape[:1] + self.logits.shape[2:]

    def row_argument(self, name: str, value: Tensor) -> Tensor:
        """Check an argument that has one value per row of the caller and bring it to (N, d1, ...)."""
        _checks.check_like_rows(name, value, self._callers_logits, self.row_shape)
        return value.unsqueeze(0) if self.single else value

    def teacher_argument(
        self, teacher_logits: Tensor | LinearLogits | TopKLogits, *, check: bool = True
    ) -> Tensor | LinearLogits | TopKLogits:
        """Check teacher logits, if they are the caller's, and bring them to (N, K, d1, ...) without their graph.

        Where rows are all in one dimension, LinearLogits stay what they are.
        """
        if not isinstance(teacher_logits, Tensor) and isinstance(teacher_logits, LinearLogits | TopKLogits):
            wanted = torch.Size((*self.row_shape, self.num_classes))
            _logits.check_teacher(teacher_logits, self._callers_logits, wanted)
            if isinstance(teacher_logits, TopKLogits):
                return teacher_logits.rows(self.logits.shape[:1] + self.logits.shape[2:])
            if self.logits.dim() == 2 and not self.single:
                return teacher_logits.detach()
            dense = teacher_logits.detach().dense()
            return dense.unsqueeze(0) if self.single else dense.movedim(-1, 1)
        if check:
            _checks.check_like_logits("teacher_logits", teacher_logits, self._callers_logits)
            _checks.warn_of_probabilities(teacher_logits.unsqueeze(0) if self.single else teacher_logits)
        return teacher_logits.detach().unsqueeze(0) if self.single else teacher_logits.detach()

    def spread_argument(self, spread: Tensor) -> Tensor:
        """Check the caller's spread and bring it to (N, K, d1, ...) without its graph."""
        _checks.check_like_logits("spread", spread, self._callers_logits)
        _checks.check_spread(spread)
        return spread.detach().unsqueeze(0) if self.single else spread.detach()

    @property
    def _callers_logits(self) -> Tensor:
        return self.logits.squeeze(0) if self.single else self.logits

    def statistics(self) -> kernels.Statistics | None:
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
        self,
        amount: Amount,
        teacher_logits: Tensor | LinearLogits | TopKLogits,
        temperature: float,
        keep: int | None = None,
        shift: float = 0.0,
    ) -> kernels.Term:
        """An amount of a teacher's prediction."""
        if isinstance(teacher_logits, TopKLogits):
            return teacher_logits.term(amount, temperature, keep, shift, self.class_weight, self.dtype)
        if isinstance(teacher_logits, LinearLogits):
            layer = (teacher_logits.hidden, teacher_logits.weight, teacher_logits.bias)
            return kernels.LinearPrediction(amount, *layer, temperature, keep, shift, class_weight=self.class_weight)
        return kernels.Prediction(amount, teacher_logits, temperature, keep, shift, class_weight=self.class_weight)

    def loss(self, *terms: kernels.Term, total: float | None = None, known: kernels.Statistics | None = None) -> Tensor:
        """The reduced cross-entropy against the sum of the terms, in the caller's shape.

        ``total`` is the mass of that sum where a label has mass 1 and classes have no weights.
        """
        if self.class_weight is not None or self.target.is_floating_point():
            total = None
        label = kernels.SoftLabel(_present(terms), self.weight(), total)
        return self.finish(kernels.cross_entropy(label, self.logits, reduce=self.reduction != "none", known=known))

    def loss_of_two_scales(self, plain: kernels.Term, scaled: kernels.Term, temperature: float) -> Tensor:
        """The loss of a term, and of logits over a temperature that of another, added up."""
        divided = replace(self, logits=self.logits.to(self.dtype) / temperature)
        return self.loss(plain) + divided.loss(scaled)

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


@dataclass
class LinearRows(Rows):
    """Checked arguments of one call, all rows in one dimension."""

    logits: LinearLogits  # type: ignore[assignment]  # (N, K)
    callers: LinearLogits = field(kw_only=True)  # (..., K)

    @property
    def row_shape(self) -> torch.Size:
        """The caller's."""
        return self.callers.shape[:-1]

    @property
    def _callers_logits(self) -> LinearLogits:  # type: ignore[override]
        return self.callers

    def row_argument(self, name: str, value: Tensor) -> Tensor:
        """Check an argument that has one value per row of the caller and bring it to (N,)."""
        _checks.check_like_rows(name, value, self.callers, self.row_shape)
        return value.flatten() if value.dim() else value.unsqueeze(0)

    def teacher_argument(
        self, teacher_logits: Tensor | LinearLogits | TopKLogits, *, check: bool = True
    ) -> Tensor | LinearLogits | TopKLogits:
        """Check teacher logits (..., K), if they are the caller's, and bring them to (N, K) without their graph."""
        if check:
            _logits.check_teacher(teacher_logits, self.callers, self.callers.shape)
        if isinstance(teacher_logits, LinearLogits):
            return teacher_logits.detach().flat()
        if isinstance(teacher_logits, TopKLogits):
            return teacher_logits.rows(self.target.shape)
        teacher_logits = teacher_logits.detach().reshape(-1, self.num_classes)
        if check:
            _checks.warn_of_probabilities(teacher_logits)
        return teacher_logits

    def spread_argument(self, spread: Tensor) -> Tensor:
        """Check the caller's spread (..., K) and bring it to (N, K) without its graph."""
        return super().spread_argument(spread).reshape(-1, self.num_classes)

    def loss_of_two_scales(self, plain: kernels.Term, scaled: kernels.Term, temperature: float) -> Tensor:
        """The reduced cross-entropies against a term, and of logits over a temperature against another, added up."""
        label = kernels.TwoScales([plain, scaled], self.weight(), divisor=temperature)
        return self.finish(kernels.cross_entropy(label, self.logits, reduce=self.reduction != "none"))

    def statistics(self) -> None:
        """They would cost a pass over the blocks, as what is made of them does."""

    def finish(self, loss: Tensor) -> Tensor:
        """The loss in the caller's shape."""
        return loss.reshape(self.row_shape) if self.reduction == "none" else loss


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
    input: Tensor | LinearLogits,
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
        input: Logits (K), (N, K) or (N, K, d1, ...), or LinearLogits.
        target: Class indices (), (N) or (N, d1, ...), or class probabilities of the shape of ``input``.
        weight: Class weights (K,), or None.
        sample_weight: One weight per row, or None.
        ignore_index: Label of the rows that count for nothing.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        counts: Whether whole-number targets of the shape of ``input`` are label counts (otherwise an error).
    """
    reduction = _checks.check_reduction(reduction)
    ignore_index = _checks.check_ignore_index(ignore_index)
    if isinstance(input, LinearLogits):
        return _prepare_linear(input, target, weight, sample_weight, ignore_index, reduction)
    _checks.check_input(input)
    if counts and isinstance(target, Tensor) and target.shape == input.shape and not target.is_complex():
        target = target.to(kernels.working_dtype(input))
        _checks.check_counts(target)
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


def _with_labels(rows: AnyRows, ignore_index: int) -> AnyRows:
    """The rows with ignored labels replaced by 0, and which are kept: None where that is known to be all.

    A label that no class has is an IndexError where labels can be read for nothing; a compiled program checks them
    when it runs; on an accelerator the kernels' gather is a device-side assertion, as in torch.
    """
    target = rows.target
    ends = least_and_greatest(target)
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
        rows, ends = replace(rows, target=target, kept=kept), least_and_greatest(target)
    if ends is None or ends[0] < 0 or ends[1] >= rows.num_classes:
        _checks.check_labels(target, rows.num_classes, " or ignore_index")
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


def _prepare_linear(
    input: LinearLogits,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> LinearRows:
    """`prepare` of arguments whose rows are the leading dimensions of the layer's input."""
    _logits.check_labels(input, target)
    logits, dtype = input.flat(), kernels.working_dtype(input.hidden)
    if weight is not None:
        _checks.check_class_weight(weight, input.shape[-1])
        _checks.check_device("weight", weight, input)
        weight = weight.to(dtype)
    rows = LinearRows(logits, target.reshape(-1).long(), None, weight, None, reduction, False, callers=input)
    if sample_weight is not None:
        rows = replace(rows, sample_weight=rows.row_argument("sample_weight", sample_weight).to(dtype))
    return _with_labels(rows, ignore_index)
