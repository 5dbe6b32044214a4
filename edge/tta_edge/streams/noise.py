"""Noise: gaussian, shot, impulse, speckle.

Every function takes planes [batch, channels, height, width] in [0, 1], the constant of one severity, and the
draws of the block; the result is clipped by the caller. Recipes: Hendrycks & Dietterich, ICLR 2019, appendix.
"""

from __future__ import annotations

import numpy as np

from tta_edge.streams.draws import Draws
from tta_edge.streams.ops import Floats


def gaussian_noise(x: Floats, c: float, draws: Draws) -> Floats:
    """Add N(0, c^2), drawn for every value."""
    return x + draws.normal(x.shape[1:]) * np.float32(c)


def shot_noise(x: Floats, c: float, draws: Draws) -> Floats:
    """Poisson(x * c) / c: the noise of counting about c photons at full brightness."""
    images = iter(x)
    counts = draws.stack(lambda generator: generator.poisson(next(images) * np.float64(c)))
    return np.asarray(counts / c, dtype=np.float32)


def impulse_noise(x: Floats, c: float, draws: Draws) -> Floats:
    """Each value (per channel) becomes 0 or 1, equally likely, with probability c."""
    u = draws.random(x.shape[1:])
    # One uniform decides both: below c it is hit, and which half of [0, c) it fell into picks pepper or salt.
    salt = np.where(u < np.float32(0.5 * c), np.float32(0.0), np.float32(1.0))
    return np.where(u < np.float32(c), salt, x)


def speckle_noise(x: Floats, c: float, draws: Draws) -> Floats:
    """Add x * N(0, c^2): noise in proportion to the signal."""
    return x + x * draws.normal(x.shape[1:]) * np.float32(c)
