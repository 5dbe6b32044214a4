"""The gate: what passes and why not, and that one hostile edge among many decides nothing."""

from __future__ import annotations

import math
import os
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tta_cloud.gate import (
    HOLD_OUT,
    GateOptions,
    gain,
    held_out,
    judge,
    judge_labelled,
    scores,
    trimmed_mean,
)

EXAMPLES = int(os.environ.get("TTA_EXAMPLES", "200"))
many = settings(max_examples=EXAMPLES, deadline=None)
CLASSES = 4
Logits = NDArray[np.float32]

odd = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e-30, -3e38, 3e38, 88.0, -1e4])
"""What a hostile sample can make of a logit."""


@pytest.fixture(autouse=True)
def loud():
    """Numbers that nobody looked at are announced by numpy's warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def towards(label: NDArray[np.int64], p: float | NDArray[np.float64]) -> Logits:
    """Logits [n, CLASSES] that give each label a probability p."""
    odds = np.log(np.asarray(p) * (CLASSES - 1) / (1 - np.asarray(p)))
    return ((np.arange(CLASSES) == label[:, None]) * np.broadcast_to(odds, label.shape)[:, None]).astype(
        np.float32
    )


def labels(n: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, CLASSES, n)


TEACHER = towards(labels(40), 0.9)
EDGES = [f"edge-{i % 10}" for i in range(40)]


def with_rows(logits: Logits, rows: slice | list[int], value: float) -> Logits:
    changed = logits.copy()
    changed[rows] = value
    return changed


@pytest.mark.parametrize(
    ("candidate", "head", "passed", "reason"),
    [
        (0.70, 0.60, True, ""),
        (0.60, 0.60, True, ""),
        (0.596, 0.60, True, ""),
        (0.594, 0.60, False, "lost"),
        (0.30, 0.60, False, "lost"),
    ],
)
def test_what_a_candidate_must_keep(candidate: float, head: float, passed: bool, reason: str) -> None:
    found = judge(towards(labels(40), candidate), towards(labels(40), head), TEACHER, EDGES, GateOptions())
    assert (found.passed, found.reason, found.samples) == (passed, reason, 40)
    assert found.score == pytest.approx(candidate, abs=1e-6)
    assert found.head == pytest.approx(head, abs=1e-6)


GOOD = towards(labels(40), 0.6)
OF_ONE, OF_FOUR = [0, 10, 20, 30], [0, 1, 2, 3]
"""Samples of one edge, and one sample of each of four."""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("candidate", "head", "target", "passed", "reason", "samples"),
    [
        (slice(None), [], [], False, "non-finite", 40),
        (OF_FOUR, [], [], False, "non-finite", 40),
        (OF_ONE, [], [], True, "", 40),
        ([], slice(None), [], True, "", 40),
        (OF_FOUR, OF_FOUR, [], True, "", 36),
        ([], [], OF_FOUR, True, "", 36),
        ([], [], slice(None), False, "non-finite", 0),
        (slice(None), slice(None), [], False, "non-finite", 0),
        ([], [], slice(0, 25), False, "few-samples", 15),
    ],
)
def test_where_there_is_no_answer(candidate, head, target, passed, reason, samples, value) -> None:
    found = judge(
        with_rows(GOOD, candidate, value),
        with_rows(GOOD, head, value),
        with_rows(TEACHER, target, value),
        EDGES,
        GateOptions(),
    )
    assert (found.passed, found.reason, found.samples) == (passed, reason, samples)


def test_a_head_without_answers_hides_no_loss() -> None:
    head = with_rows(towards(labels(40), 0.9), OF_ONE, math.nan)
    assert judge(towards(labels(40), 0.5), head, TEACHER, EDGES, GateOptions()).reason == "lost"


@pytest.mark.parametrize("minimum", [0, 1, 16, 41])
@pytest.mark.parametrize("n", [0, 1, 15, 16, 40])
def test_too_few_samples_publish_nothing(n: int, minimum: int) -> None:
    found = judge(GOOD[:n], GOOD[:n], TEACHER[:n], EDGES[:n], GateOptions(min_samples=minimum))
    assert found.passed == (n >= max(minimum, 1))
    if not found.passed:
        assert (found.reason, found.samples) == ("few-samples", n)
        assert math.isnan(found.score)
        assert math.isnan(found.head)


def test_edges_have_a_say_each_and_not_samples() -> None:
    senders = ["loud"] * 35 + [f"edge-{i}" for i in range(5)]
    head, worse = towards(labels(40), 0.6), np.where(np.arange(40) < 35, 0.1, 0.7)
    assert judge(towards(labels(40), worse), head, TEACHER, senders, GateOptions()).passed
    assert not judge(towards(labels(40), 0.8 - worse), head, TEACHER, senders, GateOptions()).passed


def test_labels_decide_where_there_are_some() -> None:
    truth = labels(10)
    right, wrong = towards(truth, 0.9), towards((truth + 1) % CLASSES, 0.9)
    half = np.where(np.arange(10)[:, None] < 5, right, wrong)
    table = [
        (right, half, True, "", 1.0, 0.5),
        (half, half, True, "", 0.5, 0.5),
        (half, right, False, "lost-labelled", 0.5, 1.0),
        (half, with_rows(right, slice(4, 10), math.nan), True, "", 0.5, 0.4),
    ]
    for candidate, head, passed, reason, mine, before in table:
        found = judge_labelled(candidate, head, truth, GateOptions())
        assert (found.passed, found.reason, found.score, found.head) == (passed, reason, mine, before)
    assert judge_labelled(half, right, truth, GateOptions(tolerance=0.6)).passed
    spoilt = judge_labelled(with_rows(right, [3], math.nan), right, truth, GateOptions())
    assert (spoilt.passed, spoilt.reason, spoilt.samples) == (False, "non-finite", 10)
    nothing = judge_labelled(right[:0], right[:0], truth[:0], GateOptions())
    assert (nothing.passed, nothing.reason) == (False, "few-samples")


def test_a_score_is_the_probability_of_the_teachers_class() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]])).astype(np.float32)
    target = np.array([[0, 9, 0, 0], [1, 0, 0, 2]], np.float32)
    np.testing.assert_allclose(scores(logits, target), [0.25, 0.4], rtol=1e-6)
    np.testing.assert_allclose(scores(logits + np.float32(3e4), target), [0.25, 0.4], rtol=2e-2)


@pytest.mark.parametrize(
    ("values", "trim", "expected"),
    [
        ([3.0], 0.4, 3.0),
        ([1.0, 2.0], 0.4, 1.5),
        ([9.0, 1.0, 2.0, 0.0], 0.0, 3.0),
        ([9.0, 1.0, 2.0, 3.0, -50.0], 0.0, 2.0),
        ([0.0] + [1.0] * 8 + [90.0], 0.2, 1.0),
        ([0.0, 1.0, 5.0], 0.49, 1.0),
    ],
)
def test_trimmed_mean(values: list[float], trim: float, expected: float) -> None:
    assert trimmed_mean(np.array(values), trim) == expected


def test_a_gain_is_of_edges_differences() -> None:
    candidate, head = np.array([0.5, 0.7, 0.9, 0.2]), np.array([0.4, 0.4, 0.8, 0.1])
    assert gain(candidate, head, ["a", "a", "b", "b"], 0.2) == pytest.approx((0.2 + 0.1) / 2)


# --- properties ---------------------------------------------------------------------------------------


@st.composite
def batches(draw, samples: int = 24):
    """Logits of anything at all, a teacher's, and who sent each sample."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.1, 1.0, 30.0]))
    logits, target = (scale * rng.normal(size=(samples, CLASSES)) for _ in range(2))
    edges = [f"edge-{i}" for i in rng.integers(0, draw(st.integers(1, 12)), samples)]
    return logits.astype(np.float32), target.astype(np.float32), edges


