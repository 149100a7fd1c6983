"""Fig. 1: generation after generation, each taught by the one before (alpha = 0, T = 1)."""

from __future__ import annotations

from pathlib import Path

from benchmarks.paper import figures
from benchmarks.paper.experiment import Experiment, Plan, Results
from benchmarks.paper.methods import cross_entropy, self_distillation
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import Claim, Part


def generation(number: int) -> str:
    """Label of a generation; 0 is the network trained with cross-entropy."""
    return f"generation {number}"


def plan(setting: Setting) -> Plan:
    """Make the chain."""
    run = setting.run(cross_entropy())
    runs = {generation(0): run}
    for number in range(1, setting.generations + 1):
        run = setting.run(self_distillation(alpha=0.0, temperature=1.0), run)
        runs[generation(number)] = run
    return runs


def claims(setting: Setting, results: Results) -> list[Claim]:
    """Decide C1 by slopes over generations: of students on the test set, of teachers on the training set."""
    students = list(range(setting.generations + 1))
    labels = [generation(number) for number in students]
    fall = [-value for value in results.slopes(students, labels, "nll")]
    teachers = {
        f"slope of the teacher's {metric}": results.slopes(students[:-1], labels[:-1], metric, "train")
        for metric in ("uncertainty", "diversity")
    }
    parts = [Part("slope of accuracy", results.slopes(students, labels, "accuracy"), "points per generation")]
    parts += [Part(text, values, "nats per generation") for text, values in teachers.items()]
    parts += [Part("fall of NLL", fall, "nats per generation")]
    text = "Over generations accuracy, predictive uncertainty and confidence diversity rise, and NLL falls"
    return [Claim("C1", text, parts)]


def draw(setting: Setting, results: Results, folder: Path) -> None:
    """Draw the four panels of the figure."""
    numbers = list(range(setting.generations + 1))
    students = {"student": (numbers, [generation(number) for number in numbers])}
    teachers = {"teacher": (numbers[1:], [generation(number - 1) for number in numbers[1:]])}
    panels = [
        figures.Panel("accuracy", students, ("test",)),
        figures.Panel("nll", students, ("test",)),
        figures.Panel("uncertainty", teachers, ("train",)),
        figures.Panel("diversity", teachers, ("train",)),
    ]
    figures.lines(setting, results, panels, folder / "figure.png", "Fig. 1", "generation")


EXPERIMENT = Experiment("Sequential self-distillation", "Fig. 1", plan, claims, draw)
