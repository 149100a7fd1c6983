"""The two levels of Beta smoothing: draws from Beta(a, 1), ascending in the order of the rows' confidence (sec. 6).

A Beta(a, 1) draw is U ** (1 / a), so it is enough to order uniforms. On a CPU they are sorted, in numpy where that can
be: where rows are few, operations of torch take longer to start than numpy's to end. On an accelerator a sort takes
more kernels than it takes to make them in order: the partial sums of m + 1 exponentials over their total are m
ascending uniforms. float64 keeps the sums ascending.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabels import kernels
from softlabels.functional._rows import Rows


class Levels(NamedTuple):
    """Soft labels as the row kernel takes them: ``hard`` times the label and ``uniform`` for every class."""

    hard: kernels.Coefficient
    uniform: kernels.Coefficient
    total: float | None = None  # hard + K uniform, where that is one number


def two_levels(
    rows: Rows,
    confidence: Tensor | None,
    alpha: float,
    concentration: float,
    generator: torch.Generator | None,
    *,
    weight: kernels.Coefficient = 1.0,
    joint: bool = False,
) -> Levels:
    """Soft labels of newly drawn amounts (sec. 6 in Eq. 3), times a weight.

    Without a confidence, draws are handed out at random.
    """
    logits = rows.logits
    num_classes = logits.shape[1]
    if num_classes == 1:
        return Levels(weight, 0.0)
    amount = 1.0
    if not isinstance(weight, Tensor):
        amount, weight = weight, 1.0
    share = amount * (1.0 - alpha) / (num_classes - 1)
    if confidence is not None:
        confidence = rows.row_argument("confidence", confidence)
        if not joint and rows.readable and kernels.has_numbers(confidence):
            return _by_numpy(rows, confidence, concentration, generator, share, amount, weight)
    draws = _draws(rows, confidence, concentration, generator, joint)
    uniform = (share - share * draws).to(kernels.working_dtype(logits))
    return _levels(amount - num_classes * uniform, uniform, amount, weight)


def _levels(hard: Tensor, uniform: Tensor, amount: float, weight: kernels.Coefficient) -> Levels:
    """Levels whose total is ``amount``, times a weight."""
    total = None if isinstance(weight, Tensor) else amount
    return Levels(kernels.times(weight, hard), kernels.times(weight, uniform), total)


def _by_numpy(
    rows: Rows,
    score: Tensor,
    concentration: float,
    generator: torch.Generator | None,
    share: float,
    amount: float,
    weight: kernels.Coefficient,
) -> Levels:
    """As `two_levels` with the draws of `_draws`."""
    kept = rows.kept
    values = kernels.to_numpy(score)
    ranked = values.ravel() if kept is None else values[kept.numpy()]
    order, draws = ascending(ranked, values.size, concentration, generator)
    uniform: NDArray[np.floating[Any]] = np.full(values.size, share, numpy_dtype(rows.logits))
    uniform[order if kept is None else np.flatnonzero(kept.numpy())[order]] = share - share * draws
    hard = torch.from_numpy((amount - rows.num_classes * uniform).reshape(values.shape))
    return _levels(hard, torch.from_numpy(uniform.reshape(values.shape)), amount, weight)


def numpy_dtype(logits: Tensor) -> type[np.floating[Any]]:
    """What numpy calls the working dtype."""
    return np.float64 if kernels.working_dtype(logits) == torch.float64 else np.float32


def ascending(
    scores: NDArray[Any], drawn: int, concentration: float, generator: torch.Generator | None
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Positions of the scores in ascending order, nan first, and as many Beta draws in ascending order.

    ``drawn`` uniforms are drawn, the last of which may not be needed.
    """
    order = scores.argsort(kind="stable")
    if scores.size and math.isnan(scores.item(order.item(-1))):  # sorted behind all else
        order = np.where(np.isnan(scores), -np.inf, scores).argsort(kind="stable")
    uniforms = np.empty(drawn)
    torch.from_numpy(uniforms).uniform_(generator=generator)
    draws = uniforms[: scores.size]
    draws.sort()
    draws **= 1.0 / concentration
    return order, draws


def _draws(
    rows: Rows, score: Tensor | None, concentration: float, generator: torch.Generator | None, joint: bool
) -> Tensor:
    """One Beta(concentration, 1) draw per row; 0 for ignored rows."""
    device = rows.logits.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if score is None:
        return _rand(rows.shape, dtype, device, generator) ** (1.0 / concentration)
    score = score.detach()
    if not score.is_floating_point():
        score = score.to(dtype)
    limit = torch.finfo(score.dtype).max
    score = score.nan_to_num(nan=-limit, posinf=limit, neginf=-limit)
    if rows.kept is not None:
        score = score.masked_fill(~rows.kept, torch.inf)  # behind all kept rows
    draw = _joint_uniforms if joint else _ordered_uniforms
    return draw(score.flatten(), dtype, generator).view(rows.shape) ** (1.0 / concentration)


def _rand(shape: Sequence[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator | None) -> Tensor:
    if generator is None:  # torch.compile cannot trace the keyword with a varying number of rows, even where it is None
        return torch.rand(shape, dtype=dtype, device=device)
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(
            "softlabels: a generator cannot be traced; leave generator=None, or allow graph breaks (fullgraph=False)"
        )
    return torch.rand(shape, dtype=dtype, device=device, generator=generator)


def _ordered_uniforms(score: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Independent uniforms handed out in ascending order of the score; 0 for rows of infinite score."""
    return _hand_out(score, _rand((_needed(score),), dtype, score.device, generator))


def _needed(score: Tensor) -> int:
    """How many uniforms are drawn for so many rows."""
    return score.numel() if score.device.type == "cpu" else score.numel() + 1


def _hand_out(score: Tensor, source: Tensor) -> Tensor:
    """Give the first rows of ``source``, one for each row of finite score, to these in the order of the scores.

    Nothing waits for the value of their number.
    """
    order = score.argsort(stable=True)
    count = (score < torch.inf).sum()
    ascending = sorted_uniforms(source, count) if score.device.type == "cpu" else summed_uniforms(source, count)
    return torch.zeros_like(ascending).scatter(0, order, ascending)


def sorted_uniforms(source: Tensor, count: Tensor) -> Tensor:
    """The first ``count`` of n uniforms in ascending order, then zeros."""
    left_out = torch.arange(source.numel(), device=source.device) >= count
    return source.masked_fill(left_out, 1.0).sort().values.masked_fill(left_out, 0.0)


def summed_uniforms(source: Tensor, count: Tensor) -> Tensor:
    """The order statistics of ``count`` uniforms, made of n + 1; the other n - ``count`` numbers mean nothing."""
    sums = (-torch.log1p(-source)).cumsum(0)
    return (sums[:-1] / sums.gather(0, count.view(1))).clamp(max=1.0)


def _joint_uniforms(score: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """As `_ordered_uniforms` over the rows of all processes of the default group; uneven row counts are padded."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return _ordered_uniforms(score, dtype, generator)
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    largest = torch.tensor(score.numel(), device=score.device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    length = int(largest)
    score = score.to(dtype)  # processes may have been given confidences of different dtypes
    padded = score.new_full((length,), torch.inf)
    padded[: score.numel()] = score
    gathered = [torch.empty_like(padded) for _ in range(world)]
    torch.distributed.all_gather(gathered, padded)
    everyone = torch.cat(gathered)
    source = _rand((_needed(everyone),), dtype, score.device, generator)
    torch.distributed.broadcast(source, 0)
    return _hand_out(everyone, source)[rank * length :][: score.numel()]
