"""A teacher's state is tensors; with the model's it resumes bit for bit, in other precisions, and from old files."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from loops import batches, make_model, train
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from versions import TORCH

import softlabels


class System(nn.Module):
    """A model that holds its criterion, as in a LightningModule or a Hugging Face model."""

    def __init__(self, dtype=torch.float32, attach=True):
        super().__init__()
        self.net = make_model()
        self.criterion = softlabels.BetaSmoothingLoss(ema_decay=0.8, generator=torch.Generator().manual_seed(3))
        if attach:
            self.criterion.attach(self.net)
        self.net.to(dtype)


def go_on(system, dtype=torch.float32):
    data = [(x.to(dtype), y) for x, y in batches(6)]
    torch.manual_seed(5)
    return train(system.net, system.criterion, torch.optim.SGD(system.net.parameters(), lr=0.1), data)


def trained(dtype=torch.float32):
    system = System(dtype)
    go_on(system, dtype)
    return system


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def by_torch(system, other, path):
    torch.save(system.state_dict(), path / "state.pt")
    other.load_state_dict(torch.load(path / "state.pt", weights_only=True))


def by_safetensors(system, other, path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(system.state_dict(), path / "state.safetensors")
    other.load_state_dict(safetensors.load_file(path / "state.safetensors"))


def by_safetensors_model(system, other, path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(system, str(path / "state.safetensors"))
    missing, unexpected = safetensors.load_model(other, str(path / "state.safetensors"))
    assert not missing
    assert not unexpected


without_processes = pytest.mark.skipif(TORCH < (2, 11), reason="older torch has no no_dist=True")


def by_dcp(system, other, path):
    dcp.save({"model": get_model_state_dict(system)}, checkpoint_id=path / "dcp", no_dist=True)
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=path / "dcp", no_dist=True)
    set_model_state_dict(other, state["model"])


WAYS = [by_torch, by_safetensors, by_safetensors_model, pytest.param(by_dcp, marks=without_processes)]


@pytest.mark.filterwarnings("ignore")  # of torch.distributed.checkpoint without processes
@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_holds_its_criterion_resumes_bit_for_bit(way, tmp_path):
    system = trained()
    assert all(isinstance(value, torch.Tensor) for value in system.state_dict().values())
    other = System()
    way(system, other, tmp_path)
    assert same(system, other)
    assert go_on(other) == go_on(system)
    assert same(system, other)


@pytest.mark.parametrize("attach", [False, True])
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16,) * 2, (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_precisions_resume_into_each_other(dtypes, attach):
    first, second = dtypes
    system = trained(first)
    saved = copy.deepcopy(system.state_dict())
    other = System(second, attach)
    other.load_state_dict(saved)
    if not attach:
        other.criterion.attach(other.net)
    teacher = other.criterion.teacher
    assert teacher.num_updates == 6
    for name, average in system.criterion.teacher.averages.items():
        assert average.dtype == torch.float32
        assert torch.equal(teacher.averages[name], average)
    losses = go_on(other, second)
    if first == second:
        assert losses == go_on(system, first)


def of_the_first_version(criterion, model, dtype):
    """What the teacher that was a copy of the model saved."""
    teacher = criterion.teacher
    averages = teacher.averages
    state = {}
    for name, value in model.state_dict().items():
        state[f"module.{name}"] = averages[name].to(dtype) if name in averages else value.clone()
    for name, value in teacher.state_dict().items():
        if name.startswith("statistics/"):
            state[f"module.{name.removeprefix('statistics/').replace('/', '.')}"] = value
    if dtype == torch.bfloat16:
        for name, average in averages.items():
            state["average_" + name.replace(".", "__")] = average
    state["_extra_state"] = {"num_updates": teacher.num_updates, "streams": int(teacher.num_passes)}
    return {f"teacher.{key}": value for key, value in state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["load then attach", "attach then load"])
def test_checkpoints_of_the_first_version_load(dtype, order):
    system = trained(dtype)
    system.net[4].requires_grad_(False)  # it had copies of frozen parameters too
    old = of_the_first_version(system.criterion, system.net, dtype)
    model = make_model().to(dtype)
    model[4].requires_grad_(False)
    criterion = softlabels.BetaSmoothingLoss(ema_decay=0.8)
    if order == "load then attach":
        criterion.load_state_dict(old)
        criterion.attach(model)
    else:
        criterion.attach(model)
        criterion.load_state_dict(old)
    assert criterion.teacher.num_updates == 6
    own, wanted = criterion.state_dict(), system.criterion.state_dict()
    for key, value in own.items():
        assert torch.equal(value, wanted[key]), key
    assert "teacher.statistics/1/running_mean" in own


def test_a_teacher_on_its_own_is_saved_pickled_and_told_whom_to_follow():
    model = make_model()
    teacher = softlabels.EMATeacher(model, 0.8)
    with torch.no_grad():
        model[0].weight.normal_()
    teacher.update()
    twin = pickle.loads(pickle.dumps(teacher))
    assert twin.num_updates == 1
    assert repr(twin) == "EMATeacher(no model, decay=0.8, mode='train', num_updates=1)"
    with pytest.raises(RuntimeError, match=r"call follow\(model\)"):
        twin(torch.randn(8, 4))
    twin.load_state_dict(teacher.state_dict())
    twin.follow(model)
    assert torch.equal(twin.eval()(batches(1)[0][0]), teacher.eval()(batches(1)[0][0]))


def test_state_that_does_not_fit_says_what():
    system = trained()
    state = system.criterion.state_dict()
    other = softlabels.BetaSmoothingLoss().attach(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)))
    with pytest.raises(RuntimeError, match=r"size mismatch for teacher\.averages/1/weight"):
        other.load_state_dict(state)
    wide = softlabels.BetaSmoothingLoss().attach(nn.Linear(4, 5))
    narrow = softlabels.BetaSmoothingLoss().attach(nn.Linear(4, 3))
    with pytest.raises(RuntimeError, match=r"size mismatch for teacher\.averages/weight"):
        wide.load_state_dict(narrow.state_dict())
    lacking = {k: v for k, v in narrow.state_dict().items() if "bias" not in k}
    with pytest.raises(RuntimeError, match=r"Missing key.*teacher\.averages/bias"):
        narrow.load_state_dict(lacking)


@pytest.mark.parametrize("how", ["pickled", "copied", "saved whole"])
def test_copies_of_a_loss_say_that_they_are_copies(how, tmp_path):
    """As in ddp_spawn, skorch and sklearn's clone: attach again, and the average goes on."""
    system = trained()
    criterion = system.criterion
    if how == "pickled":
        criterion.generator = None  # torch's generators cannot be pickled
        twin = pickle.loads(pickle.dumps(criterion))
    elif how == "copied":
        twin = copy.deepcopy(criterion)
    else:
        criterion.generator = None
        buffer = io.BytesIO()
        torch.save(criterion, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert criterion.attached
    assert not twin.attached
    for again in (twin, copy.deepcopy(twin)):
        with pytest.raises(RuntimeError, match=r"call attach\(model\) of the copy"):
            again(torch.randn(8, 3), torch.zeros(8, dtype=torch.long))
    assert same(twin, criterion)
    twin.attach(system.net)
    assert twin.teacher.num_updates == 6
    assert twin.attach(system.net) is twin
    twin.detach()
    with pytest.raises(RuntimeError, match=r"add criterion\.attach\(model\)"):
        twin(torch.randn(8, 3), torch.zeros(8, dtype=torch.long))


def test_a_loss_that_is_not_attached_yet_keeps_what_was_loaded():
    """It is saved again as it is, and goes to whatever teacher attach brings; a frozen one needs none."""
    system = trained()
    state = {key: value for key, value in system.criterion.state_dict().items() if key.startswith("teacher.")}
    criterion = softlabels.SelfDistillationLoss()
    criterion.load_state_dict(state)
    assert not criterion.attached
    assert all(torch.equal(value, state[key]) for key, value in criterion.state_dict().items())
    with pytest.raises(RuntimeError, match=r"its parameter '0\.weight' of shape \(8, 4\) is gone"):
        criterion.attach(nn.Linear(4, 3))
    assert not criterion.attached
    teacher = softlabels.EMATeacher(system.net, 0.5)
    assert criterion.attach(system.net, teacher=teacher).teacher is teacher
    assert (teacher.num_updates, teacher.decay) == (6, 0.5)
    twin = copy.deepcopy(criterion).attach(system.net)
    assert (twin.teacher.num_updates, twin.teacher.decay) == (6, 0.5)
    frozen = softlabels.SelfDistillationLoss().attach(system.net, teacher=nn.Linear(4, 3))
    frozen.load_state_dict(state)
    assert not frozen.state_dict()
