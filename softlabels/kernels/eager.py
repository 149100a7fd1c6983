"""The row kernels in closed form, without a graph, in plain PyTorch.

On a CPU the work is done for as many rows at a time as stay in its cache, so that memory sees the logits read once and
the gradient written once, and holds nothing else of their size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softlabels.kernels import formula
from softlabels.kernels.soft_label import Amount, SoftLabel, column, product, working_dtype
from softlabels.kernels.statistics import Statistics
from softlabels.kernels.statistics import statistics as traceable_statistics

BLOCK = 2**20  # elements of the rows that are worked on together: 4 MiB in float32, and two temporaries of that size
IN_PLACE_BLOCK = 2**22  # the same where there are no temporaries
NEAR = 32.0  # the largest logit of every row is at most so far from 0 where nothing is subtracted from them
SURE = 0.99  # a confidence from which on its distance from 1 is summed rather than subtracted


def statistics(logits: Tensor, keep_softmax: bool) -> Statistics:
    """Statistics of all rows; on a CPU also their softmax, if it is asked for."""
    if logits.device.type != "cpu":
        return traceable_statistics(logits)
    softmax = torch.empty_like(logits) if keep_softmax else None
    parts = [
        _statistics(logits[rows], None if softmax is None else softmax[rows])
        for rows in _blocks(logits, IN_PLACE_BLOCK if keep_softmax else BLOCK)
    ]
    return Statistics(torch.cat([p.largest for p in parts]), torch.cat([p.others for p in parts]), softmax)


def values(label: SoftLabel, logits: Tensor) -> Tensor:
    """The loss of each row."""
    return torch.cat([_values(label.rows(rows), logits[rows]) for rows in _blocks(logits, BLOCK)])


def value_and_gradient(label: SoftLabel, logits: Tensor, known: Statistics | None = None) -> tuple[Tensor, Tensor]:
    """The sum of the losses of all rows, and its gradient in the dtype of the logits, over the known softmax."""
    given = None if known is None or known.softmax is None else known.log_sum
    result = torch.empty_like(logits) if known is None or known.softmax is None else known.softmax
    in_place = label.is_even and logits.dtype == working_dtype(logits)
    totals = [
        _value_and_gradient(label.rows(rows), logits[rows], result[rows], None if given is None else given[rows])
        for rows in _blocks(logits, IN_PLACE_BLOCK if in_place else BLOCK)
    ]
    return torch.stack(totals).sum(), result


def gradient(label: SoftLabel, logits: Tensor) -> Tensor:
    """The gradient alone."""
    return value_and_gradient(label, logits)[1]


def _blocks(logits: Tensor, elements: int) -> list[slice]:
    """Rows to work on in turn: all at once, where they are few or not on a CPU."""
    count = logits.shape[0]
    if logits.numel() <= elements or count <= 1 or logits.device.type != "cpu":
        return [slice(None)]
    block = max(elements * count // logits.numel(), 1)
    return [slice(start, start + block) for start in range(0, count, block)]


def _statistics(logits: Tensor, out: Tensor | None) -> Statistics:
    x, largest, _ = _near_zero(logits.to(working_dtype(logits)))
    p = torch.softmax(x, 1) if out is None else torch.softmax(x, 1, out=out)
    p_max = p.amax(1)
    others = p_max.reciprocal() - 1.0
    sure = p_max > SURE
    if bool(sure.any()):
        rows = p.movedim(1, -1)[sure]
        others[sure] = rows.masked_fill(rows > 0.5, 0.0).sum(1) / p_max[sure]
    return Statistics(largest, others)


def _near_zero(x: Tensor, even: bool = True) -> tuple[Tensor, Tensor, Amount]:
    """Logits less the row's largest; but as they are where that is near 0 and no digits would be lost.

    Sums over the classes would lose digits far from 0, and those of a confident row whose soft label is not even.

    Returns:
        The logits, the largest of each row, and the largest of each row of the result.
    """
    largest = x.amax(1)
    if even and largest.numel():
        least, greatest = largest.aminmax()
        if least.item() >= -NEAR and greatest.item() <= NEAR:
            return x, largest, largest
    return x - largest.unsqueeze(1), largest, 0.0


def _values(label: SoftLabel, logits: Tensor) -> Tensor:
    if logits.device.type == "cpu":
        rows = formula.cross_entropy(label, logits, reduce=False, careful=False)
        if math.isfinite(rows.sum().item()):
            return rows
    return formula.cross_entropy(label, logits, reduce=False)


def _value_and_gradient(label: SoftLabel, logits: Tensor, out: Tensor, log_sum: Tensor | None) -> Tensor:
    """The sum of the losses; the gradient is written to ``out``, where the softmax stands if ``log_sum`` is given."""
    if logits.device.type == "cpu":
        x, _, largest = _near_zero(logits.to(working_dtype(logits)), label.is_even)
        p = out if out.dtype == x.dtype else torch.empty_like(x)
        if log_sum is None:
            torch.softmax(x, 1, out=p)
            log_sum = -p.amax(1).log_()
        mass = label.mass(x)
        total = (label.weight * (mass * (log_sum + largest) - label.inner(x))).sum()
        if math.isfinite(total.item()):
            label.add_to(p, -label.weight, mass * label.weight, in_place=True)
            if p is not out:
                out.copy_(p)
            return total
    rows, gradient = _by_dense_label(label, logits)
    out.copy_(gradient)
    return rows.sum()


def _by_dense_label(label: SoftLabel, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and gradient in few operations, with care for impossible classes and rows that do not count."""
    dtype = working_dtype(logits)
    log_p = torch.log_softmax(logits, 1, dtype=dtype)
    possible = label.possible(logits)
    if label.follows_prediction:
        rows = product(label.weight, -label.inner(log_p, possible))
        gradient = label.add_to(log_p.exp(), -label.weight, label.mass(log_p, possible) * label.weight, possible)
    else:
        soft = label.dense(log_p, possible=possible)
        rows = product(label.weight, -product(soft, log_p).sum(1))
        gradient = torch._log_softmax_backward_data(-soft, log_p, 1, dtype) * column(label.weight)
    if isinstance(label.weight, Tensor) and label.weight.dim():
        gradient = gradient.masked_fill((label.weight == 0).unsqueeze(1), 0.0)
    return rows, gradient.to(logits.dtype)
