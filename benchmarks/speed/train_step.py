"""What a loss costs in a whole training step, against nn.CrossEntropyLoss: of a ResNet-18, or of a tiny network.

Each loss trains a model of its own, all start equal, and each step is timed between two steps of cross-entropy. Beside
the step as a whole, the parts that a loss adds are timed alone, so that the table says where the time goes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import softlabels
from benchmarks.speed.timing import Measurement, Run, compare, keep_freed_memory
from softlabels.ranking import log_odds

TITLE = "Cost of a loss in a training step"
LOSSES: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "nn.CrossEntropyLoss": lambda model, samples: nn.CrossEntropyLoss(),
    "BetaSmoothingLoss, ema": lambda model, samples: softlabels.BetaSmoothingLoss().attach(model),
    "BetaSmoothingLoss, history": lambda model, samples: softlabels.BetaSmoothingLoss(
        ranking="history", num_samples=samples
    ),
    "BetaSmoothingLoss, batch": lambda model, samples: softlabels.BetaSmoothingLoss(ranking="batch"),
}
BASE = "nn.CrossEntropyLoss"


class BasicBlock(nn.Module):
    """The residual block of ResNet-18, with a projection where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet18(num_classes: int = 100) -> nn.Sequential:
    """ResNet-18 with the 3 x 3 stem for 32 x 32 images."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    channels_in = 64
    for stage, channels in enumerate((64, 128, 256, 512)):
        for block in range(2):
            layers.append(BasicBlock(channels_in, channels, 2 if stage and not block else 1))
            channels_in = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes))


def mlp() -> nn.Sequential:
    """One hidden layer, for 8 x 8 digits."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def many() -> nn.Sequential:
    """Many small layers: 500 parameters, whose exchange is what a teacher's pass costs."""
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(249)), nn.Linear(8, 10))


class Idle(nn.Module):
    """Has the weights of a model and does nothing, so that a teacher's pass is the exchange of the weights alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the input."""
        return x


MODELS: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...], int]] = {
    "resnet18": ("ResNet-18 for 32 x 32 images", resnet18, (3, 32, 32), 100),
    "many": ("A network of 250 layers of 8 units", many, (8,), 10),
    "mlp": ("A perceptron of 64, 64 and 10 units", mlp, (64,), 10),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--model", choices=list(MODELS), default="resnet18", help="network to train")
    parser.add_argument("--batch-size", type=int, default=128, help="images per step")
    parser.add_argument("--rounds", type=int, default=16, help="repetitions")


def describe(options: argparse.Namespace) -> str:
    """What was measured."""
    return (
        f"{MODELS[options.model][0]}, batch {options.batch_size}, each step timed {options.rounds} times between two "
        "of the base."
    )


def measure(options: argparse.Namespace) -> dict[str, dict[str, Measurement]]:
    """Time whole steps of every loss, and the parts of the EMA's cost."""
    device, batch_size, rounds = options.device, options.batch_size, options.rounds
    if options.malloc == "keep":
        keep_freed_memory()
    torch.manual_seed(0)
    samples = 50 * batch_size
    _, make_model, shape, classes = MODELS[options.model]
    initial = make_model().to(device)
    images = torch.randn(batch_size, *shape, device=device)
    labels = torch.randint(classes, (batch_size,), device=device)
    index = torch.randperm(samples, device=device)[:batch_size]
    precision: Callable[[], Any] = contextlib.nullcontext
    if device.type != "cpu":
        if images.dim() == 4:
            initial = initial.to(memory_format=torch.channels_last)
            images = images.to(memory_format=torch.channels_last)
        precision = lambda: torch.autocast(device.type, dtype=torch.bfloat16)  # noqa: E731

    def make_step(name: str) -> tuple[Run, nn.Module]:
        model = copy.deepcopy(initial)
        criterion = LOSSES[name](model, samples)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        call = {"index": index} if "history" in name else {}

        def step() -> None:
            with precision():
                loss = criterion(model(images), labels, **call)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step, criterion

    steps: dict[str, Run] = {}
    criteria: dict[str, nn.Module] = {}
    for name in LOSSES:
        steps[name], criteria[name] = make_step(name)
    teacher = criteria["BetaSmoothingLoss, ema"].teacher
    logits = torch.randn(batch_size, classes, device=device)

    def teacher_pass() -> None:
        with precision():
            teacher(images)

    idle = Idle(copy.deepcopy(initial))
    exchanging = softlabels.EMATeacher(idle)
    exchanging.update()
    parts: dict[str, Run] = {
        "part: teacher's forward pass": teacher_pass,
        "part: exchange of the weights": lambda: exchanging(images),
        "part: EMA update": teacher.update,
        "part: scores of the batch": lambda: log_odds(logits, labels, "max"),
    }
    whole = compare(steps, rounds, device, warmup=1)
    alone = compare({BASE: steps[BASE], **parts}, max(rounds // 4, 1), device, warmup=0)
    return {"step, or part of one": {**whole, **{name: alone[name] for name in parts}}}
