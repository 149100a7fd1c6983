"""An amount that goes to the other classes as given rows of numbers say, which may be rows of a table."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softlabels._reading import peek
from softlabels.kernels.soft_label import Amount, Term, column


@dataclass(eq=False)
class Spread(Term):
    """The amount, over the possible classes other than the label, in proportion to a row of non-negative numbers.

    Where no number is above 0 there, the spread is even; where the label is the only possible class, it gets all.

    Args:
        source: The rows, shaped like the logits; or with ``index`` a table (R, K), of which they are gathered.
        index: Which row of the table, row-shaped; or None.
        label: Class indices that are left out, row-shaped; None leaves none out.
    """

    source: Tensor
    index: Tensor | None = None
    label: Tensor | None = None

    def mass(self, x: Tensor, possible: Tensor | None = None) -> Amount:
        """The amount, where classes have no weights."""
        return self.amount if self.class_weight is None else super().mass(x, possible)

    def shares(self, like: Tensor, possible: Tensor | None) -> Tensor:
        """The amount times the rows over their sum."""
        shares = self._among_others(self.gathered().to(like.dtype, copy=self.index is None), possible)
        total = shares.sum(1, keepdim=True)
        lost = total == 0
        if peek(lost.any()) is not False:
            even = self._among_others(torch.ones_like(shares), possible)
            if self.label is not None:
                label_alone = torch.zeros_like(even).scatter(1, self.label.unsqueeze(1), 1.0)
                even = torch.where(even.sum(1, keepdim=True) == 0, label_alone, even)
            shares = torch.where(lost, even, shares)
            total = torch.where(lost, even.sum(1, keepdim=True), total)
        return shares.mul_(column(self.amount) / total)

    def gathered(self) -> Tensor:
        """The rows, shaped like the logits."""
        if self.index is None:
            return self.source
        return torch.nn.functional.embedding(self.index, self.source).movedim(-1, 1)

    def rows(self, chosen: slice | Tensor) -> Spread:
        """The same for some rows of dimension 0; a table stays whole."""
        part = super().rows(chosen)
        return part if self.index is None else replace(part, source=self.source)

    def settled(self) -> Spread:
        """The same, whatever becomes of the table."""
        return self if self.index is None else replace(self, source=self.gathered(), index=None)

    def _among_others(self, shares: Tensor, possible: Tensor | None) -> Tensor:
        if self.label is not None:
            shares.scatter_(1, self.label.unsqueeze(1), 0.0)
        return shares if possible is None else shares.masked_fill_(~possible, 0.0)
