"""The networks of the safety suite: factories without arguments for `tta-export build`. Normalisation is inside.

Three kinds of normalisation layers, because they fail differently: BatchNorm believes the batch, GroupNorm and
LayerNorm look at one image at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
Norm = Callable[[int], nn.Module]


def group_norm(channels: int) -> nn.Module:
    """GroupNorm of eight groups."""
    return nn.GroupNorm(8, channels)


class Standardised(nn.Module):
    """A network that takes plain images in 0..1: mean and standard deviation of the channels are its own."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(CIFAR_MEAN).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(CIFAR_STD).reshape(1, 3, 1, 1))


class Residual(nn.Module):
    """Two 3x3 convolutions; a 1x1 convolution beside them where the shape changes."""

    def __init__(self, before: int, after: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = norm(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = norm(after)
        same = stride == 1 and before == after
        beside = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), norm(after))
        self.short: nn.Module = nn.Identity() if same else beside

    def forward(self, x: Tensor) -> Tensor:
        """[batch, before, H, W] -> [batch, after, H / stride, W / stride]."""
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.short(x))


class ResNet(Standardised):
    """Three stages of residual blocks, twice as many channels in each further one."""

    def __init__(self, blocks: int, width: int, norm: Norm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = norm(width)
        plan = [
            (width * 2 ** max(0, stage - (block == 0)), width * 2**stage, 2 if stage and block == 0 else 1)
            for stage in range(3)
            for block in range(blocks)
        ]
        self.blocks = nn.Sequential(
            *(Residual(before, after, stride, norm) for before, after, stride in plan)
        )
        self.fc = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, 32, 32] float32 in 0..1 -> logits [batch, 10]."""
        x = F.relu(self.norm(self.conv((x - self.mean) / self.std)))
        logits: Tensor = self.fc(self.blocks(x).mean(dim=(2, 3)))
        return logits


class Encoder(nn.Module):
    """A transformer block, normalised before attention and before the two-layer perceptron."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.fc2 = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim] -> the same."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ConvViT(Standardised):
    """Two strided convolutions make 64 tokens, transformer blocks mix them, their mean is classified."""

    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.stem1 = nn.Conv2d(3, dim // 2, 3, 2, padding=1)
        self.stemnorm = nn.LayerNorm(dim // 2)
        self.stem2 = nn.Conv2d(dim // 2, dim, 3, 2, padding=1)
        self.pos = nn.Parameter(0.02 * torch.randn(1, 64, dim))
        self.blocks = nn.Sequential(*(Encoder(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, 32, 32] float32 in 0..1 -> logits [batch, 10]."""
        x = self.stem1((x - self.mean) / self.std).permute(0, 2, 3, 1)
        x = self.stem2(F.gelu(self.stemnorm(x)).permute(0, 3, 1, 2))
        tokens = self.blocks(x.flatten(2).transpose(1, 2) + self.pos)
        logits: Tensor = self.head(self.norm(tokens).mean(dim=1))
        return logits


class DigitNet(nn.Module):
    """Three 3x3 convolutions with BatchNorm, halved twice, averaged, classified; 24,058 parameters."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 64)
        pairs = list(pairwise(widths))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b in pairs)
        self.fc = nn.Linear(widths[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 1, 28, 28] float32 in 0..1 -> logits [batch, 10]."""
        for k, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x)))
            x = F.max_pool2d(x, 2) if k < 2 else x
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def resnet8_bn() -> nn.Module:
    """8 layers, BatchNorm, 78,042 parameters."""
    return ResNet(1, 16, nn.BatchNorm2d)


def resnet8_gn() -> nn.Module:
    """8 layers, GroupNorm."""
    return ResNet(1, 16, group_norm)


def resnet26w32_bn() -> nn.Module:
    """26 layers of twice the width, BatchNorm, 1.47 million parameters."""
    return ResNet(4, 32, nn.BatchNorm2d)


def convvit_ln() -> nn.Module:
    """Four transformer blocks of width 96, LayerNorm, 0.35 million parameters."""
    return ConvViT(96, 4, 4)


def mnist_bn() -> nn.Module:
    """The network for handwritten digits."""
    return DigitNet()
