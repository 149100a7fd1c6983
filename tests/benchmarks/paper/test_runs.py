"""Training runs: the recipe, pairing by seed, what a method's labels are made with, and that runs repeat."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import softlabels
from benchmarks.paper import methods
from benchmarks.paper.data import DataSpec, load
from benchmarks.paper.data.dataset import Data, Normalise, Split
from benchmarks.paper.methods import Task, make_criterion
from benchmarks.paper.models import ModelSpec, make
from benchmarks.paper.recipe import Recipe, evaluate, predict, train
from benchmarks.paper.runs import Run, execute, sample_weight_spread
from softlabels.metrics import reliability_curve

SHORT = Recipe(epochs=2, batch_size=64)
CE = Run(DataSpec("digits"), ModelSpec("resnet8", 4), SHORT, methods.cross_entropy())
STUDENTS = {
    "matched": methods.self_distillation(temperature=2.0),
    "pruned": methods.self_distillation(temperature=2.0, prune=0.5),
    "both": methods.self_distillation(temperature=2.0, scale_student=True),
}
OTHERS = {
    "label smoothing": methods.label_smoothing(),
    "ema": methods.beta_smoothing(ema_decay=0.9),
    "true class": methods.beta_smoothing(ema_decay=0.9, rank_by="true_class"),
    "history": methods.beta_smoothing(ema_decay=0.9, ranking="history"),
    "random": methods.beta_smoothing(ema_decay=0.9, ranking="random"),
    "batch": methods.beta_smoothing(ema_decay=0.9, ranking="batch"),
}
RIVALS = {
    "average": methods.average_distillation(0.6, ema_decay=0.9),
    "online": methods.online_label_smoothing(0.5),
    "progressive": methods.progressive_distillation(0.8),
    "early": methods.early_learning(3.0),
}
EVERY = {"cross-entropy": CE.method, **STUDENTS, **OTHERS, **RIVALS}


def numbers(record):
    return {name: value for name, value in record.items() if name not in ("seconds", "cpu_seconds")}


@pytest.fixture(scope="module")
def data():
    return load(DataSpec("digits"))


@pytest.fixture(scope="module")
def weights():
    return execute(CE, save=True)[1]


@pytest.mark.parametrize("name", EVERY)
def test_runs_repeat_bit_for_bit(name, weights):
    run = dataclasses.replace(CE, method=EVERY[name], teacher=CE if name in STUDENTS else None)
    first, second = (numbers(execute(run, weights)[0]) for _ in range(2))
    assert first == second
    assert first["key"] == run.key
    assert len(first["epochs"]) == 2
    other = numbers(execute(dataclasses.replace(run, seed=1), weights)[0])
    assert other["test"] != first["test"]


def test_methods_are_paired(data):
    """The weights that training starts from, and every batch that it sees, are those of cross-entropy."""
    seen = {}

    class Watch(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.batches = model, []

        def forward(self, x):
            if self.training:
                self.batches.append(x.clone())
            return self.model(x)

    for name, method in EVERY.items():
        torch.manual_seed(5)
        model = Watch(make(ModelSpec("resnet8", 4), 10, 1))
        start = {key: value.clone() for key, value in model.state_dict().items()}
        teacher = make(ModelSpec("resnet8", 4), 10, 1)
        logits = torch.randn(len(data.train), 10)
        criterion = make_criterion(method, Task(model, 10, data.train.labels, teacher, logits))
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in start.items())
        train(model, criterion, data, Recipe(epochs=1, batch_size=64), seed=5)
        seen[name] = start, model.batches
    reference = seen["cross-entropy"]
    for start, batches in seen.values():
        assert all(torch.equal(value, reference[0][key]) for key, value in start.items())
        assert len(batches) == len(reference[1]) == len(data.train) // 64
        assert all(torch.equal(a, b) for a, b in zip(batches, reference[1], strict=True))


def test_recipe_is_sgd_with_steps(data, monkeypatch):
    """Against a plain loop over one batch per epoch, written out."""
    recipe = Recipe(
        epochs=4, batch_size=810, lr=0.05, momentum=0.8, weight_decay=1e-3, milestones=(0.5,), lr_factor=0.2, padding=0
    )
    torch.manual_seed(0)
    model = make(ModelSpec("resnet8", 4), 10, 1)
    twin = make(ModelSpec("resnet8", 4), 10, 1)
    twin.load_state_dict(model.state_dict())
    history = train(model, nn.CrossEntropyLoss(), data, dataclasses.replace(recipe, channels_last=False), seed=0)

    images, labels = Normalise(data.train.images)(data.train.images), data.train.labels
    buffers = [torch.zeros_like(p) for p in twin.parameters()]
    generator = torch.Generator().manual_seed(0)
    for epoch in range(4):
        order = torch.randperm(810, generator=generator)
        twin.train()
        loss = nn.functional.cross_entropy(twin(images[order]), labels[order])
        assert loss.item() == pytest.approx(history[epoch]["loss"], rel=1e-4)
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        lr = 0.05 if epoch < 2 else 0.01
        with torch.no_grad():
            for p, gradient, buffer in zip(twin.parameters(), gradients, buffers, strict=True):
                buffer.mul_(0.8).add_(gradient + 1e-3 * p)
                p.sub_(lr * buffer)


def test_the_best_epoch_is_kept(data):
    model = make(ModelSpec("resnet8", 4), 10, 1)
    recipe = Recipe(epochs=6, batch_size=32, lr=0.3)
    history = train(model, nn.CrossEntropyLoss(), data, recipe, seed=0)
    logits = predict(model, data.validation, Normalise(data.train.images), recipe)
    assert evaluate(logits, data.validation.labels)["accuracy"] == max(epoch["accuracy"] for epoch in history)


def test_training_that_diverges_or_cannot_start_says_so(data):
    model = make(ModelSpec("resnet8", 4), 10, 1)
    with pytest.raises(FloatingPointError, match=r"loss of epoch \d+ is (nan|inf); try a smaller lr than 1e\+30"):
        train(model, nn.CrossEntropyLoss(), data, Recipe(epochs=5, lr=1e30), seed=0)
    with pytest.raises(ValueError, match="batch_size=811 is more than the 810 training samples of digits"):
        dataclasses.replace(CE, recipe=Recipe(epochs=1, batch_size=811))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch.compile's own, which it hides
@pytest.mark.parametrize("method", [STUDENTS["matched"], OTHERS["ema"]])
def test_compiled_network_learns_the_same(method, data):
    """The option for accelerators, here with the CPU's compiler; autocast too."""
    finals = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        model = make(ModelSpec("resnet8", 4), 10, 1)
        teacher, logits = make(ModelSpec("resnet8", 4), 10, 1), torch.randn(len(data.train), 10)
        criterion = make_criterion(method, Task(model, 10, data.train.labels, teacher, logits))
        recipe = Recipe(epochs=1, batch_size=256, compile=compiled, lr=0.01)
        finals[compiled] = train(model, criterion, data, recipe, seed=0)[0]["loss"]
    assert finals[True] == pytest.approx(finals[False], rel=1e-4)


