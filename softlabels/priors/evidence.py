"""What a batch tells the learned spreads: predictions, labels and which rows count, flat."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softlabels._reading import peek
from softlabels.functional._rows import Rows


class Evidence(NamedTuple):
    """Rows of a batch, without their graph."""

    logits: Tensor  # (M, K) of whoever predicts, float32 or float64
    predictions: Tensor  # (M, K) their softmax, 0 in rows that do not count
    target: Tensor  # (M,) class indices, or (M, K) probabilities
    counted: Tensor  # (M,) False for rows that are ignored, of weight 0, or nan

    @classmethod
    def of(cls, rows: Rows, logits: Tensor) -> Evidence:
        """Of a batch, with the logits (N, K, d1, ...) of whoever predicts."""
        num_classes = rows.num_classes
        logits = logits.detach().movedim(1, -1).reshape(-1, num_classes).to(rows.dtype)
        predictions = logits.softmax(1)
        target = rows.target.detach()
        target = target.movedim(1, -1).reshape(-1, num_classes) if target.is_floating_point() else target.flatten()
        counted = ~predictions[:, 0].isnan()  # one nan among the logits makes all of them nan
        if rows.counted is not None:
            counted &= rows.counted.flatten()
        if peek(counted.all()) is not True:
            predictions = predictions.masked_fill_(~counted.unsqueeze(1), 0.0)
        return cls(logits, predictions, target, counted)

    def of_all_processes(self) -> Evidence:
        """The rows of all processes of the default group; fewer rows are filled up with some that do not count."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        most = torch.tensor(len(self.counted), device=self.logits.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return Evidence(*(_gathered(tensor, int(most)) for tensor in self))


def _gathered(tensor: Tensor, length: int) -> Tensor:
    own = tensor.new_zeros(length, *tensor.shape[1:])
    own[: len(tensor)] = tensor
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, own)
    return torch.cat(parts)
