"""Runs as tasks of Dask: killed, interrupted, resumed, failed, and on a scheduler that was started by hand."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.paper import cluster, methods
from benchmarks.paper.cluster import existing, local
from benchmarks.paper.experiments import EXPERIMENTS
from benchmarks.paper.recipe import Recipe
from benchmarks.paper.runs import execute
from benchmarks.paper.schedule import do, kept, missing
from benchmarks.paper.setting import preset
from benchmarks.paper.store import Store, read_records
from benchmarks.paper.worker import prepare

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
COMMAND = [sys.executable, "-m", "benchmarks.paper", "pruned", "--preset", "smoke", "--seeds", "1", "--epochs", "3"]
SETTING = preset("smoke")
PLAN = EXPERIMENTS["pruned"].plan(dataclasses.replace(SETTING, recipe=dataclasses.replace(SETTING.recipe, epochs=3)))


def numbers(records):
    """Records as they are stored, without what the clock says."""
    records = json.loads(json.dumps(records))
    for record in records.values():
        del record["seconds"]
    return records


@pytest.fixture(scope="module")
def undisturbed():
    """The records of COMMAND, made one after the other in this process, without Dask."""
    torch.set_num_threads(1)
    weights, records = {}, {}
    for run in PLAN.values():
        for each in (run.teacher, run):
            if each is not None and each.key not in records:
                teacher = each.teacher and weights[each.teacher.key]
                records[each.key], weights[each.key] = execute(each, teacher, save=True)
    return numbers(records)


@pytest.fixture
def start(tmp_path):
    """Start a process in a session of its own, with what it says in LOG; all are ended after the test."""
    processes = []

    def begin(command, folder, log):
        with (tmp_path / log).open("ab") as file:
            options = {"cwd": folder, "env": ENVIRONMENT, "start_new_session": True, "stdout": file, "stderr": file}
            processes.append(subprocess.Popen(command, **options))
        return processes[-1]

    yield begin
    for process in processes:
        for pid in living(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def wait_for(what, seconds=120):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stored(out):
    runs = out / "runs.jsonl"
    return runs.read_bytes().count(b"\n") if runs.exists() else 0


def workers(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children()
        server = [child for child in children if "multiprocessing.forkserver" in " ".join(child.cmdline())]
        return [worker for each in server for worker in each.children()]
    return []


def living(session):
    """Processes of a session that still run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def test_killed_interrupted_and_resumed_gives_the_same_records(tmp_path, undisturbed, start):
    """A worker is killed, the command interrupted, then interrupted twice, and resumed by another number of workers."""
    out, log = tmp_path / "out", tmp_path / "log"
    process = start([*COMMAND, "--out", out, "--workers", "2"], ROOT, "log")
    wait_for(lambda: "0 of" in log.read_text() and len(workers(process)) == 2)
    victim = workers(process)[0]
    victim.kill()
    wait_for(lambda: stored(out))
    process.send_signal(signal.SIGINT)  # to this process alone, as kill -INT does
    assert process.wait(30) == 130
    count = stored(out)
    assert 0 < count < 4
    assert f"interrupted; {count} runs are stored in {out}/, and the same command goes on from there" in log.read_text()
    assert "Traceback" not in log.read_text()
    wait_for(lambda: not living(process.pid), 10)

    process = start([*COMMAND, "--out", out, "--workers", "1"], ROOT, "log")
    wait_for(lambda: log.read_text().count("dashboard at http://127.0.0.1:") == 2 and workers(process))
    os.killpg(process.pid, signal.SIGTERM)  # to every process, as timeout and scancel do
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM  # the second is not waited for
    wait_for(lambda: not living(process.pid), 10)
    with (out / "runs.jsonl").open("a") as file:
        file.write('{"key": "half')
    process = start([*COMMAND, "--out", out, "--workers", "1"], ROOT, "log")
    assert process.wait(120) == 0
    assert numbers(read_records(out / "runs.jsonl")) == undisturbed
    assert (out / "pruned" / "table.md").exists()
    assert "Traceback" not in log.read_text()


class Poison:
    """A plugin for workers, with which the run of seed 66 ends its process, as the kernel does for want of memory."""

    name = "poison"

    def setup(self, worker):
        from benchmarks.paper import worker as module

        real = module.execute

        def execute(run, *arguments, **options):
            return os._exit(1) if run.seed == 66 else real(run, *arguments, **options)

        module.execute = execute


