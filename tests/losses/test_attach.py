"""One line before the loop: the attached teacher sees what the model sees, and moves when the optimizer steps."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from loops import MeanTeacher, assert_same_parameters, batches, make_model, train
from torch import nn

import softlabels
from softlabels.functional import beta_smoothing_loss, self_distillation_loss
from softlabels.ranking import log_odds


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("when", ["before", "after"])
def test_ema_equals_a_hand_written_mean_teacher(make, when):
    model = make_model()
    optimizer = make(model.parameters(), lr=0.05) if when == "before" else None
    criterion = softlabels.BetaSmoothingLoss(ema_decay=0.8).attach(model)
    optimizer = optimizer or make(model.parameters(), lr=0.05)
    by_hand = MeanTeacher(model, 0.8)
    train(model, criterion, optimizer, batches(10), by_hand.step)
    assert criterion.teacher.num_updates == 10
    assert_same_parameters(criterion.teacher, by_hand)


def test_micro_batches_are_one_step():
    model = make_model()
    criterion = softlabels.BetaSmoothingLoss().attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    by_hand = MeanTeacher(model)
    for i, (x, y) in enumerate(batches(12)):
        criterion(model(x), y).backward()
        if i % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
            by_hand.step()
    assert criterion.teacher.num_updates == 3
    assert_same_parameters(criterion.teacher, by_hand)


def test_other_optimizers_do_not_count():
    model, other = make_model(), nn.Linear(2, 2)
    criterion = softlabels.BetaSmoothingLoss().attach(model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert criterion.teacher.num_updates == 0


def test_a_given_optimizer_alone_counts():
    model = make_model()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.SGD(model[4].parameters(), lr=0.1)
    criterion = softlabels.BetaSmoothingLoss().attach(model, optimizer=second)
    for x, y in batches(3):
        criterion(model(x), y).backward()
        first.step()
    assert criterion.teacher.num_updates == 0
    for x, y in batches(3):
        criterion(model(x), y).backward()
        first.step()
        second.step()
    assert criterion.teacher.num_updates == 3


def test_loss_is_that_of_the_averaged_model_on_the_same_inputs():
    """Ranking with the EMA from before the update, in train mode, as the paper's scripts do."""
    model = make_model()
    model[3].p = 0.0
    criterion = softlabels.BetaSmoothingLoss(generator=torch.Generator().manual_seed(3)).attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    by_hand = MeanTeacher(model)
    generator = torch.Generator().manual_seed(3)
    for x, y in batches(5):
        logits = model(x)
        loss = criterion(logits, y)
        with torch.no_grad():
            score = log_odds(by_hand.ema.train()(x), y, "max")
        a = criterion.concentration_for(3)
        torch.testing.assert_close(
            loss, beta_smoothing_loss(logits, y, score, concentration=a, generator=generator), rtol=0, atol=0
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        by_hand.step()


@pytest.mark.parametrize("rank_by", ["max", "true_class"])
def test_rank_by(rank_by):
    model = nn.Linear(4, 3)
    criterion = softlabels.BetaSmoothingLoss(rank_by=rank_by).attach(model)
    x, y = batches(1)[0]
    torch.manual_seed(0)
    got = criterion(model(x), y)
    p = criterion.teacher(x).softmax(1)
    confidence = p.amax(1) if rank_by == "max" else p.gather(1, y[:, None])[:, 0]
    torch.manual_seed(0)
    a = criterion.concentration_for(3)
    torch.testing.assert_close(got, beta_smoothing_loss(model(x), y, confidence, concentration=a))


def test_frozen_teacher():
    teacher, student = make_model(1).train(), make_model(2)
    criterion = softlabels.SelfDistillationLoss().attach(student, teacher=teacher)
    assert criterion.teacher is teacher
    before = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for x, y in batches(3):
        logits = student(x)
        loss = criterion(logits, y)
        torch.testing.assert_close(loss, self_distillation_loss(logits, y, teacher.eval()(x)))
        teacher.train()  # somebody meddles; the loss puts it back
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items() if "num_batches" not in k)
    assert not any(k.startswith("teacher") for k in criterion.state_dict())


def test_frozen_teacher_of_another_dtype():
    teacher, student = make_model(1).double(), make_model(2)
    criterion = softlabels.PrunedDistillationLoss().attach(student, teacher=teacher)
    criterion.to(torch.float16)
    assert next(teacher.parameters()).dtype == torch.float64
    x, y = batches(1)[0]
    assert criterion(student(x), y).dtype == torch.float32


