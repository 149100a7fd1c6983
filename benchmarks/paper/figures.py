"""Figures in the style of the paper's: bars, and lines over generations, temperatures and sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper.experiment import METRICS, Results
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import mean_interval
from softlabels.metrics import ReliabilityCurve
from softlabels.plotting import reliability_diagram

DPI = 110


def bars(setting: Setting, results: Results, path: Path, figure_name: str) -> None:
    """Save a panel of bars with 95% intervals for accuracy, ECE and NLL on the test set."""
    from matplotlib.figure import Figure

    labels, metrics = results.labels, ("accuracy", "ece", "nll")
    figure = Figure(figsize=(13, 1.2 + 0.36 * len(labels)), layout="constrained")
    figure.suptitle(f"{figure_name}: {setting.describe()}")
    for axes, metric in zip(figure.subplots(1, len(metrics)), metrics, strict=True):
        means, halves = zip(*(mean_interval(results.values(label, metric)) for label in labels), strict=True)
        halves = tuple(0.0 if math.isnan(half) else half for half in halves)
        positions = range(len(labels))
        axes.barh(positions, means, xerr=halves, color=[f"C{i % 10}" for i in positions], ecolor="0.3", capsize=3)
        axes.set_yticks(positions, labels if metric == "accuracy" else [""] * len(labels))
        axes.invert_yaxis()
        axes.set_xlabel(METRICS[metric][0])
        low = min(m - h for m, h in zip(means, halves, strict=True))
        high = max(m + h for m, h in zip(means, halves, strict=True))
        if metric == "accuracy":  # bars from 0 would hide every difference; the axis says where it starts
            axes.set_xlim(max(low - 0.3 * (high - low) - 0.1, 0.0), min(high + 0.1 * (high - low) + 0.1, 100.0))
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=DPI)


def draw_bars(figure_name: str) -> Callable[[Setting, Results, Path], None]:
    """Make what draws an experiment whose figure is bars alone."""

    def draw(setting: Setting, results: Results, folder: Path) -> None:
        bars(setting, results, folder / "figure.png", figure_name)

    return draw


Line = tuple[list[float], list[Any]]  # x, and labels of runs or lists of values by seed


@dataclass(frozen=True)
class Panel:
    """A panel of lines: a metric, found at ``where`` in the records, or values under a heading of one's own.

    ``flat`` is a line across: its name, labels of runs, which of their means to show, and where in the records it is.
    """

    metric: str
    lines: Mapping[str, Line]
    where: tuple[str, ...] = ("test",)
    flat: tuple[str, list[str], Callable[..., float], tuple[str, ...]] | None = None


def lines(
    setting: Setting, results: Results, panels: list[Panel], path: Path, figure_name: str, axis: str, log: bool = False
) -> None:
    """Save panels of lines with bands of 95% intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(panels) + 0.4, 3.4), layout="constrained")
    figure.suptitle(f"{figure_name}: {setting.describe()}")
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name, (x, points) in panel.lines.items():
            values = [
                results.values(point, panel.metric, *panel.where) if isinstance(point, str) else point
                for point in points
            ]
            means, halves = zip(*(mean_interval(of_seeds) for of_seeds in values), strict=True)
            (line,) = axes.plot(x, means, "o-", markersize=3, label=name)
            low = [m - h for m, h in zip(means, halves, strict=True)]
            high = [m + h for m, h in zip(means, halves, strict=True)]
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        if panel.flat is not None:
            name, labels, choose, where = panel.flat
            level = choose(mean_interval(results.values(label, panel.metric, *where))[0] for label in labels)
            axes.axhline(level, color="C2", linestyle="--", label=name)
        heading = METRICS[panel.metric][0] if panel.metric in METRICS else panel.metric
        axes.set_title(heading, fontsize="medium")
        axes.set_xlabel(axis)
        if log:
            axes.set_xscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        if len(panel.lines) + (panel.flat is not None) > 1:
            axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=DPI)


def pooled_curves(results: Results) -> dict[str, ReliabilityCurve]:
    """One reliability curve per method, of the test predictions of all its seeds."""
    curves: dict[str, ReliabilityCurve] = {}
    for label in results.labels:
        of_seeds = [record["curve"] for record in results.records[label]]
        count, confidence, accuracy = (
            torch.tensor([[math.nan if v is None else v for v in curve[name]] for curve in of_seeds]).double()
            for name in ("count", "confidence", "accuracy")
        )
        total = count.sum(0)
        means = [(values.nan_to_num() * count).sum(0) / total for values in (confidence, accuracy)]
        edges = torch.tensor(of_seeds[0]["edges"], dtype=torch.float64)
        curves[label] = ReliabilityCurve(*means, total.long(), edges, total)
    return curves


def reliability_diagrams(setting: Setting, results: Results, path: Path) -> None:
    """Save one diagram per method, side by side."""
    from matplotlib.figure import Figure

    curves = pooled_curves(results)
    columns = min(len(curves), 4)
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(3.4 * columns, 3.7 * rows), layout="constrained")
    figure.suptitle(f"{setting.describe()}: predictions of all seeds together")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (label, curve) in zip(panels, curves.items(), strict=False):
        reliability_diagram(curve, ax=axes, title=label)
        axes.title.set_fontsize("medium")
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=DPI)
