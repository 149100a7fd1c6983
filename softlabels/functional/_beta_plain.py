"""Beta smoothing as almost everybody calls it, in the fewest steps: of few logits, steps are all that takes time."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabels import kernels
from softlabels.functional._beta_draws import ascending, numpy_dtype
from softlabels.functional._checks import REDUCTIONS

_INT64 = np.dtype(np.int64)
_NO_ZERO = 1e-3  # the least alpha with which no rounding makes the label's part of a soft label 0


def plain_loss(
    input: Tensor,
    target: Tensor,
    confidence: Tensor,
    alpha: float,
    concentration: float,
    generator: torch.Generator | None,
    ignore_index: int,
    reduction: str,
) -> Tensor | None:
    """The loss of (N, K) logits on a CPU of which every row counts, and as much as the others.

    None where anything is otherwise, or where an argument is wrong: nothing is drawn then. The draws are those of
    `two_levels`.
    """
    if not kernels.is_plain(input, target, confidence) or not input.is_cpu or input.dim() != 2:
        return None
    count, num_classes = input.shape
    try:
        labels, scores = target.numpy(), confidence.numpy()
    except (TypeError, RuntimeError):  # of a dtype or device that numpy has not, or with a graph
        return None
    if not (
        input.is_floating_point()
        and labels.dtype is _INT64
        and labels.shape == scores.shape == (count,)
        and scores.dtype.kind == "f"
        and count > 0
        and num_classes > 1
        and type(alpha) is float
        and 0.0 <= alpha <= 1.0
        and type(concentration) is float
        and concentration > 0.0
        and type(ignore_index) is int
        and not 0 <= ignore_index < num_classes
        and reduction in REDUCTIONS
        and labels.item(labels.argmin()) >= 0
        and labels.item(labels.argmax()) < num_classes
    ):
        return None
    amount = -1.0 / count if reduction == "mean" else -1.0
    share = amount * (1.0 - alpha) / (num_classes - 1)
    order, draws = ascending(scores, count, concentration, generator)
    uniform = np.empty((count, 1), numpy_dtype(input))
    uniform.put(order, share - share * draws)
    reduce = reduction != "none"
    if input.numel() <= kernels.FEW and _NO_ZERO < alpha < 1.0 and draws.item(-1) < 1.0:
        soft = uniform.repeat(num_classes, 1)
        soft.put(_starts(count, num_classes) + labels, amount - (num_classes - 1) * uniform)
        return kernels.dense_label(input, torch.from_numpy(soft), reduce=reduce)
    uniform = uniform.ravel()
    hard = torch.from_numpy(amount - num_classes * uniform)
    return kernels.two_level(input, target, hard, torch.from_numpy(uniform), total=amount, reduce=reduce, plain=True)


@functools.lru_cache(maxsize=4)
def _starts(count: int, num_classes: int) -> NDArray[np.int64]:
    return np.arange(0, count * num_classes, num_classes)
