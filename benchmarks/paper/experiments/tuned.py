"""What users ask for: each method at the strength that validation data choose, and temperature scaling beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from benchmarks.paper import figures
from benchmarks.paper.experiment import METRICS, NAMES, Experiment, Plan, Results, interval, minus
from benchmarks.paper.experiments.comparison import BETA, CE, LS, SD
from benchmarks.paper.methods import cross_entropy, label_smoothing, self_distillation
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import Claim, Part

BATCH = "Beta smoothing, ranked by the batch"
SCALED = "cross-entropy, temperature scaled"
FORWARD = 1 / 3  # of a step: a backward pass takes about two forward passes
COSTS = {CE: 1.0, SCALED: 1.0, LS: 1.0, BETA: 1.0 + FORWARD, BATCH: 1.0, SD: 2.0 + FORWARD}
SMOOTHERS = (LS, BETA, BATCH, SD)


def label(method: str, share: float) -> str:
    """Label of a method at a share of the true class."""
    return f"{method}, true class {share:g}"


def candidates(setting: Setting) -> dict[str, Plan]:
    """Give the runs of each method, one for each strength to choose from."""
    teacher = setting.teacher()
    return {
        LS: {label(LS, share): setting.run(label_smoothing(share)) for share in setting.shares},
        BETA: {label(BETA, share): setting.beta(true_class=share) for share in setting.shares},
        BATCH: {label(BATCH, share): setting.beta(true_class=share, ranking="batch") for share in setting.shares},
        SD: {
            label(SD, share): setting.run(self_distillation(true_class=share), teacher)
            for share in setting.student_shares
        },
    }


def plan(setting: Setting) -> Plan:
    """Make cross-entropy, and each smoother at each strength."""
    return together({CE: {CE: setting.run(cross_entropy())}, **candidates(setting)})


def together(of_methods: Mapping[str, Plan]) -> Plan:
    """Put the runs of several methods into one plan."""
    return {label: run for runs in of_methods.values() for label, run in runs.items()}


class Tuned:
    """Results of each method at the strength that has the least validation NLL over the other seeds."""

    def __init__(self, of_methods: Mapping[str, Plan], results: Results) -> None:
        self.results = results
        self.chosen = {method: results.best(list(runs), "nll", -1) for method, runs in of_methods.items()}

    def values(self, method: str, metric: str) -> list[float]:
        """A metric of each seed, at the chosen strength, or at the temperature fitted on the validation set."""
        if method == SCALED:
            return self.results.values(CE, metric, "scaled")
        return self.results.values(CE, metric) if method == CE else self.results.chosen(self.chosen[method], metric)

    def better(self, first: str, second: str, metric: str, margin: float = 0.0) -> Part:
        """Say that ``first`` has the higher accuracy, or the lower ECE, NLL or KL, than ``second``, or no worse."""
        high, low = (first, second) if metric == "accuracy" else (second, first)
        difference = minus(self.values(high, metric), self.values(low, metric))
        return Part(f"{NAMES[metric]}, {high} - {low}", difference, METRICS[metric][2], margin)

    def table(self, costs: Mapping[str, float]) -> str:
        """Tabulate methods at their chosen strengths, with their costs."""
        metrics = [metric for metric in ("accuracy", "ece", "nll", "kl") if self.results.has(metric)]
        headings = ["method", "strength", *(METRICS[metric][0] for metric in metrics), "cost"]
        lines = ["| " + " | ".join(headings) + " |", "|---|---|" + "---:|" * (len(metrics) + 1)]
        for method, cost in costs.items():
            cells = [interval(self.values(method, metric), METRICS[metric][1]) for metric in metrics]
            lines.append("| " + " | ".join([method, self._strength(method), *cells, f"{cost:.1f}"]) + " |")
        return "\n".join(lines) + (
            "\n\nThe strength is what the *other* seeds' validation NLL chose, and for how many seeds. The cost is in "
            "steps of cross-entropy, counted and not timed: a forward pass of an average or a teacher is a third of a "
            "step, and a teacher is trained first. Choosing a strength multiplies it by the number of strengths."
        )

    def _strength(self, method: str) -> str:
        if method == CE:
            return ""
        if method == SCALED:
            return f"T = {interval(self.results.values(CE, 'temperature', 'scaled'), 2)}"
        counts = Counter(name.removeprefix(f"{method}, ") for name in self.chosen[method])
        if len(counts) == 1:
            return next(iter(counts))
        return "; ".join(f"{strength} ({count})" for strength, count in sorted(counts.items()))


def claims(setting: Setting, results: Results) -> list[Claim]:
    """Decide whether a smoother is worth having where a temperature can be fitted, and which is nearer to the truth."""
    tuned = Tuned(candidates(setting), results)
    decided = [
        Claim(
            f"tuned {name}",
            f"At the strength that validation data choose, {each} beats temperature-scaled cross-entropy in accuracy "
            "and NLL",
            [tuned.better(method, SCALED, metric) for metric in ("accuracy", "nll")],
        )
        for name, method, each in (
            ("LS", LS, "label smoothing"),
            ("Beta", BETA, "Beta smoothing"),
            ("SD", SD, "self-distillation"),
        )
    ]
    if results.has("kl"):
        decided.append(
            Claim(
                "tuned truth",
                "At the strength that validation data choose, too, labels that fit the instance bring predictions "
                "closer to the true posterior than equal ones do",
                [tuned.better(method, LS, "kl") for method in (BETA, SD)],
            )
        )
    return decided


def table(setting: Setting, results: Results) -> str:
    """Tabulate each method at its chosen strength."""
    return Tuned(candidates(setting), results).table(COSTS)


def draw(setting: Setting, results: Results, folder: Path) -> None:
    """Draw every metric against the strength, with cross-entropy as a line across."""
    shares = {method: setting.student_shares if method == SD else setting.shares for method in SMOOTHERS}
    lines = {method: (list(shares[method]), list(runs)) for method, runs in candidates(setting).items()}
    panels = [
        figures.Panel(metric, lines, flat=(SCALED, [CE], min, ("scaled",)))
        for metric in ("accuracy", "ece", "nll", "kl")
        if results.has(metric)
    ]
    figures.lines(setting, results, panels, folder / "figure.png", "Strength", "average share of the true class")


EXPERIMENT = Experiment("Each method at its best strength", "", plan, claims, draw, table)
