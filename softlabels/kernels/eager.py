"""The row kernels' values and gradients in closed form, without a graph, in plain PyTorch.

d/dx_c sum_j t_j log p_j = t_c - p_c sum_j t_j. On a CPU the work is done for as many rows at a time as stay in its
cache, so that memory sees the logits read once and the gradient written once, and holds nothing else of their size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softlabels.kernels import formula
from softlabels.kernels.soft_label import Coefficient, SoftLabel, column, is_number, plus, product, working_dtype

BLOCK = 2**20  # elements of the rows that are worked on together: 4 MiB in float32, and two temporaries of that size
IN_PLACE_BLOCK = 2**22  # the same where there are no temporaries
NEAR = 32.0  # the largest logit of every row is at most so far from 0 where nothing is subtracted from them


def values(label: SoftLabel, logits: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """sum_c t_c log p_c per row, and nothing that would help to find the gradient."""
    blocks = _blocks(logits, BLOCK)
    if not blocks:
        return _values(label, logits), ()
    return torch.cat([_values(label.rows(rows), logits[rows]) for rows in blocks]), ()


def total_and_gradient(label: SoftLabel, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the values of all rows and its gradient, in the dtype of the logits."""
    in_place = not label.is_spread and logits.dtype == working_dtype(logits)
    blocks = _blocks(logits, IN_PLACE_BLOCK if in_place else BLOCK)
    if not blocks:
        return _block(label, logits, None)
    gradient = torch.empty_like(logits)
    totals = [_block(label.rows(rows), logits[rows], gradient[rows])[0] for rows in blocks]
    return torch.stack(totals).sum(), gradient


def gradient(label: SoftLabel, logits: Tensor, incoming: Tensor, known: tuple[Tensor, ...]) -> Tensor:
    """The gradient of the sum of the values, each times ``incoming``, in the dtype of the logits."""
    return total_and_gradient(label.scaled(incoming), logits)[1]


def _blocks(logits: Tensor, elements: int) -> list[slice]:
    """Rows to work on in turn; none where all are done at once: few of them, or not on a CPU."""
    count = logits.shape[0]
    if logits.numel() <= elements or count <= 1 or logits.device.type != "cpu":
        return []
    block = max(elements * count // logits.numel(), 1)
    return [slice(start, start + block) for start in range(0, count, block)]


def _values(label: SoftLabel, logits: Tensor) -> Tensor:
    if logits.device.type == "cpu":
        result = formula.log_likelihood(label, logits, careful=False)
        if not math.isnan(result.sum().item()):
            return result
    return formula.log_likelihood(label, logits, careful=True)


def _block(label: SoftLabel, logits: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    if logits.device.type != "cpu":
        return _by_few_operations(label, logits, out)
    total, gradient = _by_fast_operations(label, logits, out)
    if not math.isnan(total.item()):
        return total, gradient
    return _carefully(label, logits, out)


def _by_few_operations(label: SoftLabel, logits: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = working_dtype(logits)
    log_p = torch.log_softmax(logits, 1, dtype=dtype)
    soft = formula.dense(label, log_p, careful=True)
    gradient = torch._log_softmax_backward_data(soft, log_p, 1, dtype)
    return product(soft, log_p, careful=True).sum(), _written(gradient, logits, out)


def _by_fast_operations(label: SoftLabel, logits: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """One softmax is the only slow pass: log p_c = x_c - max x + log max p, and a uniform rest is not spread out.

    The row's largest logit is subtracted from all others first, or sums over classes would lose digits; but not where
    it is near 0 and these sums make a small part of the total. All row-shaped numbers are columns.
    """
    x = logits.to(working_dtype(logits))
    largest = x.amax(1, keepdim=True)
    if label.is_spread or not _near(largest):
        x = x - largest
        largest = torch.zeros_like(largest)
    p = _softmax(x, out)
    log_p_max = p.amax(1, keepdim=True).log_()
    log_sum = largest - log_p_max
    num_classes = x.shape[1]
    rest, of_index = label.rest(careful=False), column(label.of_index)
    mass: Coefficient | None = label.mass(num_classes)
    total: Coefficient = 0.0
    of_rest: Coefficient = 0.0
    if not is_number(rest, 0.0):
        rest = rest if isinstance(rest, Tensor) else torch.full_like(largest, rest)
        if rest.dim() and rest.shape[1] > 1:
            of_rest = rest.expand(x.shape).sum(1, keepdim=True) if mass is None else mass - of_index
            total = ((rest * x).sum(1, keepdim=True) - of_rest * log_sum).sum()
        else:
            of_rest = rest * num_classes if mass is None else 0.0
            total = (rest * torch.sub(x.sum(1, keepdim=True), log_sum, alpha=num_classes)).sum()
    if not is_number(of_index, 0.0):
        at_label = formula.at_label(label.target, label.of_index, p)
        total = plus(total, (of_index * (x.gather(1, at_label[0]) - largest + log_p_max)).sum())
    mass = plus(of_rest, of_index) if mass is None else mass
    if isinstance(rest, Tensor) and not isinstance(mass, Tensor):
        torch.add(rest, p, alpha=-mass, out=p)
    else:
        p.mul_(-mass)
        if isinstance(rest, Tensor):
            p.add_(rest)
    if not is_number(of_index, 0.0):
        p.scatter_add_(1, *at_label)
    return total if isinstance(total, Tensor) else x.new_full((), total), _written(p, logits, out)


def _carefully(label: SoftLabel, logits: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same where a coefficient of 0 meets something that is not finite."""
    x = logits.to(working_dtype(logits))
    x = x - x.amax(1, keepdim=True)
    p = _softmax(x, out)
    log_p_max = p.amax(1).log_()
    value, mass, rest, of_index = formula.parts(label, x)
    total = value.sum() + product(mass, log_p_max, careful=True).sum()
    p.mul_(-column(mass)).add_(rest)
    if not is_number(of_index, 0.0):
        p.scatter_add_(1, *formula.at_label(label.target, of_index, p))
    return total, _written(p, logits, out)


def _near(largest: Tensor) -> bool:
    least, greatest = largest.aminmax()
    return least.item() >= -NEAR and greatest.item() <= NEAR


def _softmax(x: Tensor, out: Tensor | None) -> Tensor:
    return torch.softmax(x, 1, out=out if out is not None and out.dtype == x.dtype else torch.empty_like(x))


def _written(gradient: Tensor, logits: Tensor, out: Tensor | None) -> Tensor:
    if out is None or out is gradient:
        return gradient.to(logits.dtype)
    return out.copy_(gradient)
