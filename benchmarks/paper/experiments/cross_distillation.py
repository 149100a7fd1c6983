"""Fig. 8: two networks, each taught by itself and by the other."""

from __future__ import annotations

import math
from dataclasses import replace

from benchmarks.paper import figures
from benchmarks.paper.experiment import Experiment, Plan, Results
from benchmarks.paper.methods import self_distillation
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import Claim, Part


def _names(setting: Setting) -> tuple[str, str]:
    names = setting.model.name, setting.other_model.name
    if names[0] == names[1]:
        raise ValueError(f"cross-distillation needs two networks, got {names[0]} twice; name another --other-model")
    return names


def _taught(student: str, teacher: str) -> str:
    return f"{student}, taught by {teacher}"


def plan(setting: Setting) -> Plan:
    """Make two teachers and four students; each temperature is matched to the same average smoothing."""
    changes = [
        {"model": setting.model, "recipe": setting.recipe},
        {"model": setting.other_model, "recipe": setting.other_recipe},
    ]
    names = _names(setting)
    teachers = [setting.teacher(**change) for change in changes]
    runs = {f"{name}, cross-entropy": teacher for name, teacher in zip(names, teachers, strict=True)}
    for student, change in zip(names, changes, strict=True):
        for name, teacher in zip(names, teachers, strict=True):
            runs[_taught(student, name)] = replace(setting.run(self_distillation(), teacher), **change)
    return runs


def claims(setting: Setting, results: Results) -> list[Claim]:
    """Decide C11; which teacher is the better one is read from the validation set."""
    names = _names(setting)
    validation = {name: math.fsum(results.values(f"{name}, cross-entropy", "accuracy", "validation")) for name in names}
    worse, better = sorted(names, key=validation.__getitem__)
    premise = Part(
        f"accuracy of the teachers, {better} - {worse}",
        results.difference(f"{better}, cross-entropy", f"{worse}, cross-entropy", "accuracy"),
    )
    parts = [
        Part(
            f"accuracy of {student}, taught by {better} - by {worse}",
            results.difference(_taught(student, better), _taught(student, worse), "accuracy"),
        )
        for student in names
    ]
    return [Claim("C11", "A better teacher makes a better student", parts, premise)]


EXPERIMENT = Experiment("Cross-distillation", "Fig. 8", plan, claims, figures.draw_differences("Fig. 8"))
