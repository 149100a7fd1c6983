"""How sure a prediction is, as a number to order rows by."""

from __future__ import annotations

import torch
from torch import Tensor

RANK_BY = ("max", "true_class")


def log_odds(logits: Tensor, target: Tensor, rank_by: str) -> Tensor:
    """Log-odds log(c / (1 - c)) of the confidence c of each row; shape (N, d1, ...), at least float32.

    Ordering by log-odds is ordering by confidence, but where float32 confidences round to 1 and would tie, their
    log-odds still differ.

    Args:
        logits: (K), (N, K) or (N, K, d1, ...).
        target: Class indices of row shape, or class probabilities of the shape of ``logits``. Indices outside
            [0, K), such as ignore_index, give a meaningless but valid score.
        rank_by: ``"max"``: c is the largest class probability (paper sec. 6). ``"true_class"``: c is the probability
            of the label (the paper's published scripts); for class probabilities y as the target, sum_c y_c p_c.
    """
    with torch.no_grad():
        class_dim = min(logits.dim() - 1, 1)
        logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        if rank_by == "true_class" and target.shape == logits.shape:
            return torch.logit((target * logits.softmax(class_dim)).sum(class_dim))
        if rank_by == "true_class":
            valid = (target >= 0) & (target < logits.shape[class_dim])
            chosen = torch.where(valid, target, 0).long()
            chosen = chosen.reshape(logits.shape[:class_dim] + logits.shape[class_dim + 1 :])
        else:
            chosen = logits.argmax(class_dim)
        chosen = chosen.unsqueeze(class_dim)
        others = logits.scatter(class_dim, chosen, -torch.inf).logsumexp(class_dim)
        return logits.gather(class_dim, chosen).squeeze(class_dim) - others
