"""Fig. 3: cross-entropy, label smoothing, Beta smoothing and self-distillation at equal average smoothing."""

from __future__ import annotations

from pathlib import Path

from benchmarks.paper import figures
from benchmarks.paper.experiment import Experiment, Plan, Results
from benchmarks.paper.methods import cross_entropy, label_smoothing, self_distillation
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import Claim

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
    ]


def draw(setting: Setting, results: Results, folder: Path) -> None:
    """Draw bars, and reliability diagrams."""
    figures.bars(setting, results, folder / "figure.png", "Fig. 3")
    figures.reliability_diagrams(setting, results, folder / "reliability.png")


EXPERIMENT = Experiment("Distillation and label smoothing compared", "Fig. 3", plan, claims, draw)
