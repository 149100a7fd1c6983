"""Records of finished runs: one JSON line each, by the key of the run's configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Store:
    """A folder with ``runs.jsonl``, the weights of teachers, and decoded data sets.

    A line is written whole or, if the process is killed in the middle of it, is dropped by the next one that opens
    the folder. Of several lines with one key the last counts.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "runs.jsonl"
        self.checkpoints = folder / "checkpoints"
        self.data = folder / "data"
        self.records: dict[str, dict[str, Any]] = {}
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            self.path.write_bytes(whole)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                self.records[record["key"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}, line {number}, is no record of a run ({error}); remove it") from None

    def add(self, record: dict[str, Any]) -> None:
        """Append a record."""
        with self.path.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        self.records[record["key"]] = record

    def has_checkpoint(self, key: str) -> bool:
        """Tell whether the weights of a run are there."""
        return (self.checkpoints / f"{key}.pt").exists()
