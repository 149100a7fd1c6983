"""Numbers in order: random amounts that fall as a score rises, and the largest logits of a row.

On a CPU numpy sorts: it starts sooner than torch's sort and its partition takes a tenth of the time of topk. Where
reading would wait, or somebody traces, torch's operations give the same numbers without a look at them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabels._processes import of_all_processes
from softlabels._reading import break_graph, can_read

COUNTED = 2**13  # rows up to which comparing each with each takes a GPU less time than to start a sort
Amount = float | Tensor


def uniforms(shape: torch.Size, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Independent uniforms in [0, 1), in float64 where the device has it."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if generator is None:  # torch.compile cannot trace the keyword with a varying number of rows, even where it is None
        return torch.rand(shape, dtype=dtype, device=device)
    if torch.compiler.is_compiling():
        break_graph(
            "softlabels: a generator cannot be traced; leave generator=None, or allow graph breaks (fullgraph=False)"
        )
    return torch.rand(shape, dtype=dtype, device=device, generator=generator)


def ranked_amounts(
    fuses: Callable[[Tensor], bool],
    fused: Callable[..., Tensor],
    most: float,
    power: float,
    score: Tensor,
    kept: Tensor | None,
    generator: torch.Generator | None,
    dtype: torch.dtype,
    *,
    joint: bool = False,
) -> Tensor:
    """Amounts most (1 - u^power), row-shaped: independent uniforms u ascend with the scores of the kept rows.

    Equal scores go by position. A nan is below all numbers; where every kept score is nan, so is every amount. With
    ``joint`` the rows of all processes of the default group are ordered together. Where ``fuses`` says so, few rows are
    not sorted: ``fused`` calls a function of rows as one graph.
    """
    if not joint and score.numel() <= COUNTED and fuses(score):
        exponentials = torch.empty(score.numel() + 1, dtype=torch.float64, device=score.device)
        exponentials.exponential_(generator=generator)
        return fused(counted_amounts, most, power, score, kept, exponentials, dtype)
    if not joint and can_read(score) and (kept is None or can_read(kept)):
        return _by_numpy(most, power, score, kept, generator, dtype)
    if joint and torch.distributed.is_available() and torch.distributed.is_initialized():
        ascending = _of_all_processes(score, kept, generator)
    else:
        places = score.numel() if score.device.type == "cpu" else score.numel() + 1
        source = uniforms(torch.Size((places,)), score.device, generator)
        ascending = _hand_out(score.flatten(), None if kept is None else kept.flatten(), source).view(score.shape)
    return unranked_amounts(most, power, ascending, dtype)


def unranked_amounts(most: Amount, power: Amount, uniforms: Tensor, dtype: torch.dtype) -> Tensor:
    """Amounts most (1 - u^power)."""
    return (most - most * uniforms**power).to(dtype)


def counted_amounts(
    most: Amount, power: Amount, score: Tensor, kept: Tensor | None, exponentials: Tensor, dtype: torch.dtype
) -> Tensor:
    """The amounts of `ranked_amounts` without a sort, for graphs that store nothing: n rows take n^2 comparisons.

    The partial sums of m + 1 exponentials over their total are m ascending uniforms, whichever exponential comes
    first. So each row has its own, and its uniform is the sum over the rows up to its own place.

    The arguments are those of `ranked_amounts`, with n + 1 independent exponentials in the place of a generator.
    """
    scores = score.detach().flatten()
    counted = torch.ones_like(scores, dtype=torch.bool) if kept is None else kept.flatten()
    known = ~scores.isnan()
    scores = scores.masked_fill(~known, -torch.inf)
    places = torch.arange(scores.shape[0], device=scores.device)
    equal, first = scores.unsqueeze(0) == scores.unsqueeze(1), places.unsqueeze(0) <= places.unsqueeze(1)
    before = (scores.unsqueeze(0) < scores.unsqueeze(1)) | (equal & first)
    own = torch.where(counted, exponentials[:-1], 0.0)
    ascending = torch.where(before, own.unsqueeze(0), 0.0).sum(1) / (own.sum() + exponentials[-1])
    ascending = torch.where((known & counted).any(), ascending.clamp(max=1.0), torch.nan)
    return unranked_amounts(most, power, torch.where(counted, ascending, 0.0), dtype).view(score.shape)


def _by_numpy(
    most: float,
    power: float,
    score: Tensor,
    kept: Tensor | None,
    generator: torch.Generator | None,
    dtype: torch.dtype,
) -> Tensor:
    scores = _numbers(score).ravel()
    places = None if kept is None else np.flatnonzero(kept.numpy())
    if places is not None:
        scores = scores[places]
    order = scores.argsort(kind="stable")
    drawn = np.empty(score.numel())
    torch.from_numpy(drawn).uniform_(generator=generator)
    ascending = drawn[: scores.size]
    ascending.sort()
    if scores.size and math.isnan(scores.item(order.item(-1))):  # sorted behind all else
        if math.isnan(scores.item(order.item(0))):
            ascending[:] = np.nan
        order = np.where(np.isnan(scores), -np.inf, scores).argsort(kind="stable")
    amounts = np.full(score.shape, most, np.float64 if dtype == torch.float64 else np.float32)
    amounts.put(order if places is None else places[order], most - most * ascending**power)
    return torch.from_numpy(amounts)


def _hand_out(score: Tensor, kept: Tensor | None, source: Tensor) -> Tensor:
    """Give uniforms made of ``source`` to the kept rows, in the order of their scores; 0 to all others."""
    score = score.detach()
    if not score.is_floating_point():
        score = score.to(source.dtype)
    kept = torch.ones_like(score, dtype=torch.bool) if kept is None else kept
    lost = (score.isnan() | ~kept).all()
    limit = torch.finfo(score.dtype).max
    score = score.nan_to_num(nan=-limit, posinf=limit, neginf=-limit).masked_fill(~kept, torch.inf)
    order, count = score.argsort(stable=True), kept.sum()
    ascending = sorted_uniforms(source, count) if score.device.type == "cpu" else summed_uniforms(source, count)
    handed_out = torch.zeros_like(ascending).scatter(0, order, ascending)
    return torch.where(kept, torch.where(lost, torch.nan, handed_out), 0.0)


def sorted_uniforms(source: Tensor, count: Tensor) -> Tensor:
    """The first ``count`` of n uniforms in ascending order, then zeros."""
    left_out = torch.arange(source.shape[0], device=source.device) >= count
    return source.masked_fill(left_out, 1.0).sort().values.masked_fill(left_out, 0.0)


def summed_uniforms(source: Tensor, count: Tensor) -> Tensor:
    """The order statistics of ``count`` uniforms without a sort; the other n - ``count`` numbers mean nothing.

    The partial sums of m + 1 exponentials over their total are m ascending uniforms; ``source`` has n + 1 uniforms.
    """
    sums = (-torch.log1p(-source)).cumsum(0)
    return (sums[:-1] / sums.gather(0, count.view(1))).clamp(max=1.0)


def _of_all_processes(score: Tensor, kept: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Uniforms in the order of the scores of all processes, which are those of process 0."""
    dtype = torch.float32 if score.device.type == "mps" else torch.float64  # processes may have scores of any dtype
    own_scores = score.detach().flatten().to(dtype)
    own_counted = torch.ones_like(own_scores) if kept is None else kept.flatten().to(dtype)
    (rows,), own = of_all_processes(torch.stack([own_scores, own_counted], 1))
    scores, counted = rows.unbind(1)
    places = len(scores) if scores.device.type == "cpu" else len(scores) + 1
    source = uniforms(torch.Size((places,)), score.device, generator)
    torch.distributed.broadcast(source, 0)
    return _hand_out(scores.contiguous(), counted > 0, source)[own].view(score.shape)


