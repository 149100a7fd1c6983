"""DenseNet-BC of Huang et al. (2017) for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Layer(nn.Module):
    """Bottleneck to 4 ``width`` channels, then ``width`` new ones beside those that came in."""

    def __init__(self, channels_in: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, 4 * width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * width)
        self.conv2 = nn.Conv2d(4 * width, width, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        y = self.conv1(functional.relu(self.norm1(x)))
        y = self.conv2(functional.relu(self.norm2(y)))
        return torch.cat([x, y], 1)


class Transition(nn.Module):
    """Halve the channels (compression 0.5), height and width."""

    def __init__(self, channels_in: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels_in)
        self.conv = nn.Conv2d(channels_in, channels_in // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the transition."""
        return functional.avg_pool2d(self.conv(functional.relu(self.norm(x))), 2)


class DenseNet(nn.Module):
    """DenseNet-BC of depth 6n + 4: three dense blocks of n bottlenecked layers.

    Args:
        depth: 40, 100, ...; 100 with width 12 is the paper's.
        num_classes: Size of the output.
        channels: Channels of the images.
        width: Growth rate.
    """

    def __init__(self, depth: int, num_classes: int, channels: int = 3, width: int = 12) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4 (10, 16, ..., 40, 100), got {depth}")
        count = 2 * width
        parts: list[nn.Module] = [nn.Conv2d(channels, count, 3, 1, 1, bias=False)]
        for block in range(3):
            for _ in range((depth - 4) // 6):
                parts.append(Layer(count, width))
                count += width
            if block < 2:
                parts.append(Transition(count))
                count //= 2
        self.features = nn.Sequential(*parts, nn.BatchNorm2d(count), nn.ReLU(inplace=True))
        self.head = nn.Linear(count, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, channels, height, width)."""
        return self.head(self.features(x).mean((2, 3)))
