"""Which samples an edge sends: budgets that are kept, thresholds as published, and chance that can be repeated."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tta_edge.upload import FILTERS, Budgeted, Cema, Filter, Random, RateLimit
from tta_runtime.numerics import entropy

C = 10
LN_C = math.log(C)


def stream(n: int, height: float, seed: int = 0) -> np.ndarray:
    """[n, C] logits, the more certain the higher."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(n, C)).astype(np.float32)
    logits[np.arange(n), draw.integers(C, size=n)] += height * draw.random(n).astype(np.float32)
    return logits


def played(choose: Filter, logits: np.ndarray, batch: int, seed: int = 1) -> tuple[np.ndarray, Filter]:
    rand, kept = np.random.default_rng(seed).random(len(logits)), []
    for i in range(0, len(logits), batch):
        choice, choose = choose.choose(logits[i : i + batch], rand[i : i + batch])
        assert [reason == "" for reason in choice.reasons] == choice.keep.tolist()
        kept.append(choice.keep)
    return np.concatenate(kept), choose


@pytest.mark.parametrize("share", [0.05, 0.1, 0.35, 1.0])
@pytest.mark.parametrize("height", [0.0, 4.0, 40.0])
def test_the_budget_is_kept_whatever_the_entropies_are(share: float, height: float) -> None:
    kept, _ = played(Budgeted(share=share), stream(6000, height), 64)
    assert kept[600:].mean() == pytest.approx(share, rel=0.2)


@pytest.mark.parametrize("logits", [np.zeros((4000, C), np.float32), np.tile([99.0] + [0] * 9, (4000, 1))])
def test_the_budget_is_kept_where_all_answers_are_alike(logits: np.ndarray) -> None:
    kept, _ = played(Budgeted(share=0.2), logits.astype(np.float32), 64)
    assert kept[600:].mean() == pytest.approx(0.2, rel=0.2)


def test_the_budget_is_kept_soon_after_a_shift() -> None:
    logits = np.concatenate([stream(3000, 40.0), stream(3000, 0.0, seed=5)])
    kept, _ = played(Budgeted(share=0.1), logits, 64)
    assert kept[3500:].mean() == pytest.approx(0.1, rel=0.2)
    assert kept[3000:3500].mean() > 0.04, "the absolute threshold would send nothing here"
    absolute, _ = played(Cema(), logits, 64)
    assert absolute[3000:].mean() < 0.01


@pytest.mark.parametrize("name", ["budgeted", "random", "all"])
def test_batches_of_any_size_choose_the_same(name: str) -> None:
    logits = stream(640, 4.0)
    one, _ = played(FILTERS[name](0.2), logits, 1)
    many, _ = played(FILTERS[name](0.2), logits, 64)
    np.testing.assert_array_equal(one, many)


def test_part_of_the_budget_is_chance_and_the_rest_lies_in_the_middle() -> None:
    logits = stream(6000, 20.0)
    h = entropy(logits)
    kept, _ = played(Budgeted(share=0.1, explore=0.0), logits, 64)
    low, high = np.quantile(h, [0.40, 0.60])
    assert ((h[kept] > low) & (h[kept] < high)).mean() > 0.9
    drawn, _ = played(Budgeted(share=0.1, explore=1.0), logits, 64)
    assert ((h[drawn] > low) & (h[drawn] < high)).mean() < 0.35


@pytest.mark.parametrize("name", FILTERS)
def test_what_is_not_finite_is_never_sent(name: str) -> None:
    logits = stream(64, 4.0)
    logits[3, 2], logits[9, 0] = np.nan, np.inf
    choice, _ = FILTERS[name](1.0).choose(logits, np.zeros(64))
    assert not choice.keep[3]
    assert not choice.keep[9]
    assert [choice.reasons[3], choice.reasons[9]] == ["non-finite"] * 2


@pytest.mark.parametrize("name", FILTERS)
def test_no_sample_at_all_is_no_choice(name: str) -> None:
    choice, _ = FILTERS[name](0.1).choose(np.zeros((0, C), np.float32), np.zeros(0))
    assert len(choice.keep) == 0


# --- CEMA, by hand --------------------------------------------------------------------------------


