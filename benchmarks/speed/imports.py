"""What ``import softlabels`` adds to ``import torch``, in fresh interpreters."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from benchmarks.speed.timing import Measurement, ratio

TITLE = "Import"
CODE = """
import time
start = time.perf_counter()
import torch
between = time.perf_counter()
import softlabels
print(between - start, time.perf_counter() - start)
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=21, help="repetitions")


def describe(options: argparse.Namespace) -> str:
    """What was measured."""
    return f"{options.rounds} fresh interpreters with warm files and bytecode, each of which imports torch first."


def measure(options: argparse.Namespace) -> dict[str, dict[str, Measurement]]:
    """Time both imports in every interpreter."""
    _seconds()  # writes the bytecode
    pairs = [_seconds() for _ in range(options.rounds)]
    alone, together = (list(times) for times in zip(*pairs, strict=True))
    added = [both - one for one, both in pairs]
    return {
        "import": {
            "import torch": Measurement(alone),
            "import torch, softlabels": Measurement(together, ratio([(both, one) for one, both in pairs])),
            "softlabels' part": Measurement(added, ratio([(both - one, one) for one, both in pairs])),
        }
    }


def _seconds() -> tuple[float, float]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    printed = subprocess.check_output([sys.executable, "-c", CODE], text=True, env=environment)
    alone, together = map(float, printed.split())
    return alone, together