@pytest.mark.parametrize(
    "cls", [softlabels.SelfDistillationLoss, softlabels.PrunedDistillationLoss, softlabels.InstanceDirichletMAPLoss]
)
def test_ema_teacher_for_distillation(cls):
    model = make_model()
    criterion = cls().attach(model)
    assert isinstance(criterion.teacher, softlabels.EMATeacher)
    losses = train(model, criterion, torch.optim.SGD(model.parameters(), lr=0.1), batches(20))
    assert criterion.teacher.num_updates == 20
    assert losses[-1] != losses[0]


def test_an_ema_teacher_can_be_given():
    model = make_model()
    teacher = softlabels.EMATeacher(model, decay=0.5, mode="eval")
    criterion = softlabels.SelfDistillationLoss().attach(model, teacher=teacher)
    train(model, criterion, torch.optim.SGD(model.parameters(), lr=0.1), batches(4))
    assert criterion.teacher is teacher
    assert teacher.num_updates == 4


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.inner, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, x):
        return self.wrap(self.inner(x))


class WithLogits:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize(
    ("wrap", "output", "unwrap"),
    [
        (lambda z: (z, "extra"), None, lambda o: o[0]),
        (lambda z: (z.sum(), z), None, lambda o: o[1]),
        (lambda z: {"logits": z}, None, lambda o: o["logits"]),
        (lambda z: {"out": z}, None, lambda o: o["out"]),
        (WithLogits, None, lambda o: o.logits),
        (lambda z: {"scores": z}, "scores", lambda o: o["scores"]),
        (lambda z: (0 * z, z), 1, lambda o: o[1]),
        (lambda z: ({"deep": [z]},), lambda o: o[0]["deep"][0], lambda o: o[0]["deep"][0]),
    ],
)
def test_outputs_of_many_kinds(wrap, output, unwrap):
    model = Wrapped(wrap)
    criterion = softlabels.SelfDistillationLoss().attach(model, output=output)
    x, y = batches(1)[0]
    logits = unwrap(model(x))
    loss = criterion(logits, y)
    torch.testing.assert_close(loss, self_distillation_loss(logits, y, unwrap(criterion.teacher(x))))


def test_output_that_cannot_be_found():
    model = Wrapped(lambda z: {"scores": z})
    criterion = softlabels.SelfDistillationLoss().attach(model)
    x, y = batches(1)[0]
    with pytest.raises(TypeError, match=r"no logits found .* dict .* attach\(\.\.\., output=\.\.\.\)"):
        criterion(model(x)["scores"], y)
    with pytest.raises(TypeError, match="output must be a key"):
        softlabels.SelfDistillationLoss().attach(model, output=1.5)


def test_keyword_inputs_reach_the_teacher():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x, *, scale):
            return scale * self.inner(x)

    model = Two()
    criterion = softlabels.SelfDistillationLoss().attach(model)
    x, y = batches(1)[0]
    logits = model(x, scale=3.0)
    torch.testing.assert_close(criterion(logits, y), self_distillation_loss(logits, y, criterion.teacher(x, scale=3.0)))


def test_a_loss_without_a_forward_pass_of_its_own_raises():
    model = make_model()
    criterion = softlabels.BetaSmoothingLoss().attach(model)
    x, y = batches(1)[0]
    logits = model(x)
    criterion(logits, y)
    assert criterion(logits, y).isfinite()  # a second loss on the same pass
    others = [model.eval()(x), model.train().forward(x), logits.detach(), torch.randn(8, 3), nn.Linear(4, 3)(x)]
    for other in others:
        with pytest.raises(RuntimeError, match=r"no training forward pass .* model\(x\) and not model\.forward\(x\)"):
            criterion(other, y)


def test_validation_between_forward_and_loss():
    model = make_model()
    criterion = softlabels.BetaSmoothingLoss().attach(model)
    (x, y), (other, other_y) = batches(2)
    torch.manual_seed(0)
    wanted = criterion(model(x), y)
    torch.manual_seed(0)
    logits = model(x)
    model.eval()
    with torch.no_grad():
        criterion(model(other[:2]), other_y[:2])
    model.train()
    assert criterion(logits, y).isfinite()
    assert wanted.isfinite()


def test_detach_leaves_nothing_behind():
    model = make_model()
    criterion = softlabels.BetaSmoothingLoss().attach(model)
    teacher = weakref.ref(criterion.teacher)
    x, y = batches(1)[0]
    inputs = weakref.ref(x)
    model(x)
    assert criterion.detach() is criterion
    del x
    gc.collect()
    assert inputs() is None or inputs() is batches  # the list in this frame is gone as well
    assert teacher() is None
    assert not model._forward_pre_hooks
    assert not criterion.state_dict()
    assert not model._forward_hooks
    assert not any(module._load_state_dict_post_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match="needs a teacher"):
        criterion(model(batches(1)[0][0]), y)
    criterion.detach()
    criterion.attach(model)
    teacher = criterion.teacher
    assert criterion.attach(model).teacher is teacher  # again to the same model: nothing changes
    for arguments in ((make_model(),), (model, torch.optim.SGD(model.parameters(), 0.1))):
        with pytest.raises(RuntimeError, match="attached already"):
            criterion.attach(arguments[0], optimizer=arguments[1] if len(arguments) > 1 else None)


