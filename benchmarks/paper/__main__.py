"""Command line: ``python -m benchmarks.paper comparison``."""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from pathlib import Path

from benchmarks.paper import comparison, report
from benchmarks.paper.data import DATASETS
from benchmarks.paper.recipe import Recipe


def main(arguments: list[str] | None = None) -> None:
    """Run one experiment and print and save its results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description="The paper's experiments.")
    parser.add_argument("experiment", choices=["comparison"], help="comparison: every method on one data set (Fig. 3)")
    parser.add_argument("--dataset", choices=DATASETS, default="digits")
    parser.add_argument("--depth", type=int, default=8, help="depth of the CIFAR ResNet, 6n + 2 (default %(default)s)")
    parser.add_argument("--width", type=int, default=16, help="channels of its first stage (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs, help="default %(default)s")
    parser.add_argument("--seeds", type=int, default=4, help="runs per method (default %(default)s)")
    parser.add_argument("--ema-decay", type=float, default=comparison.Comparison.ema_decay, help="default %(default)s")
    parser.add_argument("--device", default="cpu", help="default %(default)s")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8), help="processes (default: cores)")
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"), help="folder (default %(default)s)")
    options = parser.parse_args(arguments)
    for name in ("epochs", "seeds", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")

    config = comparison.Comparison(
        dataset=options.dataset,
        depth=options.depth,
        width=options.width,
        ema_decay=options.ema_decay,
        device=options.device,
        recipe=Recipe(epochs=options.epochs),
    )
    command = (
        f"python -m benchmarks.paper {options.experiment} --dataset {options.dataset} --depth {options.depth} "
        f"--width {options.width} --epochs {options.epochs} --seeds {options.seeds} --ema-decay {options.ema_decay} "
        f"--device {options.device}"
    )
    start = time.perf_counter()
    records = comparison.run(config, options.seeds, min(options.workers, options.seeds))
    title = f"{options.dataset}, ResNet-{options.depth}, {options.seeds} seeds"
    text = report.save(options.out, title, dataclasses.asdict(config), records, command)
    print(f"\n{title}: test set, mean ± half-width of the 95% interval\n\n{text}\n")
    print(f"{time.perf_counter() - start:.0f} s; records, table and figure in {options.out}/")


if __name__ == "__main__":
    main()
