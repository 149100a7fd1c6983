"""The EMA teacher on its own."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from loops import MeanTeacher, batches, make_model, train
from torch import nn
from torch.nn.utils import prune

from softlabels import EMATeacher, SelfDistillationLoss


def step(model, amount=0.1):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(amount)


@pytest.mark.parametrize("warmup", [1, 2.5])
def test_schedule_is_mean_teachers(warmup):
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    teacher = EMATeacher(model, decay=0.7, warmup=warmup)
    value = 0.0
    for t in range(1, 8):
        nn.init.constant_(model.weight, float(t))
        teacher.update()
        d = min(1 - warmup / (t + warmup), 0.7)
        value = d * value + (1 - d) * t
        assert teacher.averages["weight"].item() == pytest.approx(value, rel=1e-6)


def test_bfloat16_average_moves():
    """At a decay of 0.999 the change of a bfloat16 average rounds to nothing; a float32 one moves."""
    model = nn.Linear(3, 2, bias=False).bfloat16()
    nn.init.zeros_(model.weight)
    teacher = EMATeacher(model, decay=0.999)
    teacher._num_updates = 5000  # long after the warm-up
    nn.init.ones_(model.weight)
    for _ in range(100):
        teacher.update()
    wanted = 1 - 0.999**100
    torch.testing.assert_close(teacher.averages["weight"], torch.full((2, 3), wanted), rtol=1e-4, atol=0)
    assert torch.equal(teacher(torch.eye(3).bfloat16()), torch.full((3, 2), wanted).bfloat16())
    twin = EMATeacher(model)
    twin.load_state_dict(teacher.state_dict())
    assert torch.equal(twin.averages["weight"], teacher.averages["weight"])
    assert twin.to(torch.float16).averages["weight"].dtype == torch.float32


def test_tied_and_frozen_parameters():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    teacher = EMATeacher(model, decay=0.9)
    assert list(teacher.averages) == ["0.weight", "0.bias", "1.bias"]  # tied: once; frozen: none
    by_hand = MeanTeacher(model, 0.9)
    step(model)
    teacher.update()
    by_hand.step()
    with torch.no_grad():
        by_hand.ema[2].load_state_dict(model[2].state_dict())
    x = torch.randn(4, 3)
    assert torch.equal(teacher(x), by_hand.ema(x))
    assert not torch.equal(teacher(x), model(x))


def test_a_layer_that_is_trained_later():
    """It was its own average until then."""
    model = make_model()
    model[0].requires_grad_(False)
    criterion = SelfDistillationLoss().attach(model, teacher=EMATeacher(model, 0.8))
    by_hand = MeanTeacher(model, 0.8)
    train(model, criterion, torch.optim.SGD(model[4].parameters(), lr=0.1), batches(3), by_hand.step)
    model[0].requires_grad_(True)
    train(model, criterion, torch.optim.SGD(model.parameters(), lr=0.1), batches(3), by_hand.step)
    torch.testing.assert_close(criterion.teacher.averages, dict(by_hand.ema.named_parameters()), check_dtype=False)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_modes_and_buffers(mode):
    """In mode "train" the model's modes, and running statistics of its own; else eval mode with the model's."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    teacher = EMATeacher(model, mode=mode)
    twin = copy.deepcopy(model)
    x, other = torch.randn(16, 3), torch.randn(16, 3) + 5
    teacher(x)
    twin(x)
    model(other)
    model.eval()
    teacher.update()
    assert torch.equal(teacher(x), (twin if mode == "train" else model).eval()(x))
    model.train()
    assert torch.equal(teacher(x), teacher(x)) == (mode == "eval")
    assert torch.equal(teacher.eval()(x), teacher(x))  # evaluate(teacher)
    assert all(module.training for module in model.modules())
    assert torch.equal(teacher.train()(x), teacher(x)) == (mode == "eval")


def test_dropout_leaves_the_generator_alone(monkeypatch):
    """Those of accelerators that are not in use, too, which torch.manual_seed would seed, and slowly."""
    model = nn.Dropout(0.5)
    teacher = EMATeacher(model)
    monkeypatch.setattr(torch, "manual_seed", None)
    before = torch.get_rng_state()
    one, two = teacher(torch.ones(50)), teacher(torch.ones(50))
    assert not torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_graph_and_nothing_to_train():
    model = nn.Linear(3, 2)
    teacher = EMATeacher(model)
    step(model)
    teacher.update()
    assert not teacher(torch.randn(2, 3, requires_grad=True)).requires_grad
    assert not [*teacher.parameters(), *teacher.buffers(), *teacher.children()]
    assert model.weight.requires_grad
    with torch.inference_mode():
        assert teacher(torch.randn(2, 3)).shape == (2, 2)
    model(torch.randn(2, 3)).sum().backward()


