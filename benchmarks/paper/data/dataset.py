"""What a data set is here: bytes of images on one device, in the paper's three splits."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Split:
    """Images (N, channels, height, width) as uint8 and their labels (N,) as int64.

    ``posterior`` is the true probability of each class (N, classes) in float64, where it is known.
    """

    images: Tensor
    labels: Tensor
    posterior: Tensor | None = None

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.labels)

    def take(self, index: Tensor | slice) -> Split:
        """Take some of the samples."""
        return Split(*(None if values is None else values[index] for values in self._tensors()))

    def to(self, device: str) -> Split:
        """Move it to a device."""
        return Split(*(None if values is None else values.to(device) for values in self._tensors()))

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.images, self.labels, self.posterior


@dataclass(frozen=True)
class Data:
    """A data set with the paper's splits; validation is 10% of the training data (sec. 7.1).

    ``padding`` (pixels of random shift) and ``flip`` (whether a mirrored image keeps its label) are the augmentation
    that is usual for the data set.
    """

    num_classes: int
    train: Split
    validation: Split
    test: Split
    padding: int
    flip: bool

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.train.images.shape[1]

    @property
    def flat(self) -> bool:
        """Whether images have height 1."""
        return self.train.images.shape[2] == 1

    @functools.cached_property
    def normalise(self) -> Normalise:
        """What normalises the images of every split, by the statistics of the training images."""
        return Normalise(self.train.images)

    def digest(self) -> str:
        """Hash of the bytes of every split."""
        hashed = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            for values in (split.images, split.labels, split.posterior):
                if values is not None:
                    hashed.update(values.contiguous().numpy())
        return hashed.hexdigest()[:16]

    def to(self, device: str) -> Data:
        """Move every split to a device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in ("train", "validation", "test")})


def inner(folder: Path, name: str) -> Path:
    """Give the folder of an archive, whether it is ``folder`` or in it."""
    return folder / name if (folder / name).is_dir() else folder


def hold_out(split: Split, count: int | None = None) -> tuple[Split, Split]:
    """Shuffle, always in the same way, and split off ``count`` samples (10%): (the others, those)."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    count = len(split) // 10 if count is None else count
    return split.take(order[count:]), split.take(order[:count])


def with_noise(split: Split, num_classes: int, share: float) -> Split:
    """Replace the labels of a share of the samples, drawn always in the same way, each by one of the other classes."""
    generator = torch.Generator().manual_seed(0)
    wrong = torch.randperm(len(split), generator=generator)[: round(share * len(split))]
    labels = split.labels.clone()
    labels[wrong] = (labels[wrong] + torch.randint(1, num_classes, (len(wrong),), generator=generator)) % num_classes
    return replace(split, labels=labels)


class Normalise:
    """Bytes to float32 with mean 0 and deviation 1 per channel of the training images.

    The statistics come of integer counts, so that they do not depend on the order of sums, threads or device.
    """

    def __init__(self, images: Tensor) -> None:
        values = torch.arange(256, dtype=torch.float64)
        moments = []
        for channel in images.unbind(1):
            count = torch.bincount(channel.reshape(-1).int(), minlength=256).double().cpu()
            mean = (count * values).sum() / count.sum()
            moments.append((mean, ((count * (values - mean) ** 2).sum() / count.sum()).sqrt()))
        mean, deviation = torch.tensor(moments).float().T.reshape(2, 1, -1, 1, 1).to(images.device)
        self.mean, self.deviation = mean, deviation.clamp(min=1.0)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise a batch."""
        return (images.float() - self.mean) / self.deviation


def augment(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Crop each image at random from a version of itself with a black border, and mirror half of them.

    The random numbers are drawn on the CPU, the work is done on the device of the images.
    """
    count, _, height, width = images.shape
    if padding:
        rows, columns = torch.randint(2 * padding + 1, (2, count), generator=generator).to(images.device)
        windows = functional.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
        images = windows[torch.arange(count, device=images.device), :, rows, columns]
    if flip:
        mirrored = (torch.rand(count, generator=generator) < 0.5).to(images.device)
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images
