"""Fig. 9: distillation from the teacher's surest classes alone."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.paper import figures
from benchmarks.paper.experiment import Experiment, Plan, Results
from benchmarks.paper.experiments.comparison import CE, SD
from benchmarks.paper.methods import cross_entropy, self_distillation
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import Claim, Part

MARGIN = 0.5  # points of accuracy or ECE that count as no harm


def _pruned(prune: float) -> str:
    return f"{100 * prune:g}% of the classes pruned"


def plan(setting: Setting) -> Plan:
    """Make self-distillation, and the same with classes pruned; the temperature stays."""
    teacher = setting.teacher()
    return {
        CE: setting.run(cross_entropy()),
        SD: setting.run(self_distillation(), teacher),
        **{_pruned(prune): setting.run(self_distillation(prune=prune), teacher) for prune in setting.prunes},
    }


def claims(setting: Setting, results: Results) -> list[Claim]:
    """Decide C12, and what pruning much more does."""

    def harmless(label: str) -> list[Part]:
        return [replace(results.better(label, SD, metric), margin=MARGIN) for metric in ("accuracy", "ece")]

    decided = [Claim("C12", "Pruning half of the classes does no harm", harmless(_pruned(0.5)))]
    most = max(setting.prunes)
    if most > 0.5:
        decided.append(Claim(f"prune {most:g}", f"Nor does pruning {100 * most:g}% of them", harmless(_pruned(most))))
    return decided


EXPERIMENT = Experiment("Pruned distillation", "Fig. 9", plan, claims, figures.draw_differences("Fig. 9"))
