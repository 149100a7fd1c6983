"""Fig. 4: whether the student is divided by the temperature too."""

from __future__ import annotations

from pathlib import Path

from benchmarks.paper import figures
from benchmarks.paper.experiment import Experiment, Plan, Results, minus
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
    teacher = setting.teacher()
    students = {
        label(scaled, alpha, temperature): setting.run(
            self_distillation(alpha=alpha, temperature=temperature, scale_student=scaled == BOTH), teacher
        )
        for scaled in (TEACHER_ONLY, BOTH)
        for alpha in setting.student_alphas
        for temperature in setting.student_temperatures
    }
    return {CE: setting.run(cross_entropy()), **students}


def claims(setting: Setting, results: Results) -> list[Claim]:
    """Decide C7 at the points of the grid that validation chooses: ECE at the lowest NLL, accuracy at its peak.

    The paper names the NLL as what to choose temperature and alpha by, and says that ECE grows beyond T = 3.
    """
    grid = [(alpha, t) for alpha in setting.student_alphas for t in setting.student_temperatures]
    students = {scaled: [label(scaled, *point) for point in grid] for scaled in (TEACHER_ONLY, BOTH)}
    ece = {scaled: results.chosen(results.best(labels, "nll", -1), "ece") for scaled, labels in students.items()}
    peak = {scaled: results.chosen(results.best(labels, "accuracy"), "accuracy") for scaled, labels in students.items()}
    return [
        Claim(
            "C7",
            "Scaling the teacher only, not the student, calibrates better and peaks higher in accuracy",
            [
                Part(f"ECE, scale {BOTH} - scale {TEACHER_ONLY}", minus(ece[BOTH], ece[TEACHER_ONLY])),
                Part(
                    f"accuracy at its peak, scale {TEACHER_ONLY} - scale {BOTH}", minus(peak[TEACHER_ONLY], peak[BOTH])
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
    flat = ("teacher", [CE], max, ("test",))
    panels = [figures.Panel(metric, lines, ("test",), flat=flat) for metric in ("accuracy", "ece")]
    figures.lines(setting, results, panels, folder / "figure.png", "Fig. 4", "temperature T")


EXPERIMENT = Experiment("Temperature for the student too?", "Fig. 4", plan, claims, draw)
