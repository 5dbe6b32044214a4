"""Image operations the shifts need, in numpy alone.

Everything works on *planes*: float32 arrays [batch, channels, height, width] (or [batch, height, width]), so
that a whole block of images passes through each operation at once. Every result depends on its own image
only, to the last bit: sums run over explicit taps or over one small matrix per image, never over a
batch-sized product whose rounding would depend on the batch. That is what makes a stream corrupted in chunks
equal to the stream corrupted whole.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.intp]
Border = Literal["nearest", "reflect", "reflect101"]
"""What lies beyond the edge: `nearest` aaa|abcd, `reflect` cba|abcd, `reflect101` dcb|abcd."""

NEGLIGIBLE_WEIGHT = 1e-7
"""Blur taps lighter than this are skipped: together they move a pixel by far less than one grey level."""


def border_index(position: Ints, size: int, border: Border) -> Ints:
    """The index inside 0..size-1 that stands for each (possibly outside) position."""
    if border == "nearest" or size == 1:
        return np.clip(position, 0, size - 1)
    period = 2 * size if border == "reflect" else 2 * size - 2
    folded = np.mod(position, period)
    mirrored = period - folded - (1 if border == "reflect" else 0)
    return np.where(folded < size, folded, mirrored)


def gaussian_taps(sigma: float, radius: int) -> NDArray[np.float64]:
    """Normalised Gaussian weights at -radius..radius; a single 1 for sigma 0."""
    if sigma <= 0:
        taps = np.zeros(2 * radius + 1)
        taps[radius] = 1.0
        return taps
    offset = np.arange(-radius, radius + 1, dtype=np.float64)
    taps = np.exp(-0.5 * (offset / sigma) ** 2)
    return np.asarray(taps / taps.sum())


def _filter_matrix(size: int, taps: NDArray[np.float64], border: Border) -> Floats:
    """The [size, size] matrix that applies `taps` along an axis, the border folded in."""
    radius = len(taps) // 2
    matrix = np.zeros((size, size))
    out = np.arange(size)
    for offset, tap in zip(range(-radius, radius + 1), taps, strict=True):
        np.add.at(matrix, (out, border_index(out + offset, size, border)), tap)
    return matrix.astype(np.float32)


def apply_matrices(planes: Floats, rows: Floats, columns: Floats) -> Floats:
    """`rows @ image @ columns.T` for every image.

    Args:
        planes: [..., height, width].
        rows: [new_height, height].
        columns: [new_width, width].

    Returns:
        [..., new_height, new_width].
    """
    result: Floats = np.matmul(np.matmul(rows, planes), np.ascontiguousarray(columns.T))
    return result


def gaussian_filter(planes: Floats, sigma: float, *, truncate: float, border: Border) -> Floats:
    """Separable Gaussian over the last two axes, radius int(truncate * sigma + 0.5) as in scipy.ndimage.

    Args:
        planes: [..., height, width].
        sigma: standard deviation in pixels; 0 returns the input.
        truncate: the radius in standard deviations.
        border: see `Border`.
    """
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return planes
    taps = gaussian_taps(sigma, radius)
    height, width = planes.shape[-2:]
    return apply_matrices(planes, _filter_matrix(height, taps, border), _filter_matrix(width, taps, border))


def correlate(planes: Floats, kernel: NDArray[np.float64], border: Border) -> Floats:
    """Correlation of every plane with one odd-sized kernel [kh, kw]."""
    height, width = planes.shape[-2:]
    down, right = kernel.shape[0] // 2, kernel.shape[1] // 2
    rows = border_index(np.arange(-down, height + down), height, border)
    columns = border_index(np.arange(-right, width + right), width, border)
    padded = planes[..., rows[:, None], columns[None, :]]
    total = np.zeros_like(planes)
    scratch = np.empty_like(planes)
    for y, x in zip(*np.nonzero(np.abs(kernel) > NEGLIGIBLE_WEIGHT), strict=True):
        window = padded[..., y : y + height, x : x + width]
        total += np.multiply(window, np.float32(kernel[y, x]), out=scratch)
    return total


def line_blur(planes: Floats, weights: NDArray[np.float64], angles: NDArray[np.float64]) -> Floats:
    """One-sided blur along a line, with its own angle for each image and a replicated edge.

    Tap i reads the pixel about i steps along the direction, rounded to the grid: the kernel is one-sided, so
    the image also drifts, as ImageMagick's motion blur does.

    Args:
        planes: [batch, channels, height, width].
        weights: [taps], normalised.
        angles: [batch], radians; the y axis points down.
    """
    height, width = planes.shape[-2:]
    reach = len(weights) - 1
    rows = np.clip(np.arange(-reach, height + reach), 0, height - 1)
    columns = np.clip(np.arange(-reach, width + reach), 0, width - 1)
    padded = planes[..., rows[:, None], columns[None, :]]
    total = np.zeros_like(planes)
    for i, weight in enumerate(weights):
        if weight <= NEGLIGIBLE_WEIGHT:
            continue
        across = np.ceil(i * np.cos(angles) - 0.5).astype(np.intp)
        down = np.ceil(i * np.sin(angles) - 0.5).astype(np.intp)
        # Rounding leaves few distinct offsets per tap: one slice for each instead of a gather for each image.
        for dy, dx in {(int(y), int(x)) for y, x in zip(down, across, strict=True)}:
            chosen = np.flatnonzero((down == dy) & (across == dx))
            top, left = reach + dy, reach + dx
            total[chosen] += padded[chosen, :, top : top + height, left : left + width] * np.float32(weight)
    return total


def half_gaussian(radius: int, sigma: float) -> NDArray[np.float64]:
    """The 2 * radius + 1 one-sided weights of a motion blur, normalised: exp(-i^2 / 2 sigma^2), i = 0, 1,
    ...
    """
    weights = np.exp(-(np.arange(2 * radius + 1, dtype=np.float64) ** 2) / (2.0 * sigma**2))
    return np.asarray(weights / weights.sum())


def _lerp(planes: Floats, positions: NDArray[np.float64], axis: int) -> Floats:
    """Linear interpolation along one axis at the given positions, clamped to the ends."""
    size = planes.shape[axis]
    inside = np.clip(positions, 0.0, size - 1.0)
    low = np.minimum(np.floor(inside).astype(np.intp), max(size - 2, 0))
    high = np.minimum(low + 1, size - 1)
    shape = [1] * planes.ndim
    shape[axis] = len(positions)
    share = (inside - low).astype(np.float32).reshape(shape)
    first = np.take(planes, low, axis=axis)
    second: Floats = np.take(planes, high, axis=axis)
    second -= first
    second *= share
    second += first
    return second


def spline_zoom(planes: Floats, factor: float) -> Floats:
    """Enlarge the last two axes, corner aligned to corner (scipy.ndimage.zoom, order 1).

    Returns:
        [..., round(height * factor), round(width * factor)].
    """
    result = planes
    for axis in (planes.ndim - 2, planes.ndim - 1):
        size = planes.shape[axis]
        new = round(size * factor)
        step = (size - 1) / (new - 1) if new > 1 else 1.0
        result = _lerp(result, np.arange(new) * step, axis)
    return result


def centre_zoom(planes: Floats, factor: float) -> Floats:
    """Zoom into the centre and cut back to the size of the input; factor >= 1."""
    height, width = planes.shape[-2:]
    inner_height, inner_width = int(np.ceil(height / factor)), int(np.ceil(width / factor))
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    zoomed = spline_zoom(planes[..., top : top + inner_height, left : left + inner_width], factor)
    # Rounding can leave the result a pixel short; the edge is repeated then.
    rows = (zoomed.shape[-2] - height) // 2 + np.arange(height)
    columns = (zoomed.shape[-1] - width) // 2 + np.arange(width)
    rows, columns = np.clip(rows, 0, zoomed.shape[-2] - 1), np.clip(columns, 0, zoomed.shape[-1] - 1)
    return zoomed[..., rows[:, None], columns[None, :]]


def linear_resize(planes: Floats, height: int, width: int) -> Floats:
    """Bilinear resize with pixel centres aligned and no smoothing before (OpenCV's INTER_LINEAR)."""
    result = planes
    for axis, new in ((planes.ndim - 2, height), (planes.ndim - 1, width)):
        size = planes.shape[axis]
        result = _lerp(result, (np.arange(new) + 0.5) * (size / new) - 0.5, axis)
    return result


def sample(planes: Floats, y: Floats, x: Floats, border: Border) -> Floats:
    """Bilinear sampling at free positions.

    Args:
        planes: [batch, channels, height, width].
        y: [batch, height, width], row positions in pixels.
        x: [batch, height, width], column positions in pixels.
        border: see `Border`.
    """
    batch, channels, height, width = planes.shape
    y0, x0 = np.floor(y), np.floor(x)
    share_y, share_x = (y - y0)[:, None], (x - x0)[:, None]
    top, left = y0.astype(np.intp), x0.astype(np.intp)
    rows = [border_index(top + k, height, border) * width for k in (0, 1)]
    columns = [border_index(left + k, width, border) for k in (0, 1)]
    flat = planes.reshape(batch, channels, height * width)

    def corner(down: int, right: int) -> Floats:
        index = (rows[down] + columns[right]).reshape(batch, 1, -1)
        return np.take_along_axis(flat, index, axis=2).reshape(planes.shape)

    upper = corner(0, 0) * (1 - share_x) + corner(0, 1) * share_x
    lower = corner(1, 0) * (1 - share_x) + corner(1, 1) * share_x
    return np.asarray(upper * (1 - share_y) + lower * share_y, dtype=np.float32)


def _box_matrix(size: int, new: int) -> Floats:
    """Pillow's BOX filter as a [new, size] matrix: a pixel counts whole if its centre lies in the box."""
    scale = size / new
    stretch = max(scale, 1.0)
    matrix = np.zeros((new, size))
    for i in range(new):
        centre = (i + 0.5) * scale
        low = max(int(centre - 0.5 * stretch + 0.5), 0)
        high = min(int(centre + 0.5 * stretch + 0.5), size)
        distance = (np.arange(low, high) - centre + 0.5) / stretch
        taps = ((distance > -0.5) & (distance <= 0.5)).astype(np.float64)
        matrix[i, low:high] = taps / taps.sum()
    return matrix.astype(np.float32)


def box_resize(planes: Floats, height: int, width: int) -> Floats:
    """Box resize of planes in 0..255, columns first, rounded to whole grey levels after each axis (as
    Pillow).
    """
    columns = np.ascontiguousarray(_box_matrix(planes.shape[-1], width).T)
    narrow = np.floor(np.matmul(planes, columns) + np.float32(0.5))
    result: Floats = np.floor(np.matmul(_box_matrix(planes.shape[-2], height), narrow) + np.float32(0.5))
    return result


def grey(planes: Floats) -> Floats:
    """Luma [batch, 1, height, width] of RGB planes (ITU-R BT.601 weights); grey planes as they are."""
    if planes.shape[1] == 1:
        return planes
    red, green, blue = planes[:, 0:1], planes[:, 1:2], planes[:, 2:3]
    luma: Floats = np.float32(0.299) * red + np.float32(0.587) * green + np.float32(0.114) * blue
    return luma


def add_to_value(planes: Floats, amount: float) -> Floats:
    """HSV value plus `amount`, clipped to [0, 1], hue and saturation kept.

    With hue and saturation fixed an RGB colour is proportional to its value, so no conversion is needed.
    Black has no hue: it becomes grey.
    """
    value = planes.max(axis=1, keepdims=True)
    raised = np.clip(value + np.float32(amount), 0.0, 1.0)
    black = value <= 0
    ratio = raised / np.where(black, np.float32(1.0), value)
    brighter: Floats = np.where(black, raised, planes * ratio)
    return brighter


def scale_saturation(planes: Floats, scale: float, offset: float) -> Floats:
    """HSV saturation times `scale` plus `offset`, clipped to [0, 1], hue and value kept.

    Each channel is value * (1 - saturation * k) with k given by the hue alone; only the saturation is
    exchanged. A grey pixel has hue 0 (red) by convention, so that a positive offset tints it red, as the
    published sets do.

    Args:
        planes: [batch, 3, height, width].
        scale: factor.
        offset: added after scaling.
    """
    value = planes.max(axis=1, keepdims=True)
    spread = value - planes.min(axis=1, keepdims=True)
    lit = value > 0
    saturation = np.where(lit, spread / np.where(lit, value, np.float32(1.0)), np.float32(0.0))
    wanted = np.clip(saturation * np.float32(scale) + np.float32(offset), 0.0, 1.0)
    red_hue = np.array([0.0, 1.0, 1.0], dtype=np.float32).reshape(1, 3, 1, 1)
    k = np.where(spread > 0, (value - planes) / np.where(spread > 0, spread, np.float32(1.0)), red_hue)
    result: Floats = value * (1 - wanted * k)
    return result


def clip01(planes: Floats) -> Floats:
    """Clip to [0, 1]."""
    return np.clip(planes, np.float32(0.0), np.float32(1.0))


def from_uint8(levels: NDArray[np.uint8]) -> Floats:
    """0..255 to [0, 1]; `to_uint8` gives every level back exactly."""
    return np.divide(levels, np.float32(255.0), dtype=np.float32)


def to_uint8(planes: Floats) -> NDArray[np.uint8]:
    """[0, 1] to 0..255 by truncation, the rule of the published sets."""
    return (clip01(planes) * np.float32(255.0)).astype(np.uint8)
