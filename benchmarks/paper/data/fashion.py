"""Fashion-MNIST, alone and in pairs."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.paper.data.dataset import Data, Split, hold_out


def read_idx(path: Path) -> Tensor:
    """Read a file of unsigned bytes in the IDX format of MNIST, compressed or not.

    Raises:
        ValueError: it is no such file, or is cut short.
    """
    if path.exists():
        content = path.read_bytes()
    else:
        path = path.with_name(path.name + ".gz")
        try:
            content = gzip.decompress(path.read_bytes())
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file: {error}") from None
    if content[:3] != b"\0\0\x08" or len(content) < 4:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes: it starts with {content[:4].hex(' ')}")
    dims = content[3]
    shape = np.frombuffer(content, ">u4", dims, 4).tolist()
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dims)
    if len(values) != np.prod(shape):
        raise ValueError(f"{path} holds {len(values)} values, but its header says {' x '.join(map(str, shape))}")
    return torch.from_numpy(values.copy()).reshape(shape)


def read_fashion_mnist(folder: Path) -> tuple[Split, Split]:
    """Training and test split of a folder with the four official files."""
    splits = []
    for name in ("train", "t10k"):
        images = read_idx(folder / f"{name}-images-idx3-ubyte").unsqueeze(1)
        splits.append(Split(images, read_idx(folder / f"{name}-labels-idx1-ubyte").long()))
    return splits[0], splits[1]


def fashion_pairs(train: Split, test: Split, pairs: int, size: int) -> Data:
    """Two Fashion-MNIST images side by side; class 10 * left + right: 100 classes with the confusions of clothing.

    Args:
        train: Fashion-MNIST's training split. A tenth of its images is held out for the validation pairs.
        test: Its test split.
        pairs: Number of training and validation pairs together, 10% of them for validation; the test set has 10,000.
        size: Height of a pair, and half its width; a divisor of 28, by averages over squares of 28 / size pixels.
    """
    generator = torch.Generator().manual_seed(0)
    images, held_out = hold_out(train)
    validation = pairs // 10
    splits = [
        pair(*part, size, generator) for part in ((images, pairs - validation), (held_out, validation), (test, 10_000))
    ]
    return Data(100, *splits, padding=size // 14, flip=False)  # a mirrored pair has another label


def pair(split: Split, count: int, size: int, generator: torch.Generator) -> Split:
    """Draw ``count`` pairs of images of a split."""
    left, right = torch.randint(len(split), (2, count), generator=generator)
    images = split.images
    if size != images.shape[-1]:
        images = functional.avg_pool2d(images.float(), images.shape[-1] // size).round().to(torch.uint8)
    return Split(
        torch.cat([images[left], images[right]], 3),
        split.labels[left] * 10 + split.labels[right],
    )
