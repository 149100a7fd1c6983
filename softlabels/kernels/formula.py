"""The row kernels as plain differentiable formulas: traceable, differentiable twice, and what all else must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from softlabels.kernels.soft_label import Amount, SoftLabel, Term, product, working_dtype


def cross_entropy(
    label: SoftLabel, logits: Tensor, reduce: bool, log_p: Tensor | None = None, careful: bool = True
) -> Tensor:
    """-weight sum_c t_c log p_c per row, or the sum of that over the rows.

    Without ``careful``, in fewer operations, for who looks whether the result is finite: -inf logits and rows of weight
    0 that hold junk are not cared for.
    """
    left_out = _left_out(label.weight) if careful else None
    if left_out is not None:
        logits, log_p = logits.masked_fill(left_out, 0.0), None
    if log_p is None:
        log_p = torch.log_softmax(logits, 1, dtype=working_dtype(logits))
    if label.follows_prediction:
        rows = product(-label.weight, label.inner(log_p, label.possible(logits)))
        return rows.sum() if reduce else rows
    if not careful:
        terms = log_p * label.add_to(torch.zeros_like(log_p, requires_grad=False), -label.weight, in_place=True)
        return terms.sum() if reduce else terms.sum(1)
    soft = label.dense(log_p, possible=label.possible(logits))
    if left_out is not None:
        soft = soft.masked_fill(left_out, 0.0)
    rows = product(-label.weight, product(soft, log_p).sum(1))
    return rows.sum() if reduce else rows


def confidence_penalty(label: Term, weight: Amount, beta: float, logits: Tensor, reduce: bool) -> Tensor:
    """Weight (cross-entropy with the label - beta m entropy of the prediction) per row, m the label's mass.

    Its "soft label" depends on the prediction itself, so it is no sum of terms.
    """
    left_out = _left_out(weight)
    if left_out is not None:
        logits = logits.masked_fill(left_out, 0.0)
    log_p = torch.log_softmax(logits, 1, dtype=working_dtype(logits))
    possible = logits != -torch.inf
    rows = -label.inner(log_p, possible)
    if beta != 0:
        negative_entropy = (log_p.exp() * log_p.masked_fill(~possible, 0.0)).sum(1)
        rows = rows + beta * label.mass(log_p, possible) * negative_entropy
    rows = product(weight, rows)
    return rows.sum() if reduce else rows


def _left_out(weight: Amount) -> Tensor | None:
    """The rows of weight 0, whose numbers may be anything; not where the weights learn, or none could leave 0."""
    return (weight == 0).unsqueeze(1) if isinstance(weight, Tensor) and not weight.requires_grad else None
