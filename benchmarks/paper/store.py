"""Records of finished runs: one JSON line each, by the key of the run's configuration."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # not on Windows, where nothing keeps two commands from writing at once
    fcntl = None  # type: ignore[assignment]


def save_whole(value: Any, path: Path) -> None:
    """Save tensors to a file that is there whole or not at all, also if several processes write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    torch.save(value, part)
    part.replace(path)


class Store:
    """A folder with ``runs.jsonl``, the weights of teachers, and decoded data sets.

    A line is written whole or, if the process is killed in the middle of it, is dropped by the next one that opens
    the folder. Of several lines with one key the last counts. Use it as a context manager: only one process can have
    a folder open.

    Raises:
        ValueError: another process has it open, or a line is no record.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "runs.jsonl"
        self.checkpoints = folder / "checkpoints"
        self.data = folder / "data"
        self._file = self.path.open("ab")
        try:
            self._lock(folder)
            self.records = self._read()
        except ValueError:
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

    def _read(self) -> dict[str, dict[str, Any]]:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(self.path, len(whole))
        records = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                records[record["key"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}, line {number}, is no record of a run ({error}); remove it") from None
        return records

    def add(self, record: dict[str, Any]) -> None:
        """Append a record."""
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()
        self.records[record["key"]] = record

    def has_checkpoint(self, key: str) -> bool:
        """Tell whether the weights of a run are there."""
        return (self.checkpoints / f"{key}.pt").exists()
