"""The numpy image operations against independent implementations: scipy.ndimage, Pillow, colorsys."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest

from stream_images import smooth
from tta_edge.streams import blur, digital, ops, weather
from tta_edge.streams.draws import Draws

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def ndimage():
    return pytest.importorskip("scipy.ndimage")


@pytest.fixture(scope="module")
def planes():
    return np.random.default_rng(0).random((2, 3, 24, 32), dtype=np.float32)


@pytest.mark.parametrize(
    ("border", "mode"), [("nearest", "nearest"), ("reflect", "reflect"), ("reflect101", "mirror")]
)
@pytest.mark.parametrize("sigma", [0.05, 0.4, 1.5, 6.4, 60.0])
def test_gaussian_filter(ndimage, planes, border, mode, sigma):
    ours = ops.gaussian_filter(planes, sigma, truncate=3.0, border=border)
    theirs = ndimage.gaussian_filter(planes, (0, 0, sigma, sigma), truncate=3.0, mode=mode)
    assert np.abs(ours - theirs).max() < TOLERANCE


@pytest.mark.parametrize("factor", [1.0, 1.06, 1.25, 2.25, 4.5])
def test_spline_zoom(ndimage, planes, factor):
    ours, theirs = ops.spline_zoom(planes, factor), ndimage.zoom(planes, (1, 1, factor, factor), order=1)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < TOLERANCE


@pytest.mark.parametrize("c", [(0.3, 0.4), (1.5, 0.1), (4, 0.5), (10, 0.5)])
def test_correlate(ndimage, planes, c):
    kernel = blur.disk(*c)
    assert abs(kernel.sum() - 1.0) < 0.02  # the recipe normalises before it smooths: the largest gains 1 %
    theirs = ndimage.correlate(planes, kernel[None, None], mode="mirror")
    assert np.abs(ops.correlate(planes, kernel, "reflect101") - theirs).max() < TOLERANCE


@pytest.mark.parametrize(
    ("border", "mode", "reach"), [("reflect101", "mirror", 90.0), ("reflect", "reflect", 0.4)]
)
def test_sample(ndimage, planes, border, mode, reach):
    rng = np.random.default_rng(1)
    y = rng.uniform(-reach, 23 + reach, (2, 24, 32)).astype(np.float32)
    x = rng.uniform(-reach, 31 + reach, (2, 24, 32)).astype(np.float32)
    ours = ops.sample(planes, y, x, border)
    for n in range(2):
        for c in range(3):
            theirs = ndimage.map_coordinates(planes[n, c], [y[n], x[n]], order=1, mode=mode)
            assert np.abs(ours[n, c] - theirs).max() < TOLERANCE


@pytest.mark.parametrize("c", [0.95, 0.9, 0.85, 0.75, 0.65, 0.6, 0.5, 0.4, 0.3, 0.25])
@pytest.mark.parametrize("side", [8, 32, 57])
def test_pixelate_is_pillows_box_to_the_level(c, side):
    image = pytest.importorskip("PIL.Image")
    images = smooth(3, side)
    ours = ops.to_uint8(
        digital.pixelate(ops.from_uint8(np.moveaxis(images, -1, 1)), c, Draws(0, "", 1, 0, 3))
    )
    small = max(int(side * c), 1)
    for ours_one, one in zip(np.moveaxis(ours, 1, -1), images, strict=True):
        box = image.Resampling.BOX
        theirs = image.fromarray(one).resize((small, small), box).resize((side, side), box)
        assert (ours_one == np.asarray(theirs)).all()


def test_every_level_survives_the_way_there_and_back():
    levels = np.arange(256, dtype=np.uint8)
    assert (ops.to_uint8(ops.from_uint8(levels)) == levels).all()


def test_saturation_and_value_against_colorsys(planes):
    grey_and_black = np.stack([np.full((3, 2, 2), 0.4), np.zeros((3, 2, 2))]).astype(np.float32)
    for colours in (planes[:, :, :6, :6], grey_and_black):
        saturated, brighter = ops.scale_saturation(colours, 2.5, 0.2), ops.add_to_value(colours, 0.3)
        for n, y, x in np.ndindex(colours.shape[0], *colours.shape[2:]):
            h, s, v = colorsys.rgb_to_hsv(*colours[n, :, y, x].tolist())
            wanted = colorsys.hsv_to_rgb(h, min(1.0, 2.5 * s + 0.2), v)
            assert np.abs(saturated[n, :, y, x] - wanted).max() < TOLERANCE
            wanted = colorsys.hsv_to_rgb(h, s, min(1.0, v + 0.3))
            assert np.abs(brighter[n, :, y, x] - wanted).max() < TOLERANCE


def test_line_blur_drifts_along_the_line():
    dot = np.zeros((2, 1, 15, 15), np.float32)
    dot[:, 0, 7, 7] = 1.0
    weights = ops.half_gaussian(2, 1.0)
    blurred = ops.line_blur(dot, weights, np.array([0.0, -np.pi / 2]))
    assert np.allclose(blurred[0, 0, 7, 7:2:-1], weights, atol=TOLERANCE), "read from the right"
    assert np.allclose(blurred[1, 0, 7:12, 7], weights, atol=TOLERANCE), "read from above"
    assert np.allclose(blurred.sum(axis=(1, 2, 3)), 1.0, atol=TOLERANCE)


def test_glass_copies_a_neighbour_within_reach():
    """Every pixel of the result is a pixel of the image from at most passes * reach away, plus chains."""
    numbered = np.arange(16 * 16, dtype=np.float32).reshape(1, 1, 16, 16) / 255.0
    shown = blur.glass_blur(numbered, (0.05, 1, 1), Draws(0, "glass_blur", 1, 0, 1))
    assert set(np.unique(ops.to_uint8(shown))) <= set(range(256))
    assert (ops.to_uint8(shown)[0, 0, 0] == ops.to_uint8(numbered)[0, 0, 0]).all(), (
        "the first row is only read"
    )
    assert (shown != numbered).any()


def test_plasma_is_rougher_with_a_smaller_decay():
    def roughness(decay):
        field = weather.plasma(Draws(0, "fog", 1, 0, 8), 64, decay)
        assert field.min() == 0.0
        assert field.max() == 1.0
        return np.abs(np.diff(field, axis=2)).mean()

    assert roughness(3.0) < roughness(2.0) < roughness(1.4)
