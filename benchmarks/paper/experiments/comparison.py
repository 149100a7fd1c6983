"""Fig. 3: cross-entropy, label smoothing, Beta smoothing and self-distillation at equal average smoothing."""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.paper import figures
from benchmarks.paper.experiment import Experiment, Plan, Results, interval, metric_table, minus
from benchmarks.paper.methods import cross_entropy, label_smoothing, self_distillation
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import LEAST_SEEDS, Claim, holm, mean_interval

CE, LS, BETA, SD = "cross-entropy", "label smoothing", "Beta smoothing", "self-distillation"


def plan(setting: Setting) -> Plan:
    """Make the four methods of the figure, then the three that smooth with other strengths."""
    teacher = setting.teacher()
    runs = {
        CE: setting.run(cross_entropy()),
        LS: setting.run(label_smoothing()),
        BETA: setting.beta(),
        SD: setting.run(self_distillation(), teacher),
    }
    for share in setting.true_classes:
        runs |= {
            f"{LS}, true class {share:g}": setting.run(label_smoothing(share)),
            f"{BETA}, true class {share:g}": setting.beta(true_class=share),
            f"{SD}, true class {share:g}": setting.run(self_distillation(true_class=share), teacher),
        }
    return runs


def claims(setting: Setting, results: Results) -> list[Claim]:
    """Decide C3 to C6."""
    better = results.better
    closer = Claim(
        "truth",
        "At equal average smoothing, labels that fit the instance bring predictions closer to the true posterior than "
        "equal ones do",
        [better(method, LS, "kl") for method in (BETA, SD)] if results.has("kl") else [],
    )
    return [
        Claim(
            "C3",
            "Label smoothing, Beta smoothing and self-distillation each beat cross-entropy in accuracy",
            [better(method, CE, "accuracy") for method in (LS, BETA, SD)],
        ),
        Claim(
            "C4",
            "At equal average smoothing, self-distillation beats label smoothing in accuracy",
            [better(SD, LS, "accuracy")],
        ),
        Claim(
            "C5",
            "Beta smoothing beats label smoothing in accuracy (in the paper: in all but CIFAR-100 with a ResNet)",
            [better(BETA, LS, "accuracy")],
        ),
        Claim(
            "C6",
            "All three improve ECE over cross-entropy, self-distillation and Beta smoothing more than label smoothing",
            [better(method, CE, "ece") for method in (LS, BETA, SD)] + [better(m, LS, "ece") for m in (BETA, SD)],
        ),
        *([closer] if closer.parts else []),
    ]


def draw(setting: Setting, results: Results, folder: Path) -> None:
    """Draw differences, those that matter for a page of either colour, and reliability diagrams."""
    figures.differences(results, folder / "figure.png", f"Fig. 3: {setting.describe()}")
    for scheme, ink in (("light", "#24292f"), ("dark", "#e6edf3")):
        path = folder / f"headline-{scheme}.svg"
        figures.differences(results, path, "", (LS, BETA, SD), ("accuracy", "ece"), ink)
    figures.reliability_diagrams(setting, results, folder / "reliability.png")


def table(setting: Setting, results: Results) -> str:
    """Tabulate every metric, and cross-entropy after temperature scaling, which anybody would try first."""
    return metric_table(results, CE)


def summary(setting: Setting, results: Results) -> list[str]:
    """Say what gained what, by how much and how sure, in three sentences."""
    smoothers = (LS, BETA, SD)

    def mean(label: str, metric: str) -> float:
        return mean_interval(results.values(label, metric))[0]

    parts = {metric: [results.better(m, CE, metric) for m in smoothers] for metric in ("accuracy", "ece")}
    every = [part for of_metric in parts.values() for part in of_metric]
    levels = holm([part.p_value() for part in every])

    def differences(metric: str, more: str, less: str) -> str:
        phrases = []
        for method, part in zip(smoothers, parts[metric], strict=True):
            difference, half = mean_interval(part.values)
            interval = "" if math.isnan(half) else f" ± {half:.1f}"
            phrases.append(f"{method} {abs(difference):.1f}{interval} {more if difference >= 0 else less}")
        return f"{phrases[0]}, {phrases[1]} and {phrases[2]}"

    temperature = ""
    if results.has("ece", "scaled"):
        less = minus(results.values(CE, "ece"), results.values(CE, "ece", "scaled"))
        temperature = f"; a temperature that is fitted afterwards takes {interval(less, 1)} points away"
    limit = f" of at most {mean(CE, 'limit'):.1f}" if results.has("limit") else ""
    sure = [part.verdict(level) != "undecided" for part, level in zip(every, levels, strict=True)]
    names = [f"{what} of {m}" for what in ("accuracy", "calibration") for m in smoothers]
    chance = [name for name, is_sure in zip(names, sure, strict=True) if not is_sure]
    if setting.seeds < LEAST_SEEDS:
        certainty = f"This is a glance at {setting.seeds} of the {LEAST_SEEDS} seeds or more that can be sure of it"
    else:
        which = "" if not chance else f", but for these: {', '.join(chance)}"
        certainty = f"Over {setting.seeds} seeds these six differences are beyond chance{which}"
    return [
        f"Of 100 test samples cross-entropy gets {mean(CE, 'accuracy'):.1f}{limit} right: "
        f"{differences('accuracy', 'more', 'fewer')}.",
        f"Its confidence is off by {mean(CE, 'ece'):.1f} points on average (ECE): "
        f"{differences('ece', 'points less', 'points more')}{temperature}.",
        f"{certainty} (± is the 95% interval over seeds).",
    ]


EXPERIMENT = Experiment("Distillation and label smoothing compared", "Fig. 3", plan, claims, draw, table, summary)
