"""Make every table and figure of the committed results anew from their runs: ``python -m benchmarks.paper.remake``.

A folder of ``benchmarks/results/paper`` has runs (``runs.jsonl.gz``), the arguments of the command that needs them
(``command.txt``), and the tables and figures that it leaves. Nothing is trained.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shlex
import shutil
import tempfile
from pathlib import Path

from benchmarks.paper import __main__ as command
from benchmarks.paper.runs import Run
from benchmarks.paper.schedule import missing
from benchmarks.paper.store import Store, read_records

RESULTS = Path(__file__).parents[1] / "results" / "paper"


def needed(arguments: list[str]) -> list[Run]:
    """Give the runs that a command needs."""
    options = command.make_parser().parse_args(arguments)
    setting = command.make_setting(options)
    return command.every_run(setting, command.make_plans(options, setting))


def remake(committed: Path, out: Path) -> None:
    """Do the command of a folder of results with its own runs; tables and figures go to ``out``.

    Raises:
        ValueError: a run is missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "runs.jsonl").write_bytes(gzip.decompress((committed / "runs.jsonl.gz").read_bytes()))
    arguments = shlex.split((committed / "command.txt").read_text("utf-8"))
    lacking = missing(needed(arguments), Store(out, read_only=True))
    if lacking:
        raise ValueError(
            f"{committed} has not {len(lacking)} of the runs of its command, such as {lacking[0].describe()}"
        )
    command.main([*arguments, "--out", str(out)])


def keep(runs: Path, arguments: str, committed: Path) -> None:
    """Put the runs that a command needs, and no others, into a folder of results, with its arguments."""
    keys = {run.key for run in needed(shlex.split(arguments))}
    records = [record for key, record in read_records(runs / "runs.jsonl").items() if key in keys]
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    committed.mkdir(parents=True, exist_ok=True)
    (committed / "runs.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (committed / "command.txt").write_text(arguments + "\n", encoding="utf-8")


def main() -> None:
    """Remake the folders that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.remake", description="See the module.")
    parser.add_argument("folder", nargs="*", help="of benchmarks/results/paper (default: all)")
    parser.add_argument("--runs", type=Path, help="first take the runs of --arguments from this --out")
    parser.add_argument("--arguments", help="of python -m benchmarks.paper, in one word")
    options = parser.parse_args()
    if options.runs is not None:
        keep(options.runs, options.arguments, RESULTS / options.folder[0])
    for name in options.folder or sorted(path.parent.name for path in RESULTS.glob("*/command.txt")):
        with tempfile.TemporaryDirectory() as out:
            remake(RESULTS / name, Path(out))
            for path in Path(out).rglob("*"):
                if path.suffix in (".md", ".png", ".svg"):
                    target = RESULTS / name / path.relative_to(out)
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, target)


if __name__ == "__main__":
    main()
