"""Fresh processes for tests, forked from one that has imported torch once, and groups of two that talk by gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from concurrent.futures import ThreadPoolExecutor

import torch

PRELOADED = ["torch", "torch._dynamo", "torch.distributed.fsdp", "sklearn.datasets", "softlabels"]


def call(function, *args, **environment):
    """What the function returns in a process of its own, which has these variables in its environment."""
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, args, environment))
    process.start()
    sender.close()
    try:
        value, error = receiver.recv()
    except EOFError:
        value, error = None, "it ended without an answer"
    process.join()
    assert error is None, error
    return value


def _context():
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _answer(sender, function, args, environment):
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        answer = function(*args), None
    except BaseException:
        answer = None, traceback.format_exc()
    sender.send(answer)


def both(function, *args):
    """What the function returns in each of two processes, whose environment is that of torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    with ThreadPoolExecutor(2) as threads:
        started = [threads.submit(call, function, *args, **address, RANK=r, LOCAL_RANK=r) for r in "01"]
        return [each.result() for each in started]


def spawn(worker, *args):
    """What the worker returns, called with its rank in a group of two gloo processes."""
    return both(_join, worker, *args)


def _join(worker, *args):
    torch.distributed.init_process_group("gloo")
    value = worker(torch.distributed.get_rank(), *args)
    torch.distributed.destroy_process_group()
    return value
