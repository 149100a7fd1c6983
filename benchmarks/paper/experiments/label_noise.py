"""Wrong labels: learned spreads, the paper's losses and a specialist where some training labels are replaced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.paper import figures
from benchmarks.paper.experiment import Experiment, Plan, Results
from benchmarks.paper.experiments.comparison import BETA, CE, LS, SD
from benchmarks.paper.experiments.spread import ALL, EARLY, NO_INDEX
from benchmarks.paper.methods import cross_entropy, early_learning, label_smoothing, self_distillation
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import Claim

NOISE = (0.2, 0.4)
SHARE, ALPHA = 0.75, 0.2  # of the true class: on average, and at least
PAST = "neighbours and samples, ranked by history"


def _label(method: str, noise: float) -> str:
    return f"{method}, {100 * noise:g}% wrong"


def plan(setting: Setting) -> Plan:
    """Make every method with each share of wrong labels; those of the paper at the same strength as the others."""
    runs: Plan = {}
    for noise in NOISE:
        noisy = replace(setting, data=replace(setting.data, label_noise=noise))
        of_noise = {
            CE: noisy.run(cross_entropy()),
            LS: noisy.run(label_smoothing(SHARE)),
            BETA: noisy.beta(true_class=SHARE),
            SD: noisy.run(self_distillation(true_class=SHARE), noisy.teacher()),
            NO_INDEX: noisy.beta(true_class=SHARE, alpha=ALPHA, ranking="batch", spread=("classes", "neighbours")),
            PAST: noisy.beta(true_class=SHARE, alpha=ALPHA, ranking="history", spread=("neighbours", "samples")),
            ALL: noisy.beta(
                true_class=SHARE, alpha=ALPHA, ranking="history", spread=("classes", "neighbours", "samples")
            ),
            EARLY: noisy.run(early_learning(3.0)),
        }
        runs |= {_label(method, noise): run for method, run in of_noise.items()}
    return runs


def claims(setting: Setting, results: Results) -> list[Claim]:
    """Decide S7 for each share of wrong labels."""
    decided = []
    for noise in NOISE:
        past, early = _label(PAST, noise), _label(EARLY, noise)
        percent = f"{100 * noise:g}%"
        decided += [
            Claim(
                f"S7 {percent}",
                f"With {percent} of the training labels replaced at random, past and neighbours beat every loss of the "
                "paper in accuracy and NLL",
                [
                    results.better(past, _label(method, noise), metric)
                    for method in (LS, BETA, SD)
                    for metric in ("accuracy", "nll")
                ],
            ),
            Claim(
                f"S7 {percent}, specialist",
                "They beat early-learning regularisation in accuracy and in ECE",
                [results.better(past, early, metric) for metric in ("accuracy", "ece")],
            ),
        ]
    return decided


def _draw(setting: Setting, results: Results, folder: Path) -> None:
    for noise in NOISE:
        labels = [label for label in results.labels if label.endswith(_label("", noise)) and not label.startswith(CE)]
        figures.differences(
            results, folder / f"figure-{100 * noise:.0f}.png", setting.describe(), labels, baseline=_label(CE, noise)
        )


EXPERIMENT = Experiment("Wrong labels", "", plan, claims, _draw)
