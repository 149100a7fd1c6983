"""Data sets of image files: Tiny-ImageNet and CUB-200-2011, in the layout of their archives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.paper.data.dataset import Split


def to_bytes(image: Any, size: int) -> Tensor:
    """Pixels (3, size, size) of a Pillow image; one of another size is scaled and cut to its centre.

    As for ImageNet, the shorter side is scaled to 8/7 of ``size`` (256 for 224).
    """
    from PIL import Image

    image = image.convert("RGB")
    if image.size != (size, size):
        scale = 8 * size / 7 / min(image.size)
        width, height = (max(round(side * scale), size) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_images(paths: Sequence[Path], labels: Iterable[int], size: int) -> Split:
    """Read image files in several threads."""
    from PIL import Image

    def read(path: Path) -> Tensor:
        try:
            with Image.open(path) as image:
                return to_bytes(image, size)
        except FileNotFoundError:
            raise
        except OSError as error:  # no image, or cut short
            raise ValueError(f"{path} cannot be read as an image: {error}") from None

    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:
        for index, pixels in enumerate(pool.map(read, paths)):
            images[index] = pixels
    return Split(images, torch.tensor(list(labels), dtype=torch.long))


SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
Listed = list[tuple[Path, int]]  # image files and their labels


def list_folder(folder: Path) -> tuple[Listed, Listed]:
    """List ``train/CLASS/*`` and ``test/CLASS/*``; classes are numbered in the order of their names."""
    splits, names = [], []
    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(
                f"{folder / part} is missing: a data set of one's own is a folder with train/CLASS/ and test/CLASS/, "
                "one folder of images per class in each"
            )
        classes = sorted(path for path in (folder / part).iterdir() if path.is_dir() and path.name[0] != ".")
        names.append([path.name for path in classes])
        files = [(file, label) for label, path in enumerate(classes) for file in sorted(path.iterdir())]
        splits.append([(file, label) for file, label in files if file.suffix.lower() in SUFFIXES])
    if names[0] != names[1] or len(names[0]) < 2:
        odd = sorted(set(names[0]) ^ set(names[1]))
        raise ValueError(
            f"train and test in {folder} must have the same two or more classes, got {len(names[0])} and "
            f"{len(names[1])}" + (f"; {odd[0]!r} is in one alone" if odd else "")
        )
    return splits[0], splits[1]


def read_folder(folder: Path, size: int) -> tuple[Split, Split]:
    """Read both splits of a data set of one's own."""
    train, test = (
        read_images([path for path, _ in part], [label for _, label in part], size) for part in list_folder(folder)
    )
    return train, test


def read_tiny_imagenet(folder: Path) -> tuple[Split, Split]:
    """Training split, and the labelled validation split for testing, of ``tiny-imagenet-200``."""
    folder = folder / "tiny-imagenet-200" if (folder / "tiny-imagenet-200").is_dir() else folder
    classes = {name: index for index, name in enumerate((folder / "wnids.txt").read_text().split())}
    train = [path for name in classes for path in sorted((folder / "train" / name / "images").glob("*.JPEG"))]
    labels = [classes[path.parent.parent.name] for path in train]
    rows = [line.split("\t") for line in (folder / "val" / "val_annotations.txt").read_text().splitlines()]
    test = [folder / "val" / "images" / row[0] for row in rows]
    return read_images(train, labels, 64), read_images(test, [classes[row[1]] for row in rows], 64)


def read_cub200(folder: Path) -> tuple[Split, Split]:
    """Training and test split of ``CUB_200_2011``, at 224 x 224 pixels."""
    folder = folder / "CUB_200_2011" if (folder / "CUB_200_2011").is_dir() else folder

    def column(name: str) -> list[str]:
        return [line.split()[1] for line in (folder / name).read_text().splitlines()]

    paths = [folder / "images" / name for name in column("images.txt")]
    labels = [int(label) - 1 for label in column("image_class_labels.txt")]  # they count from 1
    is_train = [flag == "1" for flag in column("train_test_split.txt")]
    splits = []
    for wanted in (True, False):
        chosen = [index for index, flag in enumerate(is_train) if flag == wanted]
        splits.append(read_images([paths[i] for i in chosen], [labels[i] for i in chosen], 224))
    return splits[0], splits[1]
