"""The step from what a camera delivers to what a network was trained on; it becomes part of every graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Preprocess:
    """x -> ((x - low) / (high - low) - mean) / std, per channel.

    Attributes:
        low: smallest value the user sends.
        high: largest value the user sends.
        mean: per channel, in units of [0, 1]; empty means 0.
        std: per channel, in units of [0, 1]; empty means 1.
        scale: whether low..high is mapped to 0..1 first. Off when the network takes the user's range itself.
    """

    low: float = 0.0
    high: float = 1.0
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    scale: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        """[batch, C, ...] float32 or uint8 -> [batch, C, ...] float32."""
        x = x.to(torch.float32)
        if self.scale and (self.low, self.high) != (0.0, 1.0):
            x = (x - self.low) * (1.0 / (self.high - self.low))
        shape = [1, -1] + [1] * (x.dim() - 2)
        if self.mean:
            x = x - torch.tensor(self.mean).reshape(shape)
        if self.std:
            x = x * (1.0 / torch.tensor(self.std)).reshape(shape)
        return x
