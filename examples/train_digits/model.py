"""A small BatchNorm network for 8x8 digits: the model of the built-in bundle."""

from __future__ import annotations

from torch import Tensor, nn

PIXEL_MEAN = 0.3075
PIXEL_STD = 0.3770
"""Mean and standard deviation of the training pixels in [0, 1]."""


def _stage(in_channels: int, out_channels: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    ]


class DigitsCnn(nn.Module):
    """Four convolutions with BatchNorm, mean pooling, one linear layer; 61,050 parameters.

    It knows clean digits only (no noise or blur in training), so a shift hurts it as it hurts a large
    network.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_stage(1, 16, stride=1),
            *_stage(16, 32, stride=1),
            *_stage(32, 64, stride=2),
            *_stage(64, 64, stride=1),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the ten digits.

        Args:
            x: [batch, 1, 8, 8] float32 in [0, 1], white strokes on black. The normalisation is inside.

        Returns:
            [batch, 10].
        """
        features: Tensor = self.body((x - PIXEL_MEAN) / PIXEL_STD)
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


def digits_cnn() -> nn.Module:
    """The network, untrained."""
    return DigitsCnn()
