"""Do the runs that are not yet in the store: each is a task of Dask, and a student's depends on its teacher's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.paper.cluster import each, submit
from benchmarks.paper.runs import Run
from benchmarks.paper.store import Store
from benchmarks.paper.worker import Inputs, progress, work


def missing(runs: Iterable[Run], store: Store) -> list[Run]:
    """Runs still to be done, each once and after its teacher, in the order in which they were asked for.

    A teacher whose record is there but whose weights are gone is done again, if a student needs it.
    """
    todo: dict[str, Run] = {}

    def visit(run: Run, as_teacher: bool) -> None:
        if run.key in todo or (run.key in store.records and not (as_teacher and store.weights(run.key) is None)):
            return
        if run.teacher is not None:
            visit(run.teacher, True)
        todo[run.key] = run

    for run in runs:
        visit(run, False)
    return list(todo.values())


def kept(runs: Iterable[Run]) -> set[str]:
    """Keys of runs whose weights are worth keeping, for the students of these or of later experiments."""
    return {run.key for run in runs if run.method.name == "cross-entropy"} | {r.teacher.key for r in runs if r.teacher}


def do(todo: list[Run], keep: set[str], store: Store, client: Any, inputs: Inputs) -> list[str]:
    """Do runs, store each as soon as it is there, with its weights if its key is in ``keep``; return what failed.

    A run that fails takes its students with it, and no other. After an interrupt, what is done is stored.
    """
    futures: dict[str, Any] = {}
    for run in todo:
        teacher = run.teacher and run.teacher.key
        if teacher is not None and teacher not in futures:
            futures[teacher] = submit(client, inputs.name(teacher), tuple, (None, store.weights(teacher)))
        taught_by = teacher and futures[teacher]
        futures[run.key] = submit(client, inputs.name(run.key), work, run, taught_by, run.key in keep, inputs)
    with progress(client, inputs, todo):
        failed = each([futures.pop(run.key) for run in todo], lambda done: store.add(*done))
    fates = {run.key: failed.get(inputs.name(run.key)) for run in todo}
    students = {run.key for run in todo if run.teacher is not None and fates.get(run.teacher.key)}
    lost = [(run, "its teacher failed" if run.key in students else fates[run.key]) for run in todo if fates[run.key]]
    return [f"{run.describe()}: {why}" for run, why in lost]
