"""The samples that wait for a step: bounded, in order, copied."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tta_edge.window import Window

actions = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(1, 12)),
        st.tuples(st.just("take"), st.integers(1, 12), st.booleans()),
        st.tuples(st.just("clear")),
    ),
    max_size=40,
)


def numbered(first, count):
    return np.arange(first, first + count, dtype=np.float32)[:, None].repeat(3, axis=1)


@given(actions, st.integers(1, 10))
def test_in_any_order_it_is_a_bounded_queue_that_accounts_for_every_sample(actions, capacity):
    window, model = Window(capacity), deque()
    put = taken = dropped = fresh = 0
    for action in actions:
        if action[0] == "put":
            growth = window.growth(action[1])
            before = len(window)
            dropped += window.put(numbered(put, action[1]))
            model.extend(range(put, put + action[1]))
            put += action[1]
            fresh += action[1]
            while len(model) > capacity:
                model.popleft()
            assert len(window) - before == growth
        elif action[0] == "take" and action[1] <= len(window):
            x, left = window.take(action[1], newest=action[2])
            if action[2]:
                for _ in range(left):
                    model.popleft()
            assert x[:, 0].tolist() == [model.popleft() for _ in range(action[1])]
            assert left == 0 or action[2]
            taken += len(x)
            dropped += left
            fresh = 0
        elif action[0] == "clear":
            dropped += window.clear()
            model.clear()
            fresh = 0
        assert len(window) == len(model) <= capacity
        assert window.nbytes == len(window) * 12
        assert window.fresh == fresh
        assert put == taken + dropped + len(window)


def test_the_newest_are_the_last_ones_and_those_before_them_are_dropped():
    window = Window(10)
    window.put(numbered(0, 8))
    x, dropped = window.take(3, newest=True)
    assert x[:, 0].tolist() == [5, 6, 7]
    assert (dropped, len(window), window.nbytes) == (5, 0, 0)


def test_the_oldest_are_taken_in_the_order_of_their_arrival_and_the_others_stay():
    window = Window(10)
    window.put(numbered(0, 5))
    window.put(numbered(5, 3))
    x, dropped = window.take(6, newest=False)
    assert x[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert (dropped, len(window)) == (0, 2)


def test_samples_are_copies_and_keep_dtype_and_shape():
    x = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    window = Window(4)
    window.put(x)
    x[:] = 0  # the frame is used again
    taken, _ = window.take(2, newest=False)
    assert (taken.dtype, taken.shape, taken.max()) == (np.uint8, (2, 3, 4), 23)


def test_a_batch_larger_than_the_window_leaves_its_newest_samples():
    window = Window(4)
    assert window.put(numbered(0, 10)) == 6
    assert window.fresh == 10
    assert window.take(4, newest=False)[0][:, 0].tolist() == [6, 7, 8, 9]


@pytest.mark.parametrize("newest", [False, True])
def test_taking_nothing_from_an_empty_window_fails_and_changes_nothing(newest):
    window = Window(4)
    with pytest.raises(IndexError):
        window.take(1, newest=newest)
    assert (len(window), window.nbytes) == (0, 0)