def test_autocast(data):
    model = make(ModelSpec("resnet8", 4), 10, 1)
    criterion = make_criterion(OTHERS["ema"], Task(model, 10, data.train.labels))
    history = train(model, criterion, data, Recipe(epochs=2, batch_size=64, bf16=True), seed=0)
    assert history[1]["loss"] < history[0]["loss"]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_smoothing_is_matched():
    """Every method gives the true class 0.85 on average, as in sec. 7.1."""
    torch.manual_seed(0)
    labels = torch.randint(10, (500,))
    logits = 3 * torch.randn(500, 10)
    logits[torch.arange(500), labels] += 6.0
    task = Task(nn.Linear(4, 10), 10, labels, nn.Linear(4, 10), logits)
    smoothing = make_criterion(methods.label_smoothing(), task).label_smoothing
    assert 1 - smoothing + smoothing / 10 == pytest.approx(0.85)
    distillation = make_criterion(methods.self_distillation(), task)
    soft = softlabels.functional.distillation_targets(labels, logits, alpha=0.6, temperature=distillation.temperature)
    assert soft[torch.arange(500), labels].mean().item() == pytest.approx(0.85, abs=1e-5)
    beta = make_criterion(methods.beta_smoothing(ema_decay=0.9), task)
    assert 0.4 + 0.6 * beta.concentration_for(10) / (beta.concentration_for(10) + 1) == pytest.approx(0.85)


