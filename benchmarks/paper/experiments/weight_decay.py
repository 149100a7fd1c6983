"""Fig. 6: the student's gain as weight decay grows."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from benchmarks.paper.experiment import Experiment, Plan, Results
from benchmarks.paper.experiments import gain
from benchmarks.paper.methods import cross_entropy, self_distillation
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import Claim, Part


def _at(weight_decay: float) -> str:
    return f"weight decay {weight_decay:g}"


def plan(setting: Setting) -> Plan:
    """Make a baseline and a student per weight decay; all students have the teacher of the recipe's own decay."""
    teacher = setting.teacher()
    runs = {}
    for weight_decay in setting.weight_decays:
        recipe = replace(setting.recipe, weight_decay=weight_decay)
        runs[gain.baseline(_at(weight_decay))] = setting.run(cross_entropy(), recipe=recipe)
        runs[gain.student(_at(weight_decay))] = setting.run(self_distillation(), teacher, recipe=recipe)
    return runs


def claims(setting: Setting, results: Results) -> list[Claim]:
    """Decide C9."""
    decades = [math.log10(weight_decay) for weight_decay in setting.weight_decays]
    falls = gain.falls(results, decades, [_at(weight_decay) for weight_decay in setting.weight_decays])
    text = "The student's relative gain shrinks as weight decay grows"
    return [Claim("C9", text, [Part("fall of the relative gain", falls, "% per decade")])]


def draw(setting: Setting, results: Results, folder: Path) -> None:
    """Draw accuracy and gain against weight decay."""
    points = [_at(weight_decay) for weight_decay in setting.weight_decays]
    x = list(setting.weight_decays)
    gain.draw(setting, results, folder / "figure.png", "Fig. 6", x, points, "weight decay")


EXPERIMENT = Experiment("Weight decay", "Fig. 6", plan, claims, draw)
