"""Fig. 1: generation after generation, each taught by the one before (alpha = 0, T = 1)."""

from __future__ import annotations

from pathlib import Path

from benchmarks.paper import figures
from benchmarks.paper.experiment import Experiment, Plan, Results, cell
from benchmarks.paper.methods import cross_entropy, self_distillation
from benchmarks.paper.runs import TEACHER_SEED
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import Claim, Part


def generation(number: int) -> str:
    """Label of a generation; 0 is the network trained with cross-entropy."""
    return f"generation {number}"


def plan(setting: Setting) -> Plan:
    """Make the chain; each generation starts from weights of its own."""
    run = setting.run(cross_entropy())
    runs = {generation(0): run}
    for number in range(1, setting.generations + 1):
        run = setting.run(self_distillation(alpha=0.0, temperature=1.0), run, seed=number * TEACHER_SEED)
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


def figure_table(results: Results, rows: dict[str, tuple[str, str | None]], where: tuple[str, ...]) -> str:
    """Markdown table of students on the test set beside their teachers on the training set.

    Args:
        results: The records.
        rows: For each heading the student's label and that of the record with the teacher's metrics.
        where: Leads to those in the record.
    """
    lines = [
        "| | student: accuracy (%) | ECE (%) | NLL (nats) | teacher: uncertainty (nats) | diversity (nats) |",
        "|---|" + "---:|" * 5,
    ]
    for heading, (student, teacher) in rows.items():
        cells = [cell(results, student, metric) for metric in ("accuracy", "ece", "nll")]
        cells += [cell(results, teacher, metric, *where) if teacher else "" for metric in ("uncertainty", "diversity")]
        lines.append(f"| {heading} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(setting: Setting, results: Results) -> str:
    """Tabulate what the figure shows: students on the test set, teachers on the training set."""
    numbers = range(setting.generations + 1)
    rows = {generation(n): (generation(n), generation(n - 1) if n else None) for n in numbers}
    return figure_table(results, rows, ("train",))


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


EXPERIMENT = Experiment("Sequential self-distillation", "Fig. 1", plan, claims, draw, table)
