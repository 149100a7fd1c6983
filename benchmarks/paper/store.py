"""Records of finished runs: one JSON line each, by the key of the run's configuration."""

from __future__ import annotations

import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # not on Windows, where nothing keeps two commands from writing at once
    fcntl = None  # type: ignore[assignment]

METRICS = ("accuracy", "ece", "nll", "uncertainty", "diversity")
# What a record must have, and what that must have in turn: all that tables, figures and estimates read.
FIELDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("train", "validation", "test"), METRICS),
    "curve": ("count", "confidence", "accuracy", "edges"),
    **dict.fromkeys(("soft_labels", "epochs", "data", "model", "recipe", "method", "device"), ()),
    **dict.fromkeys(("data_digest", "seconds", "versions", "hardware"), ()),
}


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Read the records of a file by their keys; of several with one key the last counts, half a line is left out.

    Raises:
        ValueError: a line is no record.
    """
    content = path.read_bytes() if path.exists() else b""
    records = {}
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            record = json.loads(line)
            for field, parts in FIELDS.items():
                for part in parts:
                    record[field][part]
                record[field]
            record["data"].setdefault("label_noise", 0.0)  # which older runs did not have
            records[record["key"]] = record
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}, line {number}, is no record of a run ({what}); remove it") from None
    return records


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Have a file written, which is there whole or not at all, also if several processes write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class Store:
    """A folder with ``runs.jsonl``, the weights of teachers, and decoded data sets.

    A line is written whole or, if the process is killed in the middle of it, is dropped by the next one that opens
    the folder. Use it as a context manager: only one process can have a folder open, unless ``read_only``.

    Raises:
        OSError: the folder cannot be written to.
        ValueError: another process has it open, or a line is no record.
    """

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        self.path = folder / "runs.jsonl"
        self.checkpoints = folder / "checkpoints"
        self.data = folder / "data"
        if read_only:
            self.records = read_records(self.path)
            return
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out must be a folder, but {folder} is a file")
        folder.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)
        try:
            self._lock(folder)
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
            self.records = read_records(self.path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Store:
        """Give the store."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let another process have the folder."""
        self._file.close()

    def _lock(self, folder: Path) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the file is closed
        except BlockingIOError:
            raise ValueError(f"another command is writing to {folder}; give this one another --out") from None

    def add(self, record: dict[str, Any], weights: bytes | None = None) -> None:
        """Append a record; keep the weights, if there are any, for students to come."""
        if weights is not None:
            write_whole(self._checkpoint(record["key"]), lambda file: file.write(weights))
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        if self._file.write(line) != len(line):
            raise OSError(f"no room for a record in {self.path}")
        self.records[record["key"]] = record

    def _checkpoint(self, key: str) -> Path:
        return self.checkpoints / f"{key}.pt"

    def weights(self, key: str) -> bytes | None:
        """Give the weights of a run as bytes; None where they are missing, or broken, which is said."""
        path = self._checkpoint(key)
        if not path.exists():
            return None
        try:
            with zipfile.ZipFile(path) as parts:  # as torch.save writes them, with checksums
                broken = parts.testzip()
        except (zipfile.BadZipFile, EOFError) as error:
            broken = str(error)
        if broken is not None:
            print(f"{path} is broken ({broken}); its run is done again", file=sys.stderr)
            return None
        return path.read_bytes()
