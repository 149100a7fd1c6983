"""Teachers of which the top is known: how many classes, and what becomes of the rest."""

from __future__ import annotations

from benchmarks.paper import figures
from benchmarks.paper.experiment import Experiment, Plan, Results
from benchmarks.paper.experiments.comparison import CE, SD
from benchmarks.paper.methods import RESTS, cross_entropy, recorded_distillation, self_distillation
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import Claim

TOPS = (1, 2, 5, 10)


def _label(k: int, rest: str) -> str:
    return f"top {k}, {rest}"


def plan(setting: Setting) -> Plan:
    """Make self-distillation from all classes and from tops; the temperature stays."""
    teacher = setting.teacher()
    return {
        CE: setting.run(cross_entropy()),
        **{_label(k, rest): setting.run(recorded_distillation(k, rest), teacher) for k in TOPS for rest in RESTS},
        SD: setting.run(self_distillation(), teacher),
    }


def claims(setting: Setting, results: Results) -> list[Claim]:
    """Decide whether a top that is renormalised does harm, and which form of the rest mends it."""
    renormalised, uniform, bucket = RESTS
    decided = []
    for k in (1, 2):
        for rest in (uniform, bucket):
            sides = _label(k, rest), _label(k, renormalised)
            decided.append(
                Claim(
                    f"top {k}, {rest}",
                    f"Of the {k} largest logits, a rest that is {rest} is better than none in ECE and NLL",
                    [results.better(*sides, metric) for metric in ("ece", "nll")],
                )
            )
    return decided


EXPERIMENT = Experiment("Recorded teachers", "", plan, claims, figures.draw_differences(""))
