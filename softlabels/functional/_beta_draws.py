"""Draws from Beta(a, 1), one per row, ascending in the order of the rows' confidence (paper sec. 6).

A Beta(a, 1) draw is U ** (1 / a), so it is enough to order uniforms, and ordered uniforms need no sort: the partial
sums of m + 1 exponentials over their total are m ascending uniforms. float64 keeps the sums ascending.

On a CPU this is done in numpy: where rows are few, operations of torch take longer to start than numpy's to end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabels import kernels
from softlabels.functional._rows import Rows

Draws = Tensor | NDArray[np.float64]


def two_levels(
    draws: Draws, alpha: float, rows: Rows, weight: kernels.Coefficient = 1.0
) -> tuple[kernels.Coefficient, kernels.Coefficient]:
    """What the label has more than other classes, and what every class has (sec. 6 in Eq. 3), times a weight."""
    if rows.num_classes == 1:
        return weight, 0.0
    share = (1.0 - alpha) / (rows.num_classes - 1)
    uniform = share - share * draws
    hard = 1.0 - rows.num_classes * uniform
    if not isinstance(weight, Tensor):
        hard, uniform, weight = weight * hard, weight * uniform, 1.0
    return kernels.times(weight, _to_rows(hard, rows)), kernels.times(weight, _to_rows(uniform, rows))


def _to_rows(values: Draws, rows: Rows) -> Tensor:
    """Row-shaped, in the working dtype."""
    dtype = kernels.working_dtype(rows.logits)
    if isinstance(values, Tensor):
        return values.to(dtype)
    if dtype == torch.float32:
        values = values.astype(np.float32)
    return torch.from_numpy(values)


def beta_draws(
    rows: Rows,
    confidence: Tensor | None,
    concentration: float,
    generator: torch.Generator | None,
    *,
    joint: bool = False,
) -> Draws:
    """One Beta(concentration, 1) draw per row, in the order of the confidence or, without one, at random."""
    device = rows.logits.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if confidence is None:
        return _rand(rows.shape, dtype, device, generator) ** (1.0 / concentration)
    score = rows.row_argument("confidence", confidence).detach()
    if not joint and kernels.can_be_numpy(score):
        return _by_numpy(score, rows.kept, _rand((score.numel() + 1,), dtype, device, generator), concentration)
    if not score.is_floating_point():
        score = score.to(dtype)
    limit = torch.finfo(score.dtype).max
    score = score.nan_to_num(nan=-limit, posinf=limit, neginf=-limit)
    if rows.kept is not None:
        score = score.masked_fill(~rows.kept, torch.inf)  # behind all kept rows
    draw = _joint_uniforms if joint else _ordered_uniforms
    return draw(score.flatten(), dtype, generator).view(rows.shape) ** (1.0 / concentration)


def _by_numpy(score: Tensor, kept: Tensor | None, source: Tensor, concentration: float) -> NDArray[np.float64]:
    """Of n + 1 uniforms, which m + 1 make those of the m kept rows, as in `_hand_out`."""
    values = kernels.to_numpy(score)
    chosen = None if kept is None else kept.numpy()
    ranked = values.ravel() if chosen is None else values[chosen]
    if ranked.size and ranked.dtype.kind == "f" and np.isnan(ranked.max()):
        ranked = np.where(np.isnan(ranked), -np.inf, ranked)
    sums = np.log1p(-source.numpy()[: ranked.size + 1]).cumsum()
    draws = np.empty(ranked.size)
    draws[ranked.argsort(kind="stable")] = (sums[:-1] / sums[-1]) ** (1.0 / concentration)
    if chosen is None:
        return draws.reshape(values.shape)
    result = np.zeros(values.shape)
    result[chosen] = draws
    return result


def _rand(shape: Sequence[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator | None) -> Tensor:
    if generator is None:  # torch.compile cannot trace the keyword with a varying number of rows, even where it is None
        return torch.rand(shape, dtype=dtype, device=device)
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(
            "softlabels: a generator cannot be traced; leave generator=None, or allow graph breaks (fullgraph=False)"
        )
    return torch.rand(shape, dtype=dtype, device=device, generator=generator)


def _ordered_uniforms(score: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Independent uniforms handed out in ascending order of the score; rows of infinite score are not drawn for."""
    return _hand_out(score, _rand((score.numel() + 1,), dtype, score.device, generator))


def _hand_out(score: Tensor, source: Tensor) -> Tensor:
    """Turn n + 1 uniforms into the order statistics of one uniform per row of finite score, in the order of the scores.

    Nothing is sorted but the scores. The total of the sums is read at position m, so that nothing waits for the value
    of m.
    """
    order = score.argsort(stable=True)
    sums = (-torch.log1p(-source)).cumsum(0)
    count = (score < torch.inf).sum()
    ascending = (sums[:-1] / sums.gather(0, count.view(1))).clamp(max=1.0)
    return torch.zeros_like(ascending).scatter(0, order, ascending)


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
    source = _rand((world * length + 1,), dtype, score.device, generator)
    torch.distributed.broadcast(source, 0)
    return _hand_out(torch.cat(gathered), source)[rank * length :][: score.numel()]
