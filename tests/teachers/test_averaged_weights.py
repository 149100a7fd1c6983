"""Rule 1: the teacher is the model itself, run with averaged weights, and leaves no trace in it."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from loops import MeanTeacher, batches, make_model, train
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import softlabels
from softlabels import EMATeacher
from softlabels.teachers.hooks import Scriptable

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # in torch's compiler
    pytest.mark.filterwarnings("ignore:.*weights_only=False:FutureWarning"),
]


SCRIPTABLE = Scriptable.NAME  # the one attribute that attach adds


def distilling(model, **options):
    teacher = EMATeacher(model, 0.8)
    return softlabels.SelfDistillationLoss(alpha=0.3, **options).attach(model, teacher=teacher)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 6, num_layers=2, dropout=0.3, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.lstm(x.view(-1, 2, 2))[0][:, -1])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


class Remembering(nn.Module):
    """Keeps what it computes in attributes, lists and dicts, and counts in a buffer and in a number."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.features, self.seen, self.calls = [], {}, 0
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        h = torch.tanh(self.body(x))
        self.last = h
        self.features.append(h)
        self.seen[self.calls] = h.mean().item()
        self.calls += 1
        self.steps += 1
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return self.head(h - self.mean)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = (
            nn.Linear(4, 8),
            nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2)),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        return self.head(checkpoint(self.block, self.stem(x), use_reentrant=False))


def with_forward(change):
    model = make_model()
    model.forward = change(model.forward)
    return model


def with_closures():
    """A closure over the module for forward, a partial over its layer, a hook that closes over another layer."""
    model = make_model()
    weak = weakref.proxy(model)
    linear = functools.partial(nn.functional.linear, weight=model[4].weight)
    model.forward = lambda x: linear(weak[3](weak[2](weak[1](weak[0](x)))))
    model[2].register_forward_hook(lambda module, args, output: output + weak[0].bias)
    return model


def normed(norm):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    norm(model[0])
    return model


def compiled_in_place():
    model = make_model()
    model.compile(backend="aot_eager")
    return model


MODELS = {
    "batch norm and dropout": make_model,
    "recurrent": Recurrent,
    "tied": Tied,
    "remembering": Remembering,
    "checkpointed": Checkpointed,
    "autocast forward": lambda: with_forward(torch.autocast("cpu", torch.bfloat16)),
    "compiled forward": lambda: with_forward(functools.partial(torch.compile, backend="aot_eager")),
    "compiled in place": compiled_in_place,
    "closures": with_closures,
    "weight norm, old": lambda: normed(weight_norm),
    "weight norm": lambda: normed(parametrizations.weight_norm),
    "spectral norm, old": lambda: normed(spectral_norm),
    "spectral norm": lambda: normed(parametrizations.spectral_norm),
    "orthogonal": lambda: normed(parametrizations.orthogonal),
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.TransformerEncoderLayer(2, 1, 8, batch_first=True), nn.Flatten(), nn.Linear(4, 3)
    ),
    "frozen statistics": lambda: freeze_statistics(make_model()),
}


def freeze_statistics(model):
    model[1].eval()
    return model