def test_a_dead_loss_lets_the_model_go_on():
    model = make_model()
    criterion = softlabels.BetaSmoothingLoss().attach(model)
    del criterion
    gc.collect()
    assert not model._forward_pre_hooks
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(batches(1)[0][0]).sum().backward()
    optimizer.step()


def test_the_loss_does_not_keep_the_model_alive():
    model = make_model()
    criterion = softlabels.BetaSmoothingLoss().attach(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    with pytest.raises(RuntimeError, match="the model that this EMATeacher follows is gone"):
        criterion.teacher.update()


@pytest.mark.filterwarnings("ignore:.*weights_only=False:FutureWarning")
def test_copies_of_the_model_are_free_of_the_loss():
    model = make_model()
    criterion = softlabels.BetaSmoothingLoss().attach(model)
    x, y = batches(1)[0]
    model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert buffer.tell() < 20_000  # no inputs, no teacher
    buffer.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        twin(torch.randn(3, 4))
    assert criterion(model(x), y).isfinite()


@pytest.mark.parametrize("order", ["load then attach", "attach then load"])
def test_resume_is_bit_for_bit(order):
    data = batches(12)

    def start():
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        return model, optimizer, softlabels.BetaSmoothingLoss(ema_decay=0.9)

    model, optimizer, criterion = start()
    criterion.attach(model)
    train(model, criterion, optimizer, data[:6])
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), criterion.state_dict(), torch.get_rng_state()], buffer)
    wanted = train(model, criterion, optimizer, data[6:])
    final = criterion.state_dict()

    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    model, optimizer, resumed = start()
    model.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    if order == "load then attach":
        resumed.load_state_dict(states[2])
        assert resumed.state_dict().keys() == states[2].keys()  # nothing is lost if it is saved again now
        resumed.attach(model)
    else:
        resumed.attach(model)
        resumed.load_state_dict(states[2])
    torch.set_rng_state(states[3])
    assert train(model, resumed, optimizer, data[6:]) == wanted
    for a, b in zip(resumed.state_dict().values(), final.values(), strict=True):
        assert torch.equal(a, b)


