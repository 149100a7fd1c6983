"""The fastest backend that works on the device of the logits: compiled on accelerators of Inductor, eager elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from softlabels.kernels import compiled, eager
from softlabels.kernels.soft_label import SoftLabel

COMPILED_DEVICES = ("cuda", "xpu")  # where Inductor writes Triton

_failed: set[str] = set()

Result = TypeVar("Result")


def values(label: SoftLabel, logits: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As `eager.values`."""
    return _fastest(compiled.values, eager.values, label, logits)


def total_and_gradient(label: SoftLabel, logits: Tensor) -> tuple[Tensor, Tensor]:
    """As `eager.total_and_gradient`."""
    return _fastest(compiled.total_and_gradient, eager.total_and_gradient, label, logits)


def gradient(label: SoftLabel, logits: Tensor, incoming: Tensor, known: tuple[Tensor, ...]) -> Tensor:
    """As `eager.gradient`."""
    return _fastest(compiled.gradient, eager.gradient, label, logits, incoming, known)


def _fastest(
    run_compiled: Callable[..., Result], run_eager: Callable[..., Result], label: SoftLabel, logits: Tensor, *more: Any
) -> Result:
    device = logits.device.type
    if device in COMPILED_DEVICES and device not in _failed:
        try:
            return run_compiled(label, logits, *more)
        except compiled.CompilationFailed as error:
            _failed.add(device)
            warnings.warn(f"{error.args[0]}; from now on they run uncompiled", stacklevel=2)
    return run_eager(label, logits, *more)
