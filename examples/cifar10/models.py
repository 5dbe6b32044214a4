"""The CIFAR-10 residual networks of He et al.: factories without arguments for `tta-export build`.

Written from the paper, with the parameter names under which trained weights of these networks are published
(`conv1`, `bn1`, `layer1.0.conv1`, ..., `linear`). The networks take images that are already normalised; give
`tta-export` the mean and standard deviation (--mean, --std) and the normalisation becomes part of the bundle.

Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2; shortcuts:
option A of section 3.3.
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
