"""How sure a prediction is, as a number to order rows by."""

from __future__ import annotations

import torch
from torch import Tensor

from softlabels import kernels
from softlabels.kernels import LinearLogits

RANK_BY = ("max", "true_class")


def log_odds(
    logits: Tensor | LinearLogits,
    target: Tensor,
    rank_by: str,
    known: kernels.Statistics | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """Log-odds log(c / (1 - c)) of the confidence c of each row; shape (N, d1, ...), at least float32.

    Ordering by log-odds is ordering by confidence, but where float32 confidences round to 1 and would tie, their
    log-odds still differ.

    Args:
        logits: (N, K) or (N, K, d1, ...); LinearLogits (N, K) are computed block by block.
        target: Class indices of row shape, or class probabilities of the shape of ``logits``. Indices outside
            [0, K), such as ignore_index, give a meaningless but valid score.
        rank_by: ``"max"``: c is the largest class probability (paper sec. 6). ``"true_class"``: c is the probability
            of the label (the paper's published scripts); for class probabilities y as the target, sum_c y_c p_c.
        known: Statistics of the logits, if somebody has them.
        counted: False for rows of LinearLogits that need no score, and get 0.
    """
    if isinstance(logits, LinearLogits):
        return kernels.by_blocks(lambda x, y: log_odds(x, y, rank_by), logits, target, counted=counted)
    with torch.no_grad():
        known = kernels.statistics(logits.detach()) if known is None else known
        if rank_by == "max":
            of_largest: Tensor = kernels.fused(_log_odds_of_largest, known.others)
            return of_largest
        logits, dtype = logits.detach(), known.largest.dtype
        if target.is_floating_point():
            return torch.logit((target * logits.softmax(1, dtype=dtype)).sum(1))
        target = target.long().clamp(0, logits.shape[1] - 1)
        at_label = logits.gather(1, target.unsqueeze(1)).squeeze(1).to(dtype)
        of_label: Tensor = kernels.fused(_log_odds_of_label, at_label, known.largest, known.others)
        return of_label


def _log_odds_of_label(logit: Tensor, largest: Tensor, others: Tensor) -> Tensor:
    below = logit - largest
    return below - (others - below.expm1()).log()


def _log_odds_of_largest(others: Tensor) -> Tensor:
    return -others.log()
