"""Fig. 3: cross-entropy, label smoothing, Beta smoothing and self-distillation at equal average smoothing."""

from __future__ import annotations

from pathlib import Path

from benchmarks.paper import figures
from benchmarks.paper.experiment import Experiment, Plan, Results
from benchmarks.paper.methods import cross_entropy, label_smoothing, self_distillation
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import Claim, Part

CE, LS, BETA, SD = "cross-entropy", "label smoothing", "Beta smoothing", "self-distillation"


def plan(setting: Setting) -> Plan:
    """Make the four methods of the figure."""
    teacher = setting.run(cross_entropy())
    return {
        CE: teacher,
        LS: setting.run(label_smoothing()),
        BETA: setting.beta(),
        SD: setting.run(self_distillation(), teacher),
    }


def claims(setting: Setting, results: Results) -> list[Claim]:
    """Decide C3 to C6."""

    def better(first: str, second: str, metric: str) -> Part:
        """Say that ``first`` has the higher accuracy, or the lower ECE."""
        if metric == "accuracy":
            return Part(f"accuracy, {first} - {second}", results.difference(first, second, metric))
        return Part(f"ECE, {second} - {first}", results.difference(second, first, metric))

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
        Claim("C5", "Beta smoothing beats label smoothing in accuracy", [better(BETA, LS, "accuracy")]),
        Claim(
            "C6",
            "All three improve ECE over cross-entropy, self-distillation and Beta smoothing more than label smoothing",
            [better(method, CE, "ece") for method in (LS, BETA, SD)] + [better(m, LS, "ece") for m in (BETA, SD)],
        ),
    ]


def draw(setting: Setting, results: Results, folder: Path) -> None:
    """Draw bars, and reliability diagrams."""
    figures.bars(setting, results, folder / "figure.png", "Fig. 3")
    figures.reliability_diagrams(setting, results, folder / "reliability.png")


EXPERIMENT = Experiment("Distillation and label smoothing compared", "Fig. 3", plan, claims, draw)
