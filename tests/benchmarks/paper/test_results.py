"""The committed tables and verdicts follow from the committed runs, and from nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.paper.remake import RESULTS, keep, remake
from benchmarks.paper.store import read_records

FOLDERS = sorted(path.parent.name for path in RESULTS.glob("*/command.txt"))


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *arguments, **options: None)


@pytest.mark.parametrize("name", FOLDERS)
def test_tables_are_made_of_the_runs(name, tmp_path):
    committed = RESULTS / name
    remake(committed, tmp_path)
    tables = {path.relative_to(committed) for path in committed.rglob("*.md")}
    assert tables == {path.relative_to(tmp_path) for path in tmp_path.rglob("*.md")}
    for table in tables - {Path("analytic/claims.md")}:  # its deviations are rounding, which differs between machines
        assert (tmp_path / table).read_text("utf-8") == (committed / table).read_text("utf-8")


def test_runs_that_lack_are_named_and_not_trained(tmp_path):
    committed = tmp_path / "committed"
    remake(RESULTS / "laptop-digits", tmp_path / "whole")
    keep(tmp_path / "whole", "pruned --dataset digits --seeds 1", committed)
    assert len(read_records(tmp_path / "whole" / "runs.jsonl")) > 100
    (committed / "command.txt").write_text("comparison --dataset digits --seeds 1")
    with pytest.raises(ValueError, match=r"has not \d of the runs of its command, such as label smoothing"):
        remake(committed, tmp_path / "out")
