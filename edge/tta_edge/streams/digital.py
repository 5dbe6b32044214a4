"""Digital: contrast, elastic_transform, pixelate, jpeg_compression, saturate.

Every function takes planes [batch, channels, height, width] in [0, 1], the constants of one severity, and the
draws of the block; the result is clipped by the caller. Recipes: Hendrycks & Dietterich, ICLR 2019, appendix.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from tta_edge.streams import ops
from tta_edge.streams.draws import Draws
from tta_edge.streams.ops import Floats
from tta_runtime.pillow import pillow_image

PUBLISHED_ELASTIC_SIDE: dict[str, int] = {"imagenet": 244}
"""The published ImageNet constants are multiples of 244 pixels, not of 224."""


def contrast(x: Floats, c: float, draws: Draws) -> Floats:
    """(x - mean) * c + mean with each channel's own mean."""
    # The planes are whole grey levels / 255: summing those as integers gives the same mean in any block.
    levels = np.rint(x * np.float32(255.0)).astype(np.int64).sum(axis=(2, 3), keepdims=True)
    mean = (levels / (255.0 * x.shape[2] * x.shape[3])).astype(np.float32)
    flatter: Floats = (x - mean) * np.float32(c) + mean
    return flatter


def saturate(x: Floats, c: tuple[float, float], draws: Draws) -> Floats:
    """HSV saturation times c[0] plus c[1]; three channels only."""
    return ops.scale_saturation(x, c[0], c[1])


def _affine_rows(points: NDArray[np.float64], moved: NDArray[np.float64]) -> NDArray[np.float64]:
    """The [batch, 2, 3] maps that take (x, y, 1) of `moved` back to `points`, for three point pairs each."""
    ones = np.ones((*moved.shape[:-1], 1))
    solution = np.linalg.solve(np.concatenate([moved, ones], axis=-1), points)
    return np.swapaxes(solution, -1, -2)


def elastic_transform(x: Floats, c: tuple[float, float, float], draws: Draws) -> Floats:
    """A random affine map, then a smooth random displacement; bilinear both times.

    c is (displacement a, its smoothness sigma, affine jitter f), here already in pixels. Three points (the
    corners of a square of a third of the image around its centre) are shifted by U(-f, f) in each coordinate;
    then every pixel is read from a place displaced by a * Gaussian(U(-1, 1), sigma).
    """
    strength, sigma, jitter = c
    batch, _, height, width = x.shape
    centre = np.array([height // 2, width // 2], dtype=np.float64)
    reach = min(height, width) // 3
    points = centre + reach * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = points + draws.uniform(-jitter, jitter, (3, 2))
    back = _affine_rows(np.broadcast_to(points, (batch, 3, 2)), moved)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)

    def source(axis: int) -> Floats:
        m = back[:, axis, :, None, None]
        return np.asarray(m[:, 0] * columns + m[:, 1] * rows + m[:, 2], dtype=np.float32)

    warped = ops.sample(x, source(1), source(0), "reflect101")

    def field() -> Floats:
        noise = draws.uniform(-1.0, 1.0, (height, width)).astype(np.float32)
        return ops.gaussian_filter(noise, sigma, truncate=3.0, border="reflect") * np.float32(strength)

    dx, dy = field(), field()
    return ops.sample(warped, rows.astype(np.float32) + dy, columns.astype(np.float32) + dx, "reflect")


def pixelate(x: Floats, c: float, draws: Draws) -> Floats:
    """Box-resize to int(side * c) and back, in whole grey levels as Pillow does it."""
    height, width = x.shape[-2:]
    levels = np.rint(x * np.float32(255.0))
    small = ops.box_resize(levels, max(int(height * c), 1), max(int(width * c), 1))
    return ops.box_resize(small, height, width) / np.float32(255.0)


def jpeg_compression(x: Floats, c: float, draws: Draws) -> Floats:
    """Write and read each image as JPEG of quality c, chroma halved both ways (4:2:0).

    Raises:
        ImagesExtraMissing: Pillow is not installed.
    """
    image = pillow_image("the shift jpeg_compression")
    hwc = np.ascontiguousarray(np.moveaxis(ops.to_uint8(x), 1, -1))
    decoded = np.empty_like(hwc)
    for i, picture in enumerate(hwc):
        buffer = io.BytesIO()
        mono = picture.shape[-1] == 1
        image.fromarray(picture[..., 0] if mono else picture).save(buffer, "JPEG", quality=int(c))
        buffer.seek(0)
        with image.open(buffer) as reread:
            values = np.asarray(reread)
        decoded[i] = values[..., None] if mono else values
    return ops.from_uint8(np.ascontiguousarray(np.moveaxis(decoded, -1, 1)))
