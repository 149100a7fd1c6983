"""A teacher's prediction of which a few classes per row are known, and the rest as a sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softlabels.kernels.soft_label import Amount, Term, column, is_zero, product


@dataclass(eq=False)
class TopK(Term):
    """max(amount q_c + shift, 0), with q of a few classes given and the rest of its mass in a tail of all others.

    The tail is even over the possible ones of the others; or it follows the prediction p itself: their share of class c
    is rest p_c / sum_others p, so that -rest log sum_others p is their part of the loss. Such a term must be the first
    to be added, to a multiple of p.

    Args:
        index: Class indices (N, k, d1, ...), each once per row, but for fillers, which repeat the row's first.
        probabilities: q of these classes, 0 of fillers.
        present: False for fillers.
        rest: What q leaves for all other classes, row-shaped.
        follows: Whether the tail follows the prediction; then classes have no weights and nothing is shifted.
        shift: A number. Above 0 it goes to the possible classes alone.
    """

    index: Tensor
    probabilities: Tensor
    present: Tensor
    rest: Tensor
    follows: bool = False
    shift: float = 0.0

    @property
    def follows_prediction(self) -> bool:
        """Whether its shares depend on the prediction."""
        return self.follows

    @property
    def is_absent(self) -> bool:
        """An amount of 0, and no positive shift."""
        return is_zero(self.amount) and self.shift <= 0.0

    def mass(self, x: Tensor, possible: Tensor | None = None) -> Amount:
        """The amount, where nothing is shifted, weighted or impossible."""
        if self.follows or (possible is None and self.class_weight is None and is_zero(self.shift)):
            return self.amount
        share, top = self._shares_of(x, possible)
        if self.class_weight is None:
            classes = x.shape[1] if possible is None else possible.sum(1)
            return share * classes + top.sum(1)
        weights = self._weights(x)
        whole = self.class_weight.sum() if possible is None else torch.where(possible, weights, 0.0).sum(1)
        return share * whole + (top * self.class_weight[self.index]).sum(1)

    def inner(self, x: Tensor, possible: Tensor | None = None) -> Tensor:
        """sum_c t_c x_c; of a tail that follows, rest log sum_others exp(x)."""
        share, top = self._shares_of(x, possible)
        at_top = x.gather(1, self.index)
        if self.follows:
            others = x.scatter(1, self.index, -torch.inf).logsumexp(1)
            return product(top, at_top).sum(1) + product(self.amount * self.rest, others)
        if self.class_weight is not None:
            x, at_top = x * self._weights(x), at_top * self.class_weight[self.index]
        if possible is None:
            return share * x.sum(1) + (top * at_top).sum(1)
        return share * x.masked_fill(~possible, 0.0).sum(1) + product(top, at_top).sum(1)

    def add_to(
        self, g: Tensor, factor: Amount, scale: Amount = 1.0, possible: Tensor | None = None, in_place: bool = False
    ) -> Tensor:
        """Scale g + factor t."""
        share, top = self._shares_of(g, possible)
        top = top * column(factor)
        if self.follows:
            at_top = g.gather(1, self.index)
            total = g.scatter(1, self.index, 0.0).sum(1)  # of the others; less than any number, they get nothing
            tail = scale + torch.where(total > 0, factor * self.amount * self.rest / total, 0.0)
            changed = column(scale) * at_top + top
            g = g.mul_(column(tail)) if in_place else g * column(tail)
            changed = torch.where(self.present, changed, changed[:, :1])
            return g.scatter_(1, self.index, changed) if in_place else g.scatter(1, self.index, changed)
        even = column(share * factor)
        if self.class_weight is not None:
            even, top = even * self._weights(g), top * self.class_weight[self.index]
        if possible is not None:
            even = torch.where(possible, even, 0.0)
        if isinstance(scale, Tensor) or scale != 1.0:
            g = g.mul_(column(scale)) if in_place else g * column(scale)
        g = g.add_(even) if in_place else g + even
        return g.scatter_add_(1, self.index, top) if in_place else g.scatter_add(1, self.index, top)

    def _shares_of(self, like: Tensor, possible: Tensor | None) -> tuple[Tensor, Tensor]:
        """The share of every possible class, row-shaped; and what the known classes have beyond it."""
        amount, shift = column(self.amount), self.shift
        if self.follows:
            return torch.zeros_like(self.rest), amount * self.probabilities
        possible_top = self.present if possible is None else possible.gather(1, self.index) & self.present
        classes = like.shape[1] if possible is None else possible.sum(1)
        others = classes - possible_top.sum(1)
        share = self.amount * self.rest / torch.as_tensor(others, device=like.device).clamp(min=1)
        share = torch.where(torch.as_tensor(others == 0, device=like.device), 0.0, share)
        if is_zero(shift):
            return share, amount * self.probabilities - torch.where(possible_top, share.unsqueeze(1), 0.0)
        share = (share + shift).relu()
        shifts = torch.where(possible_top, shift, min(shift, 0.0))
        top = torch.where(self.present, (amount * self.probabilities + shifts).relu(), 0.0)
        return share, top - torch.where(possible_top, share.unsqueeze(1), 0.0)

    def _weights(self, like: Tensor) -> Tensor:
        assert self.class_weight is not None
        return self.class_weight.view(1, -1, *[1] * (like.dim() - 2))