CHANGES = {
    "a new head": (
        lambda model: model.__setitem__(1, nn.Linear(4, 5)),
        "'1.weight' of shape (2, 4) has shape (5, 4) now",
    ),
    "a layer gone": (lambda model: model.__delitem__(1), "'1.weight' of shape (2, 4) is gone"),
    "a pruned layer": (
        lambda model: prune.l1_unstructured(model[0], "weight", 0.5),
        "'0.weight' of shape (4, 3) is gone",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_raises_before_anything_is_written(name):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    teacher = EMATeacher(model)
    teacher.update()
    before = {name: average.clone() for name, average in teacher.averages.items()}
    change, words = CHANGES[name]
    change(model)
    weights = copy.deepcopy(model.state_dict())
    for look in (teacher.update, lambda: teacher(torch.randn(2, 3))):
        with pytest.raises(
            RuntimeError, match=re.escape(words) + r".* criterion\.detach\(\) and criterion\.attach\(model\)"
        ):
            look()
    assert teacher.num_updates == 1
    assert all(torch.equal(average, before[name]) for name, average in teacher.averages.items())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    teacher.restart()
    assert teacher(torch.randn(2, 3)).isfinite().all()


def test_parameters_that_are_added_are_averaged_from_then_on():
    model = nn.Sequential(nn.Linear(3, 4))
    teacher = EMATeacher(model)
    teacher.update()
    model.append(nn.Linear(4, 2))
    assert teacher(torch.randn(2, 3)).shape == (2, 2)
    teacher.update()
    assert torch.equal(teacher.averages["1.weight"], model[1].weight)


def test_another_module_in_the_models_place():
    """In another precision, say: it gets the averages, and the model is not touched."""
    model = nn.Linear(3, 2)
    own = nn.Linear(3, 2).bfloat16()
    teacher = EMATeacher(model, module=own)
    step(model)
    teacher.update()
    x = torch.randn(4, 3).bfloat16()
    wanted = nn.functional.linear(x, *(average.bfloat16() for average in teacher.averages.values()))
    before = copy.deepcopy(own.state_dict())
    assert torch.equal(teacher(x), wanted)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    assert not list(teacher.parameters())
    with pytest.raises(ValueError, match="module does not have the parameters of model"):
        EMATeacher(model, module=nn.Sequential(own))
    with pytest.raises(TypeError, match="module must be"):
        EMATeacher(model, module="own")


def test_averaged_model():
    """A plain module: no hooks, no gradients, eval mode, running statistics of the average; it can be pickled."""
    model = make_model()
    criterion = SelfDistillationLoss().attach(model, teacher=EMATeacher(model, 0.8))
    train(model, criterion, torch.optim.SGD(model.parameters(), lr=0.1), batches(3))
    before = copy.deepcopy(model.state_dict())
    average = criterion.teacher.averaged_model()
    x = torch.randn(8, 4)
    assert torch.equal(average(x), criterion.teacher.eval()(x))
    assert type(average) is nn.Sequential
    assert not any(module.training for module in average.modules())
    assert all(p.requires_grad and p.grad is None for p in average.parameters())
    assert not torch.equal(average[1].running_mean, model[1].running_mean)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert b"softlabels" not in pickle.dumps(average)
    model.forward = lambda x: 2 * nn.Sequential.forward(model, x)
    assert torch.equal(criterion.teacher(x), 2 * average(x))
    with pytest.raises(RuntimeError, match=r"forward of Sequential was replaced by a function, .* teacher\.eval\(\)"):
        criterion.teacher.averaged_model()


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        EMATeacher(nn.Linear(1, 1), decay=1.0)
    with pytest.raises(ValueError, match="mode must be one of 'train', 'eval', got 'both'"):
        EMATeacher(nn.Linear(1, 1), mode="both")
    with pytest.raises(TypeError, match="model must be"):
        EMATeacher("model")
    with pytest.raises(ValueError, match="not initialised yet, 'weight'; run one forward pass"):
        EMATeacher(nn.LazyLinear(3))
