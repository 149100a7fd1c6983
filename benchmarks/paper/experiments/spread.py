"""Where the mass goes: learned spreads at equal amounts, then at their best strength beside teachers and rivals."""

from __future__ import annotations

from pathlib import Path

from benchmarks.paper import figures
from benchmarks.paper.experiment import Experiment, Plan, Results, metric_table
from benchmarks.paper.experiments import tuned
from benchmarks.paper.experiments.comparison import BETA, CE, LS, SD
from benchmarks.paper.experiments.tuned import BATCH, FORWARD, SCALED, Tuned
from benchmarks.paper.methods import (
    average_distillation,
    cross_entropy,
    early_learning,
    label_smoothing,
    online_label_smoothing,
    progressive_distillation,
)
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import Claim, Part

AMOUNTS = {"equal": "none", "random": "random", "ranked": "batch"}
SPREADS = ("classes", "neighbours", "samples")
ALL = "classes, neighbours and samples, ranked by history"
NO_INDEX = "classes and neighbours, ranked by the batch"
AVERAGE = "distillation from the average"
ONLINE, PROGRESSIVE = "online label smoothing", "progressive self-knowledge distillation"
EARLY = "early-learning regularisation"
COSTS = {
    **tuned.COSTS,
    NO_INDEX: 1.0,
    ALL: 1.0,
    AVERAGE: 1.0 + FORWARD,
    ONLINE: 1.0,
    PROGRESSIVE: 1.0,
    EARLY: 1.0,
}
NO_HARM = {"accuracy": 0.3, "ece": 0.3, "nll": 0.01}  # points, points, nats: less is as good


def cell(amount: str, spread: str) -> str:
    """Label of a cell."""
    return f"{amount} amounts, {spread}"


def cells(setting: Setting) -> Plan:
    """Make every kind of amount with every spread, at equal strength."""
    runs = {}
    for amount, ranking in AMOUNTS.items():
        even = setting.run(label_smoothing()) if ranking == "none" else setting.beta(ranking=ranking)
        runs[cell(amount, "even")] = even
        runs |= {cell(amount, spread): setting.beta(ranking=ranking, spread=spread) for spread in SPREADS}
    return runs


def candidates(setting: Setting) -> dict[str, Plan]:
    """Give the runs of each method, one for each strength to choose from."""

    def learned(method: str, ranking: str, *spread: str) -> Plan:
        return {
            f"{method}, true class {share:g}, alpha {alpha:g}": setting.beta(
                true_class=share, alpha=alpha, ranking=ranking, spread=spread
            )
            for share in setting.learned_shares
            for alpha in setting.learned_alphas
        }

    return {
        **tuned.candidates(setting),
        NO_INDEX: learned(NO_INDEX, "batch", "classes", "neighbours"),
        ALL: learned(ALL, "history", *SPREADS),
        AVERAGE: {
            f"{AVERAGE}, alpha {alpha:g}": setting.run(average_distillation(alpha, ema_decay=setting.ema_decay))
            for alpha in (0.4, 0.6, 0.8)
        },
        ONLINE: {f"{ONLINE}, alpha {a:g}": setting.run(online_label_smoothing(a)) for a in (0.5, 0.7, 0.85)},
        PROGRESSIVE: {f"{PROGRESSIVE}, alpha {a:g}": setting.run(progressive_distillation(a)) for a in (0.3, 0.5, 0.8)},
        EARLY: {f"{EARLY}, lambda {a:g}": setting.run(early_learning(a)) for a in (1.0, 3.0, 7.0)},
    }


def plan(setting: Setting) -> Plan:
    """Make cross-entropy, the cells, Beta smoothing by an EMA, and the candidates."""
    once = {CE: setting.run(cross_entropy()), **cells(setting), BETA: setting.beta()}
    return {**once, **tuned.together(candidates(setting))}


def claims(setting: Setting, results: Results) -> list[Claim]:
    """Decide S1 to S6."""
    best = Tuned(candidates(setting), results)

    def no_worse(first: str, second: str) -> list[Part]:
        return [best.better(first, second, metric, margin) for metric, margin in NO_HARM.items()]

    def ranked(metric: str) -> list[Part]:
        return [results.better(cell("ranked", spread), cell("equal", spread), metric) for spread in SPREADS]

    return [
        *(
            Claim(
                f"S1 {spread}",
                f"At equal strength the spread by {spread} has a lower NLL than the even one, for equal, random and "
                "ranked amounts",
                [results.better(cell(amount, spread), cell(amount, "even"), "nll") for amount in AMOUNTS],
            )
            for spread in SPREADS
        ),
        Claim(
            "S2 accuracy", "Given a learned spread, ranked amounts raise accuracy over equal ones", ranked("accuracy")
        ),
        Claim("S2 ECE", "Given a learned spread, ranked amounts lower ECE against equal ones", ranked("ece")),
        Claim(
            "S3",
            "In one run, the three spreads together, ranked by history, are as good as self-distillation: accuracy, "
            "ECE and NLL no worse, each at the strength that validation data choose",
            no_worse(ALL, SD),
        ),
        Claim(
            "S4",
            "So is what needs no numbers of samples: classes and neighbours, ranked by the batch",
            no_worse(NO_INDEX, SD),
        ),
        Claim(
            "S5",
            "Both beat temperature-scaled cross-entropy in accuracy and NLL",
            [best.better(method, SCALED, metric) for method in (ALL, NO_INDEX) for metric in ("accuracy", "nll")],
        ),
        *(
            Claim(
                f"S5 {name}",
                f"So does {method}, of the paper",
                [best.better(method, SCALED, metric) for metric in ("accuracy", "nll")],
            )
            for name, method in (("LS", LS), ("Beta", BETA), ("SD", SD))
        ),
        Claim(
            "S6",
            "Beta smoothing ranked by the batch is no worse than by the EMA, at equal strength",
            [
                Part(part.text, part.values, part.unit, NO_HARM[metric])
                for metric in ("accuracy", "nll")
                for part in [results.better(cell("ranked", "even"), BETA, metric)]
            ],
        ),
        Claim(
            "rivals",
            "Classes and neighbours, ranked by the batch, have a lower NLL than each other loss that needs one run",
            [best.better(NO_INDEX, rival, "nll") for rival in (BATCH, AVERAGE, ONLINE, PROGRESSIVE, EARLY)],
        ),
    ]


def table(setting: Setting, results: Results) -> str:
    """Tabulate the cells, then each method at its chosen strength."""
    shown = [CE, *cells(setting)]
    return (
        f"At equal strength:\n\n{metric_table(results, labels=shown)}\n\nEach at its best strength:\n\n"
        f"{Tuned(candidates(setting), results).table(COSTS)}"
    )


def draw(setting: Setting, results: Results, folder: Path) -> None:
    """Draw how the cells differ from cross-entropy."""
    figures.differences(results, folder / "figure.png", f"Spreads: {setting.describe()}", list(cells(setting)))


EXPERIMENT = Experiment("Where the mass goes", "", plan, claims, draw, table)
