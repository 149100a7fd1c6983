"""What an experiment leaves for a reader: a table, a figure and verdicts, with what made them."""

from __future__ import annotations

from pathlib import Path

from benchmarks.paper.experiment import Experiment, Results, metric_table
from benchmarks.paper.setting import Setting
from benchmarks.paper.statistics import Claim


def verdicts(claims: list[Claim]) -> str:
    """Markdown list of claims, their verdicts and the tests behind them."""
    lines = []
    for claim in claims:
        lines.append(f"- **{claim.name}: {claim.verdict()}.** {claim.text}.")
        lines += [f"    - {line}" for line in claim.describe()]
    return "\n".join(lines)


def verdict_table(claims: dict[str, list[Claim]]) -> str:
    """Markdown table of every claim of several experiments, by experiment."""
    listed = [(claim, name) for name, of_experiment in claims.items() for claim in of_experiment]
    listed.sort(key=lambda pair: int(pair[0].name[1:]) if pair[0].name[1:].isdigit() else 99)  # C1 to C15, then others
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


def save(folder: Path, experiment: Experiment, setting: Setting, results: Results, command: str) -> list[Claim]:
    """Write table.md and figure.png; return the claims, decided."""
    folder.mkdir(parents=True, exist_ok=True)
    claims = experiment.claims(setting, results)
    table = metric_table(results) if experiment.table is None else experiment.table(setting, results)
    title, note = f"{experiment.title} ({experiment.figure})", ""
    if results.labels:
        title += f": {setting.describe()}"
        note = "Test set, mean over seeds ± half-width of the 95% interval; ECE of 15 bins. "
    (folder / "table.md").write_text(
        f"# {title}\n\n{table}\n\n{note}{provenance(results, command)}\n\n## Verdicts\n\n{verdicts(claims)}\n",
        encoding="utf-8",
    )
    experiment.draw(setting, results, folder)
    return claims
