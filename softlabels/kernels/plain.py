"""Whether a tensor can be worked on outside of torch's own operations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_PLAIN = (Tensor, Parameter)


def is_batched(tensor: Tensor) -> bool:
    """Whether this stands for many tensors, under torch.func.vmap or the older one within autograd."""
    functorch = torch._C._functorch
    return bool(functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor))


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are tensors with data, and nobody but autograd looks at the operations on them."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return all(type(t) in _PLAIN and not t.is_meta for t in tensors)
