"""The row kernels in plain PyTorch: differentiable twice, traceable, and the reference for faster backends."""

from __future__ import annotations

import torch
from torch import Tensor


def working_dtype(logits: Tensor) -> torch.dtype:
    """float64 logits are worked on in float64, all others in float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities over dimension 1 in the working dtype."""
    if temperature != 1.0:
        logits = logits.to(working_dtype(logits)) / temperature
    return torch.log_softmax(logits, 1, dtype=working_dtype(logits))


def weighted_sum(weights: Tensor, log_p: Tensor) -> Tensor:
    """sum_c weights_c log p_c over dimension 1, where 0 * log 0 is 0."""
    impossible = (weights == 0) & (log_p == -torch.inf)
    return (weights * log_p.masked_fill(impossible, 0.0)).sum(1)


def _scaled(coefficient: float | Tensor, value: Tensor) -> Tensor:
    """coefficient * value per row, where 0 * -inf is 0."""
    if isinstance(coefficient, Tensor):
        return torch.where(coefficient == 0, 0.0, coefficient * value)
    return coefficient * value if coefficient else torch.zeros_like(value)


def _per_class(class_weight: Tensor, like: Tensor) -> Tensor:
    """(K,) class weights shaped to broadcast over (N, K, d1, ...)."""
    return class_weight.view(1, -1, *[1] * (like.dim() - 2))


def label_term(log_p: Tensor, target: Tensor, class_weight: Tensor | None) -> Tensor:
    """sum_c w_c y_c log p_c per row, for class indices or class probabilities y."""
    if target.is_floating_point():
        if class_weight is not None:
            target = target * _per_class(class_weight, target)
        return weighted_sum(target, log_p)
    log_p_true = log_p.gather(1, target.unsqueeze(1)).squeeze(1)
    if class_weight is None:
        return log_p_true
    return _scaled(class_weight[target], log_p_true)


def label_weight(target: Tensor, class_weight: Tensor) -> Tensor:
    """sum_c w_c y_c per row: the class weight of the row's label."""
    if target.is_floating_point():
        return (target * _per_class(class_weight, target)).sum(1)
    return class_weight[target]


def two_level(
    logits: Tensor,
    target: Tensor,
    on: float | Tensor,
    off: float | Tensor,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy against ``on`` on the true class and ``off`` on every other, without building the target.

    See `softlabels.kernels.two_level`.
    """
    log_p = log_softmax(logits)
    loss = -_scaled(on - off, label_term(log_p, target, class_weight))
    if not isinstance(off, Tensor) and off == 0:
        return loss
    uniform = log_p.sum(1) if class_weight is None else weighted_sum(_per_class(class_weight, log_p), log_p)
    spread = _scaled(off, uniform)
    loss = loss - spread
    # An impossible class of which the label has less than its share (on < off): inf - inf, though all terms are inf.
    return torch.where(loss.isnan() & (spread == -torch.inf), torch.inf, loss)


def keep_surest(teacher_logits: Tensor, keep: int) -> Tensor:
    """Mask of the ``keep`` largest logits of each row; among equal ones the lower class index is kept."""
    threshold = teacher_logits.topk(keep, dim=1).values[:, -1:]
    above = teacher_logits > threshold
    level = teacher_logits == threshold
    room = keep - above.sum(1, keepdim=True)
    return above | (level & (level.cumsum(1) <= room))


def teacher_probabilities(teacher_logits: Tensor, temperature: float, keep: int | None) -> Tensor:
    """softmax(teacher_logits / temperature) over the ``keep`` surest classes of each row (None: over all)."""
    if keep is not None and keep < teacher_logits.shape[1]:
        teacher_logits = teacher_logits.masked_fill(~keep_surest(teacher_logits, keep), -torch.inf)
    return log_softmax(teacher_logits, temperature).exp()


def teacher(
    logits: Tensor,
    target: Tensor,
    teacher_logits: Tensor,
    hard: float | Tensor,
    soft: float | Tensor,
    *,
    shift: float = 0.0,
    temperature: float = 1.0,
    student_temperature: float = 1.0,
    keep: int | None = None,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy against a mixture of the label and a teacher's softmax.

    See `softlabels.kernels.teacher`.
    """
    log_p = log_softmax(logits)
    prior = teacher_probabilities(teacher_logits, temperature, keep)
    if shift != 0.0:
        strength = soft.unsqueeze(1) if isinstance(soft, Tensor) else soft
        prior, soft = (strength * prior + shift).clamp_min(0.0), 1.0
    if class_weight is not None:
        prior = prior * _per_class(class_weight, prior)
    loss = -_scaled(hard, label_term(log_p, target, class_weight))
    if student_temperature != 1.0:
        log_p = log_softmax(logits, student_temperature)
    return loss - _scaled(soft, weighted_sum(prior, log_p))


def confidence_penalty(logits: Tensor, target: Tensor, beta: float, class_weight: Tensor | None = None) -> Tensor:
    """Cross-entropy less ``beta`` times the entropy of the prediction.

    See `softlabels.kernels.confidence_penalty`.
    """
    log_p = log_softmax(logits)
    loss = -label_term(log_p, target, class_weight)
    if beta == 0:
        return loss
    negative_entropy = (log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(1)
    if class_weight is not None:
        negative_entropy = negative_entropy * label_weight(target, class_weight)
    return loss + beta * negative_entropy
