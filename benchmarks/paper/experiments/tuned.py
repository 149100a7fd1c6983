"""What users ask for: each method at the strength that validation data choose, and temperature scaling beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks.paper import figures
from benchmarks.paper.experiment import METRICS, Experiment, Plan, Results, interval, minus
from benchmarks.paper.experiments.comparison import BETA, CE, LS, SD
from benchmarks.paper.methods import cross_entropy, label_smoothing, self_distillation
from benchmarks.paper.runs import Run
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


def shares(setting: Setting, method: str) -> tuple[float, ...]:
    """The strengths to choose from."""
    return setting.student_shares if method == SD else setting.shares


def plan(setting: Setting) -> Plan:
    """Make cross-entropy, and each smoother at each strength."""
    teacher = setting.teacher()
    make: dict[str, Callable[[float], Run]] = {
        LS: lambda share: setting.run(label_smoothing(share)),
        BETA: lambda share: setting.beta(true_class=share),
        BATCH: lambda share: setting.beta(true_class=share, ranking="batch"),
        SD: lambda share: setting.run(self_distillation(true_class=share), teacher),
    }
    runs = {CE: setting.run(cross_entropy())}
    return runs | {label(m, share): make[m](share) for m in SMOOTHERS for share in shares(setting, m)}


def chosen(setting: Setting, results: Results, method: str) -> list[str]:
    """For each seed the run of the strength that has the least validation NLL over the other seeds."""
    return results.best([label(method, share) for share in shares(setting, method)], "nll", -1)


def tested(setting: Setting, results: Results, method: str, metric: str) -> list[float]:
    """A metric of each seed, at the chosen strength, or at the temperature that was fitted on the validation set."""
    if method == SCALED:
        return results.values(CE, metric, "scaled")
    if method == CE:
        return results.values(CE, metric)
    return results.chosen(chosen(setting, results, method), metric)


def claims(setting: Setting, results: Results) -> list[Claim]:
    """Decide whether a smoother is worth having where a temperature can be fitted, and which is nearer to the truth."""

    def part(better: str, worse: str, metric: str) -> Part:
        sign = 1 if metric == "accuracy" else -1
        values = minus(tested(setting, results, better, metric), tested(setting, results, worse, metric))
        first, second = (better, worse) if sign == 1 else (worse, better)
        return Part(f"{NAMES[metric]}, {first} - {second}", [sign * value for value in values], METRICS[metric][2])

    decided = [
        Claim(
            f"tuned {name}",
            f"At the strength that validation data choose, {each} beats temperature-scaled cross-entropy in accuracy "
            "and NLL",
            [part(method, SCALED, metric) for metric in ("accuracy", "nll")],
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
                [part(method, LS, "kl") for method in (BETA, SD)],
            )
        )
    return decided


NAMES = {"accuracy": "accuracy", "nll": "NLL", "kl": "KL from the truth"}


def table(setting: Setting, results: Results) -> str:
    """Tabulate each method at its chosen strength."""
    metrics = [metric for metric in ("accuracy", "ece", "nll", "kl") if results.has(metric)]
    headings = ["method", "true class", *(METRICS[metric][0] for metric in metrics), "cost"]
    lines = ["| " + " | ".join(headings) + " |", "|---|---|" + "---:|" * (len(metrics) + 1)]
    for method in (CE, SCALED, *SMOOTHERS):
        cells = [interval(tested(setting, results, method, metric), METRICS[metric][1]) for metric in metrics]
        cells = [method, _strength(setting, results, method), *cells, f"{COSTS[method]:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + (
        "\n\nThe true class is the share that the *other* seeds' validation NLL chose, and for how many seeds. The "
        "cost is in steps of cross-entropy, counted and not timed: a forward pass of an average or a teacher is a "
        "third of a step, and a teacher is trained first. Choosing a strength multiplies it by the number of strengths."
    )


def _strength(setting: Setting, results: Results, method: str) -> str:
    if method == CE:
        return ""
    if method == SCALED:
        return f"T = {interval(results.values(CE, 'temperature', 'scaled'), 2)}"
    counts = Counter(name.rsplit(" ", 1)[1] for name in chosen(setting, results, method))
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{share} ({count})" for share, count in sorted(counts.items()))


def draw(setting: Setting, results: Results, folder: Path) -> None:
    """Draw every metric against the strength, with cross-entropy as a line across."""
    lines = {m: (list(shares(setting, m)), [label(m, share) for share in shares(setting, m)]) for m in SMOOTHERS}
    panels = [
        figures.Panel(metric, lines, flat=(SCALED, [CE], min, ("scaled",)))
        for metric in ("accuracy", "ece", "nll", "kl")
        if results.has(metric)
    ]
    figures.lines(setting, results, panels, folder / "figure.png", "Strength", "average share of the true class")


EXPERIMENT = Experiment("Each method at its best strength", "", plan, claims, draw, table)
