"""Records of runs as a table, a bar chart and reliability diagrams."""

from __future__ import annotations

import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch
from scipy import stats

import softlabels
from softlabels.metrics import ReliabilityCurve
from softlabels.plotting import reliability_diagram

METRICS = {
    "accuracy": "accuracy (%)",
    "ece": "ECE (%)",
    "nll": "NLL (nats)",
    "uncertainty": "uncertainty (nats)",
    "diversity": "diversity (nats)",
}
DIGITS = {"accuracy": 2, "ece": 2, "nll": 3, "uncertainty": 3, "diversity": 2}


def summarise(records: list[dict[str, Any]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and half-width of its 95% interval (Student's t over seeds; nan for one seed), by method and metric."""
    summary: dict[str, dict[str, tuple[float, float]]] = {}
    for method in dict.fromkeys(record["method"] for record in records):
        rows = [record for record in records if record["method"] == method]
        summary[method] = {metric: mean_interval([row[metric] for row in rows]) for metric in METRICS}
    return summary


def mean_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of the 95% interval of the mean."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, math.nan
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)


def table(records: list[dict[str, Any]]) -> str:
    """Markdown table of means and 95% intervals."""
    lines = ["| method | " + " | ".join(METRICS.values()) + " |", "|---|" + "---:|" * len(METRICS)]
    for method, metrics in summarise(records).items():
        cells = []
        for metric in METRICS:
            digits = DIGITS[metric]
            mean, half = metrics[metric]
            cells.append(f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}"))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bar_chart(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Save one panel of bars with 95% intervals per metric."""
    from matplotlib.figure import Figure

    summary = summarise(records)
    figure = Figure(figsize=(15, 3.6), layout="constrained")
    figure.suptitle(title)
    for axes, (metric, label) in zip(figure.subplots(1, len(METRICS)), METRICS.items(), strict=True):
        means, halves = zip(*(summary[method][metric] for method in summary), strict=True)
        halves = tuple(0.0 if math.isnan(half) else half for half in halves)
        positions = range(len(summary))
        axes.barh(positions, means, xerr=halves, color=[f"C{i}" for i in positions], ecolor="0.3", capsize=3)
        axes.set_yticks(positions, list(summary) if metric == "accuracy" else [""] * len(summary))
        axes.invert_yaxis()
        axes.set_xlabel(label)
        low = min(m - h for m, h in zip(means, halves, strict=True))
        high = max(m + h for m, h in zip(means, halves, strict=True))
        if metric == "accuracy":  # bars from 0 would hide every difference; the axis says where it starts
            axes.set_xlim(low - 0.3 * (high - low) - 0.1, min(high + 0.1 * (high - low) + 0.1, 100.0))
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def pooled_curves(records: list[dict[str, Any]]) -> dict[str, ReliabilityCurve]:
    """One reliability curve per method, of the test predictions of all its seeds."""
    curves: dict[str, ReliabilityCurve] = {}
    for method in dict.fromkeys(record["method"] for record in records):
        of_seeds = [record["curve"] for record in records if record["method"] == method]
        count, confidence, accuracy = (
            torch.tensor([curve[name] for curve in of_seeds], dtype=torch.float64)
            for name in ("count", "confidence", "accuracy")
        )
        total = count.sum(0)
        means = [(values.nan_to_num() * count).sum(0) / total for values in (confidence, accuracy)]
        edges = torch.tensor(of_seeds[0]["edges"], dtype=torch.float64)
        curves[method] = ReliabilityCurve(*means, total.long(), edges)
    return curves


def reliability_diagrams(curves: dict[str, ReliabilityCurve], path: Path, title: str) -> None:
    """Save one diagram per method, side by side."""
    from matplotlib.figure import Figure

    columns = min(len(curves), 4)
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(3.4 * columns, 3.7 * rows), layout="constrained")
    figure.suptitle(f"{title}: predictions of all seeds together")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (method, curve) in zip(panels, curves.items(), strict=False):
        reliability_diagram(curve, ax=axes, title=method)
        axes.title.set_fontsize("medium")
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=150)


def provenance(command: str) -> dict[str, str]:
    """What made the numbers: command, versions, hardware."""
    return {
        "command": command,
        "softlabels": softlabels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
    }


def cpu_name() -> str:
    """Model and number of usable cores of this machine's processor."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{os.cpu_count()} cores of {model}"


def save(out: Path, title: str, config: dict[str, Any], records: list[dict[str, Any]], command: str) -> str:
    """Write records.json, table.md, figure.png and reliability.png to ``out``; return the table."""
    out.mkdir(parents=True, exist_ok=True)
    made = provenance(command)
    text = table(records)
    plain = [{name: value for name, value in record.items() if name != "curve"} for record in records]
    (out / "records.json").write_text(json.dumps({**made, "config": config, "records": plain}, indent=1) + "\n")
    seeds = len({record["seed"] for record in records})
    note = (
        f"Mean over {seeds} seeds ± half-width of the 95% interval. Made by `{command}` with softlabels "
        f"{made['softlabels']}, torch {made['torch']}, Python {made['python']} on {made['hardware']}."
    )
    (out / "table.md").write_text(f"# {title}\n\n{text}\n\n{note}\n")
    bar_chart(records, out / "figure.png", title)
    reliability_diagrams(pooled_curves(records), out / "reliability.png", title)
    return text
