"""Networks by name: ``make(ModelSpec("resnet18"), num_classes, channels)``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from benchmarks.paper.models.densenet import DenseNet
from benchmarks.paper.models.resnet import CIFARResNet, ResNet

Maker = Callable[..., nn.Module]

# name: (what makes it of num_classes, channels and width, its published width)
MODELS: dict[str, tuple[Maker, int]] = {
    "resnet8": (functools.partial(CIFARResNet, 8), 16),  # the smallest of the family; not published
    "resnet20": (functools.partial(CIFARResNet, 20), 16),
    "resnet56": (functools.partial(CIFARResNet, 56), 16),
    "resnet18": (functools.partial(ResNet, (2, 2, 2, 2)), 64),
    "resnet34": (functools.partial(ResNet, (3, 4, 6, 3)), 64),
    "resnet18-imagenet": (functools.partial(ResNet, (2, 2, 2, 2), imagenet_stem=True), 64),
    "resnet34-imagenet": (functools.partial(ResNet, (3, 4, 6, 3), imagenet_stem=True), 64),
    "densenet10": (functools.partial(DenseNet, 10), 12),  # not published
    "densenet40": (functools.partial(DenseNet, 40), 12),
    "densenet100": (functools.partial(DenseNet, 100), 12),
}
FLAT = ("resnet8", "resnet20", "resnet56", "resnet18", "resnet34")  # those that also exist for images of height 1


@dataclass(frozen=True)
class ModelSpec:
    """Name and width of a network; None is the published width (channels of the first stage, or growth rate)."""

    name: str
    width: int | None = None

    def __post_init__(self) -> None:
        """Check both."""
        if self.name not in MODELS:
            raise ValueError(f"model must be one of {', '.join(MODELS)}, got {self.name!r}")
        if self.width is not None and self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")


def make(spec: ModelSpec, num_classes: int, channels: int, flat: bool = False) -> nn.Module:
    """Build a network with fresh weights from torch's default generator; ``flat``: for images of height 1."""
    maker, width = MODELS[spec.name]
    options = {"flat": True} if flat else {}
    return maker(
        num_classes=num_classes, channels=channels, width=width if spec.width is None else spec.width, **options
    )
