"""The soft labels of the row kernels, kept apart as a share of the label and a rest, so that none need be built.

For every row t_c = hard w_c y_c + rest_c, with y the label and w the class weights. Row coefficients are numbers or
row-shaped tensors of any sign: the kernels give sum_c t_c log p_c, and a loss comes of negative coefficients.

Where a coefficient is 0, what it multiplies counts for nothing, be it nan or infinite. To see to that takes more passes
over memory, so it is done on demand (``careful``), by those who found a nan or cannot look for one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from softlabels.kernels.plain import can_be_numpy, to_numpy

if TYPE_CHECKING:
    from typing_extensions import Self

Coefficient = float | Tensor


def working_dtype(logits: Tensor) -> torch.dtype:
    """float64 logits are worked on in float64, all others in float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def is_number(coefficient: Coefficient, number: float) -> bool:
    """Whether a coefficient is that number for all rows, and known to be so without looking at a tensor."""
    return not isinstance(coefficient, Tensor) and coefficient == number


def times(a: Coefficient, b: Coefficient) -> Coefficient:
    """a * b, for which the numbers 0 and 1 need no arithmetic."""
    if is_number(a, 0.0) or is_number(b, 1.0):
        return a
    return b if is_number(a, 1.0) or is_number(b, 0.0) else a * b


def plus(a: Coefficient, b: Coefficient) -> Coefficient:
    """a + b, for which the number 0 needs no arithmetic."""
    if is_number(a, 0.0):
        return b
    return a if is_number(b, 0.0) else a + b


def column(coefficient: Coefficient) -> Coefficient:
    """A row coefficient shaped to broadcast over the classes."""
    return coefficient.unsqueeze(1) if isinstance(coefficient, Tensor) and coefficient.dim() else coefficient


def product(coefficient: Coefficient, value: Tensor, careful: bool) -> Tensor:
    """coefficient * value; if ``careful``, a coefficient of 0 gives 0 whatever the value."""
    if is_number(coefficient, 1.0):
        return value
    if careful:
        value = value.masked_fill(~value.isfinite() & (coefficient == 0), 0.0)
    return coefficient * value


