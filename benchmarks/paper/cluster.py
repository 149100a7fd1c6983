"""Where runs are done: in processes of this machine, or on a cluster of Dask that is there already."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

PATIENCE = 10.0  # seconds within which a scheduler must answer
REPEATED = 2  # times that a run is begun again after its process has died

LOCAL = {
    "distributed.scheduler.allowed-failures": REPEATED,
    "distributed.scheduler.worker-saturation": 1.0,  # a process is given the run that it does, and none to wait for it
    # Dask would give a process up that was not replaced after 15 seconds, which importing torch may take, and wait on.
    "distributed.deploy.lost-worker-timeout": "365 days",
    "distributed.scheduler.no-workers-timeout": "5 minutes",  # runs fail when no process could be started again
    # A process that trains should not be woken: profiles are off, and clocks tick seldom.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "5s",
    "distributed.admin.system-monitor.interval": "30s",
}


@contextlib.contextmanager
def local(workers: int) -> Iterator[Any]:
    """Start processes of one thread each, give a client of theirs, and end them."""
    import dask
    from dask.distributed import Client, LocalCluster

    with (
        dask.config.set({**LOCAL, "distributed.worker.multiprocessing-method": start_method()}),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,  # not a share each: a run takes what it needs, as any other process
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
            preload=[__name__],
        ) as cluster,
        Client(cluster) as client,
    ):
        print(f"{workers} processes; dashboard at {client.dashboard_link}", file=sys.stderr)
        yield client


def start_method() -> str:
    """How processes start: as forks of one that has imported what a run needs, so that it is imported once."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    from multiprocessing import forkserver

    forkserver.set_forkserver_preload(["benchmarks.paper.worker", "distributed.nanny"])
    forkserver.ensure_running()
    return "forkserver"


def dask_setup(worker: object) -> None:
    """Leave signals that reach every process of a group, such as Ctrl-C, to the command, which ends the others."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def existing(scheduler: str, device: str) -> Iterator[Any]:
    """Give a client of a cluster that is there, by its address or scheduler file; it is left running.

    Raises:
        ValueError: there is none, or a process of it cannot do runs.
    """
    from dask.distributed import Client

    is_address = "://" in scheduler
    if not is_address and not Path(scheduler).is_file():
        raise ValueError(f"--scheduler must be an address like tcp://host:8786 or a scheduler file, got {scheduler}")
    try:
        where = {"address": scheduler} if is_address else {"scheduler_file": scheduler}
        client = Client(**where, timeout=PATIENCE)
    except OSError as error:
        raise ValueError(f"no scheduler of Dask answers at {scheduler}: {error}") from None
    with client:
        print(f"dashboard at {client.dashboard_link}", file=sys.stderr)
        if not client.nthreads():
            print(f"waiting for a worker at {scheduler}", file=sys.stderr)
            client.wait_for_workers(1)
        check(client, device)
        yield client


def check(client: Any, device: str) -> None:
    """Raise if the scheduler or a worker lacks what a run needs."""
    try:
        client.run_on_scheduler(lacks, "cpu")
    except Exception as error:  # whatever comes of a module that is not there
        raise ValueError(f"the scheduler cannot import benchmarks.paper: {error}") from None
    for address, threads in client.nthreads().items():
        if threads != 1:
            raise ValueError(f"the worker at {address} has {threads} threads; start it with --nthreads 1")
    for address, lack in client.run(lacks, device, on_error="return").items():
        if lack is not None:
            raise ValueError(f"the worker at {address} cannot do a run: {lack}")


def lacks(device: str) -> str | None:
    """Say what a process lacks to do runs, besides what it takes to be asked."""
    if device == "cuda" and not torch.cuda.is_available():
        return "its torch finds no CUDA device"
    return None


def submit(client: Any, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Have a function called on the cluster; arguments that are futures are replaced by their results.

    Unlike ``client.submit``, a task waits at the scheduler until a process is free, as those do that produce data: a
    process that dies is blamed on what it did, and not on what was to be done next.
    """
    from dask.distributed import Future
    from dask.task_spec import Task, TaskRef

    references = (TaskRef(value.key) if isinstance(value, Future) else value for value in arguments)
    # There is no public way to say this of one task: Dask guesses it, of groups of more than two tasks per process.
    task = Task(name, function, *references, _data_producer=True)
    return client.get({name: task}, name, sync=False)


def each(futures: list[Any], use: Callable[[Any], None]) -> dict[str, str]:
    """Call ``use`` with each result when it is there; give, by names of tasks, why others are not.

    Raises:
        KeyboardInterrupt: the command was asked to stop; what was there by then was used.
        ConnectionError: the cluster is gone.
    """
    from dask.distributed import as_completed

    failed: dict[str, str] = {}

    def settle(future: Any) -> None:
        why = _why_not(future)
        if why is None:
            use(future.result())
        else:
            failed[future.key] = why
        del waiting[future]

    waiting, done = dict.fromkeys(futures), as_completed(futures)
    del futures  # the cluster forgets a result that was used, unless a student needs it
    try:
        for future in done:
            settle(future)
    except KeyboardInterrupt:
        for future in [future for future in waiting if future.done()]:
            settle(future)
        raise
    return failed


def _why_not(future: Any) -> str | None:
    from dask.distributed import KilledWorker

    if future.status == "finished":
        return None
    if future.status != "error":
        raise ConnectionError("the cluster is gone")
    error = future.exception()
    if isinstance(error, KilledWorker):
        return f"its process ended {error.allowed_failures + 1} times; is there enough memory?"
    return f"{type(error).__name__}: {error}"
