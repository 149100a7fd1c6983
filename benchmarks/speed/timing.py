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
    """Median over rounds of a rival's time over the base's, with the quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def interleave(
    base: Callable[[], object],
    rivals: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warmup: int = 3,
) -> tuple[list[float], dict[str, list[tuple[float, float]]]]:
    """Time every rival between two runs of the base, in random order, ``rounds`` times.

    Returns:
        The seconds of the base, and for each rival pairs of its own seconds and the mean of the two base runs around
        it: a
        machine whose speed drifts is compared with itself at the same moment.
    """
    order = random.Random(0)
    base_seconds: list[float] = []
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in rivals}
    for index in range(warmup + rounds):
        before = _seconds(base, device)
        for name in order.sample(list(rivals), len(rivals)):
            own = _seconds(rivals[name], device)
            after = _seconds(base, device)
            if index >= warmup:
                pairs[name].append((own, (before + after) / 2))
                base_seconds.append(after)
            before = after
    return base_seconds, pairs


def ratio(pairs: list[tuple[float, float]]) -> Ratio:
    """Median and quartiles of rival over base."""
    ratios = [own / base for own, base in pairs]
    if len(ratios) < 2:
        return Ratio(ratios[0], ratios[0], ratios[0])
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(median, low, high)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for an accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
