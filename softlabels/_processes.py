"""Rows of all processes of the default torch.distributed group, put together."""

from __future__ import annotations

import torch
from torch import Tensor


def of_all_processes(*tensors: Tensor) -> tuple[list[Tensor], slice]:
    """Tensors of equally many rows, each with the rows of all processes; and where the own rows are among them.

    Processes may have different numbers of rows: fewer are filled up with zeros. So let one of the tensors say which
    rows count. Without a group, the tensors are what they were.
    """
    rows = len(tensors[0])
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return list(tensors), slice(0, rows)
    largest = torch.tensor(rows, device=tensors[0].device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    length = int(largest)
    first = torch.distributed.get_rank() * length
    return [_gathered(tensor.detach(), length) for tensor in tensors], slice(first, first + rows)


def _gathered(tensor: Tensor, length: int) -> Tensor:
    own = tensor.new_zeros(length, *tensor.shape[1:])
    own[: len(tensor)] = tensor
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, own)
    return torch.cat(parts)
