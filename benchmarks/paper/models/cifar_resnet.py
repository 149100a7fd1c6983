"""The small residual networks of He et al. (2016, sec. 4.2) for CIFAR."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut (option A: stride and zero channels)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.added = channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.added:
            shortcut = functional.pad(shortcut, [0, 0, 0, 0, 0, self.added])
        return functional.relu(y + shortcut)


class CIFARResNet(nn.Module):
    """ResNet of depth 6n + 2 in three stages of ``width``, 2 ``width`` and 4 ``width`` channels.

    Args:
        depth: 8, 14, 20, ...; 20 and 56 with width 16 are those of the paper of He et al.
        num_classes: Size of the output.
        channels: Channels of the images.
        width: Channels of the first stage.
    """

    def __init__(self, depth: int, num_classes: int, channels: int = 3, width: int = 16) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, ...), got {depth}")
        blocks = (depth - 2) // 6
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        stages: list[nn.Module] = []
        channels_in = width
        for stage in range(3):
            for block in range(blocks):
                stages.append(Block(channels_in, width * 2**stage, 2 if stage and not block else 1))
                channels_in = width * 2**stage
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, channels, height, width)."""
        return self.head(self.stages(self.stem(x)).mean((2, 3)))
