"""The row kernels' values and gradients in closed form, without a graph, in plain PyTorch.

d/dx_c sum_j t_j log p_j = t_c - p_c sum_j t_j. On a CPU the work is done for as many rows at a time as stay in its
cache, so that memory sees the logits read once and the gradient written once, and holds nothing else of their size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from softlabels.kernels import formula
from softlabels.kernels.soft_label import Coefficient, SoftLabel, column, is_number, product, working_dtype

BLOCK = 2**20  # elements of the rows that are worked on together: 4 MiB in float32, and two temporaries of that size
SMALL = 2**16  # a tensor of so few elements is done faster by few operations than by fast ones


def values(label: SoftLabel, logits: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """sum_c t_c log p_c per row, and nothing that would help to find the gradient."""
    parts = [_values(label.rows(rows), logits[rows]) for rows in _blocks(logits)]
    return torch.cat(parts) if parts else _values(label, logits), ()


def total_and_gradient(label: SoftLabel, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the values of all rows and its gradient, in the dtype of the logits."""
    blocks = list(_blocks(logits))
    if not blocks:
        return _block(label, logits, None)
    gradient = torch.empty_like(logits)
    totals = [_block(label.rows(rows), logits[rows], gradient[rows])[0] for rows in blocks]
    return torch.stack(totals).sum(), gradient


def gradient(label: SoftLabel, logits: Tensor, incoming: Tensor, known: tuple[Tensor, ...]) -> Tensor:
    """The gradient of the sum of the values, each times ``incoming``, in the dtype of the logits."""
    return total_and_gradient(label.scaled(incoming), logits)[1]


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Rows to work on in turn; none where all are done at once: few of them, or not on a CPU."""
    count = logits.shape[0]
    if logits.device.type == "cpu" and logits.numel() > BLOCK and count > 1:
        block = max(BLOCK * count // logits.numel(), 1)
        yield from (slice(start, start + block) for start in range(0, count, block))


def _values(label: SoftLabel, logits: Tensor) -> Tensor:
    if logits.device.type == "cpu":
        result = formula.log_likelihood(label, logits, careful=False)
        if not math.isnan(result.sum().item()):
            return result
    return formula.log_likelihood(label, logits, careful=True)


def _block(label: SoftLabel, logits: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    few_operations = logits.numel() <= SMALL or logits.device.type != "cpu"
    work = _by_few_operations if few_operations else _by_fast_operations
    if logits.device.type == "cpu":
        total, gradient = work(label, logits, out, careful=False)
        if not math.isnan(total.item()):
            return total, gradient
    return work(label, logits, out, careful=True)


def _by_few_operations(label: SoftLabel, logits: Tensor, out: Tensor | None, careful: bool) -> tuple[Tensor, Tensor]:
    dtype = working_dtype(logits)
    log_p = torch.log_softmax(logits, 1, dtype=dtype)
    soft = _dense(label, log_p, careful)
    gradient = torch._log_softmax_backward_data(soft, log_p, 1, dtype)
    return product(soft, log_p, careful).sum(), _written(gradient, logits, out)


def _by_fast_operations(label: SoftLabel, logits: Tensor, out: Tensor | None, careful: bool) -> tuple[Tensor, Tensor]:
    """One softmax is the only slow pass: log p_c = x_c - max x + log max p, and a uniform rest is not spread out."""
    dtype = working_dtype(logits)
    shifted = torch.sub(logits.to(dtype), logits.amax(1, keepdim=True))
    p = torch.softmax(shifted, 1, out=out if out is not None and out.dtype == dtype else torch.empty_like(shifted))
    log_p_max = p.amax(1).log_()
    value, mass, rest, of_index = formula.parts(label, shifted, careful)
    total = value.sum() + product(mass, log_p_max, careful).sum()
    p.mul_(-column(mass))
    if not is_number(rest, 0.0):
        p.add_(rest)
    if not is_number(of_index, 0.0):
        p.scatter_add_(1, *_at_label(label.target, of_index, p))
    return total, _written(p, logits, out)


def _dense(label: SoftLabel, like: Tensor, careful: bool) -> Tensor:
    """The soft label of every class, not to be written to."""
    rest, of_index = label.rest(careful), label.of_index
    if not isinstance(rest, Tensor):
        rest = like.new_full((), rest)
    rest = rest.expand(like.shape)
    if is_number(of_index, 0.0):
        return rest
    return torch.scatter_add(rest, 1, *_at_label(label.target, of_index, like))


def _at_label(target: Tensor, amount: Coefficient, like: Tensor) -> tuple[Tensor, Tensor]:
    """Where in the rows to add how much."""
    index = target.unsqueeze(1)
    share = column(amount)
    return index, (share if isinstance(share, Tensor) else like.new_full((), share)).expand(index.shape)


def _written(gradient: Tensor, logits: Tensor, out: Tensor | None) -> Tensor:
    if out is None or out is gradient:
        return gradient.to(logits.dtype)
    return out.copy_(gradient)
