"""Order, batches, and what the model is given; the measures computed from the answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_images import smooth
from tta_edge.streams import order as orders
from tta_edge.streams.errors import InputMismatch
from tta_edge.streams.measures import Recovery, drift, gap_recovered, recovery_samples, rolling_mean
from tta_edge.streams.order import batches, order
from tta_edge.streams.preprocess import preprocess
from tta_edge.streams.shifts import Shift, corrupt
from tta_edge.streams.source import Source, rows

X = smooth(10, 8, 3)
SOURCE = Source("s", 10, (8, 8, 3), lambda indices: rows(X, indices))


def test_order():
    assert order(5).tolist() == [0, 1, 2, 3, 4]
    assert order(5, limit=3).tolist() == [0, 1, 2]
    assert order(5, limit=9).tolist() == [0, 1, 2, 3, 4]
    drawn = order(100, shuffle=True, seed=1)
    assert sorted(drawn) == list(range(100))
    assert (order(100, shuffle=True, seed=1) == drawn).all()
    assert (order(100, shuffle=True, seed=2) != drawn).any()
    assert (order(100, shuffle=True, seed=1, limit=10) == drawn[:10]).all(), (
        "a sample of all, not of the first"
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.sampled_from([1, 200, 400, 1 << 20]), st.booleans())
def test_batches_are_the_shifted_stream_whatever_the_chunks(batch, chunk_values, shuffle):
    before, orders.CHUNK_VALUES = orders.CHUNK_VALUES, chunk_values
    try:
        places = order(10, shuffle=shuffle, seed=3)
        got = list(batches(SOURCE, Shift("gaussian_noise", 3), places, batch=batch, seed=5))
    finally:
        orders.CHUNK_VALUES = before
    assert (np.concatenate([b.images for b in got]) == corrupt(X[places], "gaussian_noise", 3, 5)).all()
    assert (np.concatenate([b.indices for b in got]) == places).all()
    assert [b.first for b in got] == list(range(0, 10, batch))
    assert all(len(b.images) == batch for b in got[:-1])


def test_unshifted_batches_are_the_images():
    got = list(batches(SOURCE, None, order(10), batch=4, seed=0))
    assert [len(b.images) for b in got] == [4, 4, 2]
    assert (np.concatenate([b.images for b in got]) == X).all()


# -------------------------------------------------------------------------------------------- preprocess


def test_float_input_is_channels_first_in_its_range():
    shape = ["batch", 3, 8, 8]
    x = preprocess((8, 8, 3), dtype="float32", shape=shape, low=0.0, high=1.0)(X)
    assert x.dtype == np.float32
    assert x.flags.c_contiguous
    assert (x == np.moveaxis(X, -1, 1).astype(np.float32) / np.float32(255)).all()
    wide = preprocess((8, 8, 3), dtype="float32", shape=shape, low=-1.0, high=1.0)(X)
    assert np.allclose(wide, x * 2 - 1)
    raw = preprocess((8, 8, 3), dtype="float32", shape=shape, low=0.0, high=255.0)(X)
    assert np.allclose(raw, np.moveaxis(X, -1, 1), atol=1e-4)


def test_other_inputs():
    byte = preprocess((8, 8, 3), dtype="uint8", shape=["batch", 3, 8, 8], low=0.0, high=255.0)(X)
    assert byte.dtype == np.uint8
    assert (byte == np.moveaxis(X, -1, 1)).all()
    flat = preprocess((8, 8, 3), dtype="float32", shape=["batch", 192], low=0.0, high=1.0)(X)
    assert (flat == (byte / np.float32(255)).reshape(10, 192)).all()
    free = preprocess((8, 8, 3), dtype="float32", shape=["batch", 3, "height", "width"], low=0.0, high=1.0)(X)
    assert free.shape == (10, 3, 8, 8)


@pytest.mark.parametrize(
    ("image", "wanted", "words"),
    [
        (
            (8, 8, 3),
            {"shape": ["batch", 3, 32, 32]},
            "3x8x8 (channels, height, width), the model takes 3x32x32",
        ),
        ((8, 8, 1), {"shape": ["batch", 3, 8, 8]}, "1x8x8"),
        ((8, 8, 3), {"shape": ["batch", 191]}, "the model takes 191"),
        ((8, 8, 3), {"shape": ["batch", 8, 8, 3]}, "the model takes 8x8x3"),
        ((8, 8, 3), {"shape": ["batch", 3, 8]}, "the model takes 3x8"),
        ((8, 8, 3), {"shape": ["batch", 3, 8, 8], "dtype": "int64"}, "takes int64"),
        ((8, 8, 3), {"shape": ["batch", 3, 8, 8], "dtype": "uint8", "high": 1.0}, "uint8 from 0 to 1"),
    ],
)
def test_nothing_is_resized_in_silence(image, wanted, words):
    with pytest.raises(InputMismatch) as caught:
        preprocess(image, **{"dtype": "float32", "low": 0.0, "high": 1.0, **wanted})
    assert words in str(caught.value)


# ---------------------------------------------------------------------------------------------- measures


def test_rolling_mean():
    assert rolling_mean(np.array([1.0, 0.0, 0.0, 1.0, 1.0]), 2).tolist() == [1.0, 0.5, 0.0, 0.5, 1.0]
    assert rolling_mean(np.array([1.0, 0.0]), 5).tolist() == [1.0, 0.5]
    assert rolling_mean(np.zeros(0), 5).tolist() == []


def test_gap_recovered():
    assert gap_recovered(0.9, 0.5, 0.7) == pytest.approx(0.5)
    assert gap_recovered(0.9, 0.5, 0.4) == pytest.approx(-0.25)
    assert gap_recovered(0.9, 0.9, 0.95) is None
    assert gap_recovered(0.9, 0.95, 0.95) is None


def test_recovery_time_of_a_known_course():
    """Wrong until sample 200, right from then on: near 0 once at most 5 of the last 50 are wrong."""
    wrong = np.arange(600) < 200
    assert recovery_samples(wrong, Recovery(window=50, tolerance=0.1)) == 200 + 45
    assert recovery_samples(np.zeros(600, bool), Recovery(window=50, tolerance=0.1)) == 50
    assert recovery_samples(np.arange(600) > 300, Recovery(window=50, tolerance=0.1)) == 50, (
        "it only got worse"
    )
    assert recovery_samples(wrong[:149], Recovery(window=50, tolerance=0.1)) is None, "under three windows"


@given(st.lists(st.booleans(), min_size=30, max_size=300), st.integers(1, 10))
def test_a_recovery_time_keeps_its_definition(wrong, window):
    found = recovery_samples(np.array(wrong), Recovery(window=window, tolerance=0.05))
    settled = np.mean(wrong[-(len(wrong) // 3) :])

    def near(t):
        return np.mean(wrong[t - window : t]) <= settled + 0.05 + 0.5 / window + 1e-9

    if found is None:
        assert not any(near(t) for t in range(window, len(wrong) + 1))
    else:
        assert near(found)
        assert not any(near(t) for t in range(window, found))


def test_drift():
    assert drift(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == 1.0
    assert drift(np.array([0.5, 0.5]), np.array([0.5, 0.5])) == 0.0
    assert drift(np.array([0.5, 0.5]), np.array([0.75, 0.25])) == pytest.approx(0.25)
