"""What each loss does on a GPU, counted in the code that Inductor and Triton write for it: no GPU is needed or used."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.speed.gpu_code.build import missing

TITLE = "GPU code, counted"
HARDWARE = "no GPU: code for compute capability 9.0"
CLASSES = (10, 1000, 32000, 128256)
LARGE = 10_000  # classes from which on a layer before the loss is counted too
DTYPES = ("bfloat16", "float32")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--classes", nargs="+", type=int, default=list(CLASSES), help="numbers of classes K")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the logits")
    parser.add_argument("--calls", nargs="+", metavar="PART", help="only those whose names have one of these parts")


def describe(options: argparse.Namespace) -> str:
    """What was counted."""
    from benchmarks.speed.gpu_code import build, calls, layers, program, resources, step

    return (
        f"Counted, not timed: {calls.ROWS} rows, the mean loss and its gradient. Kernels: those that are started, "
        "forward and backward; an operation of torch counts as at least one. Moved: to and from memory, in N K numbers "
        f"of the logits' dtype, where a second loop over a row is free if a cache of {build.CACHE // 2**20} MiB holds "
        f"the rows of {program.IN_FLIGHT} programs, and what operations of torch read more than once counts once. "
        f"Time: in which {build.BYTES_PER_SECOND / 1e12:g} TB/s move that, an H200's. Allocated: tensors of the "
        f"logits' size besides the gradient. Registers of one thread with rows in blocks of {resources.ROW_BLOCK}, "
        f"{resources.WARPS} warps. A step: with float32 weights and {step.IMAGES} images, in operations of "
        f"torch, with the bytes of weights, averages and momenta. LinearLogits: with an input of width "
        f"{layers.WIDTH}, forward and backward; moved is of the block's logits and the layer's weights."
    )


def measure(options: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Count every call in every dtype and number of classes. A run that was interrupted goes on where it ended."""
    reason = missing()
    if reason is not None:
        raise SystemExit(reason)
    from benchmarks.speed.gpu_code import layers, step
    from benchmarks.speed.gpu_code.build import describe_a_gpu
    from benchmarks.speed.gpu_code.calls import names, record
    from benchmarks.speed.gpu_code.count import Count, KernelCount, count

    describe_a_gpu()
    partial: Path | None = options.out and options.out / "partial.json"
    done = json.loads(partial.read_text()) if partial and partial.exists() else {}
    results: dict[str, dict[str, object]] = {}
    for classes in options.classes:
        chosen = [name for name in names(classes) if not options.calls or any(part in name for part in options.calls)]
        for dtype in options.dtypes:
            heading = f"K = {classes}, {dtype}"
            rows = done.setdefault(heading, {})
            for name in chosen:
                if name not in rows:
                    own = getattr(torch, dtype)
                    rows[name] = asdict(count(record(name, classes, own), classes, own))
                    print(f"{heading}: {name}", flush=True)
                    if partial:
                        partial.parent.mkdir(parents=True, exist_ok=True)
                        partial.write_text(json.dumps(done))
            results[heading] = {
                name: Count(**{**rows[name], "kernels": [KernelCount(**k) for k in rows[name]["kernels"]]})
                for name in chosen
            }
    for classes in options.classes:
        if classes >= LARGE:
            heading = f"LinearLogits, K = {classes}, bfloat16, blocks of {layers.rows_of(classes)} rows"
            results[heading] = dict(layers.blocks(classes, torch.bfloat16))
    results["a step of a ResNet-18"] = dict(step.parts())
    if partial:
        partial.unlink(missing_ok=True)
    return results


def table(heading: str, rows: dict[str, object]) -> str:
    """Markdown table: of calls, and of their kernels that touch something of the logits' size; of layers; of a step."""
    from benchmarks.speed.gpu_code import tables
    from benchmarks.speed.gpu_code.count import Count
    from benchmarks.speed.gpu_code.layers import Work

    blocks = {name: row for name, row in rows.items() if isinstance(row, Work)}
    if blocks:
        return tables.blocks(heading, blocks)
    counts = {name: row for name, row in rows.items() if isinstance(row, Count)}
    if not counts:
        return tables.steps(heading, rows)  # type: ignore[arg-type]
    return f"{tables.calls(heading, counts)}\n\n{tables.kernels(heading, counts)}"
