"""Counts as Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.speed.gpu_code.count import Count
from benchmarks.speed.gpu_code.layers import Work
from benchmarks.speed.gpu_code.step import Part


def calls(heading: str, rows: Mapping[str, Count]) -> str:
    """One line per call."""
    columns = [heading, "kernels", "waits", "N K numbers moved", "time of that (ms)", "allocated", "spilled"]
    lines = [f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for name, row in rows.items():
        allocated = ", ".join(f"{number} {dtype}" for dtype, number in row.allocated.items()) or "nothing"
        cells = [
            name,
            f"{row.forward} + {row.backward}",
            str(row.waits),
            f"{row.moved:.3g}",
            f"{row.milliseconds:.3g}",
            allocated,
            f"{row.spilled} B" if row.kernels else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def kernels(heading: str, rows: Mapping[str, Count]) -> str:
    """One line per Triton kernel that touches something of the logits' size, folded."""
    columns = ["call", "graph", "loops", "loads", "stores", "bytes per logit", "registers", "spilled"]
    lines = [f"| {' | '.join(columns)} |", "|---|---" + "|---:" * (len(columns) - 2) + "|"]
    for name, row in rows.items():
        for kernel in row.kernels:
            numbers = (kernel.loops, kernel.loads, kernel.stores, kernel.moved, kernel.registers, kernel.spilled)
            lines.append(f"| {name} | {kernel.graph} | {' | '.join(map(str, numbers))} |")
    return "\n".join(f"    {line}" for line in ['??? note "Kernels, ' + heading + '"', "", *lines])[4:]


def blocks(heading: str, rows: Mapping[str, Work]) -> str:
    """Two lines per loss of a layer's logits."""
    columns = [heading, "products", "other kernels", "waits", "MB moved beside the products"]
    lines = [f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {row.products} | {row.kernels} | {row.waits} | {row.moved / 1e6:.4g} |")
    return "\n".join(lines)


def steps(heading: str, rows: Mapping[str, Part]) -> str:
    """One line per part of a training step."""
    lines = [f"| {heading} | operations | MB of weights moved | time of that (ms) |", "|---|---:|---:|---:|"]
    for name, row in rows.items():
        moved = [f"{row.bytes / 1e6:.3g}", f"{row.milliseconds:.2g}"] if row.bytes else ["", ""]
        lines.append(f"| {name} | {row.operations} | {' | '.join(moved)} |")
    return "\n".join(lines)
