"""Rows of logits that are never computed as a whole."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softlabels import _checks, kernels
from softlabels.functional import _logits, _rows
from softlabels.kernels import Amount, LinearLogits, TopKLogits


@dataclass
class LinearRows(_rows.Rows):
    """Checked arguments of one call, all rows in one dimension."""

    logits: LinearLogits  # type: ignore[assignment]  # (N, K)
    callers: LinearLogits  # (..., K)

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

    def over(self, temperature: float) -> LinearRows:
        """The same with the logits over a temperature."""
        layer = self.logits
        bias = None if layer.bias is None else layer.bias / temperature
        return replace(self, logits=replace(layer, hidden=layer.hidden / temperature, bias=bias))

    def statistics(self) -> None:
        """They would cost a pass over the blocks, as what is made of them does."""

    def prediction(
        self,
        amount: Amount,
        teacher_logits: Tensor | LinearLogits | TopKLogits,
        temperature: float,
        keep: int | None = None,
        shift: float = 0.0,
    ) -> kernels.Term:
        """An amount of a teacher's prediction."""
        if isinstance(teacher_logits, LinearLogits):
            layer = teacher_logits
            return kernels.LinearPrediction(
                amount, layer.hidden, layer.weight, layer.bias, temperature, keep, shift, class_weight=self.class_weight
            )
        return super().prediction(amount, teacher_logits, temperature, keep, shift)

    def finish(self, loss: Tensor) -> Tensor:
        """The loss in the caller's shape."""
        return loss.reshape(self.row_shape) if self.reduction == "none" else loss


def prepare(
    input: LinearLogits,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> LinearRows:
    """As `_rows.prepare`, of arguments whose rows are the leading dimensions of the layer's input."""
    _logits.check_labels(input, target)
    logits, dtype = input.flat(), kernels.working_dtype(input.hidden)
    if weight is not None:
        _checks.check_class_weight(weight, input.shape[-1])
        _checks.check_device("weight", weight, input)
        weight = weight.to(dtype)
    labels, kept = _rows.labels(target.reshape(-1).long(), input.shape[-1], ignore_index)
    rows = LinearRows(logits, labels, kept, weight, None, reduction, False, input)
    if sample_weight is None:
        return rows
    return replace(rows, sample_weight=rows.row_argument("sample_weight", sample_weight).to(dtype))
