"""What each training sample looked like at its past visits."""

from __future__ import annotations

import torch
from torch import Tensor

from softlabels._tables import Tables
from softlabels.priors.evidence import Evidence

MOST_DENSE = 2**28  # numbers of a table that has one for each class: 512 MiB
KEPT = 16  # classes that are remembered of a sample in larger tables


class PastPredictions(Tables):
    """The mean of each sample's predictions at its visits so far, in half precision.

    Where a number for every class would take more than 512 MiB, the 16 largest of each sample are kept. The first batch
    tells the number of classes; until then the tables are empty.

    Args:
        num_samples: Size of the training set.

    Attributes:
        mean: (num_samples, K) float16, or (num_samples, 16) of the classes in ``classes``.
        classes: (num_samples, 16) int32, or (num_samples, 0).
        visits: (num_samples,) int32.
    """

    mean: Tensor
    classes: Tensor
    visits: Tensor

    def __init__(self, num_samples: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.empty(num_samples, 0, dtype=torch.float16))
        self.register_buffer("classes", torch.empty(num_samples, 0, dtype=torch.int32))
        self.register_buffer("visits", torch.zeros(num_samples, dtype=torch.int32))

    def make_tables(self, num_classes: int, device: torch.device) -> None:
        """Make room, now that the number of classes is known."""
        samples = len(self.visits)
        kept = num_classes if samples * num_classes <= MOST_DENSE else min(KEPT, num_classes)
        self.mean = torch.zeros(samples, kept, dtype=torch.float16, device=device)
        if kept < num_classes:
            self.classes = torch.arange(kept, dtype=torch.int32, device=device).repeat(samples, 1)

    @property
    def is_dense(self) -> bool:
        """Whether there is a number for every class."""
        return self.classes.shape[1] == 0

    def of(self, index: Tensor, num_classes: int) -> Tensor:
        """What is remembered of samples, (..., K): a row that sums to at most 1, and to 0 if it was never seen."""
        mean = torch.nn.functional.embedding(index, self.mean)  # in half of the time of mean[index]
        if self.is_dense:
            return mean
        return mean.new_zeros(*index.shape, num_classes).scatter_(-1, self.classes[index].long(), mean)

    def likeliest(self, index: Tensor) -> Tensor:
        """The class of the largest mean."""
        place = self.mean[index].float().argmax(1)
        return place if self.is_dense else self.classes[index].gather(1, place.unsqueeze(1)).squeeze(1).long()

    def record(self, rows: Evidence) -> None:
        """Average predictions in. Rows of one id are visits of one sample."""
        index, before = rows.samples, self.visits[rows.samples]
        self.visits.index_add_(0, index, rows.counted.int())
        after = self.visits[index].clamp(min=1).unsqueeze(1)
        earlier = self.of(index, rows.predictions.shape[1]) * (before.unsqueeze(1) / after)
        if self.is_dense:
            self.mean.index_copy_(0, index, earlier.half())
            self.mean.index_add_(0, index, (rows.predictions / after).half())
            return
        slot = torch.searchsorted(index.sort().values, index)  # one for each sample of the batch
        visited = torch.zeros_like(rows.predictions).index_add_(0, slot, rows.predictions)[slot]
        top = (earlier + visited / after).topk(self.mean.shape[1], sorted=False)
        self.mean[index] = top.values.half()
        self.classes[index] = top.indices.int()