def with_entropy(h: float, place: int = 0) -> np.ndarray:
    """[C] logits whose entropy is h nats, by bisection."""
    low, high = 0.0, 60.0
    for _ in range(80):
        middle = (low + high) / 2
        logits = np.zeros((1, C), np.float64)
        logits[0, place] = middle
        low, high = (middle, high) if entropy(logits.astype(np.float32))[0] > h else (low, middle)
    found = np.zeros(C, np.float32)
    found[place] = high
    return found


def test_the_papers_thresholds_are_those_of_its_equations() -> None:
    values = [0.01, 0.03, 0.2, 0.39, 0.41, 0.9]
    logits = np.stack([with_entropy(v * LN_C, place) for place, v in enumerate(values)])
    choice, _ = Cema(warm_up=None).choose(logits, np.zeros(len(values)))
    assert choice.reasons == ["certain", "", "", "", "uncertain", "uncertain"]
    released, _ = Cema.released().choose(logits, np.zeros(len(values)))
    assert released.reasons == ["", "", "", "", "uncertain", "uncertain"]


def test_the_upper_threshold_follows_the_mean_entropy_after_the_warm_up() -> None:
    """Two batches of mean entropy 0.3 ln C end the warm-up; then it falls to 0.2 and the threshold to 0.4 * 2 / 3."""
    filter_: Filter = Cema(warm_up=8, redundancy=None)
    for value in (0.3, 0.3):
        _, filter_ = filter_.choose(np.stack([with_entropy(value * LN_C, i) for i in range(4)]), np.zeros(4))
    _, filter_ = filter_.choose(np.stack([with_entropy(0.1 * LN_C, i) for i in range(8)]), np.zeros(8))
    probe = np.stack([with_entropy(0.25 * LN_C, 0), with_entropy(0.29 * LN_C, 1)])
    choice, _ = filter_.choose(probe, np.zeros(2))  # mean of 18: (8 * 0.3 + 8 * 0.1 + 0.54) / 18 = 0.2078
    assert choice.reasons == ["", "uncertain"]


def test_samples_like_those_sent_before_are_redundant() -> None:
    sure = with_entropy(0.1 * LN_C, 0)
    filter_: Filter = Cema(warm_up=None)
    first, filter_ = filter_.choose(np.stack([sure, sure]), np.zeros(2))
    assert first.keep.all(), "there is nothing to be like yet"
    second, _ = filter_.choose(np.stack([sure, with_entropy(0.03 * LN_C, 5)]), np.zeros(2))
    assert second.reasons == ["redundant", ""]


def test_a_random_share_is_that_of_the_numbers_it_is_given() -> None:
    choice, _ = Random(0.3).choose(stream(4, 1.0), np.array([0.1, 0.3, 0.29, 0.9]))
    assert choice.keep.tolist() == [True, False, True, False]


# --- the rate limit -------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 500)), min_size=1, max_size=200),
    st.integers(1, 50),
    st.integers(500, 5000),
)
def test_never_more_than_the_limit_and_what_was_saved_up(
    sends: list[tuple[float, int]], samples: int, size: int
) -> None:
    limit, now, sent = RateLimit(samples, size), 0.0, []
    for wait, nbytes in sends:
        now += wait
        allowed, limit = limit.take(nbytes, now)
        if allowed:
            sent.append((now, nbytes))
    for i, (began, _) in enumerate(sent):
        within = [(at, nbytes) for at, nbytes in sent[i:] if at <= began + 60]
        assert len(within) <= 2 * samples + 1
        assert sum(nbytes for _, nbytes in within) <= 2 * size + 1


def test_a_clock_that_is_set_back_gives_nothing() -> None:
    limit = RateLimit(2)
    for expected in (True, True, False):
        allowed, limit = limit.take(1, 1000.0)
        assert allowed == expected
    assert not limit.take(1, 10.0)[0]
    allowed, limit = limit.take(1, 10.0)
    assert not limit.take(1, 1001.0)[0]
    assert limit.take(1, 1031.0)[0]


def test_without_a_limit_all_may_go() -> None:
    limit = RateLimit()
    for _ in range(100):
        allowed, limit = limit.take(10**9, 0.0)
        assert allowed
