"""Row kernels: cross-entropy per row against the two shapes of soft label that this library needs.

Logits are (N, K) or (N, K, d1, ...), classes always in dimension 1; a *row* is one classification, so row-shaped
tensors are (N,) or (N, d1, ...). Targets are class indices (row-shaped int64, all in [0, K)) or class probabilities
(shaped like the logits, in the working dtype). Results are row-shaped, in the working dtype: float64 for float64
logits, float32 for all others. Ignored rows, row weights and reductions are the caller's business.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from softlabels.kernels import eager
from softlabels.kernels.backend import backend, get_backend, set_backend
from softlabels.kernels.eager import teacher_probabilities, working_dtype

__all__ = [
    "backend",
    "confidence_penalty",
    "get_backend",
    "set_backend",
    "teacher",
    "teacher_probabilities",
    "two_level",
    "working_dtype",
]

_IMPLEMENTATIONS: dict[str, ModuleType] = {"auto": eager, "eager": eager}


def two_level(
    logits: Tensor,
    target: Tensor,
    on: float | Tensor,
    off: float | Tensor,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy against ``on`` on the true class and ``off`` on every other class.

    loss = -[(on - off) sum_c w_c y_c log p_c + off sum_c w_c log p_c], so the N x K soft label is never built.
    ``on`` and ``off`` are numbers or row-shaped tensors; a term whose coefficient is 0 is 0 even where log p is -inf.
    """
    loss: Tensor = _IMPLEMENTATIONS[get_backend()].two_level(logits, target, on, off, class_weight)
    return loss


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
    """Cross-entropy against ``hard`` times the label plus ``soft`` times the teacher's softmax.

    loss = -[hard sum_c w_c y_c log p_c + sum_c w_c max(soft q_c + shift, 0) log p_c] with
    q = softmax(teacher_logits / temperature) over the ``keep`` surest classes of the row. In the second sum p is
    softmax(logits / student_temperature). ``hard`` and ``soft`` are numbers or row-shaped tensors.
    """
    loss: Tensor = _IMPLEMENTATIONS[get_backend()].teacher(
        logits,
        target,
        teacher_logits,
        hard,
        soft,
        shift=shift,
        temperature=temperature,
        student_temperature=student_temperature,
        keep=keep,
        class_weight=class_weight,
    )
    return loss


def confidence_penalty(logits: Tensor, target: Tensor, beta: float, class_weight: Tensor | None = None) -> Tensor:
    """w (-log p_y + beta sum_c p_c log p_c) per row, w the class weight of the row's label."""
    loss: Tensor = _IMPLEMENTATIONS[get_backend()].confidence_penalty(logits, target, beta, class_weight)
    return loss
