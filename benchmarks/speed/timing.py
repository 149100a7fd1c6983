"""Paired timing: rivals in one process, interleaved, compared by the median of ratios."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ratio:
    """Median over rounds of time / base time, with the quartiles of the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def interleave(
    runs: dict[str, Callable[[], object]], rounds: int, device: torch.device, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of each run in each round; every round calls all runs once, in random order."""
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(warmup + rounds):
        for name in order.sample(list(runs), len(runs)):
            synchronize(device)
            start = time.perf_counter()
            runs[name]()
            synchronize(device)
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: list[float], base: list[float]) -> Ratio:
    """Compare two runs of the same rounds."""
    ratios = [a / b for a, b in zip(seconds, base, strict=True)]
    if len(ratios) < 2:
        return Ratio(ratios[0], ratios[0], ratios[0])
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(median, low, high)


def synchronize(device: torch.device) -> None:
    """Wait for an accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
