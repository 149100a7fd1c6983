"""Data sets by name, as tensors: train, validation and test."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Split:
    """Images (N, channels, height, width) in float32, standardised, and their labels (N,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Data:
    """A data set with the paper's three splits; validation is 10% of the training data (sec. 7.1)."""

    name: str
    num_classes: int
    channels: int
    train: Split
    validation: Split
    test: Split


def digits(device: str = "cpu") -> Data:
    """scikit-learn's 1,797 images of 8 x 8 handwritten digits, half of them for testing; embedded in the package.

    The split is the same on every call and machine.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(bunch.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, validation, train = order[:898], order[898:988], order[988:]
    images = (images - images[train].mean()) / images[train].std()
    images, labels = images.to(device), labels.to(device)
    return Data("digits", 10, 1, *(Split(images[part], labels[part]) for part in (train, validation, test)))


DATASETS = {"digits": digits}


def random_shift(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Crop each image at random from a zero-padded version of itself, on its device, as one gather."""
    if padding == 0:
        return images
    count, _, height, width = images.shape
    padded = functional.pad(images, [padding] * 4)
    offsets = torch.randint(2 * padding + 1, (2, count), generator=generator).to(images.device)
    rows = offsets[0, :, None, None] + torch.arange(height, device=images.device)[None, :, None]
    columns = offsets[1, :, None, None] + torch.arange(width, device=images.device)[None, None, :]
    sample = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[sample, rows, columns].permute(0, 3, 1, 2).contiguous()