def test_what_fails_takes_its_students_with_it_and_no_other(tmp_path):
    """A run that raises, and one whose process ends whenever it is begun."""
    import cloudpickle
    import dask
    from dask.distributed import WorkerPlugin

    setting = dataclasses.replace(preset("smoke"), recipe=Recipe(epochs=1, batch_size=128))
    weak = setting.run(methods.self_distillation(), setting.teacher())  # one epoch teaches too little to be matched
    student = setting.run(methods.self_distillation(alpha=0.0, temperature=1.0), weak)
    poison = setting.run(methods.cross_entropy(), seed=66)
    heir = setting.run(methods.self_distillation(temperature=2.0), poison)
    good = [setting.run(methods.label_smoothing(share)) for share in (0.7, 0.8, 0.9)]
    good.append(setting.run(methods.self_distillation(temperature=2.0), weak.teacher))
    todo = [poison, weak.teacher, weak, student, heir, *good]
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    impatient = dask.config.set({"distributed.deploy.lost-worker-timeout": "0.1s"})  # sooner than any is replaced
    with Store(tmp_path) as store, impatient, local(1) as client:
        client.register_plugin(type("Plugin", (Poison, WorkerPlugin), {})())
        failures = do(todo, kept(todo), store, client, prepare(todo, store))
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert failures == [
        "cross-entropy  on digits with resnet8, seed 66: its process ended 3 times; is there enough memory?",
        failures[1],
        f"{student.describe()}: its teacher failed",
        f"{heir.describe()}: its teacher failed",
    ]
    assert failures[1].startswith(f"{weak.describe()}: ValueError: a teacher has learnt too little to be matched")
    assert set(store.records) == {run.key for run in (*good, weak.teacher)}


def test_runs_fail_by_name_when_no_process_is_left(tmp_path, monkeypatch):
    monkeypatch.setitem(cluster.LOCAL, "distributed.scheduler.no-workers-timeout", "0.5s")
    teacher = SETTING.run(methods.cross_entropy())
    todo = [teacher, SETTING.run(methods.self_distillation(temperature=2.0), teacher)]
    with Store(tmp_path) as store, local(0) as client:
        failures = do(todo, kept(todo), store, client, prepare(todo, store))
    assert failures[0].startswith(f"{teacher.describe()}: NoWorkerError: ")
    assert failures[1:] == [f"{todo[1].describe()}: its teacher failed"]


def test_a_scheduler_that_was_started_by_hand(tmp_path, undisturbed, start):
    """Its workers run in folders of their own, stay when a command was interrupted, and do the rest of it."""
    file, processes = str(tmp_path / "scheduler.json"), []
    for number, words in enumerate(
        [
            ["scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", ":0"],
            *(["worker", "--nthreads", "1", "--no-nanny", "--name", name] for name in "ab"),
        ]
    ):
        (tmp_path / str(number)).mkdir()
        command = [sys.executable, "-m", f"distributed.cli.dask_{words[0]}", *words[1:], "--scheduler-file", file]
        processes.append(start(command, tmp_path / str(number), "cluster.log"))
    wait_for(Path(file).exists)
    out, log = tmp_path / "out", tmp_path / "log"
    command = start([*COMMAND, "--out", out, "--scheduler", file], ROOT, "log")
    wait_for(lambda: stored(out))
    command.send_signal(signal.SIGINT)
    assert command.wait(30) == 130
    assert f"interrupted; {stored(out)} runs are stored in {out}/" in log.read_text()
    assert "Traceback" not in log.read_text()
    with Store(out) as store:
        todo = missing(PLAN.values(), store)
        assert 0 < len(todo) < 4
        with existing(file, "cpu") as client:
            assert len(client.nthreads()) == 2
            assert do(todo, kept(todo), store, client, prepare(todo, store)) == []
        assert numbers(store.records) == undisturbed
    assert [process.poll() for process in processes] == [None, None, None]


def test_a_cluster_that_cannot_do_runs_is_refused(monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 0.3)
    with pytest.raises(ValueError, match="must be an address like tcp://host:8786 or a scheduler file, got nowhere"):
        existing("nowhere", "cpu").__enter__()
    with pytest.raises(ValueError, match=r"no scheduler of Dask answers at tcp://127\.0\.0\.1:1"):
        existing("tcp://127.0.0.1:1", "cpu").__enter__()
