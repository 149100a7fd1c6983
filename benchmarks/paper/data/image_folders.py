"""Data sets of image files: Tiny-ImageNet, CUB-200-2011 and folders of one's own."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.paper.data.dataset import Split, inner

READING = 1  # to be raised when the same files give other pixels, so that none are kept from before


def to_bytes(image: Any, size: int) -> Tensor:
    """Pixels (3, size, size) of a Pillow image; one of another size is scaled and cut to its centre.

    As for ImageNet, the shorter side is scaled to 8/7 of ``size`` (256 for 224). The image is turned as its EXIF
    orientation says. 16-bit grey (0 to 65,535) and floating-point grey (0 to 1) become 8-bit grey.

    Raises:
        ValueError: values of more than 8 bits are outside of these ranges.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # Pillow would cut these off at 255
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    image = image.convert("RGB")
    if image.size != (size, size):
        scale = 8 * size / 7 / min(image.size)
        width, height = (max(round(side * scale), size) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _to_8_bits(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    most = 1.0 if values.dtype.kind == "f" else 65535
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= most):  # nan too
        kind = "floating-point" if most == 1.0 else "integer"
        raise ValueError(f"its {kind} values should be from 0 to {most:g}, got {low:g} to {high:g}")
    return np.round(values * (255.0 / most)).astype(np.uint8)


def read_images(paths: Sequence[Path], labels: Iterable[int], size: int) -> Split:
    """Read image files in several threads.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be read as an image; the message says which.
    """
    from PIL import Image

    def read(path: Path) -> Tensor:
        try:
            with Image.open(path) as image:
                return to_bytes(image, size)
        except FileNotFoundError:
            raise
        except Exception as error:  # Pillow's plugins raise whatever a broken file makes of their arithmetic
            raise ValueError(f"{shown(path)} cannot be read as an image: {error or type(error).__name__}") from None

    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:
        for index, pixels in enumerate(pool.map(read, paths)):
            images[index] = pixels
    return Split(images, torch.tensor(list(labels), dtype=torch.long))


def shown(path: Path) -> str:
    """Path for a message; bytes of its name that are no UTF-8 are escaped."""
    return os.fsencode(path).decode(errors="backslashreplace")


def fingerprint(paths: Iterable[Path], folder: Path) -> str:
    """Hash of the names, below ``folder``, and of the contents of files, and of the way in which they are read."""
    paths = sorted(paths)

    def hash_file(path: Path) -> bytes:
        return hashlib.sha256(path.read_bytes()).digest()

    hashed = hashlib.sha256(str(READING).encode())
    with ThreadPoolExecutor() as pool:
        for path, content in zip(paths, pool.map(hash_file, paths), strict=True):
            hashed.update(os.fsencode(path.relative_to(folder)) + b"\0" + content)
    return hashed.hexdigest()


def files_below(folder: Path) -> list[Path]:
    """Files of a folder and of the folders in it, but for hidden ones such as macOS's ``._x.png``."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        found += [Path(parent, name) for name in sorted(files) if name[0] != "."]
    return found


SUFFIXES = {
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tga", ".tif", ".tiff", ".webp"),
}
LEAST = 40  # training images: fewer leave less than four for validation
Listed = list[tuple[Path, int]]  # image files and their labels


def list_folder(folder: Path) -> tuple[Listed, Listed]:
    """List the images in ``train/CLASS/`` and ``test/CLASS/``, and in the folders in these.

    Classes are numbered in the order of their names.

    Raises:
        FileNotFoundError: there are no such folders.
        ValueError: the two have other classes, a class has no image, or all have too few.
    """
    splits, names = [], []
    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(
                f"{folder / part} is missing: a data set of one's own is a folder with train/CLASS/ and test/CLASS/, "
                "one folder of images per class in each"
            )
        classes = sorted(path for path in (folder / part).iterdir() if path.is_dir() and path.name[0] != ".")
        names.append([path.name for path in classes])
        splits.append(_list_classes(classes))
    if names[0] != names[1] or len(names[0]) < 2:
        odd = sorted(set(names[0]) ^ set(names[1]))
        raise ValueError(
            f"train and test in {shown(folder)} must have the same two or more classes, got {len(names[0])} and "
            f"{len(names[1])}" + (f"; {shown(Path(odd[0]))!r} is in one alone" if odd else "")
        )
    if len(splits[0]) < LEAST:
        raise ValueError(f"{shown(folder / 'train')} must hold at least {LEAST} images, got {len(splits[0])}")
    return splits[0], splits[1]


def _list_classes(classes: Sequence[Path]) -> Listed:
    listed: Listed = []
    for label, path in enumerate(classes):
        files = files_below(path)
        images = [(file, label) for file in files if file.suffix.lower() in SUFFIXES]
        if not images:
            got = f"{len(files)} other files, such as {shown(files[0])}" if files else "nothing"
            raise ValueError(f"{shown(path)} must hold images ({', '.join(sorted(SUFFIXES))}), got {got}")
        listed += images
    return listed


def read_folder(folder: Path, size: int) -> tuple[Split, Split]:
    """Read both splits of a data set of one's own."""
    train, test = (
        read_images([path for path, _ in part], [label for _, label in part], size) for part in list_folder(folder)
    )
    return train, test


def read_tiny_imagenet(folder: Path) -> tuple[Split, Split]:
    """Training split, and the labelled validation split for testing, of ``tiny-imagenet-200``."""
    folder = inner(folder, "tiny-imagenet-200")
    classes = {name: index for index, name in enumerate((folder / "wnids.txt").read_text("utf-8").split())}
    train = [path for name in classes for path in sorted((folder / "train" / name / "images").glob("*.JPEG"))]
    labels = [classes[path.parent.parent.name] for path in train]
    rows = [line.split("\t") for line in (folder / "val" / "val_annotations.txt").read_text("utf-8").splitlines()]
    test = [folder / "val" / "images" / row[0] for row in rows]
    return read_images(train, labels, 64), read_images(test, [classes[row[1]] for row in rows], 64)


def read_cub200(folder: Path) -> tuple[Split, Split]:
    """Training and test split of ``CUB_200_2011``, at 224 x 224 pixels."""
    folder = inner(folder, "CUB_200_2011")

    def column(name: str) -> list[str]:
        return [line.split()[1] for line in (folder / name).read_text("utf-8").splitlines()]

    paths = [folder / "images" / name for name in column("images.txt")]
    labels = [int(label) - 1 for label in column("image_class_labels.txt")]  # they count from 1
    is_train = [flag == "1" for flag in column("train_test_split.txt")]
    splits = []
    for wanted in (True, False):
        chosen = [index for index, flag in enumerate(is_train) if flag == wanted]
        splits.append(read_images([paths[i] for i in chosen], [labels[i] for i in chosen], 224))
    return splits[0], splits[1]
