"""Spreads that training teaches: of classes, of the batch's neighbours, and of each sample's past."""

from __future__ import annotations

import torch
from torch import Tensor

from softlabels._reading import peek
from softlabels._tables import Tables
from softlabels.functional._rows import Rows
from softlabels.priors.evidence import Evidence
from softlabels.priors.neighbours import neighbour_spread
from softlabels.priors.past_predictions import PastPredictions

SPREADS = ("classes", "neighbours", "samples")
DECAY = 0.98  # the newest n rows of a class weigh at least 1 - DECAY ** n
MOST_NUMBERS = 2**31  # of class profiles: 8 GiB

Source = tuple[Tensor, Tensor | None]  # rows, or a table and which row of it; as kernels.Spread takes them


class LearnedSpread(Tables):
    r"""What is remembered of classes and samples, and the spreads that follow from it.

    Tables are empty until the first batch tells the number of classes K.

    Args:
        kinds: Some of ``"classes"``, ``"neighbours"``, ``"samples"``.
        num_samples: Size of the training set, for ``"samples"``.

    Attributes:
        class_profiles: (K, K) float32. Row c is the mean prediction on the rows of class c: of all rows so far, until
            the newest n of a class would weigh less than 1 - 0.98^n. A class that was never seen is uniform.
        class_counts: (K,) float32. How many rows there were of each class.
        past: What each sample looked like, for ``"samples"``.
    """

    class_profiles: Tensor
    class_counts: Tensor

    def __init__(self, kinds: tuple[str, ...], num_samples: int | None) -> None:
        super().__init__()
        self.kinds = kinds
        self.past = PastPredictions(num_samples) if "samples" in kinds and num_samples is not None else None
        self.keeps_profiles = "classes" in kinds or "samples" in kinds  # a sample that was never seen is its class
        if self.keeps_profiles:
            self.register_buffer("class_profiles", torch.empty(0, 0))
            self.register_buffer("class_counts", torch.zeros(0))

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
            elif kind == "samples" and self.past is not None and index is not None:
                sources.append(self._of_samples(self.past, rows, index))
            else:
                sources.append(self._of_classes(rows))
        return sources

    @torch.no_grad()
    def record(self, rows: Evidence) -> None:
        """Remember rows: each once, whatever was predicted."""
        if self.keeps_profiles:
            self._record_classes(rows)
        if self.past is not None:
            self.past.record(rows)

    def _of_classes(self, rows: Rows) -> Source:
        if not rows.target.is_floating_point():
            return self.class_profiles, rows.target
        return torch.einsum("nk...,kj->nj...", rows.target, self.class_profiles.to(rows.dtype)), None

    def _of_samples(self, past: PastPredictions, rows: Rows, index: Tensor) -> Source:
        """A sample's past, and for what is not remembered of it, its class: all, if it was never seen."""
        if past.is_dense and peek((past.visits[index] > 0).all()):
            return past.mean, index
        seen = past.of(index, rows.num_classes).movedim(-1, 1).to(rows.dtype)
        table, where = self._of_classes(rows)
        of_class = table if where is None else _gathered(table, where).movedim(-1, 1)
        unseen = (past.visits[index] == 0).unsqueeze(1)
        rest = unseen if past.is_dense else (1.0 - seen.sum(1, keepdim=True)).clamp(min=0.0)
        return seen + rest * of_class, None

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

    def _make_tables(self, rows: Rows) -> None:
        """Once the number of classes is known; it cannot change after."""
        num_classes, device = rows.num_classes, rows.logits.device
        if self.keeps_profiles and self.class_profiles.numel() == 0:
            _check_size(num_classes)
            self.class_profiles = torch.full((num_classes, num_classes), 1.0 / num_classes, device=device)
            self.class_counts = torch.zeros(num_classes, device=device)
        if self.past is not None and self.past.mean.shape[1] == 0:
            self.past.make_tables(num_classes, device)
        known = self.class_profiles.shape[1] if self.keeps_profiles else num_classes
        if known != num_classes:
            raise ValueError(f"input must have {known} classes, as before, got {num_classes}; make a new loss")

    def emptied(self) -> LearnedSpread:
        """The same, as it was made."""
        return LearnedSpread(self.kinds, None if self.past is None else len(self.past.visits))

    def extra_repr(self) -> str:
        """Show the options."""
        return ", ".join(map(repr, self.kinds))


def _gathered(table: Tensor, index: Tensor) -> Tensor:
    return torch.nn.functional.embedding(index, table)  # in half of the time of table[index]


def _like_logits(flat: Tensor, rows: Rows) -> Tensor:
    """(M, K) as (N, K, d1, ...)."""
    shape = rows.logits.shape
    return flat.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def _check_size(num_classes: int) -> None:
    if num_classes**2 > MOST_NUMBERS:
        raise ValueError(
            f"class profiles of {num_classes:,} x {num_classes:,} numbers would take {num_classes**2 * 4 / 2**30:.3g} "
            "GiB; choose spread='neighbours', which remembers nothing"
        )
