"""Data sets by name: ``load(DataSpec("digits"))``."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.paper.data import cifar, fashion, image_folders
from benchmarks.paper.data.dataset import Data, Split, hold_out, inner, with_noise
from benchmarks.paper.data.digits import digits
from benchmarks.paper.data.hub import HubName, read_hub
from benchmarks.paper.data.words import LANGUAGES, LETTERS, TRAIN, words
from benchmarks.paper.store import write_whole


@dataclass(frozen=True)
class DataSpec:
    """A data set by name.

    Args:
        name: One of ``DATASETS``, or what ``own_folder`` gave.
        train_size: Use only so many of the training samples, always the first of the same order; None is all.
        pairs: Number of training and validation pairs of fashion-pairs; None for every other data set.
        size: Height of its images, and half their width. Of a folder of one's own: height and width. Else None.
        label_noise: Share of the training labels that are replaced, each by any of the other classes.
    """

    name: str
    train_size: int | None = None
    pairs: int | None = None
    size: int | None = None
    label_noise: float = 0.0

    def __post_init__(self) -> None:
        """Check the options."""
        if self.name not in (*DATASETS, *SOURCES):
            raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {self.name!r}")
        own = self.name not in DATASETS
        for option, is_for in (("pairs", "fashion-pairs"), ("size", "fashion-pairs and folder")):
            value = getattr(self, option)
            needed = self.name == "fashion-pairs" or (option == "size" and own)
            if needed == (value is None):
                raise ValueError(f"{option} is for {is_for}, and needed there; got {value} for {self.name}")
        if self.name == "fashion-pairs":
            if self.size < 1 or 28 % self.size:
                raise ValueError(f"size must divide 28, got {self.size}")
            if self.pairs < 10:
                raise ValueError(f"pairs must be at least 10, got {self.pairs}")
        if not 0 <= self.label_noise < 1:
            raise ValueError(f"label_noise must be at least 0 and below 1, got {self.label_noise}")
        most = _train_size(self)
        if self.train_size is not None and not 0 < self.train_size <= most:
            raise ValueError(f"train_size must be from 1 to {most:,} for {self.name}, got {self.train_size}")


@dataclass(frozen=True)
class Source:
    """A data set that is not embedded: what it must be like, and where it comes from.

    Args:
        num_classes: Number of classes.
        train: Number of training images.
        test: Number of test images.
        shape: Channels, height and width.
        read: Reads a folder in the layout of the official archive.
        archive: What that archive is called.
        inner: The folder in it.
        hub: Where it is on the Hugging Face hub; None: nowhere.
        padding: Pixels of random shift that are usual for it.
        folder: Where a package of the operating system installs it.
        slow: Whether it is worth keeping decoded.
    """

    num_classes: int
    train: int
    test: int
    shape: tuple[int, int, int]
    read: Callable[[Path], tuple[Split, Split]]
    archive: str
    hub: HubName | None
    inner: str = "."
    padding: int = 4
    folder: Path | None = None
    slow: bool = False


SOURCES = {
    "fashion-mnist": Source(
        10,
        60_000,
        10_000,
        (1, 28, 28),
        fashion.read_fashion_mnist,
        "the four IDX files of Fashion-MNIST (on Debian and Ubuntu: apt-get install dataset-fashion-mnist)",
        HubName("zalando-datasets/fashion_mnist"),
        padding=2,
        folder=Path("/usr/share/datasets/fashion-mnist"),
    ),
    "cifar10": Source(
        10,
        50_000,
        10_000,
        (3, 32, 32),
        cifar.read_cifar10,
        "cifar-10-python.tar.gz, unpacked",
        HubName("uoft-cs/cifar10", image="img"),
    ),
    "cifar100": Source(
        100,
        50_000,
        10_000,
        (3, 32, 32),
        cifar.read_cifar100,
        "cifar-100-python.tar.gz, unpacked",
        HubName("uoft-cs/cifar100", image="img", label="fine_label"),
    ),
    "tiny-imagenet": Source(
        200,
        100_000,
        10_000,
        (3, 64, 64),
        image_folders.read_tiny_imagenet,
        "tiny-imagenet-200.zip, unpacked",
        HubName("zh-plus/tiny-imagenet", test="valid"),
        inner="tiny-imagenet-200",
        slow=True,
    ),
    "cub200": Source(
        200,
        5_994,
        5_794,
        (3, 224, 224),
        image_folders.read_cub200,
        "CUB_200_2011.tgz, unpacked",
        HubName("Donghyun99/CUB-200-2011"),
        inner="CUB_200_2011",
        padding=28,  # an eighth of the height, as CIFAR's 4
        slow=True,
    ),
}


@dataclass(frozen=True)
class Embedded:
    """A data set that comes with a package.

    Args:
        num_classes: Number of classes.
        train: Number of training samples.
        channels: Channels of its images.
        make: Makes the three splits.
        package: What must be installed, by the name that it is imported under.
        flat: Whether its images have height 1.
    """

    num_classes: int
    train: int
    channels: int
    make: Callable[[], Data]
    package: str
    flat: bool = False


EMBEDDED = {
    "words": Embedded(len(LANGUAGES), TRAIN, len(LETTERS), words, "wordfreq", flat=True),
    "digits": Embedded(10, 810, 1, digits, "sklearn"),
}
DATASETS = (*EMBEDDED, "fashion-pairs", *SOURCES)


def own_folder(folder: Path, size: int) -> str:
    """Make a data set of a folder of image files, ``train/CLASS/*`` and ``test/CLASS/*``, and give it a name.

    The name ends in a hash of the images' files, so that the runs of one data set are never taken for another's.

    Args:
        folder: Where it lies.
        size: Height and width in pixels; other images are scaled and cut to their centre.

    Raises:
        FileNotFoundError: there are no such folders.
        ValueError: the classes of the two differ, one is empty, all have too few images, or ``size`` is too small for a
            network with three halvings.
    """
    if size < 8:
        raise ValueError(f"size must be at least 8, got {size}")
    train, test = image_folders.list_folder(folder)
    content = image_folders.fingerprint((path for path, _ in (*train, *test)), folder)
    digest = hashlib.sha256(f"{size} {content}".encode()).hexdigest()[:8]
    name = f"{os.fsencode(folder.resolve().name).decode(errors='replace')}-{digest}"
    SOURCES[name] = Source(
        1 + max(label for _, label in train),
        len(train),
        len(test),
        (3, size, size),
        functools.partial(image_folders.read_folder, size=size),
        "train/CLASS/ and test/CLASS/",
        None,
        padding=max(size // 8, 1),
        slow=True,
    )
    return name


def train_size(spec: DataSpec) -> int:
    """Number of training samples, without reading anything."""
    return spec.train_size or _train_size(spec)


def _train_size(spec: DataSpec) -> int:
    if spec.name in EMBEDDED:
        return EMBEDDED[spec.name].train
    total = SOURCES[spec.name].train if spec.pairs is None else spec.pairs
    return total - total // 10


def shape(spec: DataSpec) -> tuple[int, int, bool]:
    """Numbers of classes and of channels, and whether images have height 1, without reading anything."""
    if spec.name in SOURCES:
        return SOURCES[spec.name].num_classes, SOURCES[spec.name].shape[0], False
    if spec.name in EMBEDDED:
        return EMBEDDED[spec.name].num_classes, EMBEDDED[spec.name].channels, EMBEDDED[spec.name].flat
    return 100, 1, False


def decoded_bytes(name: str) -> int:
    """Bytes of the images that are kept decoded."""
    if name not in SOURCES or not SOURCES[name].slow:
        return 0
    source = SOURCES[name]
    return (source.train + source.test) * math.prod(source.shape)


def load(spec: DataSpec, folder: Path | None = None, cache: Path | None = None) -> Data:
    """Load a data set, on the CPU.

    Args:
        spec: Which.
        folder: Where it lies, in the layout of the official archive. None: where a package of the operating system
            puts it, or else the Hugging Face hub.
        cache: Folder for decoded images of the sets that take long to decode.

    Raises:
        FileNotFoundError: it is not there; the message says how to get it.
        ValueError: it is there, but its size, shape or classes are not those of the data set.
    """
    if spec.name in EMBEDDED:
        data = EMBEDDED[spec.name].make()
    elif spec.name == "fashion-pairs":
        data = fashion.fashion_pairs(*_splits("fashion-mnist", folder, cache), spec.pairs, spec.size)
    else:
        if spec.name not in SOURCES and folder is not None and own_folder(folder, spec.size) != spec.name:
            raise ValueError(f"{folder} does not hold the images that {spec.name} was made of; start again")
        source = SOURCES[spec.name]
        train, test = _splits(spec.name, folder, cache)
        data = Data(source.num_classes, *hold_out(train), test, padding=source.padding, flip=True)
    if spec.train_size is not None:
        data = replace(data, train=data.train.take(slice(spec.train_size)))
    if spec.label_noise:
        data = replace(data, train=with_noise(data.train, data.num_classes, spec.label_noise))
    return data


def _splits(name: str, folder: Path | None, cache: Path | None) -> tuple[Split, Split]:
    """Training and test split of a source, checked."""
    source = SOURCES[name]
    if folder is None and source.folder is not None and source.folder.is_dir():
        folder = source.folder
    origin = "the hub" if folder is None else str(folder)
    kept = None
    if cache is not None and (source.slow or folder is None):
        own = name not in DATASETS  # its name has a hash of the files
        kept = cache / (f"{name}.pt" if own else f"{name}-{_version(source, folder)}.pt")
        if kept.exists():
            try:
                stored = torch.load(kept, mmap=True)
                return Split(stored["train"], stored["train_labels"]), Split(stored["test"], stored["test_labels"])
            except (RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
                print(f"{kept} is broken ({error}); it is made again", file=sys.stderr)
    if folder is not None:
        try:
            train, test = source.read(folder)
        except FileNotFoundError as error:
            if source.hub is None:
                raise
            raise FileNotFoundError(f"no {name} in {folder} ({error.filename} is missing). {_ways(name)}") from None
    elif importlib.util.find_spec("datasets") is None:
        raise FileNotFoundError(f"{name} is not on this machine. {_ways(name)}")
    else:
        try:
            train, test = read_hub(source.hub, source.shape[0], source.shape[1])
        except (OSError, ValueError) as error:  # no connection, no such data set
            raise FileNotFoundError(f"{name} could not be had from the hub: {error}. {_ways(name)}") from error
    for part, split, count in (("training", train, source.train), ("test", test, source.test)):
        _check(f"{part} split of {name} from {origin}", split, count, source)
    if kept is not None:
        tensors = {"train": train.images, "train_labels": train.labels, "test": test.images, "test_labels": test.labels}
        write_whole(kept, functools.partial(torch.save, tensors))
    return train, test


def _version(source: Source, folder: Path | None) -> str:
    """What decoded images are kept under: a hash of the files that they come from."""
    if folder is None:
        return f"hub-{image_folders.READING}"
    folder = inner(folder, source.inner)
    return image_folders.fingerprint(image_folders.files_below(folder), folder)[:8]


def _ways(name: str) -> str:
    source = SOURCES[name]
    assert source.hub is not None
    return (
        f"Two ways to get it: give --data-dir a folder with {source.archive}; or pip install datasets, which "
        f"downloads {source.hub.name} from the Hugging Face hub"
    )


def _check(what: str, split: Split, count: int, source: Source) -> None:
    """Raise if a split is not what it should be."""
    if len(split.images) != count or len(split.labels) != count:
        raise ValueError(
            f"the {what} should have {count:,} images and labels, got {len(split.images):,} and {len(split.labels):,}"
        )
    if tuple(split.images.shape[1:]) != source.shape:
        raise ValueError(f"the {what} should have images of shape {source.shape}, got {tuple(split.images.shape[1:])}")
    classes = split.labels.unique().tolist()
    if classes != list(range(source.num_classes)):
        raise ValueError(
            f"the {what} should have each of {source.num_classes} classes, got {len(classes)} from {classes[0]} to "
            f"{classes[-1]}"
        )
