"""Blur: defocus, glass, motion, zoom, gaussian.

Every function takes planes [batch, channels, height, width] in [0, 1], the constants of one severity, and the
draws of the block; the result is clipped by the caller. Recipes: Hendrycks & Dietterich, ICLR 2019, appendix.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tta_edge.streams import ops
from tta_edge.streams.draws import Draws
from tta_edge.streams.ops import Floats


def disk(radius: float, alias_sigma: float) -> NDArray[np.float64]:
    """A filled disk, normalised, its edge smoothed by a small Gaussian."""
    reach, alias_radius = (8, 1) if radius <= 8 else (int(radius), 2)
    offset = np.arange(-reach, reach + 1)
    filled = (offset[:, None] ** 2 + offset[None, :] ** 2 <= radius**2).astype(np.float64)
    filled /= filled.sum()
    taps = ops.gaussian_taps(alias_sigma, alias_radius)
    index = ops.border_index(np.arange(-alias_radius, len(offset) + alias_radius), len(offset), "reflect101")
    padded = filled[index[:, None], index[None, :]]
    rows = sum(tap * padded[i : i + len(offset)] for i, tap in enumerate(taps))
    return np.asarray(sum(tap * rows[:, i : i + len(offset)] for i, tap in enumerate(taps)))


def defocus_blur(x: Floats, c: tuple[float, float], draws: Draws) -> Floats:
    """Correlation with a disk of radius c[0] smoothed by sigma c[1]; border reflect-101."""
    return ops.correlate(x, disk(*c), "reflect101")


def glass_blur(x: Floats, c: tuple[float, int, int], draws: Draws) -> Floats:
    """Blur, let every pixel look through a randomly displaced one, blur again.

    c is (sigma, reach d, passes). A pass runs rows and columns from size - d down to d + 1; each pixel *takes
    the value* of a neighbour displaced by -d..d-1. The recipe says exchange, but the published data was made
    by an exchange through overlapping numpy views, which copies; this follows the data.
    """
    sigma, reach, passes = c[0], int(c[1]), int(c[2])
    x = ops.from_uint8(ops.to_uint8(ops.gaussian_filter(x, sigma, truncate=4.0, border="nearest")))
    batch, channels, height, width = x.shape
    rows, columns = range(height - reach, reach, -1), range(width - reach, reach, -1)
    shape = (passes, len(rows), len(columns), 2)
    moves = draws.stack(lambda generator: generator.integers(-reach, reach, shape, dtype=np.int8))
    jump = np.moveaxis(moves[..., 1].astype(np.int32) * width + moves[..., 0], 0, -1)
    jump = np.ascontiguousarray(jump)
    # Which source pixel each place shows. The walk is sequential over places, so the batch is the vector
    # axis.
    shown = np.repeat(np.arange(height * width, dtype=np.int32)[:, None], batch, axis=1)
    image = np.arange(batch)
    for n in range(passes):
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                place = row * width + column
                shown[place] = shown[place + jump[n, i, j], image]
    flat = x.reshape(batch, channels, height * width)
    mixed = np.take_along_axis(flat, shown.T[:, None, :].astype(np.intp), axis=2).reshape(x.shape)
    return ops.gaussian_filter(mixed, sigma, truncate=4.0, border="nearest")


def motion_blur(x: Floats, c: tuple[int, float], draws: Draws) -> Floats:
    """One-sided half-Gaussian of 2r + 1 taps along an angle within 45 degrees of the horizontal; c is (r,
    sigma).
    """
    angles = np.radians(draws.uniform(-45.0, 45.0))
    return ops.line_blur(x, ops.half_gaussian(int(c[0]), c[1]), angles)


def zoom_blur(x: Floats, c: tuple[float, int], draws: Draws) -> Floats:
    """Mean of the image and its centre zooms 1, 1 + step, ...; c is (step, how many zooms)."""
    step, zooms = c[0], int(c[1])
    total = x.copy()
    for k in range(zooms):
        total += ops.centre_zoom(x, 1.0 + k * step)
    return total / np.float32(zooms + 1)


def gaussian_blur(x: Floats, c: float, draws: Draws) -> Floats:
    """Gaussian of standard deviation c pixels, the edge replicated."""
    return ops.gaussian_filter(x, c, truncate=4.0, border="nearest")
