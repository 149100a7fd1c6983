"""Paired timing: rivals in one process, interleaved, compared by the median of ratios."""

from __future__ import annotations

import ctypes
import itertools
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

Run = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """Median over rounds of a rival's time over the base's, with the quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def interleave(
    base: Run,
    rivals: dict[str, Run],
    rounds: int,
    device: torch.device,
    warmup: int = 3,
) -> tuple[list[float], dict[str, list[tuple[float, float]]]]:
    """Time every rival between two runs of the base, in random order, ``rounds`` times.

    Returns:
        The seconds of the base, and for each rival pairs of its own seconds and the mean of the two base runs around
        it: a machine whose speed drifts is compared with itself at the same moment.
    """
    order = random.Random(0)
    base_seconds: list[float] = []
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in rivals}
    for index in range(warmup + rounds):
        before = seconds(base, device)
        for name in order.sample(list(rivals), len(rivals)):
            own = seconds(rivals[name], device)
            after = seconds(base, device)
            if index >= warmup:
                pairs[name].append((own, (before + after) / 2))
                base_seconds.append(after)
            before = after
    return base_seconds, pairs


@dataclass(frozen=True)
class Measurement:
    """One contender: all its times in seconds, their ratio to the base's, and the most memory it adds in MiB.

    ``first`` is how many seconds longer than usual its first call took.
    """

    seconds: list[float]
    ratio: Ratio | None = None
    peak: float | None = None
    first: float | None = None


def compare(
    runs: dict[str, Run],
    rounds: int,
    device: torch.device,
    warmup: int = 3,
    peaks: dict[str, float | None] | None = None,
) -> dict[str, Measurement]:
    """Time all runs against the first."""
    peaks = peaks or {}
    base, *rivals = runs
    base_seconds, pairs = interleave(runs[base], {name: runs[name] for name in rivals}, rounds, device, warmup)
    measured = {base: Measurement(base_seconds, None, peaks.get(base))}
    for name, p in pairs.items():
        measured[name] = Measurement([own for own, _ in p], ratio(p), peaks.get(name))
    return measured


def ratio(pairs: list[tuple[float, float]]) -> Ratio:
    """Median and quartiles of rival over base."""
    ratios = [own / base for own, base in pairs]
    if len(ratios) < 2:
        return Ratio(ratios[0], ratios[0], ratios[0])
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(median, low, high)


def seconds(run: Run, device: torch.device) -> float:
    """Wall time of one run, of an accelerator's work too."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for an accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


@contextmanager
def busy(cores: int) -> Iterator[None]:
    """Share the machine with so many processes that compute all the time, as loaders of data do."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def keep_freed_memory() -> bool:
    """Make this process keep the memory that it frees, as jemalloc and tcmalloc do; whether malloc here can be told.

    The C library of Linux maps every block of more than 32 MB anew and gives it back when it is freed, so that the
    kernel clears each activation of a large batch again: a cost of the allocator, and no part of the work measured.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    m_trim_threshold, m_mmap_max = -1, -4  # of <malloc.h>
    return mallopt is not None and bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1))


def peak_allocated(run: Run, device: torch.device) -> float:
    """MiB that torch's allocator holds during a run, at most, beyond what it held before."""
    if device.type == "cuda":
        peak = peak_memory(run, device)
        assert peak is not None
        return peak
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    results = profile.profiler and profile.profiler.kineto_results
    assert results
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0) / 2**20


def peak_memory(run: Run, device: torch.device) -> float | None:
    """MiB that a second run adds to what is held before it, at most; None where this system cannot say.

    On a CPU this is the resident memory of the process, so it must be asked before `keep_freed_memory`.
    """
    run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        before = _resident("VmRSS")
        run()
        return max(_resident("VmHWM") - before, 0.0) / 2**10
    except (OSError, AttributeError):
        return None


def _resident(field: str) -> float:
    (kib,) = re.findall(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return float(kib)
