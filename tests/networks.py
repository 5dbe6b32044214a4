"""Small networks for the exporter's tests; each factory takes no arguments and is seeded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 7
SIZE = 16


class Residual(nn.Module):
    """Strided residual block with in-place activations, as torchvision writes them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.short(x)
        return self.relu(y)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of NCHW: a subclass with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = LayerNorm2d(channels)
        self.expand = nn.Conv2d(channels, 4 * channels, 1)
        self.project = nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(F.gelu(self.expand(self.norm(self.depthwise(x)))))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim)
        x = x + self.proj(y)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.blocks = nn.Sequential(Attention(16, 2), Attention(16, 2))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.head(self.norm(self.blocks(x))[:, 0])


def _seeded(network: nn.Module) -> nn.Module:
    """Statistics and affine parameters away from their trivial initial values."""
    generator = torch.Generator().manual_seed(5)
    for module in network.modules():
        for name in ("weight", "bias", "running_mean"):
            value = getattr(module, name, None)
            if value is not None and value.dim() == 1:
                value.data += 0.1 * torch.randn(value.shape, generator=generator)
        if getattr(module, "running_var", None) is not None:
            module.running_var.data += 0.3 * torch.rand(module.running_var.shape, generator=generator)
    return network.eval()


def resnet() -> nn.Module:
    torch.manual_seed(1)
    return _seeded(
        nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
            Residual(8, 16, 2),
            Residual(16, 16, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, CLASSES),
        )
    )


def mobilenet() -> nn.Module:
    """Inverted residual without shortcut: pointwise, depthwise strided, ReLU6, dropout."""
    torch.manual_seed(2)
    return _seeded(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(inplace=True),
            nn.Conv2d(8, 24, 1, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU6(inplace=True),
            nn.Conv2d(24, 24, 3, 2, 1, groups=24, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU6(inplace=True),
            nn.Conv2d(24, 8, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(8, CLASSES),
        )
    )


def group_norm() -> nn.Module:
    torch.manual_seed(3)
    return _seeded(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, 1, 1),
            nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(8, 16, 3, 2, 1),
            nn.GroupNorm(4, 16),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, CLASSES),
        )
    )


def convnext() -> nn.Module:
    torch.manual_seed(4)
    return _seeded(
        nn.Sequential(
            nn.Conv2d(3, 8, 4, 4),
            LayerNorm2d(8),
            ConvNeXtBlock(8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.LayerNorm(8),
            nn.Linear(8, CLASSES),
        )
    )


def vit() -> nn.Module:
    torch.manual_seed(5)
    return _seeded(VisionTransformer())


def rms() -> nn.Module:
    torch.manual_seed(6)
    return _seeded(
        nn.Sequential(
            nn.Flatten(),
            nn.Linear(3 * SIZE * SIZE, 12),
            nn.RMSNorm(12),
            nn.Tanh(),
            nn.Linear(12, CLASSES),
        )
    )


def mlp() -> nn.Module:
    torch.manual_seed(7)
    return _seeded(
        nn.Sequential(
            nn.Flatten(),
            nn.Linear(3 * SIZE * SIZE, 24),
            nn.BatchNorm1d(24),
            nn.ReLU(),
            nn.Linear(24, 12),
            nn.BatchNorm1d(12),
            nn.LeakyReLU(0.1),
            nn.Linear(12, CLASSES),
        )
    )


NETWORKS = {
    "resnet": resnet,
    "mobilenet": mobilenet,
    "group_norm": group_norm,
    "convnext": convnext,
    "vit": vit,
    "rms": rms,
    "mlp": mlp,
}
