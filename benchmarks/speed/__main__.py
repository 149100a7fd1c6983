"""Command line: ``python -m benchmarks.speed losses``, ``train-step``, ``metrics``, ``import`` or ``gpu-code``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import statistics
from pathlib import Path

import torch

from benchmarks.provenance import hardware, versions
from benchmarks.speed.timing import Measurement, busy

BENCHMARKS = {
    "losses": ("benchmarks.speed.losses", "forward and backward of the losses alone, beside their peers"),
    "linear": ("benchmarks.speed.linear", "a linear layer and its loss, with and without all logits at once"),
    "train-step": ("benchmarks.speed.train_step", "cost of a loss in a whole training step"),
    "metrics": ("benchmarks.speed.metrics", "metrics of a million predictions, beside their peers"),
    "import": ("benchmarks.speed.imports", "what importing softlabels adds to importing torch"),
    "gpu-code": ("benchmarks.speed.gpu_code", "what the losses do on a GPU, counted in generated code without one"),
}


def main(arguments: list[str] | None = None) -> None:
    """Measure and print and save the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description="What softlabels costs.")
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, (module, summary) in BENCHMARKS.items():
        command = commands.add_parser(name, help=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        benchmark = importlib.import_module(module)
        benchmark.arguments(command)
        if not hasattr(benchmark, "HARDWARE"):
            _timing_arguments(command, getattr(benchmark, "MALLOC", "keep"))
        command.add_argument("--out", type=Path, help="folder for a table and JSON; otherwise they are printed alone")
    options = parser.parse_args(arguments)
    benchmark = importlib.import_module(BENCHMARKS[options.benchmark][0])
    is_timed = not hasattr(benchmark, "HARDWARE")
    if is_timed:
        torch.set_num_threads(options.threads)

    with busy(options.busy or 0 if is_timed else 0):
        results = benchmark.measure(options)
    settings = {name: value for name, value in vars(options).items() if name not in ("benchmark", "out")}
    command_line = " ".join(
        [f"python -m benchmarks.speed {options.benchmark}"]
        + [
            f"--{name.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, list) else value}"
            for name, value in settings.items()
            if value is not None
        ]
    )
    made = {
        "command": command_line,
        **versions(),
        "hardware": hardware(options.device) if is_timed else benchmark.HARDWARE,
    }
    render = table if is_timed else benchmark.table
    text = "\n\n".join(render(heading, rows) for heading, rows in results.items())
    note = (
        f"{benchmark.describe(options)} Made by `{command_line}` with softlabels {made['softlabels']}, torch "
        f"{made['torch']} on {made['hardware']}."
    )
    print(f"\n{text}\n\n{note}")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        records = {
            heading: {name: dataclasses.asdict(row) for name, row in rows.items()} for heading, rows in results.items()
        }
        (options.out / "records.json").write_text(json.dumps({**made, "results": records}, indent=1) + "\n")
        (options.out / "table.md").write_text(f"# {benchmark.TITLE}\n\n{text}\n\n{note}\n")


def _timing_arguments(command: argparse.ArgumentParser, malloc: str) -> None:
    command.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="where to measure")
    command.add_argument("--threads", type=int, default=2, help="CPU threads")
    command.add_argument("--busy", type=int, metavar="CORES", help="that other processes compute on at the same time")
    command.add_argument(
        "--malloc",
        choices=["keep", "system"],
        default=malloc,
        help="CPU memory: keep what is freed, as jemalloc and tcmalloc do, or the system's way",
    )


def table(heading: str, rows: dict[str, Measurement]) -> str:
    """Markdown table of times, ratios to the first row and, where measured, limit, memory and first call."""
    base = next(iter(rows))
    columns = [heading, "median (ms)", f"ratio to {base} (quartiles)"]
    limit = rows.get("limit")
    memory = any(row.peak is not None for row in rows.values())
    first = any(row.first is not None for row in rows.values())
    columns += ["times the limit"] * (limit is not None) + ["memory (MiB)"] * memory + ["first call (s)"] * first
    lines = [f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for name, row in rows.items():
        median = statistics.median(row.seconds)
        cells = [name, f"{1e3 * median:.3f}", str(row.ratio or 1)]
        if limit is not None:
            cells.append(f"{median / statistics.median(limit.seconds):.1f}")
        if memory:
            cells.append("" if row is limit else "unmeasured" if row.peak is None else f"{row.peak:.3g}")
        if first:
            cells.append("" if row.first is None else f"{row.first:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
