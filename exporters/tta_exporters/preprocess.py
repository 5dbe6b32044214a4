"""The step from what a camera delivers to what a network was trained on; it becomes part of every graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tta_exporters.errors import OptionError


@dataclass(frozen=True)
class Preprocess:
    """x -> ((x - low) / (high - low) - mean) / std, per channel.

    Attributes:
        low: smallest value the user sends.
        high: largest value the user sends.
        mean: per channel, in units of [0, 1]; empty means 0.
        std: per channel, in units of [0, 1]; empty means 1.
        scale: whether low..high is mapped to 0..1 first. Off when the network takes the user's range itself.

    Raises:
        OptionError: an empty range, a standard deviation that is not positive, a number that is not finite.
    """

    low: float = 0.0
    high: float = 1.0
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    scale: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise OptionError(f"the range of the input is {self.low:g}..{self.high:g}", "Give low below high")
        if not all(math.isfinite(value) for value in self.mean):
            raise OptionError(f"the mean is {list(self.mean)}", "Give finite numbers")
        if not all(math.isfinite(value) and value > 0 for value in self.std):
            raise OptionError(f"the standard deviation is {list(self.std)}", "Give positive numbers")

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
