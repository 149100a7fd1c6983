"""Data sets that say which sample each item is, for losses that remember samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset, IterableDataset


class WithIndex(Dataset[Any]):
    """A data set whose items end with their number, for ``index=`` at the call of a loss.

    Wrap the training set before the `DataLoader`: shuffling, samplers and workers change nothing, since the number
    belongs to the item. Wrap the whole set, and take a `Subset` of that, if parts of it are trained on.

    Args:
        dataset: A map-style data set. Its items may be tuples, which get one more entry; mappings, which get the key
            ``"index"``; or anything else, which becomes a pair.

    Raises:
        TypeError: ``dataset`` has no length, such as an `IterableDataset`: its items have no numbers.
        ValueError: a mapping has the key ``"index"`` already.

    Example:
        >>> import torch, softlabels
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> data = TensorDataset(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> criterion = softlabels.BetaSmoothingLoss(ranking="history", num_samples=len(data))
        >>> model = torch.nn.Linear(4, 3)
        >>> for x, y, index in DataLoader(softlabels.data.WithIndex(data), batch_size=3, shuffle=True):
        ...     loss = criterion(model(x), y, index=index)
        >>> criterion.history.visits.tolist()
        [1, 1, 1, 1, 1, 1]
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise TypeError(
                f"dataset must have a length and numbered items, got {type(dataset).__name__}; let an iterable data "
                "set yield a number with each item itself"
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        number = int(index)
        if number < 0:
            number += len(self)
        item = self.dataset[number]
        if isinstance(item, Mapping):
            if "index" in item:
                raise ValueError("items of dataset must not have the key 'index', which the number takes")
            return {**item, "index": number}
        return (*item, number) if isinstance(item, (tuple, list)) else (item, number)
