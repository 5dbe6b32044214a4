"""From images to what a model takes. Nothing is resized or recoloured in silence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta_edge.streams.errors import InputMismatch


@dataclass(frozen=True)
class Preprocess:
    """uint8 images to a model's input; made by `preprocess`, which checks that they fit.

    Attributes:
        dtype: "float32" or "uint8".
        low: value of black.
        high: value of white.
        flat: whether the model takes [batch, values] instead of [batch, channels, height, width].
    """

    dtype: str
    low: float
    high: float
    flat: bool

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[Any]:
        """The batch for the model; channels come first, also in a flat input.

        Args:
            images: uint8 [batch, height, width, channels].

        Returns:
            [batch, channels, height, width] or [batch, values], of `dtype`.
        """
        x = np.ascontiguousarray(np.moveaxis(images, -1, 1))
        if self.flat:
            x = x.reshape(len(x), -1)
        if self.dtype == "uint8":
            return x
        unit = np.divide(x, np.float32(255.0), dtype=np.float32)
        if (self.low, self.high) == (0.0, 1.0):
            return unit
        return np.asarray(unit * np.float32(self.high - self.low) + np.float32(self.low), dtype=np.float32)


def preprocess(
    image_shape: tuple[int, int, int],
    *,
    dtype: str,
    shape: Sequence[int | str],
    low: float,
    high: float,
) -> Preprocess:
    """How images of one size become a model's input.

    Args:
        image_shape: (height, width, channels).
        dtype: the model's.
        shape: the model's, the batch dimension included; a string is a dimension of any size.
        low: value of black that the model was trained with.
        high: value of white.

    Raises:
        InputMismatch: size, channels, dtype or range do not fit; both sides are named.
    """
    height, width, channels = image_shape
    wanted = list(shape[1:])
    flat = len(wanted) == 1
    have = [math.prod(image_shape)] if flat else [channels, height, width]
    fits = len(have) == len(wanted) and all(
        isinstance(want, str) or want == got for want, got in zip(wanted, have, strict=True)
    )
    if not fits:
        raise InputMismatch(
            f"the images are {channels}x{height}x{width} (channels, height, width), "
            f"the model takes {'x'.join(map(str, wanted))}",
            "Resize or recolour the images first, or export the model for this size",
        )
    if dtype not in ("float32", "uint8"):
        raise InputMismatch(f"the model takes {dtype}, images can become float32 or uint8", "Export it again")
    if dtype == "uint8" and (low, high) != (0.0, 255.0):
        raise InputMismatch(
            f"the model takes uint8 from {low:g} to {high:g}, images are 0 to 255", "Export it for 0..255"
        )
    return Preprocess(dtype, low, high, flat)
