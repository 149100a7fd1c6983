"""What the row kernels know of a row before they know its soft label."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softlabels.kernels.soft_label import working_dtype


@dataclass(eq=False)
class Statistics:
    """Row-shaped numbers, in the working dtype and without a graph; and what else was left over in finding them.

    Args:
        largest: The row's largest logit.
        others: sum_c exp(x_c - largest) over all classes but one that has the largest logit. Where the prediction is
            nearly sure, it keeps the digits that a probability near 1 loses.
        softmax: Where a gradient can be written over it: softmax(x), in a tensor that belongs to nobody else.
        log_p: log_softmax(x) with its graph.
        count: How many logits are not -inf, where a graph of an accelerator found that too.
        below: The sum of what they are below the largest.
    """

    largest: Tensor
    others: Tensor
    softmax: Tensor | None = None
    log_p: Tensor | None = None
    count: Tensor | None = None
    below: Tensor | None = None

    @property
    def log_sum(self) -> Tensor:
        """The logarithm of the sum of exponentials above the largest logit."""
        return self.others.log1p()


def statistics(logits: Tensor) -> Statistics:
    """Statistics by operations that can be traced."""
    x = logits.detach().to(working_dtype(logits))
    largest = x.amax(1)
    is_largest = x == largest.unsqueeze(1)
    exponentials = (x - largest.unsqueeze(1)).exp().masked_fill(is_largest, 0.0)
    return Statistics(largest, exponentials.sum(1) + (is_largest.sum(1) - 1))


def statistics_with_log_p(logits: Tensor) -> Statistics:
    """The same of few or traced logits, for a formula that goes on with ``log_p``."""
    log_p = torch.log_softmax(logits, 1, dtype=working_dtype(logits))
    known = statistics(log_p)
    return Statistics(logits.detach().to(log_p.dtype).amax(1), known.others, log_p=log_p)
