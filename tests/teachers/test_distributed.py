"""Two gloo processes: DDP, FSDP2, and the EMA that needs no communication of its own."""

from __future__ import annotations

import pytest
import torch
from loops import MeanTeacher, batches, train
from processes import spawn
from torch import nn

import softlabels

DATA = batches(6, rows=8)


def model_without_batch_norm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def own_rows(rank, x, y, uneven):
    cut = 5 if uneven else 4
    return (x[:cut], y[:cut]) if rank == 0 else (x[cut:], y[cut:])


def steps(rank, called, criterion, optimizer, after=lambda: None, uneven=False):
    return train(called, criterion, optimizer, [own_rows(rank, x, y, uneven) for x, y in DATA], after)


def ddp_run(rank, attach_to, global_ranking):
    model = model_without_batch_norm()
    criterion = softlabels.BetaSmoothingLoss(ema_decay=0.8, global_ranking=global_ranking)
    if attach_to == "module before wrapping":
        criterion.attach(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    if attach_to == "wrapper":
        criterion.attach(wrapped)
    elif attach_to == "module":
        criterion.attach(model)
    by_hand = MeanTeacher(model, 0.8)
    torch.manual_seed(rank)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.05)
    steps(rank, wrapped, criterion, optimizer, by_hand.step, uneven=global_ranking)
    assert not any(key.startswith("teacher.module.module") for key in criterion.state_dict())
    own = [p.tolist() for p in criterion.teacher.module.parameters()]
    updates = criterion.teacher.num_updates
    criterion.detach()
    return updates, own, [p.tolist() for p in by_hand.ema.parameters()]


DDP_RUNS = [(to, ranking) for to in ("wrapper", "module", "module before wrapping") for ranking in (False, True)]


def ddp_worker(rank):
    return [ddp_run(rank, *options) for options in DDP_RUNS]


def test_ddp(tmp_path):
    """Attached to the wrapper, the module, or before wrapping; local ranking, and joint over uneven batches."""
    results = spawn(ddp_worker, tmp_path)
    for first, second in zip(results[0], results[1], strict=True):
        for updates, own, by_hand in (first, second):
            assert updates == len(DATA)
            assert own == by_hand
        assert first[1] == second[1]  # bit for bit, though nothing was sent


def fsdp_worker(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))

    # the documented recipe: copy, shard both alike, attach
    model = model_without_batch_norm()
    teacher = softlabels.EMATeacher(model, decay=0.8)
    fully_shard(model, mesh=mesh)
    fully_shard(teacher.module, mesh=mesh)
    criterion = softlabels.BetaSmoothingLoss().attach(model, teacher=teacher)
    torch.manual_seed(rank)
    losses = steps(rank, model, criterion, torch.optim.SGD(model.parameters(), lr=0.1))
    sharded = teacher.num_updates, [p.full_tensor().tolist() for p in teacher.module.parameters()], losses
    criterion.detach()

    # the same run without sharding
    model = model_without_batch_norm()
    wrapped = nn.parallel.DistributedDataParallel(model)
    criterion = softlabels.BetaSmoothingLoss(ema_decay=0.8).attach(wrapped)
    torch.manual_seed(rank)
    losses = steps(rank, wrapped, criterion, torch.optim.SGD(wrapped.parameters(), lr=0.1))
    whole = criterion.teacher.num_updates, [p.tolist() for p in criterion.teacher.module.parameters()], losses

    # mistakes
    model = model_without_batch_norm()
    teacher = softlabels.EMATeacher(model)
    fully_shard(model, mesh=mesh)
    with pytest.raises(RuntimeError, match="only one is sharded"):
        teacher.update()
    with pytest.raises(ValueError, match=r"sharded already .* make the EMATeacher first"):
        softlabels.BetaSmoothingLoss().attach(model)
    return sharded, whole


def test_fsdp2(tmp_path):
    for sharded, whole in spawn(fsdp_worker, tmp_path).values():
        assert sharded[0] == whole[0] == len(DATA)
        assert sharded[2] == pytest.approx(whole[2], rel=1e-5)
        for a, b in zip(sharded[1], whole[1], strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b))
