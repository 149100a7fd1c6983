"""What a batch tells the learned spreads: predictions, labels and which rows count, flat."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softlabels._processes import of_all_processes
from softlabels._reading import peek
from softlabels.functional._rows import Rows
from softlabels.kernels import LinearLogits


class Evidence(NamedTuple):
    """Rows of a batch, without their graph."""

    logits: Tensor  # (M, K) of whoever predicts, float32 or float64
    predictions: Tensor  # (M, K) their softmax, 0 in rows that do not count
    target: Tensor  # (M,) class indices, or (M, K) probabilities
    counted: Tensor  # (M,) False for rows that are ignored, of weight 0, or nan
    samples: Tensor  # (M,) ids; 0 where nobody told them

    @classmethod
    def of(cls, rows: Rows, logits: Tensor | LinearLogits, index: Tensor | None) -> Evidence:
        """Of a batch, with the logits (N, K, d1, ...) of whoever predicts, and row-shaped sample ids."""
        num_classes = rows.num_classes
        logits = logits.dense() if isinstance(logits, LinearLogits) else logits
        logits = logits.detach().movedim(1, -1).reshape(-1, num_classes).to(rows.dtype)
        predictions = logits.softmax(1)
        target = rows.target.detach()
        target = target.movedim(1, -1).reshape(-1, num_classes) if target.is_floating_point() else target.flatten()
        counted = ~predictions[:, 0].isnan()  # one nan among the logits makes all of them nan
        if rows.counted is not None:
            counted &= rows.counted.flatten()
        if peek(counted.all()) is not True:
            predictions = predictions.masked_fill_(~counted.unsqueeze(1), 0.0)
        samples = torch.zeros_like(counted, dtype=torch.int64) if index is None else index.flatten().long()
        return cls(logits, predictions, target, counted, samples)

    def of_all_processes(self) -> tuple[Evidence, slice]:
        """The rows of all processes of the default group, and where these are among them."""
        tensors, own = of_all_processes(*self)
        return Evidence(*tensors), own
