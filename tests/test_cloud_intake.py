"""What the cloud takes of what edges send, and how a round is made up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tta_cloud.intake import IntakeOptions, balanced, refusals
from tta_runtime.numerics import softmax

SURE, TORN, LEVEL = [9.0, 0, 0, 0], [2.0, 2, 0, 0], [0.0, 0, 0, 0]
NONE = np.zeros((0, 4), np.float32)


def rows(*values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_by_default_only_what_is_not_finite_is_refused() -> None:
    given = rows(SURE, TORN, LEVEL, [np.nan, 0, 0, 0], [np.inf, 0, 0, 0])
    assert refusals(given, NONE, IntakeOptions()) == ["", "", "", "bad-sample", "bad-sample"]


def test_the_groups_student_says_what_is_uninformative_and_what_is_uncertain() -> None:
    options = IntakeOptions(min_entropy=0.02, max_entropy=0.9)
    assert refusals(rows(SURE, TORN, LEVEL), NONE, options) == ["uninformative", "", "uncertain"]


def test_a_sample_like_one_taken_before_is_redundant_within_a_message_too() -> None:
    options = IntakeOptions(redundancy=0.99)
    twice = rows(TORN, TORN, SURE)
    assert refusals(twice, NONE, options) == ["", "redundant", ""]
    assert refusals(twice, softmax(rows(SURE)).astype(np.float32), options) == ["", "redundant", "redundant"]


def test_what_is_remembered_is_bounded_to_the_newest() -> None:
    options = IntakeOptions(redundancy=0.99, remembered=1)
    recent = softmax(rows(SURE, TORN)).astype(np.float32)
    assert refusals(rows(SURE), recent, options) == [""]
    assert refusals(rows(TORN), recent, options) == ["redundant"]


def test_a_round_takes_from_every_edge_in_turn() -> None:
    assert balanced(["a"] * 6 + ["b"] * 2, 4, 0.5) == [0, 1, 6, 7]
    assert balanced(["a"] * 6, 4, 0.5) == [0, 1, 2, 3], "an edge that is alone has all of it"
    assert balanced(["a"] * 6 + ["b"], 4, 0.5) == [0, 1, 6], "rather a smaller round than one of one voice"
    assert balanced([], 4, 0.5) == []


@given(
    st.lists(st.sampled_from("abcde"), max_size=60),
    st.integers(1, 40),
    st.floats(0.0, 1.0),
)
def test_no_edge_has_more_than_its_share(edges: list[str], wanted: int, share: float) -> None:
    taken = balanced(edges, wanted, share)
    assert taken == sorted(set(taken))
    assert len(taken) <= min(wanted, len(edges))
    for edge in set(edges):
        own = [place for place in taken if edges[place] == edge]
        if len(set(edges)) > 1:
            assert len(own) <= max(1, int(share * wanted))
        assert own == [place for place in range(len(edges)) if edges[place] == edge][: len(own)], (
            "oldest first"
        )


@pytest.mark.parametrize("n", [1, 3])
def test_an_edge_among_ten_that_floods_has_its_share_and_no_more(n: int) -> None:
    edges = ["hostile"] * 1000 + [f"edge-{i}" for i in range(9) for _ in range(n)]
    taken = balanced(edges, 32, 0.2)
    assert sum(edges[place] == "hostile" for place in taken) <= 6
