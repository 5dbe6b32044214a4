"""CIFAR-10 residual networks: factories without arguments for `tta-export build`.

`resnet20` to `resnet56` are the networks of He et al., with the parameter names under which trained weights of them are
published (`conv1`, `bn1`, `layer1.0.conv1`, ..., `linear`). They take images that are already normalised; give
`tta-export` the mean and standard deviation (--mean, --std) and the normalisation becomes part of the bundle.

`resnet8` and `resnet26w32` are this project's own variants for quick experiments: three stages as well, shortcuts with
a convolution (option B), and the normalisation inside, so that they take plain images in 0..1.

Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2; shortcuts: options A and B of
section 3.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10
WIDTHS = (16, 32, 64)


def shortcut(x: Tensor, channels: int, stride: int) -> Tensor:
    """Option A: every stride-th pixel, the new channels zero, half of them on either side; no parameters.

    Args:
        x: [batch, C, H, W].
        channels: of the result, at least C.
        stride: of the block.

    Returns:
        [batch, channels, ceil(H / stride), ceil(W / stride)].
    """
    missing = channels - x.shape[1]
    if stride == 1 and missing == 0:
        return x
    kept = x[:, :, ::stride, ::stride]
    batch, _, height, width = kept.shape
    front = kept.new_zeros([batch, missing // 2, height, width])
    back = kept.new_zeros([batch, missing - missing // 2, height, width])
    return torch.cat([front, kept, back], dim=1)


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to the shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.channels = channels
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in_channels, H, W] -> [batch, channels, H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + shortcut(x, self.channels, self.stride))


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(in_channels, channels, stride)
    return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(blocks - 1)))


class CifarResNet(nn.Module):
    """Three stages of ``blocks`` residual blocks each: 6 * blocks + 2 layers with weights."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], blocks, stride=1)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], blocks, stride=2)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], blocks, stride=2)
        self.linear = nn.Linear(WIDTHS[2], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, 32, 32] float32, normalised -> logits [batch, 10]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


class PlainBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm; the shortcut is a 1x1 convolution with BatchNorm where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.short = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in_channels, H, W] -> [batch, channels, H / stride, W / stride]."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.short(x))


class PlainResNet(nn.Module):
    """Three stages of ``blocks`` blocks each, ``width`` channels in the first and twice as many in each further one."""

    mean: Tensor
    std: Tensor

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4914, 0.4822, 0.4465]).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2470, 0.2435, 0.2616]).reshape(1, 3, 1, 1))
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        stages = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)]
        self.blocks = nn.Sequential(
            *(
                PlainBlock(before if index == 0 else after, after, stride if index == 0 else 1)
                for before, after, stride in stages
                for index in range(blocks)
            )
        )
        self.fc = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, 32, 32] float32 in 0..1 -> logits [batch, 10]."""
        x = F.relu(self.norm(self.conv((x - self.mean) / self.std)))
        logits: Tensor = self.fc(self.blocks(x).mean(dim=(2, 3)))
        return logits


def resnet8() -> nn.Module:
    """8 layers, 78,042 parameters."""
    return PlainResNet(blocks=1, width=16)


def resnet26w32() -> nn.Module:
    """26 layers of twice the width, 1.47 million parameters."""
    return PlainResNet(blocks=4, width=32)


def resnet20() -> nn.Module:
    """20 layers, 0.27 million parameters."""
    return CifarResNet(3)


def resnet32() -> nn.Module:
    """32 layers, 0.46 million parameters."""
    return CifarResNet(5)


def resnet44() -> nn.Module:
    """44 layers, 0.66 million parameters."""
    return CifarResNet(7)


def resnet56() -> nn.Module:
    """56 layers, 0.85 million parameters."""
    return CifarResNet(9)
