"""Items know their number, whatever a loader does with them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from softlabels.data import WithIndex


class Items:
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_numbers_follow_their_items(workers):
    """Shuffled, in worker processes, and of a part of the data."""
    data = WithIndex(TensorDataset(torch.arange(20) * 10, torch.arange(20)))
    part = Subset(data, list(range(5, 20)))
    seen = []
    for x, y, index in DataLoader(part, batch_size=4, shuffle=True, num_workers=workers):
        assert index.dtype == torch.int64
        assert torch.equal(x, index * 10)
        assert torch.equal(y, index)
        seen += index.tolist()
    assert sorted(seen) == list(range(5, 20))
    assert len(data) == 20


def test_items_of_any_kind():
    data = WithIndex(Items((1, 2), [3], {"x": 4}, 5))
    assert [data[i] for i in range(4)] == [(1, 2, 0), (3, 1), {"x": 4, "index": 2}, (5, 3)]
    assert data[-1] == (5, 3)
    assert data[torch.tensor(0)] == (1, 2, 0)


def test_what_has_no_numbers_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(TypeError, match="dataset must have a length and numbered items, got Stream"):
        WithIndex(Stream())
    with pytest.raises(ValueError, match="must not have the key 'index'"):
        WithIndex(Items({"index": 1}))[0]
