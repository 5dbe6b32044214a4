"""What the cloud takes of what edges send, and how a round is made up."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import exported
from networks import SIZE
from tta_cloud.gate import held_out, jury
from tta_cloud.intake import ACTIVE_MS, Intake, IntakeOptions, Waits, balanced, choose, refusals
from tta_runtime.bundle import Bundle
from tta_runtime.model import Engines
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
    assert balanced(["a"] * 6, 4, 1.0) == [0, 1, 2, 3]
    assert balanced(["a"] * 6, 4, 0.5) == [0, 1], "nor where the others have nothing waiting just now"
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
        assert len(own) <= max(1, math.ceil(share * wanted))
        assert own == [place for place in range(len(edges)) if edges[place] == edge][: len(own)], (
            "oldest first"
        )


@pytest.mark.parametrize("n", [1, 3])
def test_an_edge_among_ten_that_floods_has_its_share_and_no_more(n: int) -> None:
    edges = ["hostile"] * 1000 + [f"edge-{i}" for i in range(9) for _ in range(n)]
    taken = balanced(edges, 32, 0.2)
    assert sum(edges[place] == "hostile" for place in taken) <= 7


# --- who makes up a round -----------------------------------------------------------------------------


def waits(*edges: str) -> list[Waits]:
    """Waiting samples in this order, none of them held out."""
    numbers = (number for number in itertools.count(1) if not held_out(number))
    return [Waits(number, edge, 1000 * number) for number, edge in zip(numbers, edges, strict=False)]


def senders(*edges: str, at_ms: int = 0) -> dict[str, int]:
    return dict.fromkeys(edges, at_ms)


TEN = [f"edge-{i}" for i in range(10)]
OPTIONS = IntakeOptions()


def test_an_edge_that_is_alone_has_all_of_a_round() -> None:
    nine = waits(*["a"] * 9)
    assert choose(nine, senders("a"), 8, OPTIONS).new == tuple(each.number for each in nine[:8])


def test_a_flood_fills_no_round_where_the_others_have_nothing_waiting_just_now() -> None:
    flood = waits(*["edge-0"] * 100)
    assert not choose(flood, senders(*TEN), 32, OPTIONS).new
    assert choose(flood, {**senders(*TEN, at_ms=0), "edge-0": ACTIVE_MS + 1}, 32, OPTIONS).new, (
        "they have gone"
    )


def test_a_flood_of_one_among_ten_has_little_more_than_a_tenth_of_a_round() -> None:
    mixed = waits(*["edge-0"] * 400, *TEN[1:] * 4)
    found = choose(mixed, senders(*TEN), 32, OPTIONS)
    assert len(found.new) == 32
    edge = {each.number: each.edge for each in mixed}
    assert sum(edge[number] == "edge-0" for number in found.new) <= math.ceil(1.5 * 32 / 10)


def test_what_one_edge_has_waiting_is_bounded_and_its_oldest_are_given_up() -> None:
    options = IntakeOptions(max_waiting=10)
    mixed = waits(*["loud"] * 25, *["b"] * 5)
    found = choose(mixed, senders("loud", "b"), 64, options)
    assert found.surplus == tuple(each.number for each in mixed[:15])
    assert (found.new, found.held) == ((), ())


def test_what_is_held_out_is_not_learned_and_belongs_to_the_round_before_which_it_came() -> None:
    mixed = [Waits(number, "ab"[number % 2], number) for number in range(1, 121)]
    held = [number for number in range(1, 121) if held_out(number)]
    found = choose(mixed, senders("a", "b"), 60, OPTIONS)
    assert len(found.new) == 60
    assert not set(found.new) & set(held)
    assert found.held == tuple(number for number in held if number < found.new[-1])
    assert 0 < len(found.held) < len(held), "some of both"


@given(st.lists(st.sampled_from(TEN), max_size=80), st.integers(1, 40))
def test_a_round_is_whole_or_not_at_all_and_takes_nothing_twice(edges: list[str], wanted: int) -> None:
    found = choose(waits(*edges), senders(*edges), wanted, OPTIONS)
    assert len(found.new) in (0, wanted)
    assert len({*found.new, *found.held, *found.surplus}) == len(found.new) + len(found.held) + len(
        found.surplus
    )


def test_who_sends_most_of_what_is_held_out_drives_out_no_judge() -> None:
    flood = [*TEN[1:] * 3, *["edge-0"] * 500]
    places = jury(flood, 64)
    assert len(places) == 64
    assert Counter(flood[place] for place in places) == {**dict.fromkeys(TEN[1:], 3), "edge-0": 37}
    assert places == sorted(places)
    assert max(places) == len(flood) - 1, "the newest"


# --- the filter with the group's student ----------------------------------------------------------------


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines.load(Bundle.open(exported.built("mlp", ("source", "distill")).path), methods=["distill"])


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((3, SIZE, SIZE), dtype=np.float32)


def test_the_filter_follows_what_the_group_was_taught_and_no_other_group(engines: Engines) -> None:
    intake = Intake(engines, IntakeOptions(min_entropy=0.01))
    x = image(1)
    assert intake.refused("yard", "a", x) == ""
    theta = np.array(engines.bundle.theta0)
    trained = engines.bundle.manifest.theta.trained
    theta[:trained] *= 1e3  # the student is sure of everything now
    intake.teach("yard", theta)
    assert intake.refused("yard", "a", x) == "uninformative"
    assert intake.refused("roof", "a", x) == ""
    assert intake.refused("yard", "a", np.full_like(x, np.nan)) == "bad-sample"
    assert intake.refused("yard", "a", x[:1]) == "bad-sample"


def test_near_duplicates_of_an_edge_are_redundant_and_silence_no_other_edge(engines: Engines) -> None:
    intake = Intake(engines, IntakeOptions(redundancy=0.99999))
    x = image(1)
    near = x + np.float32(1e-5)
    assert intake.refused("yard", "a", x) == ""
    assert intake.refused("yard", "a", near) == "redundant"
    assert intake.refused("yard", "b", near) == ""
