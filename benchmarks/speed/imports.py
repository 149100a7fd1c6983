"""What ``import softlabels`` adds to ``import torch``: fresh interpreters, in turn."""

from __future__ import annotations

import argparse
import subprocess
import sys

from benchmarks.speed.timing import Measurement, Run, compare

TITLE = "Import"
CODE = {"import torch": "import torch", "import torch, softlabels": "import torch, softlabels"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=21, help="repetitions")


def describe(options: argparse.Namespace) -> str:
    """What was measured."""
    return f"Fresh interpreters with warm files, {options.rounds} times each, each between two of the base."


def measure(options: argparse.Namespace) -> dict[str, dict[str, Measurement]]:
    """Time both interpreters."""
    runs: dict[str, Run] = {
        name: lambda code=code: subprocess.run([sys.executable, "-c", code], check=True) for name, code in CODE.items()
    }
    return {"interpreter": compare(runs, options.rounds, options.device, warmup=1)}
