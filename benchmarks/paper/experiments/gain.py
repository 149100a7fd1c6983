"""What Fig. 5 and Fig. 6 share: the student's relative gain in accuracy along a line of settings."""

from __future__ import annotations

from pathlib import Path

from benchmarks.paper import figures
from benchmarks.paper.experiment import Results
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import slope


def baseline(at: str) -> str:
    """Label of the network trained with cross-entropy."""
    return f"cross-entropy, {at}"


def student(at: str) -> str:
    """Label of its student."""
    return f"self-distillation, {at}"


def gains(results: Results, points: list[str]) -> list[list[float]]:
    """Gain of the student over cross-entropy in % of the latter's accuracy, by point and then by seed."""
    return [
        [
            100.0 * (a - b) / b
            for a, b in zip(
                results.values(student(at), "accuracy"), results.values(baseline(at), "accuracy"), strict=True
            )
        ]
        for at in points
    ]


def falls(results: Results, x: list[float], points: list[str]) -> list[float]:
    """Minus the slope of the gain over ``x``, by seed."""
    return [-slope(x, list(column)) for column in zip(*gains(results, points), strict=True)]


def draw(
    setting: Setting, results: Results, path: Path, figure: str, x: list[float], points: list[str], axis: str
) -> None:
    """Draw accuracy and relative gain."""
    accuracy = {
        "cross-entropy": (x, [baseline(at) for at in points]),
        "self-distillation": (x, [student(at) for at in points]),
    }
    panels = [
        figures.Panel("accuracy", accuracy, ("test",)),
        figures.Panel("gain (% of accuracy)", {"self-distillation": (x, gains(results, points))}),
    ]
    figures.lines(setting, results, panels, path, figure, axis, log=True)
