"""Row kernels: the log-likelihood of each row's soft label, for the two shapes of soft label that this library needs.

Logits are (N, K) or (N, K, d1, ...), classes always in dimension 1; a *row* is one classification, so row-shaped
tensors are (N,) or (N, d1, ...). Targets are class indices (row-shaped int64, all in [0, K)) or class probabilities
(shaped like the logits, in the working dtype). Coefficients are numbers or row-shaped tensors in the working dtype.
Where one is 0, what it multiplies counts for nothing, be it infinite or nan.

Results are row-shaped, or with ``reduce`` their sum, in the working dtype: float64 for float64 logits, float32 for all
others. A loss comes of negative coefficients. Which rows count, and how much, is said by the coefficients too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softlabels.kernels import automatic, compiled, eager, formula, fused
from softlabels.kernels.backend import backend, get_backend, set_backend
from softlabels.kernels.plain import can_be_numpy, has_numbers, is_plain, to_numpy
from softlabels.kernels.soft_label import (
    Coefficient,
    SoftLabel,
    Teacher,
    TwoLevel,
    column,
    teacher_probabilities,
    times,
    working_dtype,
)

__all__ = [
    "FEW",
    "Coefficient",
    "backend",
    "can_be_numpy",
    "column",
    "confidence_penalty",
    "dense_label",
    "get_backend",
    "has_numbers",
    "is_plain",
    "set_backend",
    "teacher",
    "teacher_probabilities",
    "times",
    "to_numpy",
    "two_level",
    "working_dtype",
]


FEW = 2**16  # so few logits on a CPU are done sooner by the plain formula than by any closed form
_BACKENDS: dict[str, fused.ClosedForm] = {"auto": automatic, "eager": eager, "compile": compiled}


def two_level(
    logits: Tensor,
    target: Tensor,
    hard: Coefficient,
    uniform: Coefficient,
    class_weight: Tensor | None = None,
    *,
    total: float | None = None,
    reduce: bool = False,
    plain: bool = False,
) -> Tensor:
    """sum_c w_c (hard y_c + uniform) log p_c.

    ``total`` is hard + K uniform, if that is known to be one number; ``plain``: all tensors are known to be plain.
    """
    return _log_likelihood(TwoLevel(target, hard, class_weight, uniform, total), logits, reduce, plain)


def teacher(
    logits: Tensor,
    target: Tensor,
    teacher_logits: Tensor,
    hard: Coefficient,
    soft: Coefficient,
    class_weight: Tensor | None = None,
    *,
    shift: float = 0.0,
    weight: Coefficient = 1.0,
    temperature: float = 1.0,
    keep: int | None = None,
    reduce: bool = False,
) -> Tensor:
    """sum_c w_c (hard y_c + weight max(soft q_c + shift, 0)) log p_c.

    q is softmax(teacher_logits / temperature) over the ``keep`` surest classes of the row. ``soft`` may be negative
    only where ``shift`` is 0.
    """
    label = Teacher(
        target,
        hard,
        class_weight,
        teacher_logits.detach(),
        soft,
        shift,
        weight,
        temperature,
        keep,
        working_dtype(logits),
    )
    return _log_likelihood(label, logits, reduce)


def confidence_penalty(
    logits: Tensor,
    target: Tensor,
    beta: float,
    class_weight: Tensor | None = None,
    *,
    weight: Coefficient = 1.0,
    reduce: bool = False,
) -> Tensor:
    """weight w (log p_y - beta sum_c p_c log p_c), w the class weight of the row's label."""
    rows = formula.confidence_penalty(logits, target, beta, class_weight, weight)
    return rows.sum() if reduce else rows


def dense_label(logits: Tensor, soft: Tensor, *, reduce: bool = False) -> Tensor:
    """sum_c t_c log p_c for few plain logits on a CPU; no t_c is 0, and all are of the working dtype."""
    return formula.weighted_sum(torch.log_softmax(logits, 1, dtype=soft.dtype), soft, reduce)


def _log_likelihood(label: SoftLabel, logits: Tensor, reduce: bool, plain: bool = False) -> Tensor:
    # torch 2.11 traces no vars()
    if plain or (not torch.compiler.is_compiling() and is_plain(logits, *label.tensors().values())):
        if logits.is_cpu and logits.numel() <= FEW:
            result = formula.log_likelihood_of_few(label, logits, reduce)
        else:
            result = fused.log_likelihood(label, logits, _BACKENDS[get_backend()], reduce)
        if result is not None:
            return result
    rows = formula.log_likelihood(fused.savable(label), logits)
    return rows.sum() if reduce else rows
