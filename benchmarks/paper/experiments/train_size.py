"""Fig. 5: the student's gain as the training set grows."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from benchmarks.paper.data import train_size
from benchmarks.paper.experiment import Experiment, Plan, Results
from benchmarks.paper.experiments import gain
from benchmarks.paper.methods import cross_entropy, self_distillation
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import Claim, Part


def _counts(setting: Setting) -> list[int]:
    total = train_size(setting.data)
    return [round(fraction * total) for fraction in setting.fractions]


def _at(count: int) -> str:
    return f"{count:,} samples"


def plan(setting: Setting) -> Plan:
    """Make a baseline, a teacher and a student per size; smaller sets get more epochs, for about as many steps."""
    runs = {}
    total = train_size(setting.data)
    for count in _counts(setting):
        data = setting.data if count == total else replace(setting.data, train_size=count)
        batch_size = min(setting.recipe.batch_size, count)
        steps = setting.recipe.steps(total)
        recipe = replace(setting.recipe, batch_size=batch_size, epochs=max(round(steps / (count // batch_size)), 1))
        runs[gain.baseline(_at(count))] = setting.run(cross_entropy(), data=data, recipe=recipe)
        teacher = setting.teacher(data=data, recipe=recipe)
        runs[gain.student(_at(count))] = setting.run(self_distillation(), teacher, data=data, recipe=recipe)
    return runs


def claims(setting: Setting, results: Results) -> list[Claim]:
    """Decide C8."""
    counts = _counts(setting)
    falls = gain.falls(results, [math.log2(count) for count in counts], [_at(count) for count in counts])
    text = "The student's relative gain shrinks as the training set grows"
    return [Claim("C8", text, [Part("fall of the relative gain", falls, "% per doubling")])]


def draw(setting: Setting, results: Results, folder: Path) -> None:
    """Draw accuracy and gain against the number of samples."""
    counts = _counts(setting)
    points = [_at(count) for count in counts]
    gain.draw(setting, results, folder / "figure.png", "Fig. 5", counts, points, "training samples")


EXPERIMENT = Experiment("The size of the training set", "Fig. 5", plan, claims, draw)
