"""The EMA moves once per real optimizer step: bit for bit what a hand-written Mean Teacher loop gives."""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import pytest
import torch
from loops import MeanTeacher, assert_same_parameters, batches, make_model, train
from torch import nn
from torch.distributed.algorithms.model_averaging import averagers

import softlabels
from softlabels.teachers import steps

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


def test_two_optimizers_of_two_models():
    """As of a GAN, two for each round: a model's steps are those of the optimizer that owns it."""
    generator, critic = nn.Linear(4, 4), make_model()
    steps_of = [torch.optim.SGD(generator.parameters(), lr=0.1), torch.optim.SGD(critic.parameters(), lr=0.1)]
    criterion, by_hand = attached(critic), MeanTeacher(critic, 0.8)
    for x, y in batches(6):
        criterion(critic(generator(x).detach()), y).backward()
        steps_of[1].step()
        by_hand.step()
        critic(generator(x)).square().mean().backward()
        steps_of[0].step()
        generator.zero_grad()
        critic.zero_grad()
    assert criterion.teacher.num_updates == 6
    assert_same_parameters(criterion.teacher, by_hand)


def test_an_optimizer_for_each_parameter_that_steps_in_the_backward_pass():
    model = make_model()
    criterion, by_hand = attached(model), MeanTeacher(model, 0.8)
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        parameter.register_post_accumulate_grad_hook(lambda _, own=optimizer: own.step() or own.zero_grad())
    for x, y in batches(5):
        criterion(model(x), y).backward()
        by_hand.step()
    assert criterion.teacher.num_updates == 5
    assert_same_parameters(criterion.teacher, by_hand)


def replaced(model):
    def step():
        for module in (model[0], model[4]):
            module.weight = nn.Parameter(module.weight - 0.1 * module.weight.grad)

    return step


def test_an_optimizer_of_some_parameters():
    """The head alone is trained, though the body requires grad; steps between two passes are one."""
    model = make_model()
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
    criterion, by_hand = attached(model), MeanTeacher(model, 0.8)
    for x, y in batches(4):
        criterion(model(x), y).backward()
        for _ in range(2):
            optimizer.step()
        by_hand.step()
        optimizer.zero_grad()
    assert criterion.teacher.num_updates == 4
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
    with pytest.raises(RuntimeError, match=r"its parameter '0\.weight' of shape \(8, 4\) is gone"):
        teacher.follow(torch.nn.Linear(2, 2))
    criterion = softlabels.SelfDistillationLoss().attach(model, teacher=teacher)  # attach tells it
    train(model, criterion, torch.optim.SGD(model.parameters(), lr=0.1), batches(2))
    assert teacher.num_updates == 2


class Subclass(torch.optim.SGD):
    """torch wraps the step of both classes in hooks."""

    def step(self, closure=None):
        return super().step(closure)


class Lookahead:
    """A wrapper without hooks: after the inner step it moves the weights again."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.slow = [[p.detach().clone() for p in group["params"]] for group in optimizer.param_groups]

    def zero_grad(self):
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self):
        self.optimizer.step()
        for group, slow in zip(self.optimizer.param_groups, self.slow, strict=True):
            for p, s in zip(group["params"], slow, strict=True):
                s.lerp_(p, 0.5)
                p.copy_(s)


class Prepared(torch.optim.Optimizer):
    """As Accelerate's AcceleratedOptimizer: a subclass that never called its base."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self):
        self.optimizer.step()


