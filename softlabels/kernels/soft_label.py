"""A soft label is a sum of terms, and a term answers three questions about a block of rows.

Rows are (N, K) or (N, K, d1, ...), classes in dimension 1; *row-shaped* is (N, d1, ...). For logits x of which any
constant of the row may have been subtracted, a term t says

- ``mass(x)``: sum_c t_c, a number or row-shaped;
- ``inner(x)``: sum_c t_c x_c, row-shaped;
- ``add_to(g, factor, scale)``: scale g + factor t.

With l the row's log-sum-exp and m the mass of all terms, the cross-entropy is m l - inner(x) and its gradient
m softmax(x) - t. A new soft label is one more class of this file.

Amounts and factors are numbers or row-shaped. Two options cost passes over memory, so callers ask for them:
``possible`` marks the classes whose logit is not -inf, over which even shares are spread and outside of which an amount
of 0 counts for nothing (0 * log 0 = 0); ``in_place`` lets ``add_to`` write into g.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from softlabels.kernels.ordering import kth_largest, last_kept, prune

if TYPE_CHECKING:
    from typing_extensions import Self

Amount = float | Tensor


def working_dtype(logits: Tensor) -> torch.dtype:
    """float64 logits are worked on in float64, all others in float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def column(amount: Amount) -> Amount:
    """Let row-shaped amounts broadcast over the classes."""
    return amount.unsqueeze(1) if isinstance(amount, Tensor) and amount.dim() else amount


def product(amount: Amount, value: Tensor) -> Tensor:
    """amount * value, where an amount of 0 gives 0 whatever the value."""
    return amount * value.masked_fill(~value.isfinite() & (amount == 0), 0.0)


