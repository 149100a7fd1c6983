"""Rule 3: logits know the pass that they came from, and which output of it they are."""

from __future__ import annotations

import dataclasses
import gc
import threading
import types
import weakref
from collections import OrderedDict, UserDict, deque, namedtuple

import pytest
import torch
from loops import batches, make_model
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint
from versions import whole_graph

import softlabels
from softlabels.functional import self_distillation_loss

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's compiler
X, Y = batches(1)[0]
OTHER, _ = batches(2)[1]


def attached(model, **options):
    """Teacher == student: the loss is the entropy of the prediction, whatever the label."""
    return softlabels.SelfDistillationLoss(alpha=0.0, temperature=1.0).attach(model, **options)


def entropy(logits):
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean().float()


def seen_by(model):
    """What the teacher's passes of a model are given."""
    seen = []

    def note(module, args, kwargs):
        if not torch.is_grad_enabled():
            seen.append((*args, *kwargs.values()))

    model.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    return seen


class Two(nn.Module):
    def __init__(self, wrap=lambda out, aux: {"out": out, "aux": aux}):
        super().__init__()
        self.body, self.out, self.aux, self.wrap = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3), wrap

    def forward(self, x):
        h = self.body(x).relu()
        return self.wrap(self.out(h), self.aux(h))


Outputs = namedtuple("Outputs", ["logits", "aux_logits"])


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    aux: torch.Tensor


class UsersDict(UserDict):
    """As transformers' BatchEncoding."""


