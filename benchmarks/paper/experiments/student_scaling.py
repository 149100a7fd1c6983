"""Fig. 4: whether the student is divided by the temperature too."""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.paper import figures
from benchmarks.paper.experiment import Experiment, Plan, Results
from benchmarks.paper.experiments.comparison import CE
from benchmarks.paper.methods import cross_entropy, self_distillation
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import Claim, Part

TEACHER_ONLY, BOTH = "teacher only", "both"


def label(scaled: str, alpha: float, temperature: float) -> str:
    """Label of a student."""
    return f"scale {scaled}, alpha {alpha:g}, T = {temperature:g}"


def plan(setting: Setting) -> Plan:
    """Make the teacher and the grid of students."""
    teacher = setting.run(cross_entropy())
    students = {
        label(scaled, alpha, temperature): setting.run(
            self_distillation(alpha=alpha, temperature=temperature, scale_student=scaled == BOTH), teacher
        )
        for scaled in (TEACHER_ONLY, BOTH)
        for alpha in setting.student_alphas
        for temperature in setting.student_temperatures
    }
    return {CE: teacher, **students}


def claims(setting: Setting, results: Results) -> list[Claim]:
    """Decide C7: ECE averaged over the grid, accuracy at the point of it that validation accuracy chooses."""
    grid = [(alpha, t) for alpha in setting.student_alphas for t in setting.student_temperatures]
    gains = [results.difference(label(BOTH, *point), label(TEACHER_ONLY, *point), "ece") for point in grid]
    peaks = [
        results.chosen(results.best([label(scaled, *point) for point in grid], "accuracy"), "accuracy")
        for scaled in (TEACHER_ONLY, BOTH)
    ]
    return [
        Claim(
            "C7",
            "Scaling the teacher only, not the student, calibrates better and peaks higher in accuracy",
            [
                Part(
                    f"ECE, scale {BOTH} - scale {TEACHER_ONLY}, mean over the grid",
                    [math.fsum(column) / len(grid) for column in zip(*gains, strict=True)],
                ),
                Part(
                    f"accuracy at its peak, scale {TEACHER_ONLY} - scale {BOTH}",
                    [a - b for a, b in zip(*peaks, strict=True)],
                ),
            ],
        )
    ]


def draw(setting: Setting, results: Results, folder: Path) -> None:
    """Draw accuracy and ECE against T, with the teacher as a flat line."""
    temperatures = list(setting.student_temperatures)
    lines = {
        f"scale {scaled}, alpha {alpha:g}": (temperatures, [label(scaled, alpha, t) for t in temperatures])
        for scaled in (TEACHER_ONLY, BOTH)
        for alpha in setting.student_alphas
    }
    panels = [figures.Panel(metric, lines, ("test",), flat=("teacher", [CE], max)) for metric in ("accuracy", "ece")]
    figures.lines(setting, results, panels, folder / "figure.png", "Fig. 4", "temperature T")


EXPERIMENT = Experiment("Temperature for the student too?", "Fig. 4", plan, claims, draw)
