"""Command line: ``python -m benchmarks.speed train-step``."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from benchmarks.paper.report import provenance
from benchmarks.speed import train_step


def main(arguments: list[str] | None = None) -> None:
    """Measure and print and save the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description="What the losses cost.")
    parser.add_argument("benchmark", choices=["train-step"], help="train-step: cost of a loss in a whole training step")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default %(default)s")
    parser.add_argument("--batch-size", type=int, default=128, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=16, help="repetitions (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    parser.add_argument("--out", type=Path, default=None, help="folder for a table and JSON (default: print alone)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    results = train_step.measure(options.device, options.batch_size, options.rounds)
    command = (
        f"python -m benchmarks.speed train-step --device {options.device} --batch-size {options.batch_size} "
        f"--rounds {options.rounds} --threads {options.threads}"
    )
    made = provenance(command)
    lines = ["| step, or part of one | median (ms) | ratio to nn.CrossEntropyLoss (quartiles) |", "|---|---:|---:|"]
    lines += [
        f"| {name} | {1e3 * statistics.median(result['seconds']):.2f} | {result['ratio'] or 1} |"
        for name, result in results.items()
    ]
    note = (
        f"ResNet-18 for 32 x 32 images, batch {options.batch_size}, each step timed {options.rounds} times between two "
        f"of the base. Made by `{command}` with softlabels {made['softlabels']}, torch {made['torch']} on "
        f"{made['hardware']}."
    )
    text = "\n".join(lines)
    print(f"\n{text}\n\n{note}")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        seconds = {name: result["seconds"] for name, result in results.items()}
        (options.out / "records.json").write_text(json.dumps({**made, "seconds": seconds}, indent=1) + "\n")
        (options.out / "table.md").write_text(f"# Cost of a loss in a training step\n\n{text}\n\n{note}\n")


if __name__ == "__main__":
    main()
