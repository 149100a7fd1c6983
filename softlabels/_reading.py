"""When the numbers of a tensor can be read: on a CPU, while nobody records, transforms or watches the operations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])

_PLAIN = (Tensor, Parameter)
_PROXY = torch._C._TorchDispatchModeKey.PROXY


def is_observed() -> bool:
    """Whether somebody traces, transforms or differentiates forwards what runs now."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or has_tangents()
        or torch._C._is_tracing()
        or torch._C._get_dispatch_mode(_PROXY) is not None
    )


def has_tangents() -> bool:
    """Whether forward-mode differentiation is under way."""
    return forward_ad._current_level >= 0


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor stands for many, under torch.func.vmap or the older one within autograd."""
    functorch = torch._C._functorch
    return bool(functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor))


def is_ordinary(*tensors: Tensor) -> bool:
    """Whether these are tensors with data and no subclass that does something else."""
    for tensor in tensors:  # noqa: SIM110  # a generator takes longer
        if type(tensor) not in _PLAIN or tensor.is_meta:
            return False
    return True


def can_read(*tensors: Tensor) -> bool:
    """Whether reading the numbers of these tensors is possible and free."""
    for tensor in tensors:
        if not tensor.is_cpu or type(tensor) not in _PLAIN:
            return False
    return not is_observed()


def peek(condition: Tensor) -> bool | None:
    """Read a one-element condition; None where that is not free."""
    return bool(condition) if can_read(condition) else None


def least_and_greatest(values: Tensor) -> tuple[int, int] | None:
    """The ends of whole numbers; None where there are none, or reading is not free."""
    if not can_read(values) or values.numel() == 0:
        return None
    least, greatest = values.aminmax()
    return int(least.item()), int(greatest.item())


def can_check(values: Tensor) -> bool:
    """Whether a condition on values can be checked without waiting: now, or each time that a compiled program runs."""
    return torch.compiler.is_compiling() or can_read(values)


def check_when_run(condition: Tensor, message: str) -> None:
    """Make a compiled program check a one-element condition each time that it runs."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)


def break_graph(reason: str) -> None:
    """End the graph that is being traced, or raise for this reason if it must not end."""
    if TORCH < (2, 7):
        torch._dynamo.graph_break()
    else:
        torch._dynamo.graph_break(reason)
