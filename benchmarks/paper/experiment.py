"""What an experiment consists of, and the records that its claims are read from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.paper.runs import Run
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import Claim, slope
from benchmarks.paper.store import Store

Plan = dict[str, Run]  # label: run with seed 0

# metric: (heading, decimals, unit of a difference)
METRICS = {
    "accuracy": ("accuracy (%)", 2, "points"),
    "ece": ("ECE (%)", 2, "points"),
    "nll": ("NLL (nats)", 3, "nats"),
    "uncertainty": ("uncertainty (nats)", 3, "nats"),
    "diversity": ("diversity (nats)", 2, "nats"),
}


class Results:
    """Records of an experiment, by label and then by seed."""

    def __init__(self, plan: Plan, seeds: int, store: Store) -> None:
        self.seeds = seeds
        self.records: dict[str, list[dict[str, Any]]] = {
            label: [store.records[run.with_seed(seed).key] for seed in range(seeds)] for label, run in plan.items()
        }

    @property
    def labels(self) -> list[str]:
        """What was run, in order."""
        return list(self.records)

    def values(self, label: str, metric: str, *where: str) -> list[float]:
        """A metric of each seed; ``where`` leads to it in the record, by default the test set. Missing is nan."""
        found = []
        for record in self.records[label]:
            for name in where or ("test",):
                record = record[name]
            found.append(math.nan if record[metric] is None else record[metric])
        return found

    def difference(self, first: str, second: str, metric: str, *where: str) -> list[float]:
        """``first`` minus ``second``, paired by seed."""
        pairs = zip(self.values(first, metric, *where), self.values(second, metric, *where), strict=True)
        return [a - b for a, b in pairs]

    def slopes(self, x: list[float], labels: list[str], metric: str, *where: str) -> list[float]:
        """Slope of a metric over the runs of ``labels``, which lie at ``x``, for each seed."""
        columns = zip(*(self.values(label, metric, *where) for label in labels), strict=True)
        return [slope(x, list(column)) for column in columns]

    def best(self, labels: list[str], metric: str, sign: int = 1) -> list[str]:
        """The label that is best for each seed on the validation set, so that the test set is not searched.

        Args:
            labels: Of runs to choose among.
            metric: To choose by.
            sign: 1 where higher is better, -1 where lower is.
        """
        columns = zip(*(self.values(label, metric, "validation") for label in labels), strict=True)
        return [max(zip(column, labels, strict=True), key=lambda pair: sign * pair[0])[1] for column in columns]

    def chosen(self, labels: list[str], metric: str) -> list[float]:
        """A metric on the test set, for each seed that of the run which ``labels`` names for it."""
        return [self.values(label, metric)[seed] for seed, label in enumerate(labels)]


@dataclass(frozen=True)
class Experiment:
    """One figure of the paper.

    Args:
        title: What it shows.
        figure: Where in the paper.
        plan: The runs, by label.
        claims: The verdicts.
        draw: Saves the figure.
        table: The Markdown table; None is the usual one, of every metric on the test set.
    """

    title: str
    figure: str
    plan: Callable[[Setting], Plan]
    claims: Callable[[Setting, Results], list[Claim]]
    draw: Callable[[Setting, Results, Path], None]
    table: Callable[[Setting, Results], str] | None = None
