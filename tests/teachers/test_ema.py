"""The EMA teacher on its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from softlabels import EMATeacher


def step(model, amount=0.1):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(amount)


def test_schedule_is_mean_teachers():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    teacher = EMATeacher(model, decay=0.7)
    value = 0.0
    for t in range(1, 8):
        nn.init.constant_(model.weight, float(t))
        teacher.update()
        d = min(1 - 1 / (t + 1), 0.7)
        value = d * value + (1 - d) * t
        assert teacher.module.weight.item() == pytest.approx(value, rel=1e-6)


def test_bfloat16_average_moves():
    """At a decay of 0.999 the change of a bfloat16 average rounds to nothing; a float32 one moves."""
    model = nn.Linear(3, 2).bfloat16()
    nn.init.zeros_(model.weight)
    teacher = EMATeacher(model, decay=0.999)
    teacher.num_updates = 5000  # long after the warm-up
    nn.init.ones_(model.weight)
    for _ in range(100):
        teacher.update()
    assert teacher.module.weight.dtype == torch.bfloat16
    wanted = 1 - 0.999**100
    torch.testing.assert_close(teacher.average_weight, torch.full((2, 3), wanted), rtol=1e-4, atol=0)
    torch.testing.assert_close(teacher.module.weight, torch.full((2, 3), wanted).bfloat16())
    assert teacher(torch.ones(1, 3).bfloat16()).dtype == torch.bfloat16
    twin = EMATeacher(model)
    twin.load_state_dict(teacher.state_dict())
    assert torch.equal(twin.average_weight, teacher.average_weight)
    assert twin.to(torch.float16).average_weight.dtype == torch.float32


def test_tied_and_frozen_parameters():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    teacher = EMATeacher(model, decay=0.9)
    assert teacher.module[1].weight is teacher.module[0].weight
    step(model)
    teacher.update()
    assert torch.equal(teacher.module[2].weight, model[2].weight)  # frozen: copied exactly
    assert not torch.equal(teacher.module[0].weight, model[0].weight)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_modes_and_buffers(mode):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    teacher = EMATeacher(model, mode=mode)
    model(torch.randn(16, 3) + 5)
    teacher.update()
    same = torch.equal(teacher.module[1].running_mean, model[1].running_mean)
    assert same == (mode == "eval")
    assert teacher.module.training == (mode == "train")
    x = torch.randn(8, 3)
    assert torch.equal(teacher(x), teacher(x)) == (mode == "eval")
    assert teacher.train(mode != "train") is teacher
    assert teacher.module.training == (mode == "train")


def test_dropout_leaves_the_generator_alone(monkeypatch):
    """Those of accelerators that are not in use, too, which torch.manual_seed would seed, and slowly."""
    teacher = EMATeacher(nn.Dropout(0.5))
    monkeypatch.setattr(torch, "manual_seed", None)
    before = torch.get_rng_state()
    one, two = teacher(torch.ones(50)), teacher(torch.ones(50))
    assert not torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_graph_and_no_hooks_of_its_own():
    model = nn.Linear(3, 2)
    model.weight.grad = torch.ones_like(model.weight)
    teacher = EMATeacher(model)
    assert not teacher(torch.randn(2, 3, requires_grad=True)).requires_grad
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_follows_a_changed_model_or_says_why_not():
    model = nn.Linear(3, 2)
    teacher = EMATeacher(model)
    model.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    with pytest.raises(RuntimeError, match=r"parameters have changed since the EMATeacher was made: \['extra'\]"):
        teacher.update()


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        EMATeacher(nn.Linear(1, 1), decay=1.0)
    with pytest.raises(ValueError, match="mode must be one of 'train', 'eval', got 'both'"):
        EMATeacher(nn.Linear(1, 1), mode="both")
    with pytest.raises(TypeError, match="model must be"):
        EMATeacher("model")
    with pytest.raises(ValueError, match="not initialised yet, 'weight'; run one forward pass"):
        EMATeacher(nn.LazyLinear(3))