def prune(logits: Tensor, keep: int) -> Tensor:
    """-inf for all but the ``keep`` largest logits of each row; among equal ones the lower class index is kept.

    A row with a nan stays as it is, so that its softmax is nan.
    """
    if can_read(logits):
        place = logits.shape[1] - keep
        partitioned = np.partition(_numbers(logits), place, axis=1)[:, place : place + 1]
        threshold = torch.from_numpy(np.ascontiguousarray(partitioned)).to(logits.dtype)
    else:
        threshold = logits.topk(keep, dim=1, sorted=False).values.amin(1, keepdim=True)
    pruned = logits < threshold
    if not can_read(logits) or bool((pruned.sum(1) < logits.shape[1] - keep).any()):  # equal ones, or a nan
        level = logits == threshold
        room = keep - (logits > threshold).sum(1, keepdim=True)
        pruned |= level & (level.cumsum(1) > room)
    return logits.masked_fill(pruned, -torch.inf)


def kth_largest(logits: Tensor, keep: int) -> Tensor:
    """The smallest of the ``keep`` largest logits of each row, row-shaped; nothing of the logits' size is stored."""
    if torch.are_deterministic_algorithms_enabled():  # which kthvalue refuses, for its indices
        return logits.topk(keep, dim=1, sorted=False).values.amin(1)
    return logits.kthvalue(logits.shape[1] - keep + 1, dim=1).values


def last_kept(logits: Tensor, threshold: Tensor, keep: int) -> Tensor:
    """The highest class index that is kept of those whose logit is the threshold, row-shaped."""
    threshold = threshold.unsqueeze(1)
    level = logits == threshold
    room = keep - (logits > threshold).sum(1, keepdim=True)
    too_many = level.sum(1, keepdim=True) > room  # asked first, so that no graph stores ranks until it knows the room
    ranks = (level & too_many).cumsum(1, dtype=torch.int32)
    classes = torch.arange(logits.shape[1], device=logits.device).view(1, -1, *[1] * (logits.dim() - 2))
    return torch.where(level & (ranks <= room), classes, -1).amax(1)


def _numbers(tensor: Tensor) -> NDArray[Any]:
    tensor = tensor.detach()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    array: NDArray[Any] = tensor.numpy()
    return array
