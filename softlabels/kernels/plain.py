"""Whether a tensor can be worked on outside of torch's own operations."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_PLAIN = (Tensor, Parameter)
_PROXY = torch._C._TorchDispatchModeKey.PROXY


def is_batched(tensor: Tensor) -> bool:
    """Whether this stands for many tensors, under torch.func.vmap or the older one within autograd."""
    functorch = torch._C._functorch
    return bool(functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor))


def has_tangents() -> bool:
    """Whether forward-mode differentiation is under way."""
    return forward_ad._current_level >= 0


def can_be_numpy(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor can be read and worked on by numpy."""
    return has_numbers(tensor) and is_plain(tensor)


def has_numbers(tensor: Tensor) -> bool:
    """Whether numpy could read a tensor if nobody looked at the operations on it."""
    return tensor.is_cpu and type(tensor) in _PLAIN


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """The numbers of a plain tensor on the CPU, in a dtype that numpy knows."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    array: NDArray[Any] = tensor.numpy()
    return array


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are tensors with data, and nobody but autograd looks at the operations on them."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or has_tangents()
        or torch._C._is_tracing()
        or torch._C._get_dispatch_mode(_PROXY) is not None
    ):
        return False
    for tensor in tensors:  # noqa: SIM110  # a generator takes longer
        if type(tensor) not in _PLAIN or tensor.is_meta:
            return False
    return True
