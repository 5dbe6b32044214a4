"""Synthetic images for the tests of streams: smooth, coloured, of any size; no file is read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tta_edge.streams import ops


def smooth(count: int, side: int, channels: int = 3, *, seed: int = 0) -> NDArray[np.uint8]:
    """uint8 [count, side, side, channels] with structure of several sizes and the full range of levels."""
    rng = np.random.default_rng(seed)
    noise = rng.random((count, channels, side, side), dtype=np.float32)
    coarse = ops.gaussian_filter(noise, side / 12, truncate=3.0, border="reflect")
    fine = ops.gaussian_filter(noise, side / 40, truncate=3.0, border="reflect")
    mixed = coarse + 0.35 * fine
    mixed -= mixed.min(axis=(2, 3), keepdims=True)
    mixed /= mixed.max(axis=(2, 3), keepdims=True)
    return np.ascontiguousarray(np.moveaxis(ops.to_uint8(mixed), 1, -1))
