"""Two processes rank and draw over the joint batch as one process would."""

from __future__ import annotations

import torch
import torch.multiprocessing as mp

import softlabels

ROWS = [5, 3]  # uneven on purpose
CONFIDENCE = torch.tensor([0.9, 0.1, 0.5, 0.7, 0.3, 0.2, 0.8, 0.6])
TARGET = torch.tensor([0, 1, -100, 0, 2, 1, 0, 2])
LOGITS = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


def losses(criterion, rows):
    return criterion(LOGITS[rows], TARGET[rows], confidence=CONFIDENCE[rows])


def make(**options):
    return softlabels.BetaSmoothingLoss(reduction="none", **options)


def worker(rank, path, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(11 + rank)  # process 0 draws for all
    criterion = make(global_ranking=True, generator=generator)
    rows = slice(0, ROWS[0]) if rank == 0 else slice(ROWS[0], 8)
    results[rows] = losses(criterion, rows)
    torch.distributed.destroy_process_group()


def test_joint_batch(tmp_path):
    results = torch.zeros(8).share_memory_()
    mp.spawn(worker, args=(tmp_path / "rendezvous", results), nprocs=2)
    alone = make(generator=torch.Generator().manual_seed(11))
    torch.testing.assert_close(results, losses(alone, slice(0, 8)))


def test_without_a_process_group_it_is_the_local_ranking():
    torch.manual_seed(0)
    wanted = losses(make(), slice(0, 8))
    torch.manual_seed(0)
    torch.testing.assert_close(losses(make(global_ranking=True), slice(0, 8)), wanted)
