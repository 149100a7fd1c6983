"""Figures: differences with their intervals, and lines over generations, temperatures and sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper.experiment import METRICS, Results
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import mean_interval
from softlabels.metrics import ReliabilityCurve
from softlabels.plotting import BLUE, ORANGE, reliability_diagram

DPI = 110


def differences(
    results: Results,
    path: Path,
    title: str,
    labels: Sequence[str] | None = None,
    metrics: Sequence[str] = ("accuracy", "ece", "nll", "kl"),
    ink: str = "black",
    baseline: str | None = None,
) -> None:
    """Save, for each metric, how much each run differs from a baseline, with the 95% interval of the paired difference.

    Args:
        results: The records.
        path: Where to; the ending decides the format. An SVG has no background.
        title: Above the figure; may be empty.
        labels: The runs to show; None is all but the first.
        metrics: The metrics to show, of those that the runs have.
        ink: Colour of text and lines.
        baseline: What the others are compared with; None is the first run.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    baseline = results.labels[0] if baseline is None else baseline
    labels = results.labels[1:] if labels is None else labels
    metrics = [metric for metric in metrics if results.has(metric)]
    styles = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), ink)
    with rc_context({**styles, "svg.hashsalt": "softlabels"}):
        width = 0.2 + 0.08 * max(map(len, labels)) + 1.9 * len(metrics)
        figure = Figure(figsize=(width, 1.3 + 0.3 * len(labels)), layout="constrained")
        if title:
            figure.suptitle(title)
        panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        for axes, metric in zip(panels, metrics, strict=True):
            intervals = [mean_interval(results.difference(label, baseline, metric)) for label in labels]
            for row, (mean, half) in enumerate(intervals):
                half = 0.0 if math.isnan(half) else half
                axes.errorbar(mean, row, xerr=half, fmt="o", color=BLUE, capsize=3, linewidth=2)
            axes.axvline(0.0, color=ORANGE, linestyle="--", linewidth=1)
            name, unit = METRICS[metric][0].partition(" (")[0], METRICS[metric][2]
            level = mean_interval(results.values(baseline, metric))[0]
            axes.set_title(f"{name}\n{level:.{METRICS[metric][1]}f} with\n{baseline}", fontsize="small")
            axes.set_xlabel(f"{unit}, {'more' if metric == 'accuracy' else 'less'} is better", fontsize="small")
            axes.locator_params(axis="x", nbins=3)
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(len(labels) - 0.5, -0.5)
            axes.spines[["top", "right"]].set_visible(False)
        vector = path.suffix == ".svg"
        figure.savefig(path, dpi=DPI, transparent=vector, metadata={"Date": None} if vector else None)


def draw_differences(figure_name: str) -> Callable[[Setting, Results, Path], None]:
    """Make what draws an experiment whose figure is differences alone."""

    def draw(setting: Setting, results: Results, folder: Path) -> None:
        differences(results, folder / "figure.png", f"{figure_name}: {setting.describe()}")

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
    figure = Figure(figsize=(3.4 * columns, 3.9 * rows + 0.3), layout="constrained")
    figure.suptitle(f"{setting.describe()}: predictions of all seeds together")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (label, curve) in zip(panels, curves.items(), strict=False):
        reliability_diagram(curve, ax=axes)
        axes.set_title(f"{label}\n{axes.get_title()}", fontsize="medium")
        axes.get_legend().remove()  # over the bars of a network that is too unsure; one for all stands below
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=DPI)