@many
@given(batches(), st.floats(0, 0.45), st.floats(0, 1))
def test_what_is_published_already_passes(batch, trim, tolerance) -> None:
    logits, target, edges = batch
    found = judge(logits, logits.copy(), target, edges, GateOptions(tolerance=tolerance, trim=trim))
    assert found.passed
    assert found.score == found.head


@many
@given(batches(), batches(), st.integers(0, 2**32 - 1))
def test_the_order_of_samples_decides_nothing(batch, other, seed) -> None:
    (logits, target, edges), head = batch, other[0]
    turned = np.random.default_rng(seed).permutation(len(edges))
    options = GateOptions()
    again = judge(logits[turned], head[turned], target[turned], [edges[i] for i in turned], options)
    assert again == judge(logits, head, target, edges, options)
    np.testing.assert_array_equal(scores(logits, target)[turned], scores(logits[turned], target[turned]))


@st.composite
def with_a_liar(draw):
    """(difference, probabilities of nine honest edges' samples, logits of a liar's)."""
    wins = draw(st.booleans())
    size = st.floats(0.0055, 0.3)
    differences = np.array(draw(st.lists(size, min_size=9, max_size=9))) * (1 if wins else -1)
    share = draw(st.integers(1, 60))
    shape = (3, share, CLASSES)
    pool = draw(st.lists(odd | st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return wins, differences, np.array(pool, np.float32)[rng.integers(0, len(pool), shape)]


@many
@given(with_a_liar())
def test_one_hostile_edge_among_ten_decides_nothing(case) -> None:
    wins, differences, lies = case
    truth = labels(27, 1)
    apart = np.repeat(differences, 3)
    candidate = np.concatenate([towards(truth, 0.5 + apart), lies[0]])
    head = np.concatenate([towards(truth, 0.5), lies[1]])
    target = np.concatenate([towards(truth, 0.9), lies[2]])
    edges = [f"edge-{i // 3}" for i in range(27)] + ["liar"] * lies.shape[1]
    found = judge(candidate, head, target, edges, GateOptions())
    assert found.passed == wins, found


def test_two_hostile_edges_among_ten_are_trimmed_and_three_are_not() -> None:
    """The companion: the property above must be able to fail."""
    apart = np.where(np.arange(40) % 10 < 3, -0.5, 0.02)
    worse = judge(towards(labels(40), 0.6 + apart), GOOD, TEACHER, EDGES, GateOptions())
    assert not worse.passed
    apart = np.where(np.arange(40) % 10 < 2, -0.5, 0.02)
    assert judge(towards(labels(40), 0.6 + apart), GOOD, TEACHER, EDGES, GateOptions()).passed


# --- what is held out -----------------------------------------------------------------------------------


def test_one_sample_in_so_many_is_held_out() -> None:
    n = 40_000
    share = sum(map(held_out, range(n))) / n
    assert share == pytest.approx(1 / HOLD_OUT, abs=5 * math.sqrt(1 / HOLD_OUT / n))


def test_what_is_held_out_stays_so() -> None:
    """Written down: another rule would teach what the gate of a version before has kept apart."""
    assert [i for i in range(1, 61) if held_out(i)] == [36, 38, 44, 56]
