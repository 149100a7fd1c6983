"""Fresh processes for tests, forked from one that has imported torch once, and groups of two that talk by gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from multiprocessing.connection import wait

import torch

PRELOADED = ["torch", "torch._dynamo", "torch.distributed.fsdp", "sklearn.datasets", "softlabels"]


def call(function, *args, **environment):
    """What the function returns in a process of its own, which has these variables in its environment."""
    return _answers([_start(function, args, environment)])[0]


def both(function, *args):
    """What the function returns in each of two processes, whose environment is that of torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return _answers([_start(function, args, {**address, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"])


def _start(function, args, environment):
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, args, environment))
    process.start()
    sender.close()
    return process, receiver


def _answers(started):
    """What each process sends; where one fails, the others, which may wait for it, are ended."""
    values = {}
    try:
        while len(values) < len(started):
            for receiver in wait([receiver for _, receiver in started if receiver not in values]):
                values[receiver], error = receiver.recv()
                assert error is None, error
    except BaseException:
        for process, _ in started:
            process.terminate()
        raise
    finally:
        for process, _ in started:
            process.join()
    return [values[receiver] for _, receiver in started]


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


def spawn(worker, *args):
    """What the worker returns, called with its rank in a group of two gloo processes."""
    return both(_join, worker, *args)


def _join(worker, *args):
    torch.distributed.init_process_group("gloo")
    value = worker(torch.distributed.get_rank(), *args)
    torch.distributed.destroy_process_group()
    return value
