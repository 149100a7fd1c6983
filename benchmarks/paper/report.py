"""What an experiment leaves for a reader: a table, a figure and verdicts, with what made them."""

from __future__ import annotations

from pathlib import Path

from benchmarks.paper.experiment import Experiment, Results, metric_table
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import LEAST_SEEDS, Claim


def verdicts(claims: list[Claim]) -> str:
    """Markdown list of claims, their verdicts and the tests behind them."""
    lines = []
    for claim in claims:
        lines.append(f"- **{claim.name}: {claim.verdict()}.** {claim.text}.")
        lines += [f"    - {line}" for line in claim.describe()]
    return "\n".join(lines)


def verdict_table(claims: dict[str, list[Claim]]) -> str:
    """Markdown table of every claim of several experiments, C1 to C15 first."""
    listed = [(claim, name) for name, of_experiment in claims.items() for claim in of_experiment]
    listed.sort(key=lambda pair: int(pair[0].name[1:]) if pair[0].name[1:].isdigit() else 99)
    rows = [f"| {claim.name} | {claim.text} | {claim.verdict()} | `{name}` |" for claim, name in listed]
    return "\n".join(["| claim | | verdict | experiment |", "|---|---|---|---|", *rows])


def provenance(results: Results, command: str) -> str:
    """One sentence on what made the numbers."""
    records = [record for of_label in results.records.values() for record in of_label]
    if not records:
        return f"Made by `{command}`."
    software = sorted({", ".join(f"{n} {v}" for n, v in record["versions"].items()) for record in records})
    hardware = sorted({record["hardware"] for record in records})
    return f"Made by `{command}` with {'; '.join(software)} on {'; '.join(hardware)}."


def planned(seeds: int) -> str:
    """Say how verdicts are made, once."""
    few = f"{seeds} of at least {LEAST_SEEDS} seeds, so that nothing is decided."
    count = few if seeds < LEAST_SEEDS else f"{seeds} seeds, as planned before the first."
    return (
        f"{count} Each line is a two-sided t-test of values paired by seed; p is adjusted for the number of lines of "
        "its claim (Holm), and decides if it is below 0.05."
    )


def truth(results: Results) -> str:
    """Say what the true posterior itself would have, where it is known."""
    if not results.records or not results.has("limit"):
        return ""
    metrics = next(iter(results.records.values()))[0]["test"]
    return (
        f"The true posterior has an accuracy of {metrics['limit']:.2f}%, a KL of 0 and, on average over draws of the "
        f"labels, an NLL of {metrics['nll'] - metrics['excess']:.3f}. "
    )


def save(folder: Path, experiment: Experiment, setting: Setting, results: Results, command: str) -> list[Claim]:
    """Write table.md, claims.md, summary.md and the figures; return the claims, decided."""
    folder.mkdir(parents=True, exist_ok=True)
    claims = experiment.claims(setting, results)
    table = metric_table(results) if experiment.table is None else experiment.table(setting, results)
    title, note, tests = experiment.heading, "", ""
    if results.labels:
        title += f": {setting.describe()}"
        note = f"Test set, mean over seeds ± half-width of the 95% interval; ECE of 15 bins. {truth(results)}"
        tests = f"{planned(setting.seeds)}\n\n"
    texts = {
        "table": f"# {title}\n\n{table}\n\n{note}{provenance(results, command)}\n",
        "claims": f"{tests}{verdicts(claims)}\n",
    }
    if experiment.summary is not None:
        texts["summary"] = "".join(f"- {sentence}\n" for sentence in experiment.summary(setting, results))
    for name, text in texts.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
    experiment.draw(setting, results, folder)
    return claims
