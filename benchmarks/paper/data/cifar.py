"""CIFAR-10 and CIFAR-100, in the layout of their archives for Python."""

from __future__ import annotations

import codecs
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.paper.data.dataset import Split, inner

_ALLOWED = {  # all that a pickled numpy array of bytes needs; a file that asks for more is not opened
    "_reconstruct": np.empty(0).__reduce__()[0],
    "ndarray": np.ndarray,
    "dtype": np.dtype,
    "encode": codecs.encode,
}


class _Unpickler(pickle.Unpickler):
    """Unpickles arrays and plain values, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Find what may be found."""
        if module.split(".")[0] in ("numpy", "_codecs") and name in _ALLOWED:
            return _ALLOWED[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of CIFAR does")


def read_cifar10(folder: Path) -> tuple[Split, Split]:
    """Training and test split of the folder ``cifar-10-batches-py``, or of one that contains it."""
    folder = inner(folder, "cifar-10-batches-py")
    train = [_read(folder / f"data_batch_{number}", b"labels") for number in range(1, 6)]
    together = Split(torch.cat([part.images for part in train]), torch.cat([part.labels for part in train]))
    return together, _read(folder / "test_batch", b"labels")


def read_cifar100(folder: Path) -> tuple[Split, Split]:
    """Training and test split, with the 100 fine labels, of ``cifar-100-python`` or a folder that contains it."""
    folder = inner(folder, "cifar-100-python")
    return _read(folder / "train", b"fine_labels"), _read(folder / "test", b"fine_labels")


def _read(path: Path, labels: bytes) -> Split:
    with path.open("rb") as file:
        try:
            content = _Unpickler(file, encoding="bytes").load()
            images = np.asarray(content[b"data"], np.uint8).reshape(-1, 3, 32, 32)
            return Split(torch.from_numpy(images.copy()), torch.tensor(content[labels], dtype=torch.long))
        except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a batch of CIFAR for Python: {error}") from error
