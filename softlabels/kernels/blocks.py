"""Sums over long rows, block by block, so that a row is read once however long it is.

A block fits the registers of a GPU. Its sums are relative to its own largest numbers; a second, small step brings the
blocks of a row together, as a log-sum-exp of log-sum-exps is one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from softlabels.kernels.soft_label import Amount, Prediction, SoftLabel, Term, product

BLOCK = 1024  # the most neighbouring numbers that Inductor keeps in registers between two reductions over them
SPREAD_BLOCK = 64  # the same of numbers that lie apart, as the classes of a dense prediction do


@dataclass(eq=False)
class Summed(Term):
    """In the place of a term whose sums are known.

    Args:
        amount: The mass.
        of_logits: sum_c t_c (x_c - largest), row-shaped.
    """

    of_logits: Tensor

    def mass(self, x: Tensor, possible: Tensor | None = None) -> Amount:
        """The mass."""
        return self.amount

    def inner(self, x: Tensor, possible: Tensor | None = None) -> Tensor:
        """The sum, for logits less the largest of their row."""
        return self.of_logits


def are_better(label: SoftLabel, logits: Tensor) -> bool:
    """Whether a row and its teacher's would be read several times."""
    return pay(logits) and logits.shape[1] > _most(logits) and len(_predictions(label)) == 1


def pay(logits: Tensor) -> bool:
    """Whether another reading of a row costs time: a core of a CPU has a cache for that."""
    return not logits.is_cpu


def survey(label: SoftLabel, x: Tensor) -> tuple[SoftLabel, SoftLabel, Tensor, Tensor]:
    """Sum rows (N, K, ...) and the one prediction that a soft label holds in blocks.

    What a shift leaves of the prediction is known only after that: it takes a second look.

    Returns:
        The soft label with the facts of the prediction known; the same for sums over the logits less the largest of
        their row; the largest logit of each row; and sum_c exp(x_c - largest).
    """
    [(place, teacher)] = _predictions(label)
    weights = None if teacher.class_weight is None else teacher.class_weight.view(1, -1, *[1] * (x.dim() - 2))
    parts = [_sums(*part) for part in _blocks(x, teacher.scaled_logits(x.dtype), weights)]
    highest, total, highest_f, total_f, mass, inner = (torch.cat(of_parts, 1) for of_parts in zip(*parts, strict=True))
    largest, largest_f = highest.amax(1), highest_f.amax(1)
    above = highest - largest.unsqueeze(1)
    factor_f = (highest_f - largest_f.unsqueeze(1)).exp()
    total, total_f = (total * above.exp()).sum(1), (total_f * factor_f).sum(1)
    inner = (product(factor_f, inner) + product(mass * factor_f, above)).sum(1) / total_f
    amount = teacher.amount if weights is None else teacher.amount * ((mass * factor_f).sum(1) / total_f)
    known = _with(label, place, replace(teacher, largest=largest_f, total=total_f))
    summed = _with(label, place, Summed(amount, product(teacher.amount, inner))) if teacher.is_plain else known
    return known, summed, largest, total


def statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is known of rows (N, K, ...).

    Returns:
        The largest number; the sum of the exponentials of all others above it; how many numbers are not -inf; and the
        sum of what these are below the largest.
    """
    parts = [_statistics(*part) for part in _blocks(x)]
    highest, others, count, below = (torch.cat(of_parts, 1) for of_parts in zip(*parts, strict=True))
    largest = highest.amax(1)
    gap = highest - largest.unsqueeze(1)
    has_largest = gap == 0
    others = torch.where(has_largest, others, (1.0 + others) * gap.exp()).sum(1) + (has_largest.sum(1) - 1)
    return largest, others, count.sum(1), (below - product(count, gap)).sum(1)


def _statistics(x: Tensor) -> tuple[Tensor, ...]:
    """The same of each block."""
    highest, possible = x.amax(2), x != -torch.inf
    is_highest = x == highest.unsqueeze(2)
    above = x - _finite(highest).unsqueeze(2)
    others = torch.where(is_highest, 0.0, above.exp()).sum(2) + (is_highest.sum(2, dtype=x.dtype) - 1.0)
    return highest, others, possible.sum(2, dtype=x.dtype), -torch.where(possible, above, 0.0).sum(2)


def _sums(x: Tensor, f: Tensor, weights: Tensor | None) -> tuple[Tensor, ...]:
    """Of each block: the largest number and the sum of exponentials, for both; the sums of w e^f and of w e^f x."""
    highest, highest_f = x.amax(2), f.amax(2)
    x, exponentials = x - _finite(highest).unsqueeze(2), (f - _finite(highest_f).unsqueeze(2)).exp()
    shares = exponentials if weights is None else exponentials * weights
    return highest, x.exp().sum(2), highest_f, exponentials.sum(2), shares.sum(2), product(shares, x).sum(2)


def _finite(highest: Tensor) -> Tensor:
    return torch.where(highest == -torch.inf, 0.0, highest)


def _blocks(*rows: Tensor | None) -> list[tuple[Any, ...]]:
    """Tensors (N, K, ...) as (N, blocks, numbers, ...): one part where blocks fit, else a shorter block is another."""
    given = next(t for t in rows if t is not None)
    classes, most = given.shape[1], _most(given)
    fitting = [size for size in range(most // 4, most + 1) if classes % size == 0]
    size = classes if classes <= most else fitting[-1] if fitting else most
    whole = classes - classes % size
    ends = [(0, whole, size)] if whole == classes else [(0, whole, size), (whole, classes, classes - whole)]
    return [
        tuple(None if t is None else torch.unflatten(t[:, start:end], 1, (-1, width)) for t in rows)
        for start, end, width in ends
    ]


def _most(logits: Tensor) -> int:
    """Numbers of the largest block."""
    return BLOCK if logits.stride(1) == 1 else SPREAD_BLOCK


def _predictions(label: SoftLabel) -> list[tuple[int, Prediction]]:
    """The terms that are a teacher's prediction, and their places."""
    return [(place, term) for place, term in enumerate(label.terms) if isinstance(term, Prediction)]


def _with(label: SoftLabel, place: int, term: Term) -> SoftLabel:
    terms = list(label.terms)
    terms[place] = term
    return replace(label, terms=terms)