def test_a_copied_loss_continues_after_its_own_attach():
    model = make_model()
    criterion = softlabels.BetaSmoothingLoss(ema_decay=0.9).attach(model)
    train(model, criterion, torch.optim.SGD(model.parameters(), lr=0.1), batches(3))
    twin = copy.deepcopy(criterion)
    assert criterion.attached
    assert not twin.attached
    with pytest.raises(RuntimeError, match=r"needs a teacher in training: call attach\(model\) of the copy"):
        twin(torch.randn(2, 3), torch.tensor([0, 1]))
    other = copy.deepcopy(model)
    twin.attach(other)
    assert twin.teacher.num_updates == 3
    for a, b in zip(twin.state_dict().values(), criterion.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert "EMATeacher(Sequential, decay=0.9, mode='train', num_updates=3)" in repr(criterion)


def test_nothing_of_the_teacher_is_trained_or_switched():
    model = make_model()
    criterion = softlabels.BetaSmoothingLoss().attach(model)
    assert not list(criterion.parameters())
    assert not list(criterion.buffers())
    criterion.to(torch.float64)
    assert {average.dtype for average in criterion.teacher.averages.values()} == {torch.float32}


def test_student_is_undisturbed():
    """Same dropout, same batch-norm statistics, with and without a teacher."""
    x, _ = batches(1)[0]
    plain, watched = make_model(), make_model()
    criterion = softlabels.BetaSmoothingLoss(generator=torch.Generator().manual_seed(0)).attach(watched)
    results = []
    for model in (plain, watched):
        torch.manual_seed(5)
        first = model(x)
        if model is watched:
            criterion(first, torch.zeros(8, dtype=torch.long))
        results.append((first, model(x), model[1].running_mean.clone()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_wrong_arguments_of_attach():
    model = make_model()
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        softlabels.BetaSmoothingLoss().attach(lambda x: x)
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got str"):
        softlabels.BetaSmoothingLoss().attach(model, optimizer="sgd")
    with pytest.raises(TypeError, match="teacher must be a"):
        softlabels.BetaSmoothingLoss().attach(model, teacher=lambda x: x)
    with pytest.raises(ValueError, match=r"shares Sequential '' with the model.*or none for an EMA of the model"):
        softlabels.SelfDistillationLoss().attach(model, teacher=model)


def move(criterion, model):
    """Let teacher and model differ."""
    criterion.teacher.update()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()


VIEWS = {
    "flattened": lambda z: z.flatten(0, 1),
    "transposed": lambda z: z.transpose(1, 2),
    "shifted": lambda z: z[:, :-1].transpose(1, 2),
    "last position": lambda z: z[:, -1],
    "reshaped": lambda z: z.view(2, -1, 3),
    "itself": lambda z: z.transpose(1, 2).transpose(1, 2).transpose(1, 2),
    "in another dtype": lambda z: z.double().flatten(0, 1),
    "cast, shifted, copied": lambda z: z.float()[:, 1:].contiguous().view(-1, 3),
    "unbound": lambda z: z.unbind(1)[-1],
    "split": lambda z: z.split(2, dim=-2)[1].transpose(-1, -2),
    "permuted": lambda z: z.permute(0, -1, 1).unsqueeze(-1).squeeze(-1),
    "reversed in batches": lambda z: z[2:-1:2, -2:].mT.movedim(1, 2).movedim(2, 1),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("length", [5, 3])  # 3 is the number of classes: the shapes agree also when transposed
def test_views_of_the_logits(name, length):
    """Token classifiers flatten or transpose before the loss; the teacher's rows follow."""
    view = VIEWS[name]
    model = nn.Linear(4, 3)
    criterion = softlabels.SelfDistillationLoss(alpha=0.0).attach(model)
    move(criterion, model)
    x = torch.randn(8, length, 4)
    logits = view(model(x))
    target = torch.randint(3, logits.shape[:1] + logits.shape[2:])
    loss = criterion(logits, target)
    wanted = self_distillation_loss(logits, target, view(criterion.teacher(x)), alpha=0.0)
    torch.testing.assert_close(loss, wanted)


REORDERED = {
    "index": lambda z: z[torch.arange(7, -1, -1)],
    "index_select": lambda z: z.index_select(0, torch.arange(7, -1, -1)),
    "flip": lambda z: z.flip(0),
    "roll": lambda z: z.roll(1, 0),
    "gather": lambda z: z.gather(0, torch.arange(7, -1, -1)[:, None].expand(8, 3)),
}


@pytest.mark.parametrize("name", REORDERED)
def test_rows_in_another_order_need_output(name):
    reorder = REORDERED[name]
    model, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
    criterion = softlabels.SelfDistillationLoss().attach(model)
    with pytest.raises(RuntimeError, match=r"another order.*let attach\(\.\.\., output=\.\.\.\) do the same"):
        criterion(reorder(model(x)), y)
    criterion.detach().attach(model, output=reorder)
    logits = reorder(model(x))
    wanted = self_distillation_loss(logits, y, reorder(criterion.teacher(x)))
    torch.testing.assert_close(criterion(logits, y), wanted)


def test_a_model_may_pick_its_own_rows():
    class Sorted(nn.Linear):
        def forward(self, x):
            return super().forward(x).flip(0)

    model, x, y = Sorted(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
    criterion = softlabels.SelfDistillationLoss().attach(model)
    for change in (lambda z: z, lambda z: z.float(), lambda z: z / 2, lambda z: z.clone()):
        assert criterion(change(model(x)), y).isfinite()


def test_copies_of_the_logits_need_output():
    model = nn.Linear(4, 3)
    x, mask = torch.randn(8, 5, 4), torch.rand(8, 5) < 0.5
    criterion = softlabels.SelfDistillationLoss().attach(model)
    with pytest.raises(RuntimeError, match=r"\(8, 5, 3\).*let attach\(\.\.\., output=\.\.\.\) do the same"):
        criterion(model(x)[mask], torch.zeros(int(mask.sum()), dtype=torch.long))
    criterion.detach().attach(model, output=lambda z: z[mask])
    assert criterion(model(x)[mask], torch.zeros(int(mask.sum()), dtype=torch.long)).isfinite()
    assert criterion(2 * model(x)[mask], torch.zeros(int(mask.sum()), dtype=torch.long)).isfinite()


@pytest.mark.parametrize("cls", [softlabels.BetaSmoothingLoss, softlabels.SelfDistillationLoss])
def test_an_attached_teacher_that_returns_probabilities_is_warned_of(cls):
    model, teacher = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 3), nn.Softmax(1))
    criterion = cls().attach(model, teacher=teacher)
    x, y = batches(1)[0]
    with pytest.warns(UserWarning, match="teacher_logits look like probabilities"):
        criterion(model(x), y)