@dataclass(eq=False)
class Term:
    """What the terms share: an amount, a factor per class, and the three answers as they follow from the shares."""

    facts: ClassVar[tuple[str, ...]] = ()  # fields that say what is known of the rows, row-shaped

    amount: Amount
    class_weight: Tensor | None = field(default=None, kw_only=True)
    _shares: Tensor | None = field(default=None, init=False, repr=False)  # of the block that the term stands for

    @property
    def is_even(self) -> bool:
        """Whether all classes but the label's have the same share."""
        return False

    @property
    def follows_prediction(self) -> bool:
        """Whether its shares depend on the prediction: then its inner product alone says what it costs."""
        return False

    @property
    def is_absent(self) -> bool:
        """Whether it adds nothing, known without a look at a tensor."""
        return False

    def claim(self, possible: Tensor) -> Tensor:
        """The possible classes, and those that this term says are true: their share stays, and costs what it must."""
        return possible

    def surveyed(self, like: Tensor, possible: Tensor) -> Self:
        """The same, with its facts known."""
        return self

    def shares(self, like: Tensor, possible: Tensor | None) -> Tensor:
        """The shares of the classes, without class weights; one for all where they are even."""
        raise NotImplementedError

    def mass(self, x: Tensor, possible: Tensor | None = None) -> Amount:
        """sum_c t_c."""
        shares = self._weighted(x, possible)
        return shares.sum(1) * (x.shape[1] // shares.shape[1])

    def inner(self, x: Tensor, possible: Tensor | None = None) -> Tensor:
        """sum_c t_c x_c."""
        shares = self._weighted(x, possible)
        if possible is not None:
            return product(shares, x).sum(1)
        return (shares * x).sum(1) if shares.shape[1] > 1 else shares.squeeze(1) * x.sum(1)

    def add_to(
        self, g: Tensor, factor: Amount, scale: Amount = 1.0, possible: Tensor | None = None, in_place: bool = False
    ) -> Tensor:
        """Scale g + factor t."""
        shares = self._weighted(g, possible)
        if isinstance(factor, Tensor):
            shares, factor = shares * column(factor), 1.0
        if not in_place:
            return torch.add(_scaled(g, scale), shares, alpha=factor)
        if shares.shape[1] == 1 and not isinstance(scale, Tensor):
            return torch.add(shares * factor, g, alpha=scale, out=g)  # one pass
        return _scaled(g, scale, in_place=True).add_(shares, alpha=factor)

    def rows(self, chosen: slice | Tensor) -> Self:
        """The same for some rows of dimension 0."""
        own = {name: value[chosen] for name, value in tensors(self) if name != "class_weight" and value.dim()}
        return replace(self, **own)

    def settled(self) -> Self:
        """The same, whatever becomes of the caller's tensors."""
        return self

    def _weighted(self, like: Tensor, possible: Tensor | None) -> Tensor:
        if possible is None and self._shares is not None:
            return self._shares
        shares = self.shares(like, possible)
        if self.class_weight is not None:
            shares = shares * self._weight_of_classes(like)
        self._shares = shares if possible is None else None
        return shares

    def _weight_of_classes(self, like: Tensor) -> Amount:
        if self.class_weight is None:
            return 1.0
        return self.class_weight.view(1, -1, *[1] * (like.dim() - 2))


@dataclass(eq=False)
class Label(Term):
    """The amount, at the row's class.

    Args:
        index: Class indices in [0, K), row-shaped.
    """

    index: Tensor

    @property
    def is_even(self) -> bool:
        """It has no other class."""
        return True

    def claim(self, possible: Tensor) -> Tensor:
        """The row's class is meant."""
        return possible | self._is_label(possible)

    def mass(self, x: Tensor, possible: Tensor | None = None) -> Amount:
        """The amount."""
        return self.amount

    def inner(self, x: Tensor, possible: Tensor | None = None) -> Tensor:
        """amount x_y."""
        at_label = x.gather(1, self.index.unsqueeze(1)).squeeze(1)
        return self.amount * at_label if possible is None else product(self.amount, at_label)

    def add_to(
        self, g: Tensor, factor: Amount, scale: Amount = 1.0, possible: Tensor | None = None, in_place: bool = False
    ) -> Tensor:
        """Scale g, with the amount added at the label: by a comparison where compiling, since that fuses."""
        g = _scaled(g, scale, in_place)
        amount, index = self.amount * factor, self.index.unsqueeze(1)
        if torch.compiler.is_compiling():
            return torch.where(self._is_label(g), g + column(amount), g)
        amount = amount if isinstance(amount, Tensor) else g.new_full((), amount)
        value = amount.unsqueeze(1) if amount.dim() else amount.expand(index.shape)
        return g.scatter_add_(1, index, value) if in_place else g.scatter_add(1, index, value)

    def _is_label(self, like: Tensor) -> Tensor:
        classes = torch.arange(like.shape[1], dtype=torch.int32, device=like.device)  # as many bits as a float32
        return classes.view(1, -1, *[1] * (like.dim() - 2)) == self.index.to(torch.int32).unsqueeze(1)


@dataclass(eq=False)
class Even(Term):
    """The amount, spread evenly over the possible classes of the row.

    Args:
        count: How many classes are possible, row-shaped, where it is known.
    """

    facts = ("count",)

    count: Tensor | None = None

    @property
    def is_even(self) -> bool:
        """Unless the classes have weights."""
        return self.class_weight is None

    @property
    def is_absent(self) -> bool:
        """An amount of 0."""
        return is_zero(self.amount)

    def surveyed(self, like: Tensor, possible: Tensor) -> Even:
        """The same, with the number of possible classes known."""
        return replace(self, count=possible.sum(1, dtype=like.dtype))

    def mass(self, x: Tensor, possible: Tensor | None = None) -> Amount:
        """The amount, or its part that class weights leave."""
        if self.count is None or possible is None:
            return super().mass(x, possible)
        if self.class_weight is None:
            return self.amount
        return self.amount / self.count * torch.where(possible, self._weight_of_classes(x), 0.0).sum(1)

    def inner(self, x: Tensor, possible: Tensor | None = None) -> Tensor:
        """amount / count times the sum of the possible classes' x_c: in the same loop as the count."""
        if self.count is None or possible is None:
            return super().inner(x, possible)
        terms = x if self.class_weight is None else product(self._weight_of_classes(x), x)
        return product(self.amount / self.count, torch.where(possible, terms, 0.0).sum(1))

    def shares(self, like: Tensor, possible: Tensor | None) -> Tensor:
        """amount / K; of impossible classes 0."""
        amount = column(self.amount)
        if possible is not None:
            count = possible.sum(1) if self.count is None else self.count
            return torch.where(possible, amount / count.unsqueeze(1), 0.0).to(like.dtype)
        share = amount / max(like.shape[1], 1)
        return share if isinstance(share, Tensor) and share.dim() else like.new_zeros((1,) * like.dim()) + share


@dataclass(eq=False)
class Given(Term):
    """The amount times given probabilities or counts.

    Args:
        probabilities: Shaped like the logits, in the working dtype.
    """

    probabilities: Tensor

    def claim(self, possible: Tensor) -> Tensor:
        """Classes with a probability are meant."""
        return possible | (self.probabilities > 0)

    def shares(self, like: Tensor, possible: Tensor | None) -> Tensor:
        """Amount times probabilities."""
        if is_zero(self.amount):
            return torch.zeros_like(self.probabilities)
        return column(self.amount) * self.probabilities


@dataclass(eq=False)
class Prediction(Term):
    """max(amount q_c + shift, 0), with q a teacher's softmax over its surest classes at a temperature.

    Args:
        logits: The teacher's logits, shaped like the student's, in any floating dtype.
        temperature: Divides them.
        keep: How many classes of each row keep a probability; None is all.
        shift: A number. Above 0 it goes to the possible classes alone.
        largest: The row's largest logit over the temperature, where it is known.
        total: The sum of the exponentials of what the others are above it.
        threshold: In the place of ``keep``: smaller logits keep no probability, row-shaped.
        last: Nor do logits that equal the threshold, of classes above this one.
    """

    facts = ("largest", "total")

    logits: Tensor
    temperature: Amount = 1.0
    keep: int | None = None
    shift: Amount = 0.0
    largest: Tensor | None = None
    total: Tensor | None = None
    threshold: Tensor | None = None
    last: Tensor | None = None

    @property
    def is_absent(self) -> bool:
        """An amount of 0, and no positive shift."""
        return is_zero(self.amount) and not isinstance(self.shift, Tensor) and self.shift <= 0.0

    @property
    def is_plain(self) -> bool:
        """Whether nothing is shifted."""
        return is_zero(self.shift)

    def mass(self, x: Tensor, possible: Tensor | None = None) -> Amount:
        """The amount, where nothing is shifted or weighted."""
        if self.class_weight is None and self.is_plain:
            return self.amount
        if self.total is None or not self.is_plain:
            return super().mass(x, possible)
        return self.amount * ((self.exponentials(x.dtype) * self._weight_of_classes(x)).sum(1) / self.total)

    def inner(self, x: Tensor, possible: Tensor | None = None) -> Tensor:
        """Where nothing is shifted, two sums of exponentials are enough: sum_c q_c x_c needs no q."""
        if self.total is None or not self.is_plain:
            return super().inner(x, possible)
        exponentials = self.exponentials(x.dtype) * self._weight_of_classes(x)
        return product(self.amount, product(exponentials, x).sum(1) / self.total)

    def shares(self, like: Tensor, possible: Tensor | None) -> Tensor:
        """max(amount q + shift, 0)."""
        absent = is_zero(self.amount)  # then the teacher may be anything
        shares = like.new_zeros(like.shape) if absent else column(self.amount) * self.probabilities(like.dtype)
        if is_zero(self.shift):
            return shares
        shift = like.new_zeros(()) + self.shift
        return (shares + (shift if possible is None else torch.where(possible, shift, shift.clamp(max=0.0)))).relu()

    def probabilities(self, dtype: torch.dtype) -> Tensor:
        """q."""
        if self.total is None:
            return torch.softmax(self.scaled_logits(dtype), 1, dtype=dtype)
        return self.exponentials(dtype) / self.total.unsqueeze(1)

    def surveyed(self, like: Tensor, possible: Tensor) -> Prediction:
        """The same, with the largest logit of each row and the sum of the exponentials known."""
        largest, total = largest_and_total(self.scaled_logits(like.dtype))
        return replace(self, largest=largest, total=total)

    def exponentials(self, dtype: torch.dtype) -> Tensor:
        """exp of the scaled logits above the largest of their row, which is known."""
        assert self.largest is not None
        return (self.scaled_logits(dtype) - self.largest.unsqueeze(1)).exp()

    def scaled_logits(self, dtype: torch.dtype) -> Tensor:
        """The kept logits over the temperature."""
        logits = self.pruned().logits.to(dtype)
        if self.threshold is not None and self.last is not None:
            threshold, classes = self.threshold.unsqueeze(1), torch.arange(logits.shape[1], device=logits.device)
            after = classes.view(1, -1, *[1] * (logits.dim() - 2)) > self.last.unsqueeze(1)
            logits = torch.where((logits < threshold) | ((logits == threshold) & after), -torch.inf, logits)
        unscaled = not isinstance(self.temperature, Tensor) and self.temperature == 1.0
        return logits if unscaled else logits / self.temperature

    def thresholded(self, fused: Callable[..., Any]) -> Prediction:
        """The same, pruned by a threshold that kernels apply as they read; ``fused`` calls functions of rows."""
        if self.keep is None or self.keep >= self.logits.shape[1]:
            return replace(self, keep=None)
        threshold = kth_largest(self.logits, self.keep)
        last = fused(last_kept, self.logits, threshold, self.keep)
        return replace(self, keep=None, threshold=threshold, last=last)

    def pruned(self) -> Prediction:
        """The same term, with logits of -inf where no probability is kept."""
        if self.keep is None:
            return self
        all_kept = self.keep >= self.logits.shape[1]
        return replace(self, logits=self.logits if all_kept else prune(self.logits, self.keep), keep=None)


def largest_and_total(x: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """The largest number of each row and sum_c exp(x_c - largest): in these words, Inductor takes one loop."""
    largest = x.amax(dim, keepdim=True)
    total = (x - largest).exp().sum(dim, keepdim=True)
    return largest.squeeze(dim), total.squeeze(dim)


@dataclass(eq=False)
class SoftLabel:
    """The sum of the terms, and how much each row counts.

    Args:
        terms: The terms. Fewest passes are taken where a `Label` comes last.
        weight: A number or row-shaped. A row of weight 0 counts for nothing, whatever its numbers.
        total: The mass of every row, where the caller knows that it is this number.
    """

    terms: Sequence[Term]
    weight: Amount
    total: float | None = None

    @property
    def is_even(self) -> bool:
        """Whether in every row all classes but the label's have the same share."""
        return all(term.is_even for term in self.terms)

    @property
    def follows_prediction(self) -> bool:
        """Whether in a row the shares depend on the prediction."""
        return any(term.follows_prediction for term in self.terms)

    def mass(self, x: Tensor, possible: Tensor | None = None) -> Amount:
        """sum_c t_c of all terms, without the weight."""
        if self.total is not None:
            return self.total
        first, *others = [term.mass(x, possible) for term in self.terms]
        return functools.reduce(operator.add, others, first)

    def inner(self, x: Tensor, possible: Tensor | None = None) -> Tensor:
        """sum_c t_c x_c of all terms, without the weight."""
        first, *others = [term.inner(x, possible) for term in self.terms]
        return functools.reduce(operator.add, others, first)

    def add_to(
        self, g: Tensor, factor: Amount, scale: Amount = 1.0, possible: Tensor | None = None, in_place: bool = False
    ) -> Tensor:
        """Scale g + factor t."""
        for term in self.terms:
            g, scale = term.add_to(g, factor, scale, possible, in_place), 1.0
        return g

    def possible(self, logits: Tensor) -> Tensor:
        """Classes that can have a share: those whose logit is not -inf, and those that a label says are true."""
        possible = logits != -torch.inf
        for term in self.terms:
            possible = term.claim(possible)
        return possible

    def surveyed(self, like: Tensor, possible: Tensor) -> SoftLabel:
        """The same, with the facts of its terms known."""
        return replace(self, terms=[term.surveyed(like, possible) for term in self.terms])

    def facts(self) -> list[Tensor]:
        """What its terms know of the rows, in a fixed order."""
        return [getattr(term, name) for term in self.terms for name in term.facts]

    def with_facts(self, values: Sequence[Tensor]) -> SoftLabel:
        """The same, with these facts known."""
        given = iter(values)
        return replace(self, terms=[replace(t, **{name: next(given) for name in t.facts}) for t in self.terms])

    def dense(self, like: Tensor, factor: Amount = 1.0, possible: Tensor | None = None) -> Tensor:
        """Factor t of every class, shaped like the logits."""
        return self.add_to(like.new_zeros(()).expand(like.shape), factor, possible=possible)

    def rows(self, chosen: slice | Tensor) -> SoftLabel:
        """The soft labels of some rows of dimension 0."""
        weight = self.weight[chosen] if isinstance(self.weight, Tensor) and self.weight.dim() else self.weight
        return replace(self, terms=[term.rows(chosen) for term in self.terms], weight=weight)

    def settled(self) -> SoftLabel:
        """The same, whatever becomes of tables that its terms read."""
        return replace(self, terms=[term.settled() for term in self.terms])

    def scaled(self, factor: Tensor) -> SoftLabel:
        """The same, every row counting ``factor`` times as much."""
        return replace(self, weight=self.weight * factor)

    def tensors(self) -> list[Tensor]:
        """Every tensor in it, in a fixed order."""
        own = [self.weight] if isinstance(self.weight, Tensor) else []
        return [tensor for term in self.terms for _, tensor in tensors(term)] + own

    def with_tensors(self, values: Sequence[Tensor]) -> SoftLabel:
        """The same with other tensors, in the order of [`tensors`][]."""
        given = iter(values)
        terms = [replace(term, **{name: next(given) for name, _ in tensors(term)}) for term in self.terms]
        weight = next(given) if isinstance(self.weight, Tensor) else self.weight
        return replace(self, terms=terms, weight=weight)


def tensors(term: Term) -> list[tuple[str, Tensor]]:
    """The fields of a term that are tensors."""
    return [(name, value) for name, value in vars(term).items() if isinstance(value, Tensor) and name != "_shares"]


def is_zero(amount: Amount) -> bool:
    """Whether an amount is the number 0, told without a look at a tensor."""
    return not isinstance(amount, Tensor) and amount == 0.0


def _scaled(g: Tensor, scale: Amount, in_place: bool = False) -> Tensor:
    if not isinstance(scale, Tensor) and scale == 1.0:
        return g
    return g.mul_(column(scale)) if in_place else g * column(scale)
