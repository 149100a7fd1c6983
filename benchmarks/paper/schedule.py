"""Do the runs that are not yet in the store, teachers before students, in parallel processes."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing as mp
from tqdm import tqdm

from benchmarks.paper.data import load, train_size
from benchmarks.paper.runs import Run, execute
from benchmarks.paper.store import Store


def missing(runs: Iterable[Run], store: Store) -> list[Run]:
    """Runs still to be done, each once and after its teacher, in the order in which they were asked for.

    A teacher whose record is there but whose weights are gone is done again, if a student needs it.
    """
    todo: dict[str, Run] = {}

    def visit(run: Run, as_teacher: bool) -> None:
        if run.key in todo:
            return
        if run.key in store.records and not (as_teacher and not store.has_checkpoint(run.key)):
            return
        if run.teacher is not None:
            visit(run.teacher, True)
        todo[run.key] = run

    for run in runs:
        visit(run, False)
    return list(todo.values())


def prepare(runs: Iterable[Run], store: Store, folder: Path | None = None) -> None:
    """Load each data set once: what is missing or broken is found, and decoded, before any process starts."""
    for spec in dict.fromkeys(run.data for run in missing(runs, store)):
        load(spec, folder, store.data)


def do(runs: list[Run], store: Store, workers: int, folder: Path | None = None) -> list[str]:
    """Do the missing runs with a progress bar over optimizer steps; each record is stored as soon as it is there.

    A run that fails takes its students with it, and no other.

    Args:
        runs: What must be in the store in the end.
        store: Where records and weights go.
        workers: Processes. On a CPU each uses one thread, so that results do not depend on their number.
        folder: Where the data set lies; None for the usual places.

    Returns:
        What failed, one line per run.
    """
    todo = missing(runs, store)
    if not todo:
        return []
    teachers = {run.teacher.key for run in [*runs, *todo] if run.teacher is not None}
    waiting = list(todo)
    steps = {run.key: run.recipe.steps(train_size(run.data)) for run in todo}
    context = mp.get_context("spawn")
    finished_steps = context.SimpleQueue()
    interval = 0.2 if sys.stderr.isatty() else 30.0  # seconds between lines of a log file
    pool = ProcessPoolExecutor(min(workers, len(todo)), context, _initialise, (finished_steps,))
    bar = tqdm(total=sum(steps.values()), unit="step", smoothing=0.05, mininterval=interval, desc=f"{len(todo)} runs")
    running: dict[Future[dict[str, Any]], Run] = {}
    failed: dict[str, str] = {}
    with pool, bar:
        while running or waiting:
            for run in [run for run in waiting if run.teacher is not None and run.teacher.key in failed]:
                waiting.remove(run)
                failed[run.key] = f"{run.describe()}: its teacher failed"
            unfinished = {run.key for run in [*waiting, *running.values()]}
            ready = [run for run in waiting if run.teacher is None or run.teacher.key not in unfinished]
            for run in ready[: workers - len(running)]:
                waiting.remove(run)
                save = run.key in teachers or run.method.name == "cross-entropy"
                running[pool.submit(_work, run, folder, store.checkpoints, store.data, save)] = run
            done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in done:
                run = running.pop(future)
                error = future.exception()
                if isinstance(error, BrokenExecutor):  # a process was killed, and the pool takes no more work
                    raise RuntimeError(f"a process ended during {run.describe()}; is there enough memory?") from error
                if error is None:
                    store.add(future.result())
                else:
                    failed[run.key] = f"{run.describe()}: {type(error).__name__}: {error}"
            while not finished_steps.empty():
                bar.update(finished_steps.get())
    return list(failed.values())


_finished_steps: Any = None


def _initialise(finished_steps: Any) -> None:
    global _finished_steps
    _finished_steps = finished_steps
    torch.set_num_threads(1)  # these networks are too small to share; one thread also makes runs repeatable
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process whose parent was killed would train on for nobody."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(run: Run, folder: Path | None, checkpoints: Path, cache: Path, save: bool) -> dict[str, Any]:
    return execute(run, checkpoints, save, folder, cache, _finished_steps.put)
