"""Programs that average, wrap and copy on their own; what the extra dev does not install is skipped."""

from __future__ import annotations

import copy
import functools
import importlib.util
import pickle
import sys
import types
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
    averages = dict(average.ema_model.net.named_parameters())
    assert averages.keys() == dict(system.net.named_parameters()).keys()
    assert not torch.equal(averages["0.weight"], system.net[0].weight)


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
    copies = [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), criterion.teacher.averaged_model()]
    for scripted in (*copies, copy.deepcopy(nn.Sequential(model)), copy.deepcopy(copies[2])):
        assert torch.equal(torch.jit.script(scripted)(x), model(x))
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script\(copy\.deepcopy\(module\)\)"):
        torch.jit.script(nn.Sequential(model))  # where torch leaves what it scripts in the place of the model
    model.train()
    assert criterion(model(x), y).isfinite()


@pytest.mark.filterwarnings("ignore")
def test_fastai_whose_optimizer_is_its_own(monkeypatch):
    if importlib.util.find_spec("fasthtml") is None:  # with which fastai draws progress bars
        for name in ("fasthtml", "fasthtml.common"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    model = make_model()
    optimizer = pytest.importorskip("fastai.optimizer").SGD(model.parameters(), lr=0.1, mom=0.9)
    assert not isinstance(optimizer, torch.optim.Optimizer)
    criterion, by_hand = softlabels.BetaSmoothingLoss(ema_decay=0.8).attach(model), MeanTeacher(model, 0.8)
    train(model, criterion, optimizer, batches(5), by_hand.step)
    model(batches(1)[0][0])  # a change of the weights is seen at the next pass
    assert criterion.teacher.num_updates == 5
    assert_same_parameters(criterion.teacher, by_hand)


class Tabular(nn.Module):
    """As a model of pytorch_tabular, which takes a column of the labels, and as many of the logits."""

    def __init__(self, loss):
        super().__init__()
        self.net, self.loss = make_model(), loss

    def forward(self, batch):
        return {"logits": self.net(batch["continuous"])}

    def training_step(self, batch):
        return self.loss(self(batch)["logits"][:, 0:3], batch["target"][:, 0])


def test_a_loss_that_the_model_would_make_a_part_of_itself():
    model = Tabular(softlabels.BetaSmoothingLoss())
    with pytest.raises(ValueError, match="is itself a part of the model; attach it to the submodule"):
        model.loss.attach(model)
    model = Tabular(nn.CrossEntropyLoss())
    criterion, by_hand = softlabels.BetaSmoothingLoss(ema_decay=0.8).attach(model), MeanTeacher(model, 0.8)
    del model.loss
    model.loss = lambda logits, labels: criterion(logits, labels)  # a function is no part
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in batches(5):
        optimizer.zero_grad()
        model.training_step({"continuous": x, "target": y[:, None]}).backward()
        optimizer.step()
        by_hand.step()
    assert criterion.teacher.num_updates == 5
    assert_same_parameters(criterion.teacher, by_hand)
    assert not any("loss" in name for name in model.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_the_weight_averaging_of_lightning_over_a_module_that_holds_the_loss(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("of Lightning 2.6")

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.criterion, self.net = softlabels.BetaSmoothingLoss(ema_decay=0.8), make_model()
            self.criterion.attach(self.net)

        def training_step(self, batch, _):
            x, y = batch
            return self.criterion(self.net(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    module = Lit()
    by_hand = MeanTeacher(module.net, 0.8)

    class Compared(callbacks.EMAWeightAveraging):
        def on_train_batch_end(self, *args):
            by_hand.step()
            super().on_train_batch_end(*args)

        def on_train_end(self, *args):
            average = self._average_model.module.net  # of the weights of the net alone, and its own buffers
            assert average.state_dict().keys() == module.net.state_dict().keys()
            assert not torch.equal(average[0].weight, module.net[0].weight)
            assert module.criterion.teacher.num_updates == 5
            assert_same_parameters(module.criterion.teacher, by_hand)
            seen.append(True)

    seen = []
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[Compared(decay=0.9)],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches(5), batch_size=None))
    assert seen == [True]
