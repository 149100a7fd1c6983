"""Spreads that training teaches: of classes, of the batch's neighbours, and of each sample's past."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softlabels._reading import peek
from softlabels.functional._rows import Rows
from softlabels.priors.evidence import Evidence
from softlabels.priors.neighbours import neighbour_spread

if TYPE_CHECKING:
    from typing_extensions import Self

SPREADS = ("classes", "neighbours", "samples")
DECAY = 0.98  # the newest n rows of a class weigh at least 1 - DECAY ** n
MOST_NUMBERS = 2**31  # that one table may have: 8 GiB of class profiles, 4 GiB of past predictions

Source = tuple[Tensor, Tensor | None]  # rows, or a table and which row of it; as kernels.Spread takes them


class LearnedSpread(nn.Module):
    r"""What is remembered of classes and samples, and the spreads that follow from it.

    Tables are empty until the first batch tells the number of classes K.

    Args:
        kinds: Some of ``"classes"``, ``"neighbours"``, ``"samples"``.
        num_samples: Size of the training set, for ``"samples"``.

    Attributes:
        class_profiles: (K, K) float32. Row c is the mean prediction on the rows of class c: of all rows so far, until
            the newest n of a class would weigh less than 1 - 0.98^n. A class that was never seen is uniform.
        class_counts: (K,) float32. How many rows there were of each class.
        past: (num_samples, K) float16. The mean of each sample's predictions at its visits so far.
        visits: (num_samples,) int32.
    """

    class_profiles: Tensor
    class_counts: Tensor
    past: Tensor
    visits: Tensor

    def __init__(self, kinds: tuple[str, ...], num_samples: int | None) -> None:
        super().__init__()
        self.kinds = kinds
        self.num_samples = num_samples if "samples" in kinds else None
        self.keeps_profiles = "classes" in kinds or "samples" in kinds  # a sample that was never seen is its class
        if self.keeps_profiles:
            self.register_buffer("class_profiles", torch.empty(0, 0))
            self.register_buffer("class_counts", torch.zeros(0))
        if self.num_samples is not None:
            self.register_buffer("past", torch.empty(self.num_samples, 0, dtype=torch.float16))
            self.register_buffer("visits", torch.zeros(self.num_samples, dtype=torch.int32))

    @torch.no_grad()
    def sources(self, rows: Rows, batch: Evidence, among: Evidence, own: slice, index: Tensor | None) -> list[Source]:
        """The spreads for a batch, each as rows shaped like the logits, or as a table and which of its rows.

        Tables are those from before this batch: use the spreads before `record` is called.

        Args:
            rows: The batch.
            batch: What it tells.
            among: The rows that may be neighbours: ``batch``, or those of all processes.
            own: Where the batch is among them.
            index: Sample ids, row-shaped.
        """
        self._make_tables(rows)
        sources: list[Source] = []
        for kind in self.kinds:
            if kind == "neighbours":
                sources.append((_like_logits(neighbour_spread(batch, among, own.start), rows), None))
            elif kind == "samples" and index is not None:
                sources.append(self._of_samples(rows, index))
            else:
                sources.append(self._of_classes(rows))
        return sources

    @torch.no_grad()
    def record(self, rows: Evidence) -> None:
        """Remember rows: each once, whatever was predicted."""
        if self.keeps_profiles:
            self._record_classes(rows)
        if self.num_samples is not None:
            self._record_samples(rows)

    def _of_classes(self, rows: Rows) -> Source:
        if not rows.target.is_floating_point():
            return self.class_profiles, rows.target
        return torch.einsum("nk...,kj->nj...", rows.target, self.class_profiles.to(rows.dtype)), None

    def _of_samples(self, rows: Rows, index: Tensor) -> Source:
        seen = self.visits[index] > 0
        if peek(seen.all()):
            return self.past, index
        table, where = self._of_classes(rows)
        of_class = table if where is None else _gathered(table, where).movedim(-1, 1)
        return torch.where(
            seen.unsqueeze(1), _gathered(self.past, index).movedim(-1, 1).to(of_class.dtype), of_class
        ), None

    def _record_classes(self, rows: Evidence) -> None:
        """Move profiles towards the mean prediction of each class in the batch."""
        p, counted, is_soft = rows.predictions.float(), rows.counted.float(), rows.target.is_floating_point()
        labels = rows.target.float() * counted.unsqueeze(1) if is_soft else rows.target
        n = labels.sum(0) if is_soft else torch.zeros_like(self.class_counts).index_add_(0, labels, counted)
        self.class_counts += n
        step = torch.where(n > 0, torch.maximum(n / self.class_counts, 1.0 - DECAY**n), 0.0)
        if is_soft:
            means = labels.T @ p / torch.where(n > 0, n, 1.0).unsqueeze(1)
            self.class_profiles.lerp_(means, step.unsqueeze(1))
            return
        # The first rows must leave exact zeros where they have them, so that the old mean is scaled and not moved.
        kept = _gathered(self.class_profiles, labels).mul_((1.0 - step)[labels].unsqueeze(1))
        self.class_profiles.index_copy_(0, labels, kept)
        share = (step / n.clamp(min=1.0))[labels]
        self.class_profiles.index_add_(0, labels, p * share.unsqueeze(1))

    def _record_samples(self, rows: Evidence) -> None:
        """Average predictions into the means of their samples' visits."""
        index = rows.samples
        before = self.visits[index]
        self.visits.index_add_(0, index, rows.counted.int())
        after = self.visits[index].clamp(min=1)
        self.past.index_copy_(0, index, _gathered(self.past, index).mul_((before / after).unsqueeze(1)))
        self.past.index_add_(0, index, (rows.predictions / after.unsqueeze(1)).half())

    def _make_tables(self, rows: Rows) -> None:
        """Once the number of classes is known; it cannot change after."""
        num_classes, device = rows.num_classes, rows.logits.device
        if self.keeps_profiles and self.class_profiles.numel() == 0:
            _check_size("class profiles", num_classes, num_classes, 4)
            self.class_profiles = torch.full((num_classes, num_classes), 1.0 / num_classes, device=device)
            self.class_counts = torch.zeros(num_classes, device=device)
        if self.num_samples is not None and self.past.shape[1] == 0:
            _check_size("past predictions", self.num_samples, num_classes, 2)
            self.past = torch.zeros(self.num_samples, num_classes, dtype=torch.float16, device=device)
        known = self.class_profiles.shape[1] if self.keeps_profiles else num_classes
        if known != num_classes:
            raise ValueError(f"input must have {known} classes, as before, got {num_classes}; make a new loss")

    def is_in(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Whether a checkpoint has these tables; if not, empty ones are put there."""
        empty = LearnedSpread(self.kinds, self.num_samples).state_dict(prefix=prefix)
        found = set(empty) <= set(state_dict)
        for name, table in empty.items():
            state_dict.setdefault(name, table)
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow moves between devices but keep the dtypes."""
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the sizes of the checkpoint's tables: they may have been made already, or not yet."""
        for name, buffer in self.named_buffers(recurse=False):
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.dim() == buffer.dim() and 0 in (*saved.shape, *buffer.shape):
                setattr(self, name, buffer.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Show the options."""
        return ", ".join(map(repr, self.kinds))


def _gathered(table: Tensor, index: Tensor) -> Tensor:
    return torch.nn.functional.embedding(index, table)  # in half of the time of table[index]


def _like_logits(flat: Tensor, rows: Rows) -> Tensor:
    """(M, K) as (N, K, d1, ...)."""
    shape = rows.logits.shape
    return flat.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def _check_size(what: str, rows: int, num_classes: int, size: int) -> None:
    if rows * num_classes > MOST_NUMBERS:
        raise ValueError(
            f"the {what} of {rows:,} x {num_classes:,} numbers would take {rows * num_classes * size / 2**30:.3g} GiB; "
            "choose spread='neighbours', which remembers nothing"
        )
