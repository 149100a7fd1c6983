"""What an experiment consists of, and the records that its claims are read from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.paper.data import DataSpec
from benchmarks.paper.runs import Run
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import Claim, Part, mean_interval, slope
from benchmarks.paper.store import Store

Plan = dict[str, Run]  # label: the run for seed 0

# metric: (heading, decimals, unit of a difference)
METRICS = {
    "accuracy": ("accuracy (%)", 2, "points"),
    "ece": ("ECE (%)", 2, "points"),
    "gap": ("confidence - accuracy (points)", 2, "points"),
    "nll": ("NLL (nats)", 3, "nats"),
    "uncertainty": ("uncertainty (nats)", 3, "nats"),
    "diversity": ("diversity (nats)", 2, "nats"),
    "kl": ("KL from the truth (nats)", 3, "nats"),
    "excess": ("NLL above the truth's (nats)", 3, "nats"),
}


NAMES = {"accuracy": "accuracy", "ece": "ECE", "nll": "NLL", "kl": "KL from the truth"}


class Results:
    """Records of an experiment, by label and then by seed."""

    def __init__(self, plan: Plan, seeds: int, store: Store) -> None:
        self.seeds = seeds
        self.records: dict[str, list[dict[str, Any]]] = {}
        digests: dict[DataSpec, str] = {}
        for label, run in plan.items():
            self.records[label] = [store.records[run.repeated(seed).key] for seed in range(seeds)]
            for record in self.records[label]:
                digest = digests.setdefault(run.data, record["data_digest"])
                if record["data_digest"] != digest:
                    raise ValueError(
                        f"runs in {store.path} were made on different copies of {run.data.name} (digests {digest} and "
                        f"{record['data_digest']}); start again with another --out"
                    )

    @property
    def labels(self) -> list[str]:
        """What was run, in order."""
        return list(self.records)

    def has(self, metric: str, where: str = "test") -> bool:
        """Tell whether every run has a metric; that of the true posterior is known for few data sets."""
        every = [record.get(where) for of_label in self.records.values() for record in of_label]
        return all(metrics is not None and metric in metrics for metrics in every)

    def values(self, label: str, metric: str, *where: str) -> list[float]:
        """A metric of each seed; ``where`` leads to it in the record, by default the test set. Missing is nan."""
        if metric == "gap":
            return [gap(record["curve"]) for record in self.records[label]]
        found = []
        for record in self.records[label]:
            for name in where or ("test",):
                record = record[name]
            found.append(math.nan if record[metric] is None else record[metric])
        return found

    def difference(self, first: str, second: str, metric: str, *where: str) -> list[float]:
        """``first`` minus ``second``, paired by seed."""
        return minus(self.values(first, metric, *where), self.values(second, metric, *where))

    def slopes(self, x: list[float], labels: list[str], metric: str, *where: str) -> list[float]:
        """Slope of a metric over the runs of ``labels``, which lie at ``x``, for each seed."""
        columns = zip(*(self.values(label, metric, *where) for label in labels), strict=True)
        return [slope(x, list(column)) for column in columns]

    def best(self, labels: list[str], metric: str, sign: int = 1) -> list[str]:
        """For each seed, the label that is best on average over the *other* seeds, on the validation set.

        A label chosen by a seed's own runs would be the luckiest of them, on the test set too: a best of many beats
        one even where all are equal.

        Args:
            labels: Of runs to choose among.
            metric: To choose by.
            sign: 1 where higher is better, -1 where lower is.
        """
        scores = {label: self.values(label, metric, "validation") for label in labels}
        totals = {label: math.fsum(values) for label, values in scores.items()}
        alone = self.seeds == 1
        return [
            max(labels, key=lambda label: sign * (totals[label] - (0.0 if alone else scores[label][seed])))
            for seed in range(self.seeds)
        ]

    def chosen(self, labels: list[str], metric: str) -> list[float]:
        """A metric on the test set, for each seed that of the run which ``labels`` names for it."""
        return [self.values(label, metric)[seed] for seed, label in enumerate(labels)]

    def better(self, first: str, second: str, metric: str) -> Part:
        """Say that ``first`` has the higher accuracy, or the lower ECE, NLL or KL, than ``second``."""
        high, low = (first, second) if metric == "accuracy" else (second, first)
        return Part(f"{NAMES[metric]}, {high} - {low}", self.difference(high, low, metric), METRICS[metric][2])


def gap(curve: dict[str, list[float | None]]) -> float:
    """Mean confidence less accuracy of a reliability curve, in points: above 0 is over-confident."""
    bins = zip(curve["count"], curve["confidence"], curve["accuracy"], strict=True)
    return 100.0 * math.fsum(n * (c - a) for n, c, a in bins if n) / math.fsum(curve["count"])


def minus(first: list[float], second: list[float]) -> list[float]:
    """Differences, seed by seed."""
    return [a - b for a, b in zip(first, second, strict=True)]


def cell(results: Results, label: str, metric: str, *where: str) -> str:
    """Mean and half-width of the 95% interval, as text."""
    return interval(results.values(label, metric, *where), METRICS[metric][1] if metric in METRICS else 2)


def interval(values: list[float], decimals: int) -> str:
    """Mean and half-width of the 95% interval of values, as text."""
    mean, half = mean_interval(values)
    return f"{mean:.{decimals}f}" + ("" if math.isnan(half) else f" ± {half:.{decimals}f}")


def metric_table(results: Results, scaled: str | None = None, labels: list[str] | None = None) -> str:
    """Markdown table of means and 95% intervals on the test set.

    Args:
        results: The records.
        scaled: A run that is also shown after temperature scaling, if its records have that.
        labels: The runs to show; None is all.
    """
    metrics = [metric for metric in METRICS if metric == "gap" or results.has(metric)]
    headings = [METRICS[metric][0] for metric in metrics]
    lines = ["| method | " + " | ".join(headings) + " |", "|---|" + "---:|" * len(metrics)]
    for label in results.labels if labels is None else labels:
        cells = [cell(results, label, metric) for metric in metrics]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
        if label == scaled and results.has("nll", "scaled"):
            cells = ["" if metric == "gap" else cell(results, label, metric, "scaled") for metric in metrics]
            lines.append(f"| {label}, temperature scaled | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Experiment:
    """One figure of the paper, or an experiment of this project's own.

    Args:
        title: What it shows.
        figure: Where in the paper; empty for what is not there, and what ``all`` leaves out.
        plan: The runs, by label.
        claims: The verdicts.
        draw: Saves the figure.
        table: The Markdown table; None is the usual one, of every metric on the test set.
        summary: What came of it, in sentences for a reader who knows none of this.
    """

    title: str
    figure: str
    plan: Callable[[Setting], Plan]
    claims: Callable[[Setting, Results], list[Claim]]
    draw: Callable[[Setting, Results, Path], None]
    table: Callable[[Setting, Results], str] | None = None
    summary: Callable[[Setting, Results], list[str]] | None = None

    @property
    def heading(self) -> str:
        """The title, and where in the paper."""
        return f"{self.title} ({self.figure})" if self.figure else self.title
