"""Teachers of which the largest logits of each row were recorded."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from softlabels._reading import least_and_greatest, peek
from softlabels.kernels.linear import blocks
from softlabels.kernels.linear_logits import LinearLogits
from softlabels.kernels.ordering import prune
from softlabels.kernels.soft_label import Amount, working_dtype
from softlabels.kernels.top_k import TopK

TAILS = ("uniform", "bucket")


@dataclass(eq=False, repr=False)
class TopKLogits:
    r"""The $k$ largest logits of a teacher's rows, as ``teacher_logits`` of a loss.

    With $v_j$ the values, $T$ the temperature and $Z$ the log-normalizer, the classes in the top have
    $q_j = \exp(v_j / T - Z)$, exactly the whole teacher's probabilities, and all others together
    $r = 1 - \sum_j q_j$. Where $r$ goes is the ``tail``:

    - ``"uniform"``: evenly to the other classes. For the MAP loss with $\gamma \ne 1$, too.
    - ``"bucket"``: nowhere in particular. The others are one category, and the student is told how much it gets:
      their part of the loss is $-r \log P$ with $P = \sum_{c\ \mathrm{other}} p_c$, and its gradient that of a soft
      label whose rest follows the student's own prediction, $t_c = r\, p_c / P$.

    Without ``log_normalizer`` $q$ is the softmax of the top alone and $r = 0$: the student learns that nothing else is
    possible, more than the teacher ever said. For draws of a sampled teacher, whose values are the logarithms of their
    frequencies, it is right on average.

    ``SelfDistillationLoss`` takes it for any student. ``PrunedDistillationLoss`` keeps the surest classes of the top
    and needs no fewer than it keeps. ``InstanceDirichletMAPLoss`` knows the strength of a row from what is recorded:
    ``"exact"`` from ``log_normalizer`` or else the top's sum, and ``"normalized"`` with the mean logit of the top in
    the place of the row's.

    No gradient flows to it.

    Args:
        values: Logits (..., k), the leading dimensions those of the rows; any floating dtype. -inf fills up rows of
            which fewer are known; each has at least one other value.
        indices: Their classes (..., k), int64 or int32. Probabilities of a class that a row names twice add up.
        num_classes: $K$.
        log_normalizer: $Z$, the logsumexp over all classes of logits / temperature, of row shape; 0.0 where values are
            normalised log-probabilities, as inference servers give them. None: it is not known.
        temperature: Of which ``log_normalizer`` is; None is 1. A loss with another raises. Without ``log_normalizer``
            any temperature will do, unless one is given here.
        tail: ``"uniform"`` or ``"bucket"``.

    Raises:
        ValueError: shapes do not match, k is more than K, probabilities of a row sum to more than 1 (further than the
            rounding of values explains), or an option is none.
        IndexError: a class outside [0, K). This and the sums are looked at on a CPU; on an accelerator, classes are a
            device-side assertion.
        TypeError: a dtype is none of the above.

    Example:
        >>> import torch, softlabels
        >>> teacher = torch.randn(8, 1000)
        >>> top = softlabels.TopKLogits.of(teacher, 50, temperature=2.0)
        >>> top
        TopKLogits(values=(8, 50), num_classes=1000, temperature=2.0, tail='uniform')
        >>> criterion = softlabels.SelfDistillationLoss(temperature=2.0)
        >>> loss = criterion(torch.randn(8, 1000), torch.randint(1000, (8,)), teacher_logits=top)

    Reference:
        Anshumann et al., *Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs*, 2025, on the bias of
        tops and on sampling.
    """

    values: Tensor
    indices: Tensor
    num_classes: int
    log_normalizer: Tensor | float | None = None
    temperature: float | None = None
    tail: str = "uniform"

    def __post_init__(self) -> None:
        for name, tensor in (("values", self.values), ("indices", self.indices)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        if not self.values.is_floating_point():
            raise TypeError(f"values must be of a floating dtype, got {self.values.dtype}")
        if self.indices.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"indices must hold classes as torch.int64 or int32, got {self.indices.dtype}")
        if self.values.shape != self.indices.shape or self.values.dim() == 0:
            raise ValueError(
                f"values and indices must have the same shape (..., k), got {tuple(self.values.shape)} and "
                f"{tuple(self.indices.shape)}"
            )
        if type(self.num_classes) is not int or not 1 <= self.values.shape[-1] <= self.num_classes:
            raise ValueError(
                f"num_classes must be an int of at least k={self.values.shape[-1]}, and k at least 1, got "
                f"{self.num_classes!r}"
            )
        if self.tail not in TAILS:
            raise ValueError(f"tail must be one of {', '.join(map(repr, TAILS))}, got {self.tail!r}")
        if self.temperature is not None and not 0.0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be in (0, inf), or None, got {self.temperature!r}")
        self.values = self.values.detach()
        if isinstance(self.log_normalizer, Tensor):
            if self.log_normalizer.shape not in (self.values.shape[:-1], torch.Size(())):
                raise ValueError(
                    f"log_normalizer must have one value per row, shape {tuple(self.values.shape[:-1])}, got "
                    f"{tuple(self.log_normalizer.shape)}"
                )
            self.log_normalizer = self.log_normalizer.detach()
        ends = least_and_greatest(self.indices)
        if ends is not None and (ends[0] < 0 or ends[1] >= self.num_classes):
            raise IndexError(f"indices must hold classes in [0, {self.num_classes}), got {ends[0]} to {ends[1]}")
        if self.log_normalizer is not None:
            self.temperature = 1.0 if self.temperature is None else float(self.temperature)
        self._check_values()

    @classmethod
    @torch.no_grad()
    def of(
        cls, logits: Tensor | LinearLogits, k: int, *, temperature: float | None = None, tail: str = "uniform"
    ) -> TopKLogits:
        """Record the top of logits.

        Args:
            logits: (..., K), classes last; or LinearLogits, which are worked on in blocks.
            k: How many logits of each row.
            temperature: For which ``log_normalizer`` is taken, in float32 or better; None takes none.
            tail: As in the constructor.

        Returns:
            Values in the dtype of the logits, indices in int32.

        Raises:
            ValueError: k is not between 1 and K.
        """
        num_classes = logits.shape[-1]
        if type(k) is not int or not 1 <= k <= num_classes:
            raise ValueError(f"k must be an int between 1 and the number of classes, {num_classes}, got {k!r}")

        parts = blocks(logits.flat()) if isinstance(logits, LinearLogits) else [(..., logits.reshape(-1, num_classes))]
        tops, normalizers = [], []
        for _, x in parts:
            tops.append(x.topk(k, 1))
            if temperature is not None:
                normalizers.append((x.to(working_dtype(x)) / temperature).logsumexp(1))
        rows = logits.shape[:-1]
        values = torch.cat([top.values for top in tops]).view(*rows, k)
        indices = torch.cat([top.indices.int() for top in tops]).view(*rows, k)
        return cls(
            values, indices, num_classes, torch.cat(normalizers).view(rows) if normalizers else None, temperature, tail
        )

    @property
    def shape(self) -> torch.Size:
        """(..., K): that of all logits, classes last."""
        return torch.Size((*self.values.shape[:-1], self.num_classes))

    @property
    def device(self) -> torch.device:
        """Where values lie."""
        return self.values.device

    def rows(self, row_shape: torch.Size) -> TopKLogits:
        """The same with values and indices (N, k, d1, ...), for row-shaped tensors of this shape, (N, d1, ...)."""
        new = copy.copy(self)
        shape = (*row_shape, self.values.shape[-1])
        new.values, new.indices = self.values.reshape(shape).movedim(-1, 1), self.indices.reshape(shape).movedim(-1, 1)
        if isinstance(self.log_normalizer, Tensor):
            new.log_normalizer = self.log_normalizer.expand(self.values.shape[:-1]).reshape(row_shape)
        return new

    def scaled(self, temperature: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of what `rows` returns: values over the temperature, and the log-normalizer, or else that of the top.

        Raises:
            ValueError: another temperature was recorded.
        """
        if self.temperature is not None and self.temperature != temperature:
            raise ValueError(
                f"temperature={temperature:g} is not that of teacher_logits, TopKLogits with "
                f"temperature={self.temperature:g}: their log_normalizer holds for that one alone"
            )
        scaled = self.values.to(dtype) / temperature
        if self.log_normalizer is None:
            return scaled, scaled.logsumexp(1)
        if isinstance(self.log_normalizer, Tensor):
            return scaled, self.log_normalizer.to(dtype)
        return scaled, torch.full_like(scaled[:, 0], self.log_normalizer)

    def term(
        self,
        amount: Amount,
        temperature: float,
        keep: int | None,
        shift: float,
        class_weight: Tensor | None,
        dtype: torch.dtype,
    ) -> TopK:
        """Of what `rows` returns: an amount of its prediction, of the ``keep`` surest classes if those are fewer."""
        scaled, normalizer = self.scaled(temperature, dtype)
        pruned = keep is not None and keep < self.num_classes
        if pruned:
            assert keep is not None
            if keep > scaled.shape[1]:
                raise ValueError(
                    f"teacher_logits are TopKLogits of {scaled.shape[1]} classes, and {keep} of {self.num_classes} are "
                    "to be kept: raise prune, record more, or use SelfDistillationLoss"
                )
            scaled = prune(scaled, keep)
        if pruned or self.log_normalizer is None:
            probabilities = scaled.softmax(1)
            rest = torch.zeros_like(normalizer)
        else:
            probabilities = (scaled - normalizer.unsqueeze(1)).exp()
            total = probabilities.sum(1)
            rest = (1.0 - total).clamp(min=0.0)
            probabilities = probabilities / total.clamp(min=1.0).unsqueeze(1)  # what rounding had added
        follows = self.tail == "bucket" and self.log_normalizer is not None and not pruned
        if follows and (class_weight is not None or shift != 0.0):
            what = "class weights" if class_weight is not None else "gamma other than 1"
            raise ValueError(f"{what} and tail='bucket' do not go together: a bucket is no class; use tail='uniform'")
        index, probabilities, present = _distinct(self.indices.long(), probabilities, scaled > -torch.inf)
        all_known = present.sum(1) == self.num_classes
        total = probabilities.sum(1)
        probabilities = torch.where(all_known.unsqueeze(1), probabilities / total.unsqueeze(1), probabilities)
        rest = torch.where(all_known, 0.0, rest)
        return TopK(amount, index, probabilities, present, rest, follows, shift, class_weight=class_weight)

    def _check_values(self) -> None:
        if peek((self.values == -torch.inf).all(-1).any()):
            raise ValueError("each row of values must have one that is not -inf")
        if self.log_normalizer is None:
            return
        dtype, normalizer = working_dtype(self.values), torch.as_tensor(self.log_normalizer)
        scaled = self.values.to(dtype) / (self.temperature or 1.0)
        total = (scaled - normalizer.to(scaled).unsqueeze(-1)).exp().sum(-1)
        rounding = (
            2.0 * torch.finfo(self.values.dtype).eps * (1.0 + normalizer.to(scaled).abs() + scaled.amax(-1).abs())
        )
        excess = total - 1.0 - rounding
        if peek((excess > 1e-3).any()):
            raise ValueError(
                f"the probabilities exp(values / temperature - log_normalizer) of a row sum to "
                f"{total.flatten()[excess.argmax()].item():.4g}, more than 1; log_normalizer must be the logsumexp "
                "over all classes of logits / temperature"
            )

    def __repr__(self) -> str:
        normalizer = self.log_normalizer
        known = f", log_normalizer={normalizer!r}" if isinstance(normalizer, float | int) else ""
        temperature = "" if self.temperature is None else f", temperature={self.temperature}"
        tail = "" if normalizer is None else f", tail={self.tail!r}"
        return (
            f"TopKLogits(values={tuple(self.values.shape)}, num_classes={self.num_classes}{known}{temperature}{tail})"
        )


def _distinct(index: Tensor, probabilities: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each class once per row, its probabilities added up, in dimension 1; behind them fillers of the first class."""
    index = torch.where(present, index, -1)
    ordered, order = index.sort(1, descending=True)  # fillers last
    probabilities = probabilities.gather(1, order)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    if peek(begins.all() & (ordered >= 0).all()):
        return ordered, probabilities, begins
    place = begins.cumsum(1) - 1
    classes = torch.full_like(ordered, -1).scatter(1, place, ordered)
    probabilities = torch.zeros_like(probabilities).scatter_add(1, place, probabilities)
    found = classes >= 0
    return torch.where(found, classes, classes[:, :1].clamp(min=0)), probabilities, found
