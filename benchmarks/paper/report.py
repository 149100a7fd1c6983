"""What an experiment leaves for a reader: a table, a figure and verdicts, with what made them."""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.paper.experiment import METRICS, Experiment, Results
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import Claim, mean_interval


def metric_table(results: Results) -> str:
    """Markdown table of means and 95% intervals on the test set."""
    headings = [heading for heading, _, _ in METRICS.values()]
    lines = ["| method | " + " | ".join(headings) + " |", "|---|" + "---:|" * len(METRICS)]
    for label in results.labels:
        cells = []
        for metric, (_, decimals, _) in METRICS.items():
            mean, half = mean_interval(results.values(label, metric))
            cells.append(f"{mean:.{decimals}f}" + ("" if math.isnan(half) else f" ± {half:.{decimals}f}"))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdicts(claims: list[Claim]) -> str:
    """Markdown list of claims, their verdicts and the tests behind them."""
    lines = []
    for claim in claims:
        lines.append(f"- **{claim.name}: {claim.verdict()}.** {claim.text}.")
        lines += [f"    - {line}" for line in claim.describe()]
    return "\n".join(lines)


def verdict_table(claims: dict[str, list[Claim]]) -> str:
    """Markdown table of every claim of several experiments, by experiment."""
    rows = [
        f"| {claim.name} | {claim.text} | {claim.verdict()} | `{name}` |"
        for name, of_experiment in claims.items()
        for claim in of_experiment
    ]
    return "\n".join(["| claim | | verdict | experiment |", "|---|---|---|---|", *sorted(rows, key=_claim_order)])


def _claim_order(row: str) -> tuple[int, str]:
    name = row.split("|")[1].strip()
    return (int(name[1:]) if name[1:].isdigit() else 99, name)


def provenance(results: Results, command: str) -> str:
    """One sentence on what made the numbers."""
    records = [record for of_label in results.records.values() for record in of_label]
    if not records:
        return f"Made by `{command}`."
    software = sorted({", ".join(f"{n} {v}" for n, v in record["versions"].items()) for record in records})
    hardware = sorted({record["hardware"] for record in records})
    return f"Made by `{command}` with {'; '.join(software)} on {'; '.join(hardware)}."


def save(folder: Path, experiment: Experiment, setting: Setting, results: Results, command: str) -> list[Claim]:
    """Write table.md and figure.png; return the claims, decided."""
    folder.mkdir(parents=True, exist_ok=True)
    claims = experiment.claims(setting, results)
    table = metric_table(results) if experiment.table is None else experiment.table(setting, results)
    note = "" if not results.labels else f"Test set, mean over {setting.seeds} seeds ± half-width of the 95% interval. "
    (folder / "table.md").write_text(
        f"# {experiment.title} ({experiment.figure}): {setting.describe()}\n\n{table}\n\n"
        f"{note}{provenance(results, command)}\n\n## Verdicts\n\n{verdicts(claims)}\n"
    )
    experiment.draw(setting, results, folder)
    return claims
