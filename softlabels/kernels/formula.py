"""The row kernels as plain differentiable formulas: traceable, differentiable twice, and what all else must equal."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softlabels.kernels.soft_label import Coefficient, SoftLabel, is_number, product, times, working_dtype


def log_likelihood(label: SoftLabel, logits: Tensor, careful: bool = True) -> Tensor:
    """sum_c t_c log p_c per row; if ``careful``, 0 times anything is 0."""
    log_p = torch.log_softmax(logits, 1, dtype=working_dtype(logits))
    rest, of_index = label.rest(careful), label.of_index
    if is_number(of_index, 0.0):
        return product(rest, log_p, careful).sum(1)
    of_label = product(of_index, log_p.gather(1, label.target.unsqueeze(1)).squeeze(1), careful)
    if is_number(rest, 0.0):
        return of_label
    of_rest = product(rest, log_p, careful).sum(1)
    return add(of_label, of_rest) if careful else of_label + of_rest


def log_likelihood_of_few(label: SoftLabel, logits: Tensor, reduce: bool) -> Tensor | None:
    """As `log_likelihood`, or the sum of all rows, in the fewest operations; None where one must be careful.

    For tensors so small that operations take longer to start than to run. Their values must be readable.
    """
    log_p = torch.log_softmax(logits, 1, dtype=working_dtype(logits))
    soft = dense(label, log_p, careful=False)
    result = weighted_sum(log_p, soft.clone() if soft.is_inference() else soft, reduce)  # or autograd could not save it
    total: float = result.item() if reduce else result.sum().item()
    return None if math.isnan(total) else result


def weighted_sum(log_p: Tensor, soft: Tensor, reduce: bool) -> Tensor:
    """sum_c t_c log p_c per row, or the sum of all rows."""
    weighted = log_p * soft
    return weighted.sum() if reduce else weighted.sum(1)


def dense(label: SoftLabel, like: Tensor, careful: bool) -> Tensor:
    """The soft label of every class, not to be written to."""
    rest, of_index = label.rest(careful), label.of_index
    if not isinstance(rest, Tensor):
        if not isinstance(of_index, Tensor) and of_index != 0.0:
            whole = torch.full_like(like, rest, requires_grad=False)
            return whole.scatter_(1, label.target.unsqueeze(1), rest + of_index)
        rest = like.new_full((), rest)
    rest = rest.expand(like.shape)
    if is_number(of_index, 0.0):
        return rest
    return torch.scatter_add(rest, 1, *at_label(label.target, of_index, like))


def at_label(target: Tensor, amount: Coefficient, like: Tensor) -> tuple[Tensor, Tensor]:
    """Where in the rows to add how much."""
    index = target.unsqueeze(1)
    if isinstance(amount, Tensor) and amount.dim():
        return index, amount.unsqueeze(1)
    return index, (amount if isinstance(amount, Tensor) else like.new_full((), amount)).expand(index.shape)


def parts(label: SoftLabel, shifted: Tensor) -> tuple[Tensor, Tensor, Coefficient, Coefficient]:
    """The log-likelihood of soft labels of logits with a constant s_i to be subtracted from each row.

    Returns:
        The values sum_c t_c shifted_c and the masses sum_c t_c per row, so that the log-likelihood is value - mass s;
        the rest of the soft label, and the share of an index label. A uniform rest is not spread over the classes.
    """
    rest, of_index = label.rest(careful=True), label.of_index
    if isinstance(rest, Tensor) and rest.dim() and rest.shape[1] > 1:
        rest = rest.expand(shifted.shape)
        mass = rest.sum(1)
        value = product(rest, shifted, careful=True).sum(1)
    else:
        per_row = rest.squeeze(1) if isinstance(rest, Tensor) and rest.dim() else rest
        mass = times(per_row, float(shifted.shape[1])) + shifted.new_zeros(shifted.shape[:1] + shifted.shape[2:])
        value = mass if is_number(per_row, 0.0) else product(per_row, shifted.sum(1), careful=True)
    if not is_number(of_index, 0.0):
        logit = shifted.gather(1, label.target.unsqueeze(1)).squeeze(1)
        value = add(product(of_index, logit, careful=True), value)
        mass = mass + of_index
    return value, mass, rest, of_index


def add(of_label: Tensor, of_rest: Tensor) -> Tensor:
    """The sum of the label's part and the rest's, which may be infinities of opposite sign.

    So they are where the label is impossible and has less of the soft label than the other classes; the label's share
    and the rest's together are what the soft label has there, and that has the sign of the rest.
    """
    result = of_label + of_rest
    return torch.where(result.isnan() & of_rest.isinf(), of_rest, result)


def confidence_penalty(
    logits: Tensor, target: Tensor, beta: float, class_weight: Tensor | None, weight: Coefficient
) -> Tensor:
    """weight w (log p_y - beta sum_c p_c log p_c) per row, w the class weight of the row's label."""
    log_p = torch.log_softmax(logits, 1, dtype=working_dtype(logits))
    label = SoftLabel(target, 1.0, class_weight)
    if target.is_floating_point():
        weighted = target * label.weighted(1.0)
        result = product(weighted, log_p, careful=True).sum(1)
        of_row: Coefficient = weighted.sum(1)
    else:
        of_row = label.of_index
        result = product(of_row, log_p.gather(1, target.unsqueeze(1)).squeeze(1), careful=True)
    if beta != 0:
        negative_entropy = (log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(1)
        result = result - beta * times(of_row, negative_entropy)
    return product(weight, result, careful=True)
