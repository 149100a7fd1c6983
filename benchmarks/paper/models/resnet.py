"""The residual networks of He et al. (2016) with four stages, with a stem for small images or for ImageNet."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes (option B)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Four stages of ``width``, 2, 4 and 8 ``width`` channels.

    Args:
        blocks: Blocks of each stage: (2, 2, 2, 2) is ResNet-18, (3, 4, 6, 3) is ResNet-34.
        num_classes: Size of the output.
        channels: Channels of the images.
        width: Channels of the first stage.
        imagenet_stem: Open with a 7x7 convolution and a maximum, both of stride 2, instead of one 3x3 convolution.
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        num_classes: int,
        channels: int = 3,
        width: int = 64,
        imagenet_stem: bool = False,
    ) -> None:
        super().__init__()
        first = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
        if not imagenet_stem:
            first = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        if imagenet_stem:
            self.stem.append(nn.MaxPool2d(3, 2, 1))
        stages: list[nn.Module] = []
        channels_in = width
        for stage, count in enumerate(blocks):
            for block in range(count):
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