def run(name, logits=None, asked=None, steps=4):
    """Train with an attached teacher and note what it says, or with its logits from outside."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = MODELS[name]()
    criterion = softlabels.SelfDistillationLoss(alpha=0.3)
    if logits is None:
        criterion = distilling(model)
        ask = criterion.ask_teacher
        criterion.ask_teacher = lambda input, given: asked.append(ask(input, given)) or asked[-1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    grads = []
    for i, (x, y) in enumerate(batches(steps)):
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "tied"):  # two passes share autocast's cache
            loss = criterion(model(x), y, teacher_logits=None if logits is None else logits[2 * i])
            loss = loss + criterion(model(x.flip(0)), y, teacher_logits=None if logits is None else logits[2 * i + 1])
        optimizer.zero_grad()
        loss.backward()
        grads.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        optimizer.step()
    return model, grads, torch.get_rng_state(), criterion


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return not isinstance(a, (int, float)) or a == b


@pytest.mark.parametrize("name", MODELS)
def test_training_is_bit_equal_to_one_with_the_teachers_logits_from_outside(name):
    """Weights, gradients, buffers, attributes, random streams."""
    asked = []
    model, grads, state, _ = run(name, asked=asked)
    other, other_grads, other_state, _ = run(name, logits=asked)
    assert len(asked) == 8
    assert same(grads, other_grads)
    assert torch.equal(state, other_state)
    for (path, module), twin in zip(model.named_modules(), other.modules(), strict=True):
        mine, theirs = (
            {
                k: v
                for k, v in vars(m).items()
                if "hooks" not in k and k not in ("_modules", "_compiled_call_impl", SCRIPTABLE)
            }
            for m in (module, twin)
        )
        assert same(mine, theirs), path


WITHOUT_RANDOMNESS = [name for name in MODELS if name not in ("recurrent", "checkpointed", "attention")]


@pytest.mark.parametrize("name", WITHOUT_RANDOMNESS)
def test_logits_are_those_of_a_model_that_has_the_averages(name):
    """Built anew and given the averaged weights and the statistics: whatever the model is made of."""
    torch.compiler.reset()
    model, _, _, criterion = run(name, asked=[])
    twin = MODELS[name]()
    twin.load_state_dict(model.state_dict())
    averages = criterion.teacher.averages
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(averages[name])
    for own, module in zip(model.modules(), twin.modules(), strict=True):
        if isinstance(module, nn.Dropout):
            module.p = own.p = 0.0
        module.training = own.training
    x = torch.randn(8, 4)
    torch.testing.assert_close(criterion.teacher(x), twin(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(criterion.teacher(x), model(x), rtol=1e-3)


def entropy(logits):
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def test_what_is_done_to_the_model_holds_for_the_teacher():
    """Until the first step the teacher says what the model says: adapters, rates, masks, modes, hooks, heads."""
    x, y = batches(1)[0]
    model = make_model()
    criterion = softlabels.SelfDistillationLoss(alpha=0.0, temperature=1.0).attach(model)
    model[3].p = 0.0

    def check():
        logits = model(x)
        torch.testing.assert_close(criterion(logits, y), entropy(logits))

    check()
    prune.l1_unstructured(model[0], "weight", 0.5)
    check()
    prune.random_unstructured(model[0], "weight", 0.5)
    check()
    model[4] = nn.Linear(8, 5)
    check()
    model[4] = nn.Sequential(model[4].requires_grad_(False), nn.Linear(5, 5, bias=False))  # an adapter
    check()
    model.register_forward_pre_hook(lambda module, args: (args[0] / 255,))
    check()
    model.register_forward_pre_hook(lambda module, args, kwargs: ((2 * args[0],), kwargs), with_kwargs=True)
    model.register_forward_hook(lambda module, args, output: output + 1)
    check()
    model.forward = lambda x: 3 * nn.Sequential.forward(model, x)
    check()


def test_batch_norm_that_is_frozen_takes_one_row():
    model = freeze_statistics(make_model())
    criterion = softlabels.SelfDistillationLoss().attach(model)
    assert criterion(model(torch.randn(1, 4)), torch.zeros(1, dtype=torch.long)).isfinite()
    assert not model[1].training


def test_statistics_that_are_frozen_midway_are_the_models():
    """For the teacher too, as everything that is done to the model; until then they were its own."""
    model = make_model()
    criterion = softlabels.SelfDistillationLoss().attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, criterion, optimizer, batches(3))
    assert not torch.equal(criterion.teacher.averaged_model()[1].running_mean, model[1].running_mean)
    model[1].eval()
    train(model, criterion, optimizer, batches(1))
    assert torch.equal(criterion.teacher.averaged_model()[1].running_mean, model[1].running_mean)
    x = batches(1)[0][0]
    assert torch.equal(criterion.teacher.eval()(x), criterion.teacher.averaged_model()(x))


def test_modes_are_those_of_the_pass():
    """Validation between the pass and the loss; a mode that somebody switches for a moment."""
    model = make_model()
    model[3].p = 0.0
    criterion = softlabels.SelfDistillationLoss(alpha=0.0, temperature=1.0).attach(model)
    x, y = batches(1)[0]
    logits = model(x)
    model.eval()
    torch.testing.assert_close(criterion(logits, y), entropy(logits))
    assert not model[1].training


def test_evaluating_the_teacher_does_not_leave_it_in_eval_mode():
    model = make_model()
    criterion = softlabels.SelfDistillationLoss().attach(model)
    x, y = batches(1)[0]
    statistics = model[1].running_mean.clone()
    criterion.teacher.eval()
    assert torch.equal(criterion.teacher(x), criterion.teacher(x))
    seen = []
    model[3].register_forward_hook(lambda module, args, output: seen.append(module.training))
    criterion(model(x), y)
    assert seen == [True, True]
    assert not torch.equal(statistics, model[1].running_mean)


def test_parametrizations_that_are_cached_are_not_the_models():
    torch.manual_seed(0)
    model = normed(parametrizations.weight_norm)
    criterion = distilling(model)
    criterion.teacher.update()
    with torch.no_grad():
        model[0].parametrizations.weight.original1.normal_()
    x, y = batches(1)[0]
    wanted = criterion.teacher(x)
    with parametrize.cached():
        logits = model(x)
        loss = criterion(logits, y)
        assert torch.equal(model(x), logits)
    torch.testing.assert_close(
        loss, softlabels.functional.self_distillation_loss(logits, y, wanted, alpha=0.3), rtol=0, atol=0
    )


def test_a_pass_that_raises_leaves_the_model_as_it_was():
    class Failing(nn.Linear):
        def forward(self, x):
            self.note = torch.is_grad_enabled()
            if not torch.is_grad_enabled():
                raise KeyboardInterrupt
            return super().forward(x)

    model = Failing(4, 3)
    criterion = distilling(model)
    criterion.teacher.update()
    with torch.no_grad():
        model.weight.normal_()
    before, pointer = model.weight.detach().clone(), model.weight.data_ptr()
    x, y = batches(1)[0]
    with pytest.raises(KeyboardInterrupt):
        criterion(model(x), y)
    assert torch.equal(model.weight, before)
    assert model.weight.data_ptr() == pointer
    assert model.weight.requires_grad
    assert model.note


class System(nn.Module):
    """A module that contains the loss, as a LightningModule does."""

    def __init__(self, attached):
        super().__init__()
        self.criterion = softlabels.BetaSmoothingLoss()
        self.net = make_model()
        if attached:
            self.criterion.attach(self.net)

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("use_buffers", [False, True])
def test_the_users_own_average_of_a_module_that_contains_the_loss(attached, use_buffers):
    system = System(attached)
    average = AveragedModel(system, avg_fn=lambda a, p, n: p, use_buffers=use_buffers)  # the latest weights
    if not attached:
        system.criterion.attach(system.net)
    train(system.net, system.criterion, torch.optim.SGD(system.net.parameters(), 0.1), batches(3))
    average.update_parameters(system)
    with torch.no_grad():
        system.net[0].weight.fill_(7.0)
    average.update_parameters(system)
    for name, value in system.net.state_dict().items():
        assert torch.equal(average.module.net.state_dict()[name], value), name
    assert list(average.module.state_dict()) == list(System(attached).state_dict())
    assert list(copy.deepcopy(system).state_dict()) == list(system.state_dict())


def test_memory_is_averages_statistics_and_inputs():
    """A model in training with a teacher, of which a small part is trained as with LoRA: what is held beside it."""

    def held():
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
        storages = [t.untyped_storage() for t in tensors if not torch._is_functional_tensor(t)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    base = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 256))
    base.register_buffer("table", torch.zeros(10_000))
    base.requires_grad_(False)
    model = nn.Sequential(base, nn.Linear(256, 3))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    x, y = torch.randn(32, 64), torch.randint(3, (32,))

    def loop(criterion, n):
        for _ in range(n):
            loss = criterion(model(x + 1), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    loop(nn.CrossEntropyLoss(), 3)
    before = held()
    criterion = softlabels.BetaSmoothingLoss().attach(model)
    loop(criterion, 3)
    averages = 4 * (256 * 3 + 3)
    statistics = 4 * 2 * 256 + 8
    assert held() - before == averages + statistics
    logits = [model(x + i) for i in range(3)]
    graphs = held() - before - averages - statistics
    criterion.detach()
    others = [model(x + i) for i in range(3)]
    without = held() - before - graphs
    del logits
    gc.collect()
    assert graphs == without + 3 * x.untyped_storage().nbytes()
    assert len(others) == 3


def test_copies_and_pickles_of_the_model_know_nothing_of_softlabels(tmp_path):
    model = make_model()
    criterion = softlabels.BetaSmoothingLoss().attach(model)
    model(batches(1)[0][0])
    assert b"softlabels" not in pickle.dumps(model)
    torch.save(model, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").stat().st_size < 20_000  # no inputs, no teacher
    code = (
        "import sys; sys.modules['softlabels'] = None; import torch; "
        f"m = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False); m(torch.randn(3, 4)).sum().backward(); "
        "[m.register_forward_pre_hook(lambda module, args: None) for _ in range(99)]; m(torch.randn(3, 4))"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False), copy.copy(model)):
        assert torch.equal(twin.eval()(torch.ones(1, 4)), model.eval()(torch.ones(1, 4)))
        with pytest.raises(RuntimeError, match="no training forward pass"):
            criterion(twin.train()(torch.randn(8, 4)), torch.zeros(8, dtype=torch.long))
        model.train()
        twin.load_state_dict(model.state_dict())  # the hooks on loading are there no more


def test_a_traced_model_that_is_attached_can_be_copied_and_pickled():
    """torch.fx writes its own pickles, and would follow a reference to the model for ever."""
    model = torch.fx.symbolic_trace(make_model().eval())
    criterion = softlabels.BetaSmoothingLoss().attach(model)
    x = torch.ones(1, 4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.eval()(x), model(x))
    assert criterion.attached


def test_the_average_of_a_model_in_inference_mode_and_no_grad():
    model = make_model().eval()
    teacher = EMATeacher(model, 0.8)
    by_hand = MeanTeacher(model, 0.8)
    x = torch.randn(8, 4)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(teacher(x), by_hand.ema(x))
    model.train()
    model(x).sum().backward()
