"""Theta: layout, packing, digest, distance and difference."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tta_runtime import theta
from tta_runtime.errors import LayoutMismatch, NonFiniteTheta

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ARRAYS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, max_side=4), elements=FLOATS)
TENSORS = st.lists(
    st.tuples(st.text(min_size=1, max_size=6), ARRAYS, st.sampled_from(["weight", "mean"]), st.booleans()),
    min_size=1,
    max_size=6,
    unique_by=lambda t: t[0],
)


@given(TENSORS)
def test_pack_and_unpack_are_inverse(tensors):
    layout, vector = theta.make_layout(tensors)
    named = theta.unpack(layout, vector)
    assert set(named) == {t[0] for t in tensors}
    for name, values, _, _ in tensors:
        np.testing.assert_array_equal(named[name], values)
    np.testing.assert_array_equal(theta.pack(layout, named), vector)


@given(TENSORS)
def test_trained_entries_come_first_and_fill_their_part(tensors):
    layout, _ = theta.make_layout(tensors)
    flags = [e.trained for e in layout.entries]
    assert flags == sorted(flags, reverse=True)
    assert layout.trained == sum(t[1].size for t in tensors if t[3])
    assert layout.size == sum(t[1].size for t in tensors)
    offset = 0
    for entry in layout.entries:
        assert entry.offset == offset
        offset += int(np.prod(entry.shape))


def test_digest_is_what_the_specification_says():
    """Built here from the text of docs/spec/bundle.md, byte by byte."""
    layout, vector = theta.make_layout(
        [
            ("b.mean", np.array([3.0], np.float32), "mean", False),
            ("a", np.array([[1.0, -2.5]], np.float32), "weight", True),
        ]
    )
    expected = hashlib.sha256(
        b"a\x001,2\x00" + struct.pack("<2f", 1.0, -2.5) + b"b.mean\x001\x00" + struct.pack("<f", 3.0)
    ).hexdigest()
    assert layout.digest == theta.digest(layout, vector) == expected


@given(TENSORS, st.data())
def test_the_digest_changes_with_any_bit(tensors, data):
    layout, vector = theta.make_layout(tensors)
    index = data.draw(st.integers(0, vector.nbytes - 1))
    changed = vector.copy()
    changed.view(np.uint8)[index] ^= 1
    assert theta.digest(layout, changed) != layout.digest


def test_unpack_gives_views():
    layout, vector = theta.make_layout([("a", np.zeros((2, 2), np.float32), "weight", True)])
    theta.unpack(layout, vector)["a"][1, 1] = 5.0
    assert vector[3] == 5.0


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "missing ['a', 'b']"),
        (
            {"a": np.zeros(2, np.float32), "b": np.zeros(1, np.float32), "c": np.zeros(1, np.float32)},
            "unknown ['c']",
        ),
        ({"a": np.zeros(3, np.float32), "b": np.zeros(1, np.float32)}, "[3], the layout says float32 [2]"),
        ({"a": np.zeros(2), "b": np.zeros(1, np.float32)}, "float64"),
    ],
)
def test_packing_what_does_not_fit(tensors, says):
    layout, _ = theta.make_layout(
        [("a", np.ones(2, np.float32), "w", True), ("b", np.ones(1, np.float32), "w", True)]
    )
    with pytest.raises(LayoutMismatch) as refusal:
        theta.pack(layout, tensors)
    assert says in str(refusal.value)


def test_check_names_the_tensor_that_is_not_finite():
    layout, vector = theta.make_layout(
        [("first", np.ones(2, np.float32), "w", True), ("second", np.ones(3, np.float32), "w", True)]
    )
    assert theta.check(layout, vector) is vector
    bad = vector.copy()
    bad[[3, 4]] = np.nan, np.inf
    with pytest.raises(NonFiniteTheta, match=r"2 values .* `second`"):
        theta.check(layout, bad)
    for wrong in (vector[:-1], vector.astype(np.float64), vector[None]):
        with pytest.raises(LayoutMismatch, match=r"float32 \[5\]"):
            theta.check(layout, wrong)


def test_distance_is_relative_and_exact_where_it_matters():
    ones = np.ones(4, np.float32)
    assert theta.distance(ones, ones) == 0.0
    assert theta.distance(2 * ones, ones) == 1.0
    assert theta.distance(ones, 2 * ones) == 0.5
    assert theta.distance(ones, 0 * ones) == np.inf
    assert theta.distance(0 * ones, 0 * ones) == 0.0
    # float32 would lose the difference of a million small changes against a norm of 1000
    many = np.ones(1_000_000, np.float32)
    assert theta.distance(many + np.float32(1e-6), many) == pytest.approx(9.5367431640625e-07, rel=1e-6)


def test_diff_has_a_row_for_each_tensor():
    layout, a = theta.make_layout(
        [
            ("w", np.full(4, 2.0, np.float32), "weight", True),
            ("m", np.full((2, 1), 1.0, np.float32), "mean", False),
        ]
    )
    b = a.copy()
    b[:4] = 1.0
    rows = theta.diff(layout, a, b)
    assert [(r.name, r.kind, r.trained, r.size, r.relative, r.max_abs) for r in rows] == [
        ("w", "weight", True, 4, 1.0, 1.0),
        ("m", "mean", False, 2, 0.0, 0.0),
    ]


def test_name_at():
    layout, _ = theta.make_layout(
        [("a", np.ones(2, np.float32), "w", True), ("s", np.float32(1).reshape(()), "w", True)]
    )
    assert [theta.name_at(layout, i) for i in range(3)] == ["a", "a", "s"]
    with pytest.raises(IndexError):
        theta.name_at(layout, 3)


def test_the_layout_digest_sees_everything_but_the_values():
    one = [("a", np.ones(2, np.float32), "w", True)]
    base, _ = theta.make_layout(one)
    same, _ = theta.make_layout([("a", np.zeros(2, np.float32), "w", True)])
    assert theta.layout_digest(base) == theta.layout_digest(same)
    for other in (
        ("b", one[0][1], "w", True),
        ("a", np.ones((2, 1), np.float32), "w", True),
        ("a", one[0][1], "v", True),
        ("a", one[0][1], "w", False),
    ):
        assert theta.layout_digest(theta.make_layout([other])[0]) != theta.layout_digest(base)