@dataclass(eq=False)
class SoftLabel:
    """What both soft labels share: the part of the label.

    Args:
        target: Class indices (N, d1, ...) in [0, K), or class probabilities y (N, K, d1, ...).
        hard: Coefficient of the label.
        class_weight: (K,), or None.
    """

    target: Tensor
    hard: Coefficient
    class_weight: Tensor | None

    @property
    def of_index(self) -> Coefficient:
        """hard * w_y per row, where the label is a class index; 0 where it is class probabilities."""
        if self.target.is_floating_point():
            return 0.0
        if self.class_weight is None or is_number(self.hard, 0.0):
            return self.hard
        return product(self.hard, self.class_weight[self.target], careful=True)

    @property
    def is_spread(self) -> bool:
        """Whether the rest differs between classes, so that it has the size of the logits."""
        return self.class_weight is not None or self.target.is_floating_point()

    def rest(self, careful: bool) -> Coefficient:
        """All but the part of an index label; broadcasts over (N, K, d1, ...)."""
        rest = self.prior(careful)
        if self.target.is_floating_point() and not is_number(self.hard, 0.0):
            label = self.weighted(product(column(self.hard), self.target, careful))
            return label if is_number(rest, 0.0) else rest + label
        return rest

    def prior(self, careful: bool) -> Coefficient:
        """The part that does not depend on the label; broadcasts over (N, K, d1, ...)."""
        raise NotImplementedError

    def mass(self, num_classes: int) -> float | None:
        """sum_c t_c, where that is one number for all rows and needs no look at a tensor."""
        return None

    def scaled(self, factor: Tensor) -> Self:
        """The soft label times a factor per row, or one factor for all."""
        raise NotImplementedError

    def normalized(self) -> tuple[Self, tuple[Tensor, ...]]:
        """The same with every softmax's normalizer known, and those normalizers."""
        return self, ()

    def with_normalizer(self, normalizer: tuple[Tensor, ...]) -> Self:
        """The same with the normalizers that [`normalized`][] gave."""
        return self

    def weighted(self, value: Coefficient) -> Coefficient:
        """w_c times a value that broadcasts over (N, K, d1, ...)."""
        if self.class_weight is None or is_number(value, 0.0):
            return value
        trailing = self.target.dim() - (2 if self.target.is_floating_point() else 1)
        return value * self.class_weight.view(1, -1, *[1] * trailing)

    def tensors(self) -> dict[str, Tensor]:
        """All fields that are tensors, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def replace(self, fields: dict[str, Any]) -> Self:
        """The same with some other fields; not to be traced."""
        return type(self)(**{**vars(self), **fields})

    def rows(self, chosen: slice) -> Self:
        """The soft labels of some rows of dimension 0."""
        return self.replace(
            {name: t[chosen] for name, t in self.tensors().items() if name != "class_weight" and t.dim()}
        )


@dataclass(eq=False)
class TwoLevel(SoftLabel):
    """t_c = w_c (hard y_c + uniform).

    Args:
        uniform: Coefficient of all classes.
        total: hard + K uniform, where the caller knows it to be one number.
    """

    uniform: Coefficient
    total: float | None = None

    def prior(self, careful: bool) -> Coefficient:
        """w_c uniform."""
        return self.weighted(column(self.uniform))

    def mass(self, num_classes: int) -> float | None:
        """hard + K uniform."""
        if self.is_spread:
            return None
        if isinstance(self.hard, Tensor) or isinstance(self.uniform, Tensor):
            return self.total
        return self.hard + num_classes * self.uniform

    def scaled(self, factor: Tensor) -> TwoLevel:
        """Scale both coefficients."""
        return TwoLevel(self.target, times(factor, self.hard), self.class_weight, times(factor, self.uniform))


@dataclass(eq=False)
class Teacher(SoftLabel):
    """t_c = w_c (hard y_c + weight max(soft q_c + shift, 0)), q the teacher's softmax over its surest classes.

    Args:
        teacher_logits: Shaped like the logits of the student, in any floating dtype.
        soft: Coefficient of q.
        shift: A number.
        weight: Coefficient of all that is not the label's.
        temperature: Divides the teacher's logits.
        keep: How many classes of each row are kept; None keeps all.
        dtype: The working dtype.
        normalizer: The largest logit of each row over the temperature and the logarithm of the sum of
            exponentials above it, where they are known.
    """

    teacher_logits: Tensor
    soft: Coefficient
    shift: Coefficient
    weight: Coefficient
    temperature: Coefficient
    keep: int | None
    dtype: torch.dtype
    normalizer: tuple[Tensor, ...] = ()

    @property
    def is_spread(self) -> bool:
        """A teacher's prediction is."""
        return True

    def prior(self, careful: bool) -> Coefficient:
        """w_c weight max(soft q_c + shift, 0)."""
        if is_number(self.shift, 0.0):
            soft = times(self.weight, self.soft)
            if careful and isinstance(self.soft, Tensor) and isinstance(self.weight, Tensor):
                soft = product(self.weight, self.soft, careful)
            return soft if is_number(soft, 0.0) else self.weighted(product(column(soft), self._softmax(), careful))
        prior = (product(column(self.soft), self._softmax(), careful) + self.shift).clamp_min(0.0)
        return self.weighted(product(column(self.weight), prior, careful))

    def mass(self, num_classes: int) -> float | None:
        """hard + weight soft, where nothing is shifted."""
        soft = times(self.weight, self.soft)
        if super().is_spread or not is_number(self.shift, 0.0):
            return None
        return None if isinstance(soft, Tensor) or isinstance(self.hard, Tensor) else self.hard + soft

    def scaled(self, factor: Tensor) -> Teacher:
        """Scale the label's coefficient and the weight of the rest."""
        return self._with(times(factor, self.hard), times(factor, self.weight), self.normalizer)

    def normalized(self) -> tuple[Teacher, tuple[Tensor, ...]]:
        """The same with the largest logit and the sum of exponentials of each row known; all classes are kept."""
        if is_number(self.shift, 0.0) and is_number(times(self.weight, self.soft), 0.0):
            return self, ()
        scaled = self._scaled()
        largest = scaled.amax(1)
        normalizer = largest, (scaled - largest.unsqueeze(1)).exp().sum(1).log()
        return self.with_normalizer(normalizer), normalizer

    def with_normalizer(self, normalizer: tuple[Tensor, ...]) -> Teacher:
        """The same with known normalizers."""
        return self._with(self.hard, self.weight, normalizer)

    def _with(self, hard: Coefficient, weight: Coefficient, normalizer: tuple[Tensor, ...]) -> Teacher:
        return Teacher(
            self.target,
            hard,
            self.class_weight,
            self.teacher_logits,
            self.soft,
            self.shift,
            weight,
            self.temperature,
            self.keep,
            self.dtype,
            normalizer,
        )

    def _softmax(self) -> Tensor:
        if self.normalizer:
            largest, log_sum = self.normalizer
            return (self._scaled() - largest.unsqueeze(1) - log_sum.unsqueeze(1)).exp()
        return teacher_probabilities(self.teacher_logits, self.temperature, self.keep, self.dtype)

    def _scaled(self) -> Tensor:
        logits = self.teacher_logits.to(self.dtype)
        return logits if is_number(self.temperature, 1.0) else logits / self.temperature


def teacher_probabilities(
    teacher_logits: Tensor, temperature: Coefficient, keep: int | None, dtype: torch.dtype
) -> Tensor:
    """softmax(teacher_logits / temperature) over the ``keep`` surest classes of each row (None: over all)."""
    if keep is not None and keep < teacher_logits.shape[1]:
        teacher_logits = prune(teacher_logits, keep)
    if not is_number(temperature, 1.0):
        teacher_logits = teacher_logits.to(dtype) / temperature
    return torch.softmax(teacher_logits, 1, dtype=dtype)


def prune(teacher_logits: Tensor, keep: int) -> Tensor:
    """-inf for all but the ``keep`` largest logits of each row; among equal ones the lower class index is kept."""
    threshold = _largest(teacher_logits, keep)
    pruned = ~(teacher_logits >= threshold)
    if not can_be_numpy(teacher_logits) or np.any(
        np.count_nonzero(pruned.numpy(), axis=1) < teacher_logits.shape[1] - keep
    ):  # equal ones
        level = teacher_logits == threshold
        room = keep - (teacher_logits > threshold).sum(1, keepdim=True)
        pruned |= level & (level.cumsum(1) > room)
    return teacher_logits.masked_fill(pruned, -torch.inf)


def _largest(values: Tensor, rank: int) -> Tensor:
    """The ``rank``-th largest number of each row, without a sort of the row; the class dimension stays, of size 1."""
    if not can_be_numpy(values):
        return values.topk(rank, dim=1, sorted=False).values.amin(1, keepdim=True)
    place = values.shape[1] - rank
    chosen = np.partition(to_numpy(values), place, axis=1)[:, place : place + 1]  # a quarter of the time of topk
    return torch.from_numpy(np.ascontiguousarray(chosen)).to(values.dtype)