class Toggling:
    """As schedule-free wrappers do: the weights are others before and after the inner step."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def zero_grad(self):
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self):
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for p in parameters:
            p.mul_(2)
        self.optimizer.step()
        for p in parameters:
            p.div_(2)


class Sharpness(torch.optim.Optimizer):
    """SAM: weights are moved away and back by hand, between two passes of one step."""

    def __init__(self, base):
        self.base = base
        super().__init__(base.param_groups, {})

    @torch.no_grad()
    def away(self):
        self.old = [p.clone() for group in self.param_groups for p in group["params"]]
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        for p, old in zip((p for group in self.param_groups for p in group["params"]), self.old, strict=True):
            p.copy_(old)
        self.base.step()


WRAPPERS = {
    "subclass": lambda parameters: Subclass(parameters, lr=0.1),
    "lookahead": lambda parameters: Lookahead(torch.optim.SGD(parameters, lr=0.1)),
    "prepared": lambda parameters: Prepared(torch.optim.SGD(parameters, lr=0.1)),
    "toggling": lambda parameters: Toggling(torch.optim.SGD(parameters, lr=0.1)),
    "local SGD": lambda parameters: local_sgd(torch.optim.SGD(parameters, lr=0.1)),
}


def local_sgd(optimizer):
    from torch.distributed.optim import PostLocalSGDOptimizer

    class Halving(averagers.ModelAverager):
        def __init__(self):
            pass

        @torch.no_grad()
        def average_parameters(self, params):
            for group in params:
                for p in group["params"]:
                    p.mul_(0.9)

    return PostLocalSGDOptimizer(optimizer, Halving())


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("given", [False, True])
def test_wrapped_optimizers_are_followed_when_their_step_is_over(name, given):
    model = make_model()
    optimizer = WRAPPERS[name](model.parameters())
    criterion, by_hand = attached(model, optimizer=optimizer if given else None), MeanTeacher(model, 0.8)
    train(model, criterion, optimizer, batches(5), by_hand.step)
    assert criterion.teacher.num_updates == 5
    assert_same_parameters(criterion.teacher, by_hand)


def test_two_passes_of_one_step():
    model = make_model()
    optimizer = Sharpness(torch.optim.SGD(model.parameters(), lr=0.1))
    criterion, by_hand = attached(model), MeanTeacher(model, 0.8)
    for x, y in batches(4):
        criterion(model(x), y).backward()
        optimizer.away()
        criterion(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        by_hand.step()
    assert criterion.teacher.num_updates == 4
    assert_same_parameters(criterion.teacher, by_hand)


def by_hand_loop(model, criterion, by_hand, step, n=6):
    for x, y in batches(n):
        criterion(model(x), y).backward()
        with torch.no_grad():
            step()
        model.zero_grad()
        by_hand.step()


def masters_of(model):
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.SGD(masters, lr=0.1)

    def step():
        for master, p in zip(masters, model.parameters(), strict=True):
            master.grad = p.grad.float()
        optimizer.step()
        for master, p in zip(masters, model.parameters(), strict=True):
            p.copy_(master)

    return step


def flat_buffer_of(model):
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    optimizer, offset = torch.optim.SGD([flat], lr=0.1), 0
    for p in model.parameters():
        p.data = flat.data[offset : offset + p.numel()].view_as(p)
        offset += p.numel()

    def step():
        flat.grad = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.step()

    return step


def plain(model):
    def step():
        for p in model.parameters():
            p -= 0.1 * p.grad

    return step


@pytest.mark.parametrize("make", [plain, masters_of, flat_buffer_of, replaced])
def test_where_no_optimizer_owns_the_weights_their_change_is_the_step(make):
    model = make_model()
    step = make(model)
    criterion, by_hand = attached(model), MeanTeacher(model, 0.8)
    by_hand_loop(model, criterion, by_hand, step)
    assert criterion.teacher.num_updates == 6
    assert_same_parameters(criterion.teacher, by_hand)


def test_micro_batches_are_one_step_of_nobody():
    model = make_model()
    step = plain(model)
    criterion, by_hand = attached(model), MeanTeacher(model, 0.8)
    for i, (x, y) in enumerate(batches(8)):
        criterion(model(x), y).backward()
        if i % 4 == 3:
            with torch.no_grad():
                step()
            model.zero_grad()
            by_hand.step()
    assert criterion.teacher.num_updates == 2
    assert_same_parameters(criterion.teacher, by_hand)


def test_an_average_on_an_accelerator_does_not_stand_still_in_silence(monkeypatch):
    """There a look at the weights would wait for the device: it is taken at few calls, and says what to do."""
    model = make_model()
    criterion = attached(model)
    monkeypatch.setattr(steps, "HOST", "another device")
    with pytest.raises(RuntimeError, match=r"attach\(model, optimizer=False\) and criterion\.teacher\.update\(\)"):
        by_hand_loop(model, criterion, MeanTeacher(model), plain(model), n=8)
    criterion.detach().attach(model, optimizer=False)
    by_hand_loop(model, criterion, MeanTeacher(model), plain(model), n=20)
    assert criterion.teacher.num_updates == 0
    other = make_model()
    criterion = attached(other)
    train(other, criterion, torch.optim.SGD(other.parameters(), lr=0.1), batches(20))


@pytest.mark.parametrize("optimizer", [False, None])
def test_updates_by_hand(optimizer):
    """Nobody's steps count, or they do: a call after each step is one update either way."""
    model = make_model()
    criterion, by_hand = attached(model, optimizer=optimizer), MeanTeacher(model, 0.8)

    def after():
        criterion.teacher.update()
        by_hand.step()

    train(model, criterion, torch.optim.SGD(model.parameters(), lr=0.1), batches(5), after)
    assert criterion.teacher.num_updates == 5
    assert_same_parameters(criterion.teacher, by_hand)


