"""What a command would do, without doing it: runs, hours and disk."""

from __future__ import annotations

import functools
import gzip
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper import models
from benchmarks.paper.data import DataSpec, decoded_bytes, shape, train_size
from benchmarks.paper.runs import TEACHER_SEED, Record, Run
from benchmarks.paper.schedule import kept, missing
from benchmarks.paper.store import Store
from benchmarks.provenance import hardware

RECORD, EPOCH = 2_000, 75  # bytes of a line of runs.jsonl, about, and of each epoch in it
RESULTS = Path(__file__).parents[1] / "results" / "paper"
Rates = dict[tuple[Any, ...], tuple[float, int]]  # seconds and optimizer steps


def describe(runs: list[Run], store: Store, processes: int | None) -> str:
    """List the runs that are missing, and estimate what they take.

    Args:
        runs: All that the command needs.
        store: What there is.
        processes: Processes that would do them; None is not known.
    """
    todo = missing(runs, store)
    keep = kept([*runs, *todo])
    wanted = {run.key for run in runs} | {run.key for run in todo}
    stored = len(wanted) - len(todo)
    lines = [f"{len(wanted)} runs; {stored} are stored in {store.path}, {len(todo)} are to be done:"]
    counts = Counter(run.describe(with_seed=False) for run in todo)
    lines += [f"  {count} x {what}" for what, count in counts.items()]
    lines += [*_hours(todo, store.records.values(), processes), _disk(todo, keep)]
    return "\n".join(lines)


def announce(todo: list[Run], store: Store, processes: int | None) -> str:
    """Say in one line what is to be done, and how long it takes by what is stored or was committed."""
    if not todo:
        return "every run is stored; nothing is trained"
    names = " and ".join(dict.fromkeys(f"{run.model.name} on {run.data.name}" for run in todo))
    seeds = len({run.seed % TEACHER_SEED for run in todo})
    known = [*store.records.values(), *_committed(todo[0].data.name)]
    total, without = _total(todo, [record for record in known if record["device"] == todo[0].device])
    what = f"{len(todo)} networks ({names}, {seeds} {'seed' if seeds == 1 else 'seeds'})"
    if without or processes is None:
        return f"{what}; Ctrl-C keeps what is done"
    minutes = total / min(processes, len(todo)) / 60
    return f"{what} on {processes} processes: about {max(minutes, 1):.0f} minutes; Ctrl-C keeps what is done"


def _committed(dataset: str) -> Iterable[Record]:
    """Records of the results that come with the project, which tell about other machines too."""
    path = RESULTS / f"laptop-{dataset}" / "runs.jsonl.gz"
    return map(json.loads, gzip.decompress(path.read_bytes()).splitlines()) if path.exists() else ()


def _total(todo: list[Run], records: Iterable[Record]) -> tuple[float, Counter[str]]:
    """Seconds of one process, and the runs of which no such run is known."""
    rates = _rates(records)
    total, without = 0.0, Counter[str]()
    for run in todo:
        rate = next((rates[like] for like in _likes(asdict(run)) if like in rates), None)
        if rate is None:
            without[f"{run.model.name} on {run.data.name}"] += 1
        else:
            total += rate[0] / rate[1] * run.recipe.steps(train_size(run.data))
    return total, without


def _hours(todo: list[Run], records: Iterable[Record], processes: int | None) -> list[str]:
    if not todo:
        return []
    device = todo[0].device
    names = {run.data.name for run in todo}  # a folder of one's own may have had another content
    known = [record for record in records if record["device"] == device and record["data"]["name"] in names]
    if device == "cpu" or torch.cuda.is_available():
        machine = hardware(device)
    else:  # planned where there is no accelerator
        machine = Counter(record["hardware"] for record in known).most_common(1)[0][0] if known else "an accelerator"
    total, without = _total(todo, (record for record in known if record["hardware"] == machine))
    lines = []
    if without.total() < len(todo):
        hours = total / 3600
        shared = "" if processes is None else f"; {hours / processes:.2g} by {processes} processes"
        count = len(todo) - without.total()
        lines.append(f"hours of one process on {machine}, by stored runs: {hours:.2g} for {count} runs{shared}")
    if without:
        names = ", ".join(f"{count} of {what}" for what, count in without.items())
        lines.append(
            f"no estimate for {without.total()} runs ({names}): no such run on {machine} is stored; a short one "
            "(--seeds 1 --epochs 2, same --out) is enough"
        )
    return lines


def _rates(records: Iterable[Record]) -> Rates:
    sums: dict[tuple[Any, ...], list[float]] = defaultdict(lambda: [0.0, 0])
    for record in records:
        for like in _likes(record):
            sums[like][0] += _seconds(record)
            sums[like][1] += _steps(record)
    return {like: (seconds, int(steps)) for like, (seconds, steps) in sums.items()}


def _seconds(record: Record) -> float:
    """Seconds of a run where nothing else is at work; of a CPU's, those that it computed."""
    return float(record.get("cpu_seconds", record["seconds"]) if record["device"] == "cpu" else record["seconds"])


def _steps(record: Record) -> int:
    recipe, data = record["recipe"], record["data"]
    samples = train_size(DataSpec(**data))
    return int(recipe["epochs"] * (samples // recipe["batch_size"]))


def _likes(config: Record) -> list[tuple[Any, ...]]:
    """What a run must share with another for its seconds per step to tell: with the method, else without."""
    recipe, data, model = config["recipe"], config["data"], config["model"]
    same = (
        *(data[name] for name in ("name", "pairs", "size")),
        *(model[name] for name in ("name", "width")),
        *(recipe[name] for name in ("batch_size", "bf16", "channels_last", "compile")),
    )
    return [(*same, config["method"]["name"]), same]


def _disk(todo: list[Run], keep: set[str]) -> str:
    records = sum(RECORD + EPOCH * run.recipe.epochs for run in todo)
    weights = sum(_weight_bytes(run.model, *shape(run.data)) for run in todo if run.key in keep)
    images = sum(decoded_bytes(name) for name in {run.data.name for run in todo})
    parts = {"records": records, "weights of teachers": weights, "decoded images": images}
    sizes = ", ".join(f"{what} {_size(count)}" for what, count in parts.items() if count)
    return f"disk: {sizes or 'nothing'}"


@functools.cache
def _weight_bytes(spec: models.ModelSpec, num_classes: int, channels: int, flat: bool) -> int:
    with torch.device("meta"):
        model = models.make(spec, num_classes, channels, flat)
    return sum(value.nbytes for value in model.state_dict().values())


def _size(count: int) -> str:
    power = min(int(math.log(count, 1000)), 3)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"
