"""Two gloo processes: DDP, FSDP2, and the EMA that needs no communication of its own."""

from __future__ import annotations

import pytest
import torch
from loops import MeanTeacher, batches, train
from processes import spawn
from torch import nn
from versions import fsdp2

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
    own = [average.tolist() for average in criterion.teacher.averages.values()]
    assert list(criterion.teacher.averages) == list(dict(model.named_parameters()))
    updates = criterion.teacher.num_updates
    criterion.detach()
    return updates, own, [p.tolist() for p in by_hand.ema.parameters()]


DDP_RUNS = [(to, ranking) for to in ("wrapper", "module", "module before wrapping") for ranking in (False, True)]


def run_from_different_starts(rank):
    """Attached before DistributedDataParallel broadcasts the weights of process 0."""
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    criterion = softlabels.BetaSmoothingLoss(ema_decay=0.8).attach(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    by_hand = MeanTeacher(model, 0.8)
    steps(rank, wrapped, criterion, torch.optim.SGD(wrapped.parameters(), lr=0.1), by_hand.step)
    own = [average.tolist() for average in criterion.teacher.averages.values()]
    return own, [p.tolist() for p in by_hand.ema.parameters()]


def ddp_worker(rank):
    return [ddp_run(rank, *options) for options in DDP_RUNS], run_from_different_starts(rank)


def test_ddp():
    """Attached to the wrapper, the module, or before wrapping; local ranking, and joint over uneven batches."""
    (runs, first), (others, second) = spawn(ddp_worker)
    assert first[0] == first[1] == second[0] == second[1]  # whatever the processes started from
    for first, second in zip(runs, others, strict=True):
        for updates, own, by_hand in (first, second):
            assert updates == len(DATA)
            assert own == by_hand
        assert first[1] == second[1]  # bit for bit, though nothing was sent


def fsdp_worker(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))

    def run(shard, attach_first, decay=0.8):
        model = model_without_batch_norm()
        criterion = softlabels.BetaSmoothingLoss(ema_decay=decay)
        called = model
        if attach_first:
            criterion.attach(model)
        if shard:
            fully_shard(model[0], mesh=mesh)
            fully_shard(model, mesh=mesh)
        else:
            called = nn.parallel.DistributedDataParallel(model)
        if not attach_first:
            criterion.attach(called)
        torch.manual_seed(rank)
        optimizer = torch.optim.SGD(called.parameters(), lr=0.1)
        losses = steps(rank, called, criterion, optimizer)
        criterion.teacher.eval()(DATA[0][0])
        losses += steps(rank, called, criterion, optimizer)
        return model, criterion, losses

    def whole(tensors):
        return {n: (t.full_tensor() if shard else t).tolist() for n, t in tensors.items()}

    results = []
    for shard, attach_first in ((True, False), (True, True), (False, False)):
        model, criterion, losses = run(shard, attach_first)
        averages = criterion.teacher.averages
        if shard:
            assert all(t.to_local().numel() < t.numel() for t in averages.values())
        weights = whole(model.state_dict())
        results.append((criterion.teacher.num_updates, whole(averages), weights, losses))
        if shard:  # the state is one of DTensors, which goes on in another process group or without one
            state = {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in criterion.state_dict().items()}
            resumed, another, _ = run(True, False)
            another.load_state_dict(state)
            assert whole(another.teacher.averages) == whole(averages)
            another.detach()
            plain = softlabels.BetaSmoothingLoss(ema_decay=0.8).attach(model_without_batch_norm())
            plain.load_state_dict(state)
            assert {n: t.tolist() for n, t in plain.teacher.averages.items()} == whole(averages)
            assert resumed is not None
        criterion.detach()

    # a module of the user's, sharded in a way of its own
    shard = False
    model, own = model_without_batch_norm(), model_without_batch_norm()
    fully_shard(own, mesh=mesh)
    teacher = softlabels.EMATeacher(model, module=own)
    with torch.no_grad():
        model[0].weight.normal_()
    teacher.update()
    x = DATA[0][0]
    wanted = teacher.averaged_model()(x)
    torch.testing.assert_close(teacher(x), wanted)
    return results


@fsdp2
def test_fsdp2():
    """Attached before or after sharding, it is the run of DistributedDataParallel; the averages are sharded."""
    for sharded, attached_first, whole in spawn(fsdp_worker):
        for got in (sharded, attached_first):
            assert got[0] == whole[0] == 2 * len(DATA)
            assert got[3] == pytest.approx(whole[3], rel=1e-5)
            for mine, theirs in ((got[1], whole[1]), (got[2], whole[2])):
                for name, value in mine.items():
                    torch.testing.assert_close(torch.tensor(value), torch.tensor(theirs[name]))
