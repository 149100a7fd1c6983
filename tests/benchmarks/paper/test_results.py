"""The committed tables and verdicts follow from the committed runs, and from nothing else."""

from __future__ import annotations

import gzip
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.paper import __main__ as command

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "paper"


@pytest.mark.parametrize("name", ["laptop-digits", "laptop-fashion-pairs"])
def test_tables_are_made_of_the_runs(name, tmp_path, monkeypatch):
    def prepare(todo, store, folder):
        raise AssertionError(f"{len(todo)} runs are not stored; with this command nothing is left to train")

    monkeypatch.setattr(command, "prepare", prepare)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *arguments, **options: None)
    committed = RESULTS / name
    (tmp_path / "runs.jsonl").write_bytes(gzip.decompress((committed / "runs.jsonl.gz").read_bytes()))
    (made_by,) = set(
        re.findall(r"`python -m benchmarks\.paper (.*?)`", (committed / "comparison/table.md").read_text("utf-8"))
    )
    command.main([*shlex.split(made_by), "--out", str(tmp_path)])
    tables = {path.relative_to(committed) for path in committed.rglob("*.md")}
    assert len(tables) >= 4
    for table in tables - {Path("analytic/table.md")}:  # its deviations are rounding, which differs between machines
        assert (tmp_path / table).read_text("utf-8") == (committed / table).read_text("utf-8")