KINDS = {
    "dict, as torchvision's segmentation": (lambda o, a: {"out": o, "aux": a}, lambda r: (r["out"], r["aux"])),
    "namedtuple, as GoogLeNet": (Outputs, lambda r: (r.logits, r.aux_logits)),
    "tuple": (lambda o, a: (o, a), lambda r: r),
    "nested": (lambda o, a: {"logits": o, "others": [{"aux": a}]}, lambda r: (r["logits"], r["others"][0]["aux"])),
    "dataclass": (Result, lambda r: (r.logits, r.aux)),
    "ordered": (lambda o, a: OrderedDict(aux=a, logits=o), lambda r: (r["logits"], r["aux"])),
    "one node": (lambda o, a: torch.cat([o, a], 1).chunk(2, 1), lambda r: r),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("order", ["out first", "aux first", "aux alone"])
def test_two_outputs_of_one_pass(name, order):
    """Each loss gets the teacher's rows of its own output, and both share one pass of the teacher."""
    wrap, parts = KINDS[name]
    model = Two(wrap)
    criterion, seen = attached(model), seen_by(model)
    out, aux = parts(model(X))
    for logits in {"out first": (out, aux), "aux first": (aux, out), "aux alone": (aux,)}[order]:
        torch.testing.assert_close(criterion(logits, Y), entropy(logits))
    assert len(seen) == 1


@pytest.mark.parametrize("hooks", [False, True])
def test_hooks_on_the_backward_pass_keep_outputs_apart(hooks):
    model = Two(lambda o, a: (o, a))
    if hooks:
        model.register_full_backward_hook(lambda module, inputs, outputs: None)
        model.register_full_backward_pre_hook(lambda module, outputs: None)
    criterion = attached(model)
    out, aux = model(X.clone().requires_grad_())
    (criterion(out, Y) + 0.4 * criterion(aux, Y)).backward()
    torch.testing.assert_close(criterion(aux, Y), entropy(aux))
    with pytest.raises(RuntimeError, match="made of several outputs or training passes"):
        criterion(out + aux, Y)
    criterion = attached(model, output=lambda r: r[0] + r[1])
    out, aux = model(X)
    torch.testing.assert_close(criterion(out + aux, Y), entropy(out + aux))


def test_a_frozen_teacher_of_one_output_answers_for_the_logits_alone():
    model, teacher = Two(), nn.Linear(4, 3)
    criterion = softlabels.SelfDistillationLoss().attach(model, teacher=teacher)
    result = model(X)
    wanted = self_distillation_loss(result["out"], Y, teacher(X))
    torch.testing.assert_close(criterion(result["out"], Y), wanted)
    with pytest.raises(RuntimeError, match="an output of the model that the teacher does not return"):
        criterion(result["aux"], Y)


def test_losses_on_one_pass_ask_once():
    """As in mixup: two labels for one batch."""
    model = make_model()
    criterion, seen = softlabels.SelfDistillationLoss().attach(model), seen_by(model)
    logits = model(X)
    loss = 0.3 * criterion(logits, Y) + 0.7 * criterion(logits, Y.flip(0))
    loss.backward()
    assert len(seen) == 1


WAYS = {
    "cast": lambda z: z.float(),
    "scaled": lambda z: 2 * z,
    "viewed": lambda z: z.view(2, 4, 3).flatten(0, 1),
    "adjusted": lambda z: z + torch.zeros(3, requires_grad=True),
    "masked in place": lambda z: z.masked_fill_(torch.zeros(8, 3, dtype=torch.bool), -1.0),
    "written to in place": lambda z: z.index_put_((torch.tensor(0),), torch.zeros(3, dtype=z.dtype)),
    "checkpointed": lambda z: checkpoint(torch.mul, z, 2.0, use_reentrant=False),
    "compiled": torch.compile(lambda z: 2 * z, backend="aot_eager"),
    "hooked": lambda z: z.register_hook(lambda g: g) and z,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("autocast", [False, True])
def test_two_passes_keep_apart_on_every_way(way, autocast):
    model = nn.Linear(4, 3)
    criterion, seen = softlabels.SelfDistillationLoss().attach(model), seen_by(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        first, second = model(X), model(OTHER)
    criterion(WAYS[way](second), Y)
    criterion(WAYS[way](first), Y)
    assert [args[0] is x for args, x in zip(seen, (OTHER, X), strict=True)] == [True, True]


@pytest.mark.parametrize("attach_to", ["wrapper", "inner"])
@pytest.mark.parametrize("fullgraph", [False, pytest.param(True, marks=whole_graph)])
def test_two_passes_of_a_compiled_model_keep_apart(attach_to, fullgraph):
    torch.compiler.reset()
    model = nn.Linear(4, 3)
    called = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    criterion = softlabels.SelfDistillationLoss().attach(called if attach_to == "wrapper" else model)
    seen = seen_by(model)
    first, second = called(X), called(OTHER)
    criterion(2 * second, Y)
    criterion(first, Y)
    assert [torch.equal(args[0], x) for args, x in zip(seen, (OTHER, X), strict=True)] == [True, True]


VIEWED = {
    "split in unequal parts": lambda z: z.split([2, 3, 7], 1)[1],
    "repeated": lambda z: z[:, :3].repeat(2, 1),
    "repeated row by row": lambda z: z[:, :3].repeat_interleave(2, 0),
    "classes last": lambda z: z.view(8, 3, 4).mT.reshape(-1, 3),
    "every fourth": lambda z: z[:, ::4],
    "from the end": lambda z: z[:, -3:].unsqueeze(1).squeeze(1),
}


@pytest.mark.parametrize("name", VIEWED)
def test_views_are_followed(name):
    model = nn.Linear(4, 12)
    criterion = attached(model)
    logits = VIEWED[name](model(X))
    torch.testing.assert_close(criterion(logits, torch.zeros(len(logits), dtype=torch.long)), entropy(logits))


ORDER = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
MOVED = {
    "picked": lambda z: z[ORDER],
    "written into another": lambda z: torch.zeros(8, 3).index_put((ORDER,), z),
    "copied into another": lambda z: torch.zeros(8, 3).index_copy(0, ORDER, z),
    "scattered": lambda z: torch.zeros(8, 3).scatter(0, ORDER[:, None].expand(8, 3), z),
    "turned": lambda z: z.rot90(2),
    "taken": lambda z: z.take(torch.arange(24).flip(0).view(8, 3)),
    "padded and cut": lambda z: nn.functional.pad(z, (0, 0, 3, 0))[:8],
}


@pytest.mark.parametrize("name", MOVED)
def test_rows_that_are_moved_raise(name):
    model = nn.Linear(4, 3)
    criterion = attached(model)
    with pytest.raises(RuntimeError, match=r"attach\(\.\.\., output=\.\.\.\) do the same"):
        criterion(MOVED[name](model(X)), Y)


def test_a_left_over_pass_belongs_to_nobody():
    model = make_model()
    criterion = softlabels.SelfDistillationLoss().attach(model)
    model(X)  # a pass whose loss is another one
    model.eval()
    with pytest.raises(RuntimeError, match="no training forward pass of the attached model"):
        criterion(model(OTHER), Y)


def test_an_exception_in_a_pass_leaves_no_pass():
    class Fragile(nn.Linear):
        error = None

        def forward(self, x):
            if self.error is not None:
                raise self.error
            return super().forward(x)

    model = Fragile(4, 3)
    criterion = attached(model)
    for error in (ValueError(), KeyboardInterrupt()):  # torch calls no hooks after the second
        model.error = error
        with pytest.raises(type(error)):
            model(X)
        model.error = None
        logits = model(OTHER)
        torch.testing.assert_close(criterion(logits, Y), entropy(logits))


@pytest.mark.parametrize("grad", [False, True])
def test_a_model_that_calls_itself_has_one_pass(grad):
    class TwoScales(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x, one=False):
            with torch.set_grad_enabled(grad or torch.is_grad_enabled()):
                return self.head(x) if one else self(x, one=True) + self(x.roll(1, 1), one=True)

    model = TwoScales()
    criterion, seen = attached(model), seen_by(model)
    logits = model(X)
    torch.testing.assert_close(criterion(logits, Y), entropy(logits))
    assert [len(args) for args in seen if len(args) == 1] == [1]


def test_threads_have_passes_of_their_own():
    model = nn.Linear(4, 3)
    criterion = attached(model)
    barrier, losses = threading.Barrier(2), {}

    class Waiting(nn.Linear):
        def forward(self, x):
            if torch.is_grad_enabled():
                barrier.wait(5)
            return super().forward(x)

    model = Waiting(4, 3)
    criterion = attached(model)
    lock = threading.Lock()

    def work(x):
        logits = model(x)
        with lock:
            losses[id(x)] = criterion(logits, Y), entropy(logits)

    threads = [threading.Thread(target=work, args=(x,)) for x in (X, OTHER)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(losses) == 2
    for got, wanted in losses.values():
        torch.testing.assert_close(got, wanted)


def test_the_pass_is_gone_with_its_graph():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    criterion = attached(model)
    assert criterion.attached
    x = torch.randn(8, 4, requires_grad=True)
    inputs = weakref.ref(x)
    logits = 2 * model({"x": x}["x"])
    del x
    assert inputs() is not None
    del logits
    assert inputs() is None


class Batch:
    def __init__(self, x):
        self.x, self.note = x, types.SimpleNamespace(x=x)


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor


INPUTS = {
    "dict": (lambda x: {"x": x}, lambda b, v: b.__setitem__("x", v), lambda b: b["x"]),
    "list": (lambda x: [x], lambda b, v: b.__setitem__(0, v), lambda b: b[0]),
    "nested": (lambda x: ({"x": [x]},), lambda b, v: b[0].__setitem__("x", [v]), lambda b: b[0]["x"][0]),
    "object": (Batch, lambda b, v: setattr(b, "x", v), lambda b: b.x),
    "object in an object": (Batch, lambda b, v: setattr(b.note, "x", v), lambda b: b.note.x),
    "UserDict": (lambda x: UsersDict(x=x), lambda b, v: b.__setitem__("x", v), lambda b: b["x"]),
    "deque": (lambda x: deque([x]), lambda b, v: b.__setitem__(0, v) or b.append(v), lambda b: b[0]),
    "appended to": (lambda x: [x], lambda b, v: b.append(v) or b.__setitem__(0, v), lambda b: b[0]),
}


@pytest.mark.parametrize("name", INPUTS)
def test_entries_that_the_model_replaces(name):
    """The teacher sees what the model was given, not the features that the model put in its place."""
    make, put, get = INPUTS[name]

    class Replacing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, batch):
            put(batch, torch.tanh(self.a(get(batch))))
            return self.b(get(batch))

    model = Replacing()
    criterion = attached(model)
    logits = model(make(X))
    torch.testing.assert_close(criterion(logits, Y), entropy(logits))


def test_inputs_written_to_raise_and_empty_containers_are_no_trouble():
    class Writing(nn.Linear):
        def forward(self, x, notes, *, more=None):
            notes["calls"] = notes.get("calls", 0) + 1
            return super().forward(x)

    model = Writing(4, 3)
    criterion = attached(model)
    x, notes = X.clone(), {}
    logits = model(x, notes, more=())
    assert criterion(logits, Y).isfinite()
    assert notes == {"calls": 1}
    logits = model(x, {})
    x.add_(1)
    with pytest.raises(RuntimeError, match="have been written to since it began"):
        criterion(logits, Y)


class DynamicCache:
    def __init__(self):
        self.keys = []


def test_a_cache_that_the_model_writes_to_is_refused_by_name():
    class Caching(nn.Linear):
        def forward(self, x, past_key_values=None):
            if past_key_values is not None:
                past_key_values.keys.append(x)
            return super().forward(x)

    model = Caching(4, 3)
    criterion = attached(model)
    assert criterion(model(X, past_key_values=None), Y).isfinite()
    with pytest.raises(RuntimeError, match=r"'past_key_values'.*use_cache=False"):
        criterion(model(X, past_key_values=DynamicCache()), Y)
    criterion.detach().attach(model, teacher_inputs=lambda x, past_key_values=None: x)
    assert criterion(model(X, past_key_values=DynamicCache()), Y).isfinite()


class Strict(dict):
    def __getattr__(self, name):
        if name.startswith("__"):  # copy of Python 3.10 asks for __getstate__
            raise AttributeError(name)
        return self[name]


Pair = namedtuple("Pair", ["x", "ids"])
FROZEN_INPUTS = {
    "dict subclass": (lambda x: Strict(x=x), lambda b: b.x),
    "namedtuple": (lambda x: Pair(x, torch.arange(8)), lambda b: b.x),
    "dataclass": (lambda x: Frozen(x), lambda b: b.x),
    "UserDict": (lambda x: UsersDict(x=x, text=["a"]), lambda b: b["x"]),
    "packed sequence": (lambda x: pack_sequence(list(x[:, None])), lambda b: pad_packed_sequence(b, True)[0][:, 0]),
}


@pytest.mark.parametrize("name", FROZEN_INPUTS)
def test_frozen_teachers_get_inputs_of_the_type_that_the_model_got(name):
    make, get = FROZEN_INPUTS[name]

    class Taking(nn.Linear):
        def forward(self, batch):
            types_seen.append(type(batch))
            return super().forward(get(batch).to(self.weight.dtype))

    types_seen = []
    model, teacher = Taking(4, 3), Taking(4, 3).double()
    criterion = softlabels.SelfDistillationLoss().attach(model, teacher=teacher)
    batch = make(X)
    logits = model(batch)
    torch.testing.assert_close(criterion(logits, Y), self_distillation_loss(logits, Y, teacher(batch)))
    assert types_seen == [type(batch)] * 3


def test_frozen_teachers_of_another_number_of_classes():
    model = nn.Linear(4, 3)
    criterion = softlabels.SelfDistillationLoss().attach(model, teacher=nn.Linear(4, 5))
    with pytest.raises(RuntimeError, match=r"\(8, 5\).*\(8, 3\); it knows 5 classes, and the model 3"):
        criterion(model(X), Y)


def backbones():
    backbone = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5))
    return backbone, nn.Sequential(backbone, nn.Linear(8, 3)), nn.Sequential(backbone, nn.Linear(8, 3))


def test_a_frozen_teacher_that_shares_modules_raises():
    backbone, student, teacher = backbones()
    adapted = nn.ModuleDict({"base_model": student})  # as PEFT's, with teacher=peft_model.get_base_model()
    for model, other in ((student, teacher), (adapted, student), (student, adapted), (backbone, teacher)):
        with pytest.raises(ValueError, match=r"shares .* with the model.*copy\.deepcopy\(teacher\)"):
            softlabels.SelfDistillationLoss().attach(model, teacher=other)
    tied = nn.Linear(4, 8)
    tied.weight = backbone[0].weight
    with pytest.raises(ValueError, match="shares Linear"):
        softlabels.SelfDistillationLoss().attach(student, teacher=nn.Sequential(tied, nn.Linear(8, 3)))
    assert backbone.training
    assert not student._forward_pre_hooks
    activation = nn.ReLU()  # what has neither weights nor randomness may be shared
    softlabels.SelfDistillationLoss().attach(
        nn.Sequential(nn.Linear(4, 3), activation), teacher=nn.Sequential(nn.Linear(4, 3), activation)
    )


def test_compiled_loss_beside_an_eager_model():
    torch.compiler.reset()
    model = nn.Linear(4, 3)
    criterion = attached(model)
    compiled = torch.compile(criterion, backend="aot_eager")
    for x in (X, OTHER):
        logits = model(x)
        loss = compiled(logits, Y)
        torch.testing.assert_close(loss, entropy(logits))
        loss.backward()


def test_autocast_inside_forward_is_the_teachers_too():
    """As Accelerate's prepare does it; and logits computed under autocast are asked about outside."""
    model = nn.Linear(4, 3)
    dtypes = []
    forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    model.forward = lambda x: dtypes.append((z := forward(x)).dtype) or z.float()
    criterion = attached(model)
    logits = model(X)
    torch.testing.assert_close(criterion(logits, Y), entropy(logits), rtol=0, atol=1e-6)
    assert dtypes == [torch.bfloat16, torch.bfloat16]


class SeveralDevices(nn.DataParallel):
    """Without devices: inputs are cast as they would be moved, replicas run one after the other."""

    def forward(self, x):
        outputs = []
        for rows in x.to(self.module.weight.dtype).chunk(2):
            replica = self.module._replicate_for_data_parallel()
            for name, parameter in self.module.named_parameters():
                setattr(replica, name, parameter.clone())
            outputs.append(replica(rows))
        return torch.cat(outputs)


def test_data_parallel_over_several_devices_is_attached_as_a_wrapper():
    model = nn.Linear(4, 3).double()
    called = SeveralDevices(model)
    criterion, seen = attached(called), seen_by(called)
    logits = called(X)
    torch.testing.assert_close(criterion(logits, Y), entropy(logits), check_dtype=False)
    assert not seen  # the teacher's pass is one of the model itself
    inner = attached(model)
    with pytest.raises(RuntimeError, match=r"DataParallel copies it to several devices, attach that"):
        inner(called(X), Y)


def test_a_model_that_is_sharded_after_attach_by_fsdp1_raises():
    model = nn.Sequential(nn.Linear(4, 3))
    criterion = attached(model)
    model.__dict__["_fsdp_use_orig_params"] = False  # the mark that FullyShardedDataParallel leaves
    model[0]._parameters.clear()
    model.register_parameter("_flat_param", nn.Parameter(torch.zeros(15)))
    with pytest.raises(TypeError, match=r"FSDP1.*fully_shard"):
        model(X)
    assert criterion.attached


def test_replicas_of_data_parallel_are_not_passes_of_the_model():
    model = nn.Linear(4, 3)
    criterion = attached(model)
    replica = model._replicate_for_data_parallel()
    for key, value in model._parameters.items():
        setattr(replica, key, value)
    with pytest.raises(RuntimeError, match="no training forward pass"):
        criterion(replica(X), Y)
    logits = model(X)
    gc.collect()
    torch.testing.assert_close(criterion(logits, Y), entropy(logits))
