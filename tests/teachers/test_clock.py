"""The EMA moves once per real optimizer step: bit for bit what a hand-written Mean Teacher loop gives."""

from __future__ import annotations

import pickle

import pytest
import torch
from loops import MeanTeacher, assert_same_parameters, batches, make_model, train

import softlabels

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),  # leaves version counters unchanged
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def attached(model, **options):
    return softlabels.BetaSmoothingLoss(ema_decay=0.8).attach(model, **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("explicit", [False, True])
def test_optimizers(name, explicit):
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    criterion = attached(model, optimizer=optimizer if explicit else None)
    by_hand = MeanTeacher(model, 0.8)
    train(model, criterion, optimizer, batches(8), by_hand.step)
    assert criterion.teacher.num_updates == 8
    assert_same_parameters(criterion.teacher, by_hand)


def test_learning_rate_scheduler():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=8)
    criterion, by_hand = attached(model), MeanTeacher(model, 0.8)

    def after():
        scheduler.step()
        by_hand.step()

    train(model, criterion, optimizer, batches(8), after)
    assert criterion.teacher.num_updates == 8
    assert_same_parameters(criterion.teacher, by_hand)


def test_closures():
    """LBFGS calls the closure, and so the loss, many times in one step."""
    model = make_model()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3)
    criterion, by_hand = attached(model), MeanTeacher(model, 0.8)
    for x, y in batches(3):

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        by_hand.step()
    assert criterion.teacher.num_updates == 3
    assert_same_parameters(criterion.teacher, by_hand)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_grad_scaler_skips(fused):
    """Unfused, the scaler does not call the optimizer; fused, the optimizer is called and does nothing."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    criterion, by_hand = attached(model), MeanTeacher(model, 0.8)
    for i, (x, y) in enumerate(batches(6)):
        loss = criterion(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if i in (1, 4):
            model[0].weight.grad.fill_(torch.inf)
        before = model[0].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, model[0].weight) == (i in (1, 4))
        if i not in (1, 4):
            by_hand.step()
    _ = criterion.state_dict()
    assert criterion.teacher.num_updates == 4
    assert_same_parameters(criterion.teacher, by_hand)


@pytest.mark.parametrize("order", ["together", "alternating", "one seldom"])
def test_two_optimizers_make_one_round(order):
    """Each owns half. Together: the round ends when both have stepped. Else: when the average is next needed."""
    model = make_model()
    halves = [
        torch.optim.SGD([*model[0].parameters(), *model[1].parameters()], lr=0.1),
        torch.optim.AdamW(model[4].parameters(), lr=0.05),
    ]
    criterion, by_hand = attached(model), MeanTeacher(model, 0.8)
    for i, (x, y) in enumerate(batches(6)):
        stepping = {"together": halves, "alternating": [halves[i % 2]], "one seldom": halves[: 1 + (i % 3 == 2)]}[order]
        loss = criterion(model(x), y)
        model.zero_grad()
        loss.backward()
        for optimizer in stepping:
            optimizer.step()
        by_hand.step()
    _ = criterion.state_dict()  # whoever looks sees the steps already made
    assert criterion.teacher.num_updates == 6
    assert_same_parameters(criterion.teacher, by_hand)


def test_an_optimizer_of_some_parameters_makes_its_own_rounds():
    """The head alone is trained, though the body requires grad; several steps without a loss in between count too."""
    model = make_model()
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
    criterion, by_hand = attached(model), MeanTeacher(model, 0.8)
    for x, y in batches(4):
        criterion(model(x), y).backward()
        for _ in range(2):
            optimizer.step()
            by_hand.step()
        optimizer.zero_grad()
    _ = criterion.state_dict()
    assert criterion.teacher.num_updates == 8
    assert_same_parameters(criterion.teacher, by_hand)


def test_parameters_added_to_the_optimizer_later():
    model = make_model()
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
    criterion, by_hand = attached(model), MeanTeacher(model, 0.8)
    train(model, criterion, optimizer, batches(2), by_hand.step)
    optimizer.add_param_group({"params": [*model[0].parameters(), *model[1].parameters()]})
    train(model, criterion, optimizer, batches(3), by_hand.step)
    _ = criterion.state_dict()
    assert criterion.teacher.num_updates == 5
    assert_same_parameters(criterion.teacher, by_hand)


def test_compiled_optimizer_step():
    torch.compiler.reset()
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.05))
    criterion, by_hand = attached(model), MeanTeacher(model, 0.8)
    step = torch.compile(optimizer.step, backend="aot_eager")
    for x, y in batches(5):
        loss = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        step()
        by_hand.step()
    assert criterion.teacher.num_updates == 5
    assert_same_parameters(criterion.teacher, by_hand)


def test_two_losses_keep_apart_or_share():
    """Each attached loss has its own average, unless one is given the other's teacher: then it moves once per step."""
    model = make_model()
    one, two = attached(model), attached(model)
    assert one.teacher is not two.teacher
    shared = softlabels.SelfDistillationLoss().attach(model, teacher=one.teacher)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in batches(3):
        logits = model(x)
        loss = one(logits, y) + two(logits, y) + shared(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert [c.teacher.num_updates for c in (one, two, shared)] == [3, 3, 3]
    one.detach()  # the clock goes on for the other user of the teacher
    train(model, lambda z, y: shared(z, y) + two(z, y), optimizer, batches(2))
    assert shared.teacher.num_updates == 5
    with pytest.raises(ValueError, match="already follows the steps"):
        softlabels.SelfDistillationLoss().attach(model, teacher=shared.teacher, optimizer=optimizer)


class Around(torch.optim.Optimizer):
    """An optimizer that steps another inside its own step, as SAM and Lookahead do."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure=None):
        self.inner.step()


def test_an_optimizer_around_another_is_one_step():
    model = make_model()
    criterion, by_hand = attached(model), MeanTeacher(model, 0.8)
    optimizer = Around(torch.optim.SGD(model.parameters(), lr=0.1))
    train(model, criterion, optimizer, batches(5), by_hand.step)
    assert criterion.teacher.num_updates == 5
    assert_same_parameters(criterion.teacher, by_hand)


def test_a_step_that_raises_does_not_stop_the_clock():
    model = make_model()
    criterion, by_hand = attached(model), MeanTeacher(model, 0.8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    train(model, criterion, optimizer, batches(3), by_hand.step)
    assert criterion.teacher.num_updates == 3
    assert_same_parameters(criterion.teacher, by_hand)


def test_pending_steps_at_detach_and_load():
    model = make_model()
    criterion = attached(model)
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)  # a part of the model: the round stays open
    state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in criterion.state_dict().items()}
    train(model, criterion, optimizer, batches(1))
    criterion.load_state_dict(state)
    _ = criterion.state_dict()
    assert criterion.teacher.num_updates == 0  # the loaded average does not move by a step made before
    train(model, criterion, optimizer, batches(1))
    teacher = criterion.teacher
    criterion.detach()
    assert teacher.num_updates == 1


def test_a_teacher_of_another_model_is_left_alone():
    model, other = make_model(0), make_model(1)
    foreign = softlabels.EMATeacher(other)
    criterion = softlabels.SelfDistillationLoss().attach(model, teacher=foreign)
    train(model, criterion, torch.optim.SGD(model.parameters(), lr=0.1), batches(2))
    assert foreign.num_updates == 0


def test_an_unpickled_teacher_is_told_whom_to_follow():
    model = make_model()
    teacher = pickle.loads(pickle.dumps(softlabels.EMATeacher(model)))
    with pytest.raises(RuntimeError, match=r"call follow\(model\)"):
        teacher.update()
    with pytest.raises(ValueError, match="does not have the parameters"):
        teacher.follow(torch.nn.Linear(2, 2))
    criterion = softlabels.SelfDistillationLoss().attach(model, teacher=teacher)  # attach tells it
    train(model, criterion, torch.optim.SGD(model.parameters(), lr=0.1), batches(2))
    assert teacher.num_updates == 2