def test_a_search_that_puts_the_weights_back_leaves_nothing_in_the_average():
    """A learning-rate finder before the first epoch, or in the middle."""
    model = make_model()
    criterion = attached(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        before = copy.deepcopy(model.state_dict())
        train(model, criterion, torch.optim.SGD(model.parameters(), lr=1.0), batches(4))
        model.load_state_dict(before)
        by_hand = MeanTeacher(model, 0.8)
        with pytest.warns(UserWarning, match="weights were loaded into the attached model") as caught:
            train(model, criterion, optimizer, batches(3), by_hand.step)
        assert len(caught) == 1
        assert criterion.teacher.num_updates == 3
        assert_same_parameters(criterion.teacher, by_hand)


@pytest.mark.parametrize("part", ["whole", "layer", "larger module"])
def test_weights_that_are_loaded_before_the_first_step(part):
    model, other = make_model(0), make_model(1)
    criterion = attached(model)
    train(model, criterion, torch.optim.SGD(model.parameters(), lr=0.0), [])
    x, y = batches(1)[0]
    criterion(model(x), y)
    if part == "whole":
        model.load_state_dict(other.state_dict())
    elif part == "layer":
        model[0].load_state_dict(other[0].state_dict())
    else:
        nn.ModuleDict({"net": model}).load_state_dict(nn.ModuleDict({"net": other}).state_dict())
    by_hand = MeanTeacher(model, 0.8)
    train(model, criterion, torch.optim.SGD(model.parameters(), lr=0.1), batches(3), by_hand.step)
    assert criterion.teacher.num_updates == 3
    assert_same_parameters(criterion.teacher, by_hand)


@pytest.mark.parametrize("part", ["whole", "layer"])
def test_weights_that_are_loaded_later_restart_the_average(part):
    """As after a roll-back from NaN: an average of NaN would stay so for ever."""
    model = make_model(0)
    criterion = attached(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, criterion, optimizer, batches(2))
    good = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[0].weight.fill_(torch.nan)
    optimizer.step()
    assert criterion.teacher.averages["0.weight"].isnan().all()
    module = model if part == "whole" else model[0]
    module.load_state_dict({k.removeprefix("" if part == "whole" else "0."): v for k, v in good.items()}, strict=False)
    by_hand = MeanTeacher(model, 0.8)
    with pytest.warns(
        UserWarning, match="its average was begun, which restarts from them; .* state_dict of the criterion"
    ):
        train(model, criterion, optimizer, batches(3), by_hand.step)
    assert criterion.teacher.num_updates == 3
    assert_same_parameters(criterion.teacher, by_hand)


@pytest.mark.parametrize("order", ["model first", "criterion first"])
def test_an_average_that_is_loaded_with_the_weights_goes_on(order):
    model = make_model()
    criterion = attached(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, criterion, optimizer, batches(3))
    parts = [model, criterion] if order == "model first" else [criterion, model]
    saved = [copy.deepcopy(part.state_dict()) for part in parts]
    train(model, criterion, optimizer, batches(2))
    for part, state in zip(parts, saved, strict=True):
        part.load_state_dict(state)
    train(model, criterion, optimizer, batches(2))
    assert criterion.teacher.num_updates == 5


def test_layers_frozen_for_a_step_keep_their_average():
    """toggle_optimizer does so each round."""
    model = make_model()
    criterion, by_hand = attached(model), MeanTeacher(model, 0.8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for i, (x, y) in enumerate(batches(9)):
        model[0].requires_grad_(i % 3 < 2)
        loss = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        by_hand.step()
    assert_same_parameters(criterion.teacher, by_hand)


def test_exceptions_in_the_steps_of_other_models():
    model, other = make_model(), nn.Linear(4, 3)
    criterion, by_hand = attached(model), MeanTeacher(model, 0.8)

    def interrupted():
        raise KeyboardInterrupt

    for owner in (other, model):
        with pytest.raises(KeyboardInterrupt):
            torch.optim.SGD(owner.parameters(), lr=0.1).step(interrupted)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, _ in batches(8):  # a warm-up without the loss
        model(x).square().mean().backward()
        optimizer.step()
        by_hand.step()
    assert criterion.teacher.num_updates == 8
    assert_same_parameters(criterion.teacher, by_hand)


def test_threads_attach_and_step_at_the_same_time():
    failures = []

    def work(seed):
        try:
            for _ in range(3):
                with lock:
                    model = make_model(seed)
                    by_hand = MeanTeacher(model, 0.8)
                criterion = attached(model)
                train(model, criterion, torch.optim.SGD(model.parameters(), lr=0.1), batches(20), by_hand.step)
                assert criterion.teacher.num_updates == 20
                assert_same_parameters(criterion.teacher, by_hand)
                criterion.detach()
        except BaseException as error:
            failures.append(error)

    lock = threading.Lock()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_an_ema_teacher_inside_torch_compile_or_of_the_inner_module_is_followed():
    torch.compiler.reset()
    model = make_model()
    teacher = softlabels.EMATeacher(model, 0.8)
    compiled = torch.compile(teacher, backend="eager")
    criterion = softlabels.SelfDistillationLoss().attach(model, teacher=compiled)
    wrapped = nn.Sequential(model)  # as Fabric's, PEFT's or a user's wrapper
    inner, outer = softlabels.EMATeacher(model, 0.8), softlabels.EMATeacher(wrapped, 0.8)
    others = [softlabels.SelfDistillationLoss().attach(wrapped, teacher=inner)]
    others += [softlabels.SelfDistillationLoss().attach(model, teacher=nn.ModuleList([outer, nn.Identity()])[0])]
    by_hand = MeanTeacher(model, 0.8)
    train(
        wrapped,
        lambda z, y: criterion(z, y) + others[0](z, y) + others[1](z, y),
        torch.optim.SGD(model.parameters(), lr=0.1),
        batches(4),
        by_hand.step,
    )
    for each in (teacher, inner):
        assert each.num_updates == 4
        assert_same_parameters(each, by_hand)
    assert outer.num_updates == 4
    assert list(criterion.state_dict())[:1] == ["teacher.averages/0/weight"]
    assert compiled(batches(1)[0][0]).shape == (8, 3)


def test_a_temporary_optimizer_counts():
    model = make_model()
    criterion, by_hand = attached(model), MeanTeacher(model, 0.8)
    for x, y in batches(3):
        criterion(model(x), y).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        model.zero_grad()
        by_hand.step()
    assert criterion.teacher.num_updates == 3
    assert_same_parameters(criterion.teacher, by_hand)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_put_back_by_hand_after_nan_restart_the_average(bad):
    """By copy_, which no hook sees; an average of NaN would stay so for ever, and with it the loss."""
    model = make_model()
    criterion = attached(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, criterion, optimizer, batches(3))
    good = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[0].weight.fill_(bad)
    optimizer.step()
    model(batches(1)[0][0])
    assert not criterion.teacher.averages["0.weight"].isfinite().any()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(good[name])
    by_hand = MeanTeacher(model, 0.8)
    with pytest.warns(UserWarning, match="the average of the weights is NaN, and they are not") as caught:
        train(model, criterion, optimizer, batches(4), by_hand.step)
    assert len(caught) == 1
    assert criterion.teacher.num_updates == 4
    assert_same_parameters(criterion.teacher, by_hand)
    assert criterion.teacher.averaged_model()(batches(1)[0][0]).isfinite().all()


def test_when_the_given_optimizer_is_gone_others_count():
    """Made anew for a second phase, say: the average would stand still in silence."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion, by_hand = attached(model, optimizer=optimizer), MeanTeacher(model, 0.8)
    train(model, criterion, optimizer, batches(2), by_hand.step)
    del optimizer
    gc.collect()
    train(model, criterion, torch.optim.SGD(model.parameters(), lr=0.1), batches(2), by_hand.step)
    assert criterion.teacher.num_updates == 4
    assert_same_parameters(criterion.teacher, by_hand)
