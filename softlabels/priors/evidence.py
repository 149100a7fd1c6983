"""What a batch tells the learned spreads: predictions, labels and which rows count, flat."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softlabels.functional._rows import Rows


class Evidence(NamedTuple):
    """Rows of a batch, without their graph."""

    log_p: Tensor  # (M, K) log-probabilities, float32 or float64
    target: Tensor  # (M,) class indices, or (M, K) probabilities
    counted: Tensor  # (M,) False for rows that are ignored, of weight 0, or nan

    @classmethod
    def of(cls, rows: Rows, logits: Tensor) -> Evidence:
        """Of a batch, with the logits (N, K, d1, ...) of whoever predicts."""
        num_classes = rows.num_classes
        log_p = torch.log_softmax(logits.detach().movedim(1, -1).reshape(-1, num_classes), 1, dtype=rows.dtype)
        target = rows.target.detach()
        target = target.movedim(1, -1).reshape(-1, num_classes) if target.is_floating_point() else target.flatten()
        counted = ~log_p.isnan().any(1)
        return cls(log_p, target, counted if rows.counted is None else counted & rows.counted.flatten())

    def of_all_processes(self) -> Evidence:
        """The rows of all processes of the default group; fewer rows are filled up with some that do not count."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        most = torch.tensor(len(self.counted), device=self.log_p.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return Evidence(*(_gathered(tensor, int(most)) for tensor in self))

    def predictions(self) -> Tensor:
        """Probabilities (M, K); 0 in rows that do not count."""
        return self.log_p.exp().masked_fill(~self.counted.unsqueeze(1), 0.0)


def _gathered(tensor: Tensor, length: int) -> Tensor:
    own = tensor.new_zeros(length, *tensor.shape[1:])
    own[: len(tensor)] = tensor
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, own)
    return torch.cat(parts)
