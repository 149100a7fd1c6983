"""A model that returns LinearLogits is attached as any other: its average has its own head."""

from __future__ import annotations

import copy

import pytest
import torch
from processes import spawn
from torch import nn

import softlabels
from softlabels import LinearLogits, functional

CLASSES, WIDTH = 11, 6


class Model(nn.Module):
    def __init__(self, width=WIDTH, wrap=lambda logits: logits, dense=False):
        super().__init__()
        self.body, self.head = nn.Embedding(CLASSES, width), nn.Linear(width, CLASSES)
        self.wrap, self.dense = wrap, dense

    def forward(self, tokens):
        hidden = self.body(tokens).tanh()
        return self.head(hidden) if self.dense else self.wrap(LinearLogits(hidden, self.head.weight, self.head.bias))


def text():
    return torch.randint(CLASSES, (4, 9))


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: {"logits": x, "other": torch.ones(2)}, lambda x: (x, torch.ones(2, requires_grad=True))],
)
def test_the_average_teaches_with_its_own_head(wrap):
    model = Model(wrap=wrap)
    criterion = softlabels.SelfDistillationLoss(temperature=1.0).attach(model)
    criterion.teacher.decay = 0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    tokens = text()
    for _ in range(3):
        found = softlabels.teachers.structures.find_logits(model(tokens[:, :-1]), None)
        average = criterion.teacher.averaged_model()
        expected = functional.self_distillation_loss(
            found.dense().flatten(0, 1),
            tokens[:, 1:].flatten(),
            average.head(average.body(tokens[:, :-1]).tanh()).flatten(0, 1),
            temperature=1.0,
        )
        loss = criterion(found, tokens[:, 1:])
        torch.testing.assert_close(loss, expected)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert criterion.teacher.num_updates == 3
    assert not torch.equal(average.head.weight, model.head.weight)


def test_beta_smoothing_is_ranked_by_the_average():
    model, tokens = Model(), text()
    criterion = softlabels.BetaSmoothingLoss(generator=torch.Generator().manual_seed(1)).attach(model)
    with torch.no_grad():
        model.head.weight.mul_(-1.0)  # no step: the average does not follow
    hidden = model(tokens)
    average = criterion.teacher.averaged_model()
    teacher = average.head(average.body(tokens).tanh())
    expected = functional.beta_smoothing_loss(
        hidden.dense().flatten(0, 1),
        tokens.flatten(),
        teacher.softmax(-1).amax(-1).flatten(),
        alpha=criterion.alpha,
        concentration=criterion.concentration_for(CLASSES),
        generator=torch.Generator().manual_seed(1),
    )
    torch.testing.assert_close(criterion(hidden, tokens), expected)


@pytest.mark.parametrize("teacher", [Model(width=3), Model(dense=True), Model()])
@pytest.mark.parametrize(
    "change",
    [
        lambda hidden: hidden,
        lambda hidden: hidden[:, :-1],
        lambda hidden: hidden.flatten(0, 1),
        lambda hidden: hidden.transpose(0, 1)[1:],
        lambda hidden: 2.0 * hidden[1],
    ],
)
def test_rows_that_were_moved_on_the_way_are_moved_for_the_teacher(teacher, change):
    model, tokens = Model(), text()
    criterion = softlabels.SelfDistillationLoss(temperature=1.0).attach(model, teacher=copy.deepcopy(teacher))
    found = model(tokens)
    moved = LinearLogits(change(found.hidden), found.weight, found.bias)
    labels = change(tokens.unsqueeze(-1).float()).squeeze(-1).long() % CLASSES
    taught = teacher(tokens)
    taught = taught if isinstance(taught, torch.Tensor) else taught.dense()
    places = torch.arange(tokens.numel()).view(*tokens.shape, 1).float()
    kept = (change(places) if change(torch.ones(4, 9, 1)).max() == 1 else change(places) / 2).squeeze(-1).long()
    expected = functional.self_distillation_loss(
        moved.dense().flatten(0, -2), labels.flatten(), taught.flatten(0, 1)[kept].flatten(0, -2), temperature=1.0
    )
    torch.testing.assert_close(criterion(moved, labels), expected)


def test_rows_that_were_picked_raise():
    model, tokens = Model(), text()
    criterion = softlabels.SelfDistillationLoss().attach(model)
    found = model(tokens)
    picked = LinearLogits(found.hidden[tokens > 3], found.weight, found.bias)
    with pytest.raises(RuntimeError, match="the loss was given rows picked from the model's logits"):
        criterion(picked, tokens[tokens > 3])


def test_logits_of_another_model_raise():
    criterion = softlabels.SelfDistillationLoss().attach(Model())
    with pytest.raises(RuntimeError, match="come from no training forward pass of the attached model"):
        criterion(Model()(text()), text())


def ddp(rank):
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Model(), find_unused_parameters=True)
    criterion = softlabels.BetaSmoothingLoss().attach(model)
    tokens = text()
    mine = tokens[2 * rank :][:2]
    criterion(model(mine), mine).backward()
    return [p.grad.sum().item() for p in model.parameters()]


def test_ddp_finds_what_is_used_in_linear_logits():
    results = spawn(ddp)
    assert results[0] == pytest.approx(results[1])
    assert all(results[0])


def sharded(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    logits, target = torch.randn(8, CLASSES), torch.randint(CLASSES, (8,))
    messages = []
    for make in (
        lambda: functional.label_smoothing_map_loss(distribute_tensor(logits, mesh, [Shard(0)]), target[:4], beta=0.1),
        lambda: functional.label_smoothing_map_loss(distribute_tensor(logits, mesh, [Shard(1)]), target, beta=0.1),
        lambda: functional.self_distillation_loss(logits, target, distribute_tensor(logits, mesh, [Shard(0)])),
        lambda: functional.label_smoothing_map_loss(
            distribute_tensor(logits, mesh, [Shard(0)]), distribute_tensor(target, mesh, [Shard(0)]), beta=0.1
        ),
        lambda: LinearLogits(torch.randn(8, 3), distribute_tensor(torch.randn(CLASSES, 3), mesh, [Shard(0)])),
    ):
        try:
            make()
        except TypeError as error:
            messages.append(str(error))
    return messages


def test_dtensors_raise_one_sentence():
    for messages in spawn(sharded):
        assert len(messages) == 5
        assert all("is a DTensor" in message for message in messages)
        assert "input.to_local()" in messages[0]
        assert "input.full_tensor()" in messages[1]
        assert "teacher_logits.to_local()" in messages[2]
        assert "input.to_local()" in messages[3]
        assert "weight.full_tensor()" in messages[4]
