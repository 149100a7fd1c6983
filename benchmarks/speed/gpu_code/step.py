"""What an EMA teacher adds to a training step, counted in operations of torch: each starts at least one kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.speed.gpu_code.build import BYTES_PER_SECOND
from benchmarks.speed.gpu_code.recorder import Recorder
from benchmarks.speed.train_step import resnet18
from softlabels import BetaSmoothingLoss

IMAGES = 2  # the number of operations does not depend on it


@dataclass(frozen=True)
class Part:
    """One part of a step: operations, and bytes of weights and their averages that it moves."""

    operations: int
    bytes: int

    @property
    def milliseconds(self) -> float:
        """In which an H200's memory moves so many bytes."""
        return 1e3 * self.bytes / BYTES_PER_SECOND


def parts() -> dict[str, Part]:
    """The parts of a training step of a ResNet-18 in float32, by SGD with momentum, on tensors of a CPU."""
    plain, model = resnet18(), resnet18()
    criterion = BetaSmoothingLoss(ranking="ema").attach(model)
    teacher = criterion.teacher
    teacher.update()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
    images, labels = torch.randn(IMAGES, 3, 32, 32), torch.zeros(IMAGES, dtype=torch.int64)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())

    def train(network: nn.Module) -> None:
        nn.functional.cross_entropy(network(images), labels).backward()

    for network in (plain, model):
        train(network)  # from now on there are gradients to add to
    optimizer.step()  # makes its state
    own = _operations(lambda: train(plain))
    return {
        "model, forward and backward": Part(own, 0),
        "optimizer: SGD with momentum": Part(_operations(optimizer.step), 7 * weights),
        "teacher: noting the model's pass": Part(_operations(lambda: train(model)) - own, 0),
        "teacher: update of the averages": Part(_operations(teacher.update), 5 * weights),
        "teacher: forward pass": Part(_operations(lambda: teacher(images)), 0),
    }


def _operations(run: Callable[[], object]) -> int:
    recorder = Recorder(rows=1, classes=2**40)
    recorder.counts_cpu = True
    with recorder:
        run()
    return sum(event.kernels for event in recorder.taken())
