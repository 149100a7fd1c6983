"""Data sets from the Hugging Face hub, through the library ``datasets``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.paper.data.dataset import Split
from benchmarks.paper.data.image_folders import to_bytes


@dataclass(frozen=True)
class HubName:
    """Where a data set is on the hub, and what its columns and splits are called."""

    name: str
    image: str = "image"
    label: str = "label"
    train: str = "train"
    test: str = "test"


def read_hub(hub: HubName, channels: int, size: int) -> tuple[Split, Split]:
    """Download, or take from the cache of ``datasets``, and decode both splits."""
    import datasets

    splits = []
    for part in (hub.train, hub.test):
        rows = datasets.load_dataset(hub.name, split=part)
        images = torch.empty(len(rows), channels, size, size, dtype=torch.uint8)
        labels = torch.empty(len(rows), dtype=torch.long)
        for index, row in enumerate(rows):
            picture = row[hub.image]
            grey = channels == 1
            images[index] = torch.from_numpy(np.array(picture.convert("L"))) if grey else to_bytes(picture, size)
            labels[index] = row[hub.label]
        splits.append(Split(images, labels))
    return splits[0], splits[1]
