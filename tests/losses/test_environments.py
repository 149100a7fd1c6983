"""attach where people train: compiled, checkpointed, autocast, resumed; and nothing is left behind."""

from __future__ import annotations

import gc
import io
import weakref

import pytest
import torch
from loops import batches, make_model, train
from torch import nn
from torch.utils.checkpoint import checkpoint
from versions import whole_graph

import softlabels

pytestmark = pytest.mark.filterwarnings(  # raised inside torch's compiler at graph breaks and hooks; not shown to users
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)
DATA = batches(4)


def plain_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def run(model, parameters, criterion, step=None, data=DATA):
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    step = step or (lambda x, y: criterion(model(x), y))
    torch.manual_seed(1)
    losses = []
    for x, y in data:
        loss = step(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def attached(model, **options):
    return softlabels.BetaSmoothingLoss(ema_decay=0.8).attach(model, **options)


@pytest.fixture(scope="module")
def wanted():
    torch.set_num_threads(1)
    model = plain_model()
    return run(model, model.parameters(), attached(model))


COMPILE = [{}, pytest.param({"fullgraph": True}, marks=whole_graph), {"dynamic": True}]


@pytest.mark.parametrize("options", COMPILE, ids=str)
@pytest.mark.parametrize(
    "how",
    ["attach wrapper", "attach inner, not run yet", "attach first", "in place, then attach", "attach, then in place"],
)
def test_compiled_models(how, options, wanted):
    torch.compiler.reset()
    options = {"backend": "aot_eager", **options}
    model = plain_model()
    if how == "attach wrapper":
        called = torch.compile(model, **options)
        called(DATA[0][0])
        criterion = attached(called)
    elif how == "attach inner, not run yet":
        called = torch.compile(model, **options)
        criterion = attached(model)
    elif how == "attach first":
        criterion = attached(model)
        called = torch.compile(model, **options)
    else:
        called = model
        if how == "in place, then attach":
            model.compile(**options)
            criterion = attached(model)
        else:
            criterion = attached(model)
            model.compile(**options)
    losses = run(called, model.parameters(), criterion)
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert criterion.teacher.num_updates == len(DATA)
    assert not any("_orig_mod" in key for key in criterion.state_dict())


@pytest.mark.parametrize("how", ["attach wrapper", "attach first", "in place"])
@pytest.mark.parametrize("length", [5, 3])
def test_views_of_a_compiled_models_logits(how, length):
    """As in test_attach: rows of student and teacher belong together, or the loss raises."""
    torch.compiler.reset()
    model = nn.Linear(4, 3)
    called = model
    if how == "attach first":
        criterion = softlabels.SelfDistillationLoss(alpha=0.0).attach(model)
        called = torch.compile(model, backend="aot_eager")
    else:
        if how == "in place":
            model.compile(backend="aot_eager")
        else:
            called = torch.compile(model, backend="aot_eager")
        criterion = softlabels.SelfDistillationLoss(alpha=0.0).attach(called)
    criterion.teacher.update()  # teacher and model differ
    torch.nn.init.normal_(model.weight)
    x, target = torch.randn(8, length, 4), torch.randint(3, (8, length))
    logits = called(x)
    loss = criterion(logits.transpose(1, 2), target)
    teacher_logits = criterion.teacher(x)
    wanted = softlabels.functional.self_distillation_loss(
        logits.transpose(1, 2), target, teacher_logits.transpose(1, 2), alpha=0.0
    )
    torch.testing.assert_close(loss, wanted)


@pytest.mark.parametrize("in_place", [False, True])
def test_inner_module_of_a_compiled_model_that_has_run(in_place, wanted):
    """A hook added to it may never fire. Then the loss says so; it never trains unranked."""
    torch.compiler.reset()
    model = plain_model()
    if in_place:
        model.compile(backend="aot_eager")
        called = model
    else:
        called = torch.compile(model, backend="aot_eager")
    called(DATA[0][0])
    criterion = attached(model)
    if in_place:
        assert run(called, model.parameters(), criterion) == pytest.approx(wanted, rel=1e-5)
    else:
        with pytest.raises(RuntimeError, match="compiled and run before attach, attach the compiled wrapper"):
            run(called, model.parameters(), criterion)


def test_compiled_step(wanted):
    """Forward pass and loss in one region: works with graph breaks."""
    torch.compiler.reset()
    model = plain_model()
    criterion = attached(model)
    step = torch.compile(lambda x, y: criterion(model(x), y), backend="aot_eager")
    assert run(model, model.parameters(), criterion, step) == pytest.approx(wanted, rel=1e-5)
    criterion.detach()
    torch.compiler.reset()
    model = plain_model()
    criterion = attached(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    @torch.compile(backend="aot_eager")
    def whole(x, y):
        loss = criterion(model(x), y)
        loss.backward()
        return loss.detach()

    torch.manual_seed(1)
    losses = []
    for x, y in DATA:
        losses.append(whole(x, y).item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses == pytest.approx(wanted, rel=1e-5)


@whole_graph
def test_compiled_step_without_a_break_is_refused():
    torch.compiler.reset()
    model = plain_model()
    criterion = attached(model)
    step = torch.compile(lambda x, y: criterion(model(x), y), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="Compile the model instead of the whole step"):
        step(*DATA[0])


@whole_graph
@pytest.mark.parametrize("ranking", ["batch", "random"])
def test_compiled_step_without_a_teacher(ranking):
    torch.compiler.reset()
    model = plain_model()
    criterion = softlabels.BetaSmoothingLoss(ranking=ranking)
    compiled = torch.compile(lambda x, y: criterion(model(x), y), backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    got = compiled(*DATA[0])
    torch.manual_seed(0)
    torch.testing.assert_close(got, criterion(model(DATA[0][0]), DATA[0][1]))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # reentrant, in the teacher's pass
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    """One teacher pass per loss, on the right inputs, though the block inside runs its forward twice."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.head = (
                nn.Linear(4, 8),
                nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
                nn.Linear(8, 3),
            )

        def forward(self, x):
            return self.head(checkpoint(self.block, self.stem(x), use_reentrant=use_reentrant))

    torch.manual_seed(0)
    model = Checkpointed()
    criterion = attached(model)
    passes = []

    def note(module, args):
        if not torch.is_grad_enabled():  # the teacher's pass
            passes.append(args[0])

    model.register_forward_pre_hook(note)
    run(model, model.parameters(), criterion)
    assert [id(x) for x in passes] == [id(x) for x, _ in DATA]
    with pytest.raises(RuntimeError, match="no training forward pass"):
        criterion(torch.randn(8, 3), DATA[0][1])  # the recomputation of the backward pass left nothing behind


def test_loss_outside_of_the_autocast_block():
    """The teacher runs in the autocast state of the model's pass, not of the loss."""
    model = plain_model()
    criterion = softlabels.SelfDistillationLoss().attach(model)
    dtypes = []
    model.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    x, y = DATA[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = model(x)
    assert criterion(inside, y).dtype == torch.float32
    outside = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        criterion(outside, y)
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]  # model, teacher, twice


def test_two_passes_before_one_loss():
    """Each loss belongs to the pass of its logits, in any order."""
    model = make_model()
    model[3].p = 0.0
    criterion = softlabels.SelfDistillationLoss().attach(model)
    criterion.teacher.update()
    with torch.no_grad():
        model[4].weight.normal_()
    (one, y), (two, _) = DATA[:2]
    first, second = model(one), model(two)
    for logits, x in ((second, two), (first, one)):
        wanted = softlabels.functional.self_distillation_loss(logits, y, criterion.teacher(x))
        torch.testing.assert_close(criterion(logits, y), wanted)


def test_a_pass_in_eval_mode_between_does_not_count():
    """Grad enabled, but eval mode: neither its inputs nor its logits are the loss's."""
    model = plain_model()
    criterion = softlabels.SelfDistillationLoss().attach(model)
    (one, y), (two, _) = DATA[:2]
    logits = model(one)
    model.eval()
    model(two[:3])
    model.train()
    wanted = softlabels.functional.self_distillation_loss(logits, y, criterion.teacher(one))
    torch.testing.assert_close(criterion(logits, y), wanted)


def test_inputs_changed_in_place_raise():
    """A model that overwrites its input would show the teacher something else."""
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))
    criterion = attached(model)
    x, y = DATA[0]
    with pytest.raises(RuntimeError, match="written to since it began"):
        criterion(model(x.clone()), y)


def test_other_inputs_for_the_teacher():
    student, teacher = nn.Linear(4, 3), nn.Linear(2, 3)
    x, y = DATA[0]
    for teacher_inputs in (lambda x: x[:, :2], lambda x: (x[:, :2],), lambda x: {"input": x[:, :2]}):
        criterion = softlabels.SelfDistillationLoss().attach(student, teacher=teacher, teacher_inputs=teacher_inputs)
        logits = student(x)
        wanted = softlabels.functional.self_distillation_loss(logits, y, teacher(x[:, :2]))
        torch.testing.assert_close(criterion(logits, y), wanted)
    with pytest.raises(TypeError, match="teacher_inputs must be callable"):
        softlabels.SelfDistillationLoss().attach(student, teacher=teacher, teacher_inputs=2)


def test_a_model_that_moves_takes_its_teacher_along():
    model = plain_model()
    criterion = attached(model)
    model.to("meta")
    x, y = DATA[0][0].to("meta"), DATA[0][1].to("meta")
    assert criterion(model(x), y).device.type == "meta"
    assert {average.device.type for average in criterion.teacher.averages.values()} == {"meta"}


def test_data_parallel_over_one_device_or_none_is_a_pass_through(wanted):
    model = nn.DataParallel(plain_model())
    criterion = attached(model)
    assert run(model, model.parameters(), criterion) == wanted
    assert list(criterion.teacher.averages) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_unsupported_models_raise_at_attach():
    class FlatParameters(nn.Module):  # as FullyShardedDataParallel
        _fsdp_wrapped_module = None

    with pytest.raises(TypeError, match=r"FSDP1.*shard it with fully_shard"):
        attached(nn.Sequential(FlatParameters()))
    with pytest.raises(TypeError, match=r"ScriptModule; attach to the module that it was made of"):
        attached(torch.jit.script(nn.Linear(4, 3)))


def test_nothing_survives_an_iteration():
    """Fifty iterations, some of them interrupted, leave no tensor behind that was not there before."""
    model = make_model()
    criterion = attached(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(0)

    def iteration(i):
        x, y = torch.randn(64, 4, generator=generator), torch.randint(3, (64,), generator=generator)
        if i % 7 == 3:
            model(x)  # a pass whose loss is never computed
        loss = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return weakref.ref(x)

    def living():
        gc.collect()
        return sum(t.numel() for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter))

    for i in range(50):
        iteration(i)
    before = living()
    for i in range(50):
        assert iteration(i)() is None  # without waiting for the garbage collector
    assert living() <= before


def test_inputs_die_with_the_graph_or_when_the_teacher_was_asked():
    model = plain_model()
    criterion = attached(model)
    for asked in (False, True):
        x = torch.randn(8, 4)
        inputs = weakref.ref(x)
        logits = model(2 * x if asked else x)
        del x
        if asked:
            criterion(logits, DATA[0][1])
        else:
            assert inputs() is not None
            del logits
        assert inputs() is None  # without waiting for the garbage collector


def test_evaluation_keeps_nothing():
    model = plain_model()
    criterion = attached(model)
    x = torch.randn(8, 4)
    inputs = weakref.ref(x)
    model.eval()
    model(x)
    model.train()
    with torch.no_grad():
        model(x)
    del x
    assert inputs() is None
    assert criterion is not None


@pytest.mark.parametrize("ranking", ["ema", "history", "batch"])
def test_resume_with_generator_and_history(ranking):
    data = [(x, y, torch.arange(8 * (i % 2), 8 * (i % 2) + 8)) for i, (x, y) in enumerate(batches(8))]

    def start():
        model = plain_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        generator = torch.Generator().manual_seed(9)
        criterion = softlabels.BetaSmoothingLoss(
            ranking=ranking, num_samples=16 if ranking == "history" else None, generator=generator, ema_decay=0.9
        )
        return model, optimizer, criterion.attach(model) if ranking == "ema" else criterion

    def go(model, optimizer, criterion, data):
        losses = []
        for x, y, index in data:
            loss = criterion(model(x), y, index=index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    objects = start()
    go(*objects, data[:4])
    buffer = io.BytesIO()
    torch.save([o.state_dict() for o in objects], buffer)
    wanted = go(*objects, data[4:])
    buffer.seek(0)
    fresh = start()
    for thing, state in zip(fresh, torch.load(buffer, weights_only=True), strict=True):
        thing.load_state_dict(state)
    assert go(*fresh, data[4:]) == wanted


def test_old_checkpoints_say_what_restarts():
    model = plain_model()
    criterion = attached(model)
    train(model, criterion, torch.optim.SGD(model.parameters(), lr=0.1), DATA)
    with pytest.warns(UserWarning, match="no EMA teacher for BetaSmoothingLoss; its average restarts"):
        criterion.load_state_dict(nn.CrossEntropyLoss().state_dict())
    assert criterion.teacher.num_updates == 0
    assert torch.equal(criterion.teacher.averages["0.weight"], model[0].weight)
    generator = torch.Generator()
    with pytest.warns(UserWarning, match="no generator state"):
        softlabels.BetaSmoothingLoss(generator=generator).load_state_dict({})
    history = softlabels.BetaSmoothingLoss(ranking="history", num_samples=4)
    with pytest.warns(UserWarning, match="no prediction history for BetaSmoothingLoss; it restarts empty"):
        history.load_state_dict({})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        criterion.load_state_dict({"nonsense": torch.zeros(1), **criterion.state_dict()})


def test_inside_a_larger_module():
    """A loss that is part of a model's own state, as in a LightningModule."""

    class System(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = plain_model()
            self.loss = softlabels.BetaSmoothingLoss(ema_decay=0.9)

    system = System()
    with pytest.raises(ValueError, match="is itself a part of the model; attach it to the submodule"):
        system.loss.attach(system)
    system.loss.attach(system.model)
    train(system.model, system.loss, torch.optim.SGD(system.model.parameters(), lr=0.1), DATA)
    state = system.state_dict()
    assert torch.equal(state["loss.teacher.averages/0/weight"], system.loss.teacher.averages["0.weight"])
    for attach_first in (True, False):
        other = System()
        if attach_first:
            other.loss.attach(other.model)
        other.load_state_dict(state)
        if not attach_first:
            other.loss.attach(other.model)
        assert other.loss.teacher.num_updates == 4
        assert torch.equal(other.loss.teacher.averages["0.weight"], system.loss.teacher.averages["0.weight"])


def test_a_model_that_changes_dtype_takes_its_teacher_along():
    model = plain_model()
    criterion = attached(model)
    x, y = DATA[0]
    criterion.teacher.update()
    before = criterion.teacher.averages["0.weight"].clone()
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        model.to(dtype)
        assert criterion(model(x.to(dtype)), y).isfinite()
        assert seen[-2:] == [dtype, dtype]
        # the float32 average survives a stay in bfloat16
        torch.testing.assert_close(criterion.teacher.averages["0.weight"].float(), before, rtol=0, atol=0)
    model[2].to(torch.float64)  # not the first parameter alone
    criterion.teacher.update()
    assert criterion.teacher.averages["2.weight"].dtype == torch.float64


def test_state_that_waits_for_attach():
    """It is a copy, it survives being saved again, inside another module too, and a frozen teacher clears it."""
    model = plain_model()
    criterion = attached(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    train(model, criterion, optimizer, DATA)
    waiting = nn.ModuleDict({"loss": softlabels.BetaSmoothingLoss(ema_decay=0.8)})
    state = nn.ModuleDict({"loss": criterion}).state_dict()
    waiting.load_state_dict(state)
    kept = {key: value.clone() for key, value in state.items() if isinstance(value, torch.Tensor)}
    train(model, criterion, optimizer, DATA)
    again = waiting.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], value) for key, value in kept.items())
    waiting.load_state_dict({}, strict=False)
    waiting["loss"].attach(model)
    assert waiting["loss"].teacher.num_updates == 4
    frozen = softlabels.SelfDistillationLoss()
    frozen.load_state_dict(criterion.state_dict())
    frozen.attach(model, teacher=plain_model())
    assert not frozen.state_dict()


def test_state_that_does_not_fit_leaves_the_loss_unattached():
    criterion = softlabels.BetaSmoothingLoss()
    criterion.load_state_dict(attached(plain_model()).state_dict())
    other = nn.Linear(4, 3)
    with pytest.raises(RuntimeError, match=r"EMATeacher"):
        criterion.attach(other)
    assert not criterion.attached
    assert not other._forward_pre_hooks
    criterion.attach(plain_model())


@pytest.mark.filterwarnings("ignore:.*needs no teacher:UserWarning")
@pytest.mark.parametrize("way", ["confidence", "switched off", "ranking"])
def test_inputs_are_released_with_the_graph(way):
    model = plain_model()
    criterion = softlabels.BetaSmoothingLoss(
        label_smoothing=0.0 if way == "switched off" else 0.15, ranking="batch" if way == "ranking" else "ema"
    ).attach(model)
    distillation = softlabels.SelfDistillationLoss().attach(model)
    x = torch.randn(8, 4)
    inputs = weakref.ref(x)
    logits = model(x)
    del x
    target = DATA[0][1]
    criterion(logits, target, confidence=torch.rand(8) if way == "confidence" else None)
    distillation(logits, target, teacher_logits=torch.randn(8, 3))
    del logits
    assert inputs() is None  # without waiting for the garbage collector


def test_a_loss_with_nothing_to_smooth_keeps_no_average_and_says_so():
    model = plain_model()
    for criterion in (
        softlabels.BetaSmoothingLoss(label_smoothing=0.0),
        softlabels.BetaSmoothingLoss(alpha=1.0),
        softlabels.BetaSmoothingLoss(ranking="batch"),
        softlabels.SelfDistillationLoss(alpha=1.0),
        softlabels.InstanceDirichletMAPLoss(beta=0.0),
    ):
        with pytest.warns(UserWarning, match=r"Loss\(.*\) needs no teacher, so attach keeps no average"):
            criterion.attach(model)
        assert criterion.attached
        assert not criterion.state_dict()
    with pytest.warns(UserWarning, match="needs no teacher"):
        criterion = softlabels.SelfDistillationLoss(alpha=1.0).attach(model)
    x, y = DATA[0]
    criterion(model(x), y)
    criterion.alpha = 0.5  # a schedule switches it on: the average begins here
    assert criterion(model(x), y).isfinite()
    assert criterion.teacher.source is model
