"""Checks of calls whose logits are no tensor: LinearLogits and TopKLogits."""

from __future__ import annotations

import torch
from torch import Tensor

from softlabels import _checks
from softlabels.kernels import LinearLogits, TopKLogits


def check_teacher(value: Tensor | LinearLogits | TopKLogits, input: Tensor | LinearLogits, wanted: torch.Size) -> None:
    """Teacher logits of any kind have a shape with the classes last, (..., K)."""
    if isinstance(value, Tensor):
        return _checks.check_like_logits("teacher_logits", value, input)
    if not isinstance(value, LinearLogits | TopKLogits):
        raise TypeError(f"teacher_logits must be a Tensor, LinearLogits or TopKLogits, got {type(value).__name__}")
    _checks.check_device("teacher_logits", value, input)
    if value.shape != wanted:
        raise ValueError(
            f"teacher_logits, {value!r}, stand for logits of shape {tuple(value.shape)}, but input of shape "
            f"{tuple(input.shape)} needs rows and classes of shape {tuple(wanted)}"
        )
    return None


def check_labels(input: LinearLogits, target: Tensor) -> None:
    """Targets of LinearLogits are class indices, one per row."""
    _checks.check_tensor("target", target)
    _checks.check_device("target", target, input)
    rows = tuple(input.shape[:-1])
    if target.is_floating_point() or (target.dim() == len(rows) + 1 and target.shape == input.shape):
        raise RuntimeError(
            "target must hold class indices for LinearLogits: probabilities or counts of shape "
            f"{tuple(input.shape)} would be as large as the logits; give the loss LinearLogits.dense()"
        )
    if target.shape != rows:
        raise ValueError(
            f"target must be class indices of shape {rows}, the leading dimensions of hidden, got shape "
            f"{tuple(target.shape)}"
        )
    _checks.check_index_dtype(target)


def check_dense(value: object) -> None:
    """What shows soft labels has all classes of all rows."""
    if isinstance(value, LinearLogits):
        raise TypeError(
            "soft labels are shown as probabilities of all classes, which LinearLogits are there to avoid; pass "
            "teacher_logits.dense() for a few rows"
        )
    if isinstance(value, TopKLogits):
        raise TypeError("soft labels are shown of logits of all classes, got TopKLogits")
