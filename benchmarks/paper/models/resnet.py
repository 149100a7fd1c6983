"""The residual networks of He et al. (2016), with a stem for small images or for ImageNet, in two dimensions or one."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


def three(channels_in: int, channels: int, stride: int, flat: bool) -> nn.Conv2d:
    """Make a 3x3 convolution that keeps height and width at stride 1, or a 1x3 convolution for images of height 1."""
    size, padding = ((1, 3), (0, 1)) if flat else (3, 1)
    return nn.Conv2d(channels_in, channels, size, stride, padding, bias=False)


class ZeroPadding(nn.Module):
    """Shortcut without parameters where the shape changes (option A): stride, and channels of zeros."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.added = channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        """Apply the shortcut."""
        return functional.pad(x[:, :, :: self.stride, :: self.stride], [0, 0, 0, 0, 0, self.added])


class Projection(nn.Sequential):
    """Shortcut by a 1x1 convolution where the shape changes (option B)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


class Block(nn.Module):
    """Two 3x3 convolutions, or 1x3 where images are ``flat``, and a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int, shortcut: type[nn.Module], flat: bool) -> None:
        super().__init__()
        self.conv1 = three(channels_in, channels, stride, flat)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = three(channels, channels, 1, flat)
        self.norm2 = nn.BatchNorm2d(channels)
        changes = stride != 1 or channels_in != channels
        self.shortcut = shortcut(channels_in, channels, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stages of ``width``, 2 ``width``, 4 ``width``, ... channels.

    Args:
        blocks: Blocks of each stage: (2, 2, 2, 2) is ResNet-18, (3, 4, 6, 3) is ResNet-34.
        num_classes: Size of the output.
        channels: Channels of the images.
        width: Channels of the first stage.
        imagenet_stem: Open with a 7x7 convolution and a maximum, both of stride 2, instead of one 3x3 convolution.
        shortcut: What a block adds where its shape changes.
        flat: For images of height 1, such as words: every 3x3 convolution is 1x3.

    Raises:
        ValueError: ``flat`` with the stem for ImageNet.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        num_classes: int,
        channels: int = 3,
        width: int = 64,
        imagenet_stem: bool = False,
        shortcut: type[nn.Module] = Projection,
        flat: bool = False,
    ) -> None:
        super().__init__()
        if flat and imagenet_stem:
            raise ValueError("the stem for ImageNet is not for images of height 1")
        first = nn.Conv2d(channels, width, 7, 2, 3, bias=False) if imagenet_stem else three(channels, width, 1, flat)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        if imagenet_stem:
            self.stem.append(nn.MaxPool2d(3, 2, 1))
        stages: list[nn.Module] = []
        channels_in = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                stages.append(Block(channels_in, width * 2**stage, 2 if stage and not block else 1, shortcut, flat))
                channels_in = width * 2**stage
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, channels, height, width)."""
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class CIFARResNet(ResNet):
    """ResNet of depth 6n + 2 for CIFAR (sec. 4.2): three stages, and shortcuts without parameters.

    Args:
        depth: 8, 14, 20, ...; 20 and 56 with width 16 are those of the paper of He et al.
        num_classes: Size of the output.
        channels: Channels of the images.
        width: Channels of the first stage.
        flat: For images of height 1: every 3x3 convolution is 1x3.
    """

    def __init__(self, depth: int, num_classes: int, channels: int = 3, width: int = 16, flat: bool = False) -> None:
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, ...), got {depth}")
        super().__init__(((depth - 2) // 6,) * 3, num_classes, channels, width, shortcut=ZeroPadding, flat=flat)
