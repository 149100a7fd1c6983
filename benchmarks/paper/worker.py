"""What a process of the cluster does with a run, and the bar over the optimizer steps of all of them."""

from __future__ import annotations

import contextlib
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper.data import DataSpec, load, train_size
from benchmarks.paper.runs import Record, Run, Weights, execute
from benchmarks.paper.store import Store

Done = tuple[Record | None, Weights | None]  # no record of a teacher that was stored before

_alone = threading.Lock()  # runs in threads of one process would draw from each other's random numbers


@dataclass(frozen=True)
class Inputs:
    """What the runs of a command share.

    Args:
        folder: Where the data set lies, on every machine; None for the usual places.
        cache: Folder of decoded data sets; used where a process sees it.
        digests: What each data set must be, so that no machine trains on another copy.
        topic: Under which processes tell how far they are.
    """

    folder: Path | None = None
    cache: Path | None = None
    digests: Mapping[DataSpec, str] = field(default_factory=dict)
    topic: str = field(default_factory=lambda: uuid.uuid4().hex)

    def name(self, key: str) -> str:
        """Name the task of a run; another command on the same cluster may have the same run."""
        return f"run-{key}-{self.topic}"


def prepare(todo: list[Run], store: Store, folder: Path | None = None) -> Inputs:
    """Load each data set once: what is missing, broken or changed is found, and decoded, before any process starts.

    Raises:
        ValueError: stored runs were made on another copy of a data set.
    """
    digests = {}
    for spec in dict.fromkeys(run.data for run in todo):
        digests[spec] = load(spec, folder, store.data).digest()
        for record in store.records.values():
            if record["data"] == asdict(spec) and record["data_digest"] != digests[spec]:
                raise ValueError(
                    f"runs in {store.path} were made on another copy of {spec.name} (digest {record['data_digest']}, "
                    f"this one has {digests[spec]}); start again with another --out"
                )
    return Inputs(folder and folder.resolve(), store.data.resolve(), digests)


def work(run: Run, teacher: Done | None, save: bool, inputs: Inputs) -> Done:
    """Do a run; its teacher's weights come as the result of the teacher's task."""
    from dask.distributed import get_worker

    worker = get_worker()
    name, steps = worker.get_current_task(), 0
    cache = inputs.cache
    if cache is None or not cache.is_dir():
        cache = Path(worker.local_directory) / "data"

    def on_epoch(count: int) -> None:
        nonlocal steps
        steps += count
        worker.log_event(inputs.topic, [run.key, steps])
        task = worker.state.tasks.get(name)
        if task is None or task.state == "cancelled":
            raise InterruptedError("nobody waits for this run any more")

    with _alone:
        torch.set_num_threads(1)  # these networks are too small to share; one thread also makes runs repeatable
        expected = inputs.digests.get(run.data)
        weights = None if teacher is None else teacher[1]
        return execute(run, weights, save=save, folder=inputs.folder, cache=cache, expected=expected, on_epoch=on_epoch)


@contextlib.contextmanager
def progress(client: Any, inputs: Inputs, runs: list[Run]) -> Iterator[None]:
    """Show a bar over optimizer steps: on a terminal in one line, in a log file by a line every 30 seconds."""
    from tqdm import tqdm

    live = sys.stderr.isatty()
    bar = tqdm(
        total=sum(run.recipe.steps(train_size(run.data)) for run in runs),
        desc=f"{len(runs)} runs",
        unit="step",
        smoothing=0.05,
        mininterval=0.2 if live else 30.0,
        maxinterval=10.0 if live else 30.0,
        bar_format=None
        if live
        else "{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt} steps [{elapsed}<{remaining}]\n",
    )
    steps: dict[str, int] = {}

    def on_event(event: tuple[float, Any]) -> None:
        key, count = event[1]
        bar.update(count - steps.get(key, 0))  # a run that is repeated counts anew
        steps[key] = count

    client.subscribe_topic(inputs.topic, on_event)
    try:
        with bar:
            yield
    finally:
        client.unsubscribe_topic(inputs.topic)
