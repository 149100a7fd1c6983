"""Programs that average, wrap and copy on their own; what the extra dev does not install is skipped."""

from __future__ import annotations

import functools
import typing

import pytest
import torch
from loops import MeanTeacher, assert_same_parameters, batches, make_model, train
from torch import nn

import softlabels

LOSSES = [getattr(softlabels, name) for name in softlabels.__all__ if name.endswith("Loss")]


class System(nn.Module):
    def __init__(self):
        super().__init__()
        self.criterion = softlabels.BetaSmoothingLoss(ema_decay=0.8)
        self.net = make_model()
        self.criterion.attach(self.net)

    def forward(self, x):
        return self.net(x)


@pytest.mark.filterwarnings("ignore")
def test_ema_pytorch_over_a_module_that_contains_the_loss():
    ema_pytorch = pytest.importorskip("ema_pytorch")
    system = System()
    average = ema_pytorch.EMA(system, beta=0.5, update_after_step=0, update_every=1)
    optimizer = torch.optim.SGD(system.net.parameters(), lr=0.1)
    train(system.net, system.criterion, optimizer, batches(4), average.update)
    assert system.criterion.teacher.num_updates == 4
    copy = dict(average.ema_model.net.named_parameters())
    assert copy.keys() == dict(system.net.named_parameters()).keys()
    assert not torch.equal(copy["0.weight"], system.net[0].weight)


@pytest.mark.parametrize("wrapped", [False, True])
def test_schedule_free(wrapped):
    schedulefree = pytest.importorskip("schedulefree")
    model = make_model()
    if wrapped:
        optimizer = schedulefree.ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=0.1), momentum=0.9)
    else:
        optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.01)
    optimizer.train()
    criterion, by_hand = softlabels.BetaSmoothingLoss(ema_decay=0.8).attach(model), MeanTeacher(model, 0.8)
    train(model, criterion, optimizer, batches(5), by_hand.step)
    assert criterion.teacher.num_updates == 5
    assert_same_parameters(criterion.teacher, by_hand)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = make_model()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    criterion = softlabels.BetaSmoothingLoss(ema_decay=0.8).attach(model, optimizer=optimizer)
    by_hand = MeanTeacher(model, 0.8)
    train(model, criterion, optimizer, batches(4), by_hand.step)
    assert criterion.teacher.num_updates == 4
    assert_same_parameters(criterion.teacher, by_hand)


@pytest.mark.filterwarnings("ignore")
def test_skorch_clones_the_loss():
    skorch = pytest.importorskip("skorch")

    class Net(skorch.NeuralNetClassifier):
        def initialize_criterion(self):
            super().initialize_criterion()
            self.criterion_.attach(self.module_)
            return self

        def get_loss(self, y_pred, y_true, *args, **kwargs):
            return self.criterion_(y_pred, y_true)

    net = Net(
        make_model(), criterion=softlabels.BetaSmoothingLoss, max_epochs=2, verbose=0, train_split=None, batch_size=8
    )
    x = torch.randn(32, 4)
    net.fit(x.numpy(), torch.randint(3, (32,)).numpy())
    assert net.criterion_.teacher.num_updates == 8


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_losses_have_no_annotations_that_others_cannot_evaluate(loss):
    """As fastai's BaseLoss, which takes over a loss's annotations, and reads them in a module of its own."""

    class BaseLoss:
        def __init__(self, loss, **options):
            self.func = loss(**options)
            functools.update_wrapper(self, self.func)

    options = {"beta": 0.1} if loss is softlabels.LabelSmoothingMAPLoss else {}
    wrapped = BaseLoss(loss, **options)
    assert all(not isinstance(hint, str) for hint in getattr(wrapped, "__annotations__", {}).values())
    for cls in loss.__mro__[:-2]:
        typing.get_type_hints(type("Elsewhere", (), {"__annotations__": dict(vars(cls).get("__annotations__", {}))}))
    assert wrapped.reduction == "mean"


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_a_model_is_scripted_after_attach():
    model = make_model().eval()
    criterion = softlabels.BetaSmoothingLoss().attach(model)
    x, y = batches(1)[0]
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(x), model(x))
    model.train()
    assert criterion(model(x), y).isfinite()
