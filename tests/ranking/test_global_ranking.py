"""Two processes rank and draw over the joint batch as one process would."""

from __future__ import annotations

import torch
from processes import spawn

import softlabels

ROWS = [5, 3]  # uneven on purpose
CONFIDENCE = torch.tensor([0.9, 0.1, 0.5, 0.7, 0.3, 0.2, 0.8, 0.6])
TARGET = torch.tensor([0, 1, -100, 0, 2, 1, 0, 2])
LOGITS = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


def losses(criterion, rows):
    return criterion(LOGITS[rows], TARGET[rows], confidence=CONFIDENCE[rows])


def make(**options):
    return softlabels.BetaSmoothingLoss(reduction="none", **options)


def worker(rank):
    generator = torch.Generator().manual_seed(11 + rank)  # process 0 draws for all
    criterion = make(global_ranking=True, generator=generator)
    rows = slice(0, ROWS[0]) if rank == 0 else slice(ROWS[0], 8)
    return losses(criterion, rows).tolist()


def test_joint_batch():
    ranks = spawn(worker)
    results = torch.tensor([*ranks[0], *ranks[1]])
    alone = make(generator=torch.Generator().manual_seed(11))
    torch.testing.assert_close(results, losses(alone, slice(0, 8)))


def test_without_a_process_group_it_is_the_local_ranking():
    torch.manual_seed(0)
    wanted = losses(make(), slice(0, 8))
    torch.manual_seed(0)
    torch.testing.assert_close(losses(make(global_ranking=True), slice(0, 8)), wanted)
