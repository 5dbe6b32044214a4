"""Weather: snow, frost (photographs or our own texture), fog, brightness.

Every function takes planes [batch, channels, height, width] in [0, 1], the constants of one severity, and the
draws of the block; the result is clipped by the caller. Recipes: Hendrycks & Dietterich, ICLR 2019, appendix.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tta_edge.streams import ops
from tta_edge.streams.draws import Draws
from tta_edge.streams.ops import Floats

FIRST_WIBBLE = 100.0
ICE_TINT = (0.86, 0.94, 1.0)
"""Red, green, blue of our own frost at full strength: a cold white."""


def plasma(draws: Draws, size: int, decay: float) -> Floats:
    """Diamond-square plasma on a torus, each map stretched to [0, 1].

    Every new point is the mean of its four neighbours plus wibble * U(-wibble, wibble); the wibble starts at
    100 and is divided by `decay` at each halving, so that a small decay gives a rough map.

    Args:
        draws: randomness of the block.
        size: side of the map in pixels, a power of two.
        decay: above 1.

    Returns:
        [batch, size, size].
    """
    field = np.zeros((len(draws), size, size))
    step, wibble = size, FIRST_WIBBLE

    def jitter(mean_of_four: NDArray[np.float64]) -> NDArray[np.float64]:
        return mean_of_four + wibble * draws.uniform(-wibble, wibble, mean_of_four.shape[1:])

    while step >= 2:
        half = step // 2
        corners = field[:, ::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=1)
        field[:, half::step, half::step] = jitter((pairs + np.roll(pairs, -1, axis=2)) / 4)
        centres, corners = field[:, half::step, half::step], field[:, ::step, ::step]
        beside = corners + np.roll(corners, -1, axis=2) + centres + np.roll(centres, 1, axis=1)
        field[:, ::step, half::step] = jitter(beside / 4)
        below = corners + np.roll(corners, -1, axis=1) + centres + np.roll(centres, 1, axis=2)
        field[:, half::step, ::step] = jitter(below / 4)
        step, wibble = half, wibble / decay
    field -= field.min(axis=(1, 2), keepdims=True)
    field /= field.max(axis=(1, 2), keepdims=True)
    return field.astype(np.float32)


def _map_size(x: Floats) -> int:
    """The smallest power of two that covers the image (32 for CIFAR, 256 for ImageNet)."""
    return int(2 ** np.ceil(np.log2(max(x.shape[-2:]))))


def fog(x: Floats, c: tuple[float, float], draws: Draws) -> Floats:
    """Add a plasma of strength c[0] and decay c[1], then scale so that the brightest pixel stays as it
    was.
    """
    strength = np.float32(c[0])
    height, width = x.shape[-2:]
    mist = plasma(draws, _map_size(x), c[1])[:, None, :height, :width]
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    foggy: Floats = (x + strength * mist) * (brightest / (brightest + strength))
    return foggy


def snow(x: Floats, c: tuple[float, ...], draws: Draws) -> Floats:
    """Whiten the scene, then add motion-blurred flakes, twice (the second time turned by 180 degrees).

    c is (mean, deviation, zoom, threshold, blur radius, blur sigma, share of the original colours).
    """
    mean, deviation, zoom, threshold, radius, sigma, share = c
    flakes = draws.normal(x.shape[-2:])[:, None] * np.float32(deviation) + np.float32(mean)
    flakes = ops.centre_zoom(flakes, zoom)
    flakes[flakes < threshold] = 0.0
    flakes = ops.from_uint8(ops.to_uint8(flakes))
    angles = np.radians(draws.uniform(-135.0, -45.0))
    flakes = ops.line_blur(flakes, ops.half_gaussian(int(radius), sigma), angles)
    white = np.maximum(x, ops.grey(x) * np.float32(1.5) + np.float32(0.5))
    scene = np.float32(share) * x + np.float32(1.0 - share) * white
    snowy: Floats = scene + flakes + flakes[..., ::-1, ::-1]
    return snowy


def frost(x: Floats, c: tuple[float, float], draws: Draws, photos: Sequence[Floats]) -> Floats:
    """c[0] * image + c[1] * a random crop of a random photograph of frost.

    Args:
        x: planes.
        c: (share of the image, share of the photograph).
        draws: randomness of the block.
        photos: each [3, height, width] in [0, 1], at least as large as the image.
    """
    height, width = x.shape[-2:]

    def crop(generator: np.random.Generator) -> Floats:
        photo = photos[int(generator.integers(len(photos)))]
        top = int(generator.integers(photo.shape[1] - height + 1))
        left = int(generator.integers(photo.shape[2] - width + 1))
        return photo[:, top : top + height, left : left + width]

    layer: Floats = draws.stack(crop)
    if x.shape[1] == 1:
        layer = ops.grey(layer)
    frosted: Floats = np.float32(c[0]) * x + np.float32(c[1]) * layer
    return frosted


def frost_procedural(x: Floats, c: tuple[float, float], draws: Draws) -> Floats:
    """The recipe of frost with a texture of our own in place of the photographs.

    Thin bright ridges (the zero crossings of a rough plasma) over broad patches of ice, in a cold white. It
    is not the published frost and its figures are not comparable with it, hence the other name.
    """
    height, width = x.shape[-2:]
    size = _map_size(x)
    patches = plasma(draws, size, 2.5)[:, :height, :width]
    ridges = (1.0 - np.abs(2.0 * plasma(draws, size, 1.4)[:, :height, :width] - 1.0)) ** 4
    ice = np.clip(0.1 + 0.5 * patches + 0.8 * ridges, 0.0, 1.0)[:, None].astype(np.float32)
    tint = np.array(ICE_TINT if x.shape[1] == 3 else (1.0,), dtype=np.float32).reshape(1, -1, 1, 1)
    frosted: Floats = np.float32(c[0]) * x + np.float32(c[1]) * ice * tint
    return frosted


def brightness(x: Floats, c: float, draws: Draws) -> Floats:
    """HSV value plus c."""
    return ops.add_to_value(x, c)