@pytest.mark.parametrize("weighting", ["exact", "normalized", "none"])
def test_eq_9_has_the_share_of_eq_3(weighting):
    """Averaged over the training set, the hard label has the share alpha under every weighting."""
    torch.manual_seed(0)
    labels = torch.randint(10, (500,))
    logits = torch.randn(500, 10)
    logits[torch.arange(500), labels] += 4.0
    task = Task(nn.Linear(4, 10), 10, labels, nn.Linear(4, 10), logits)
    criterion = make_criterion(methods.dirichlet_map(weighting), task)
    _, weight = softlabels.functional.dirichlet_map_targets(
        labels, logits, beta=criterion.beta, temperature=criterion.temperature, sample_weighting=weighting
    )
    assert 1.0 / weight.mean().item() == pytest.approx(0.6, rel=1e-4)


def test_spread_of_sample_weights():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(7.0)]])
    spread = sample_weight_spread(logits, temperature=1.0)
    assert spread["variation"] == pytest.approx(2 / 6)  # S is 4 and 8
    assert spread["effective_share"] == pytest.approx(12**2 / (2 * (4**2 + 8**2)))
    moved = sample_weight_spread(logits + torch.tensor([[5.0], [0.0]]), temperature=1.0)
    assert moved["centred_variation"] == pytest.approx(spread["centred_variation"])
    assert moved["variation"] != pytest.approx(spread["variation"])


def test_evaluation_is_in_the_units_of_the_table():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 4.0], [3.0, 0.0], [1.0, 0.0]]), torch.zeros(5).long()
    values = evaluate(logits, labels)
    assert values["accuracy"] == pytest.approx(60.0)
    assert values["ece"] == pytest.approx(100 * reliability_curve(logits, labels).error().item())
    assert values["nll"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item())


def test_key_is_of_everything_that_decides_the_numbers():
    student = Run(CE.data, CE.model, SHORT, STUDENTS["matched"], CE)
    keys = {CE.key, student.key, student.repeated(1).key}
    for name, value in {
        "data": DataSpec("digits", train_size=100),
        "model": ModelSpec("resnet8", 8),
        "recipe": dataclasses.replace(SHORT, lr=0.05),
        "method": STUDENTS["pruned"],
        "teacher": CE.repeated(7),
        "seed": 3,
        "device": "cuda",
    }.items():
        keys.add(dataclasses.replace(student, **{name: value}).key)
    assert len(keys) == 10
    moved = dataclasses.replace(student, teacher=CE.repeated(100)).repeated(3)
    assert (moved.seed, moved.teacher.seed) == (3, 103)


def test_what_smoothing_is_matched_to_is_in_the_key():
    for method in (methods.self_distillation(), methods.dirichlet_map("none")):
        other = {**method.options, "temperature": methods.matched(0.9)}
        changed = dataclasses.replace(CE, method=methods.Method(method.name, other))
        assert changed.key != dataclasses.replace(CE, method=method).key


def test_small_sets_in_data_are_whole():
    split = Split(torch.zeros(70, 1, 8, 8, dtype=torch.uint8), torch.arange(70) % 10)
    tiny = Data(10, split, split, split, padding=1, flip=False)
    model = make(ModelSpec("resnet8", 4), 10, 1)
    history = train(model, nn.CrossEntropyLoss(), tiny, Recipe(epochs=1, batch_size=70), seed=0)
    assert math.isfinite(history[0]["loss"])
