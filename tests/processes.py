"""Two gloo processes that each return a value."""

from __future__ import annotations

import torch
import torch.multiprocessing as mp


def spawn(worker, path, *args):
    results = mp.get_context("spawn").Manager().dict()
    mp.spawn(start, args=(worker, str(path / "rendezvous"), results, *args), nprocs=2)
    return results


def start(rank, worker, path, results, *args):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    results[rank] = worker(rank, *args)
    torch.distributed.destroy_process_group()
