"""Fig. 2: one teacher, students at rising temperatures (alpha = 0)."""

from __future__ import annotations

import itertools
from pathlib import Path

from benchmarks.paper import figures
from benchmarks.paper.experiment import METRICS, Experiment, Plan, Results, minus
from benchmarks.paper.experiments import sequential
from benchmarks.paper.methods import self_distillation
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import Claim, Part

TEACHER = ("soft_labels", "teacher")  # the teacher's softened predictions on the training set


def label(temperature: float) -> str:
    """Label of a student."""
    return f"T = {temperature:g}"


def plan(setting: Setting) -> Plan:
    """Make the students, and the generations of Fig. 1 that they are compared with."""
    teacher = setting.teacher()
    students = {
        label(temperature): setting.run(self_distillation(alpha=0.0, temperature=temperature), teacher)
        for temperature in setting.temperatures
    }
    return {**students, **sequential.plan(setting)}


def claims(setting: Setting, results: Results) -> list[Claim]:
    """Decide C2. Temperatures and generations are chosen on the validation set."""
    labels = [label(temperature) for temperature in setting.temperatures]
    first, middle, last = labels[0], labels[len(labels) // 2], labels[-1]
    generations = [sequential.generation(number) for number in range(1, setting.generations + 1)]

    def rises(metric: str, *where: str) -> list[Part]:
        early = results.difference(middle, first, metric, *where)
        late = results.difference(last, middle, metric, *where)
        name = f"the teacher's {metric}" if where else metric
        unit = METRICS[metric][2]
        return [
            Part(f"{name}, {middle} - {first}", early, unit),
            Part(f"{name} levels off: that less {last} - {middle}", minus(early, late), unit),
            Part(f"{name} keeps half of the rise", [a / 2 + b for a, b in zip(early, late, strict=True)], unit),
        ]

    steps = [results.difference(b, a, "uncertainty", *TEACHER) for a, b in itertools.pairwise(labels)]
    best, best_generation = results.best(labels, "accuracy"), results.best(generations, "accuracy")
    lowest = results.chosen(results.best(labels[1:-1], "nll", -1), "nll")
    return [
        Claim(
            "C2",
            "Raising T raises the teacher's uncertainty throughout, while its diversity and the student's accuracy "
            "rise and level off; the best T beats the generations at T = 1; NLL is U-shaped",
            [
                Part("smallest step of the teacher's uncertainty", [min(s) for s in zip(*steps, strict=True)], "nats"),
                *rises("diversity", *TEACHER),
                *rises("accuracy"),
                Part(
                    "accuracy, best T - best generation",
                    minus(results.chosen(best, "accuracy"), results.chosen(best_generation, "accuracy")),
                ),
                Part(f"NLL, {first} - best T between", minus(results.values(first, "nll"), lowest), "nats"),
                Part(f"NLL, {last} - best T between", minus(results.values(last, "nll"), lowest), "nats"),
            ],
        )
    ]


def table(setting: Setting, results: Results) -> str:
    """Tabulate what the figure shows: students on the test set, softened teachers on the training set."""
    rows = {label(t): (label(t), label(t)) for t in setting.temperatures}
    return sequential.figure_table(results, rows, TEACHER)


def draw(setting: Setting, results: Results, folder: Path) -> None:
    """Draw the four panels of the figure, with the best generation as a flat line."""
    line = (list(setting.temperatures), [label(temperature) for temperature in setting.temperatures])
    generations = [sequential.generation(number) for number in range(1, setting.generations + 1)]
    students, teachers = {"student": line}, {"teacher": line}
    panels = [
        figures.Panel("accuracy", students, ("test",), flat=("best generation at T = 1", generations, max, ("test",))),
        figures.Panel("nll", students, ("test",), flat=("best generation at T = 1", generations, min, ("test",))),
        figures.Panel("uncertainty", teachers, TEACHER),
        figures.Panel("diversity", teachers, TEACHER),
    ]
    figures.lines(setting, results, panels, folder / "figure.png", "Fig. 2", "temperature T")


EXPERIMENT = Experiment("The temperature of the teacher", "Fig. 2", plan, claims, draw, table)
