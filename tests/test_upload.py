"""The upload filters: the published rules, the budget on every kind of stream, and the rate limit."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tta_edge.upload import (
    E_MAX,
    E_MIN,
    FILTERS,
    BudgetedFilter,
    CemaFilter,
    EveryFilter,
    RateLimit,
    Why,
    make_filter,
    refilled,
    spent,
    wait_s,
)
from tta_runtime.errors import BadValue, StateMalformed
from tta_runtime.numerics import entropy, softmax

SENT = {Why.EVERY, Why.EXPLORE, Why.INFORMATIVE}


def rng(seed=0):
    return np.random.default_rng(seed)


def peaks(r, n, classes, scale):
    """Logits with a class that stands out by about `scale`."""
    logits = r.normal(size=(n, classes))
    logits[np.arange(n), r.integers(classes, size=n)] += scale * r.random(n)
    return logits.astype(np.float32)


def with_entropy(share, classes, top=0):
    """Logits of which the class `top` has so much more than the others that H = share * ln C."""
    low, high = 0.0, 60.0
    for _ in range(80):
        middle = (low + high) / 2
        logits = np.zeros((1, classes), np.float64)
        logits[0, top] = middle
        low, high = (middle, high) if entropy(logits)[0] > share * math.log(classes) else (low, middle)
    return logits.astype(np.float32)


STREAMS = {
    "certain": lambda r, n: peaks(r, n, 10, 30.0),
    "uncertain": lambda r, n: peaks(r, n, 10, 0.5),
    "mixed": lambda r, n: peaks(r, n, 10, 8.0),
    "two classes": lambda r, n: peaks(r, n, 2, 6.0),
    "a thousand classes": lambda r, n: peaks(r, n, 1000, 15.0),
    "all alike": lambda r, n: np.tile(np.float32([3.0, 0.0, 0.0]), (n, 1)),
    "one-hot": lambda r, n: np.eye(10, dtype=np.float32)[r.integers(10, size=n)] * 200,
    "uniform": lambda r, n: np.zeros((n, 10), np.float32),
    "two kinds": lambda r, n: np.where(r.random((n, 1)) < 0.5, np.float32(40), 1) * peaks(r, n, 10, 3.0),
    "labels in runs": lambda r, n: (
        peaks(r, n, 10, 0.1) + 6 * np.eye(10, dtype=np.float32)[np.arange(n) // 100 % 10]
    ),
}


# --- what every filter keeps to ---------------------------------------------------------------------


@pytest.mark.parametrize("name", FILTERS)
def test_what_is_not_finite_is_never_sent_and_leaves_no_trace(name):
    r = rng()
    logits, rand = peaks(r, 300, 10, 8.0), r.random(300)
    spoilt = np.repeat(logits, 2, axis=0)
    for i, bad in enumerate(np.resize([np.nan, np.inf, -np.inf], 300)):
        spoilt[2 * i + 1, r.integers(10)] = bad
    clean, mixed = make_filter(name, 10), make_filter(name, 10)
    expected = clean.choose(logits, rand)
    found = mixed.choose(spoilt, np.repeat(rand, 2))
    assert not found.keep[1::2].any()
    assert set(found.reasons[1::2]) == {Why.NON_FINITE}
    assert np.isnan(found.entropy[1::2]).all()
    assert (found.keep[::2] == expected.keep).all()
    assert mixed.snapshot() == clean.snapshot()


@pytest.mark.parametrize("name", FILTERS)
def test_reasons_agree_with_the_choice_and_the_choice_with_its_arguments(name):
    r = rng(1)
    logits, rand = peaks(r, 400, 10, 8.0), r.random(400)
    found, again = (make_filter(name, 10).choose(logits, rand) for _ in range(2))
    assert [why in SENT for why in found.reasons] == found.keep.tolist()
    assert found.reasons == again.reasons
    np.testing.assert_allclose(found.entropy, entropy(logits), rtol=1e-6)


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_goes_on_from_its_snapshot_as_plain_numbers(name):
    r = rng(2)
    first, second = make_filter(name, 10), make_filter(name, 10)
    for _ in range(20):
        first.choose(peaks(r, 64, 10, 8.0), r.random(64))
    second.restore(json.loads(json.dumps(first.snapshot())))
    for _ in range(5):
        logits, rand = peaks(r, 64, 10, 8.0), r.random(64)
        assert first.choose(logits, rand).reasons == second.choose(logits, rand).reasons
    assert first.snapshot() == second.snapshot()


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(
    "change",
    [
        lambda s: s | {"more": 1.0},
        lambda s: dict(list(s.items())[1:]) if s else {"x": 1.0},
        lambda s: {key: [math.nan] for key in s} if s else {"x": 1.0},
        lambda s: dict.fromkeys(s, "text") if s else {"x": 1.0},
        lambda s: {key: [1.0, 2.0, 3.0] for key in s} if s else {"x": 1.0},
        lambda s: {key: [[1.0]] for key in s} if s else {"x": 1.0},
        lambda s: dict.fromkeys(s, -1.0) if s else {"x": 1.0},
        lambda s: dict.fromkeys(s) if s else {"x": 1.0},
    ],
)
def test_a_snapshot_that_does_not_fit_is_refused_and_leaves_no_trace(name, change):
    r = rng(3)
    filter_ = make_filter(name, 10)
    filter_.choose(peaks(r, 64, 10, 8.0), r.random(64))
    before = filter_.snapshot()
    with pytest.raises(StateMalformed):
        filter_.restore(change(before))
    assert filter_.snapshot() == before


def test_a_snapshot_of_other_classes_is_refused():
    r = rng(3)
    for make in (CemaFilter, BudgetedFilter):
        ten, three = make(10), make(3)
        ten.choose(peaks(r, 64, 10, 8.0), np.zeros(64))
        with pytest.raises(StateMalformed, match="average"):
            three.restore(ten.snapshot())


def test_wrong_names_and_values_are_told():
    with pytest.raises(BadValue, match="did you mean `budgeted`"):
        make_filter("budgetted", 10)
    for share in (-0.1, 1.1, math.nan):
        for name in ("budgeted", "random"):
            with pytest.raises(BadValue, match="share"):
                make_filter(name, 10, share)
    with pytest.raises(BadValue, match="band"):
        BudgetedFilter(10, band=(0.8, 0.2))
    with pytest.raises(BadValue, match="explore"):
        BudgetedFilter(10, explore=2.0)
    with pytest.raises(ValueError, match="expected"):
        make_filter("all", 10).choose(np.zeros((2, 9), np.float32), np.zeros(2))
    with pytest.raises(ValueError, match="expected"):
        make_filter("all", 10).choose(np.zeros((2, 10), np.float32), np.zeros(3))


def test_an_empty_batch_is_one():
    for name in FILTERS:
        assert make_filter(name, 10).choose(np.zeros((0, 10), np.float32), np.zeros(0)).reasons == ()


# --- all, random ------------------------------------------------------------------------------------


def test_all_and_random():
    r = rng(4)
    logits, rand = peaks(r, 4000, 10, 8.0), r.random(4000)
    assert make_filter("all", 10).choose(logits, rand).keep.all()
    found = make_filter("random", 10, 0.25).choose(logits, rand)
    assert (found.keep == (rand < 0.25)).all()
    assert not EveryFilter(10, 0.0).choose(logits, rand).keep.any()


# --- cema -------------------------------------------------------------------------------------------


def test_the_band_of_cema_excludes_its_edges_and_says_on_which_side_a_sample_lies():
    rows = [with_entropy(share, 1000, top) for top, share in enumerate((0.01, 0.021, 0.2, 0.39, 0.41, 0.9))]
    logits = np.concatenate(rows)
    found = CemaFilter(1000, redundancy=None).choose(logits, np.zeros(6))
    low, inside, high = Why.UNINFORMATIVE, Why.INFORMATIVE, Why.UNCERTAIN
    assert found.reasons == (low, inside, inside, inside, high, high)
    released = FILTERS["released"](1000, 0.1).choose(logits, np.zeros(6))
    assert released.reasons == (inside, inside, inside, inside, high, high)


def test_e_max_follows_the_mean_of_all_samples_from_the_warm_up_on():
    """Against the rule written down once more, batch by batch."""
    r = rng(5)
    classes, warm_up, scale = 50, 100, 1.2
    filter_ = CemaFilter(classes, scale=scale, warm_up=warm_up, redundancy=0.4)
    seen, warm, average = [], None, None
    for number in range(30):
        logits = peaks(r, 16, classes, 14.0 if number < 15 else 9.0)
        h, p = entropy(logits).astype(np.float64), softmax(logits).astype(np.float64)
        seen += h.tolist()
        if warm is None and len(seen) >= warm_up:
            warm = np.mean(seen)
        e_max = E_MAX * math.log(classes) * (1.0 if warm is None else scale * np.mean(seen) / warm)
        keep = (h > E_MIN * math.log(classes)) & (h < e_max)
        if average is not None:
            cosine = p @ average / np.linalg.norm(p, axis=1) / np.linalg.norm(average)
            keep &= np.abs(cosine) < 0.4
        if keep.any():
            mean = p[keep].mean(0)
            average = mean if average is None else 0.9 * average + 0.1 * mean
        found = filter_.choose(logits, r.random(16))
        assert filter_.e_max == pytest.approx(e_max, rel=1e-6)
        assert (found.keep == keep).all(), number
    assert warm is not None
    assert average is not None
    assert filter_.e_max > scale * E_MAX * math.log(classes)


def test_the_released_e_max_never_moves():
    r = rng(6)
    filter_ = FILTERS["released"](10, 0.1)
    for scale in (30.0, 0.1):
        for _ in range(20):
            filter_.choose(peaks(r, 64, 10, scale), np.zeros(64))
        assert filter_.e_max == E_MAX * math.log(10)


def test_absolute_thresholds_starve_where_the_budgeted_filter_does_not():
    """Why it is the default."""
    r = rng(7)
    logits, rand = STREAMS["uncertain"](r, 2000), r.random(2000)
    for name, least, most in (("cema", 0.0, 0.001), ("released", 0.0, 0.001), ("budgeted", 0.08, 0.12)):
        filter_ = make_filter(name, 10)
        batches = [filter_.choose(logits[i : i + 40], rand[i : i + 40]) for i in range(0, 2000, 40)]
        assert least <= np.concatenate([each.keep for each in batches]).mean() <= most, name


# --- budgeted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("share", [0.03, 0.1, 0.5])
def test_the_budget_is_kept_within_a_fifth_on_every_stationary_stream(name, share):
    r = rng(8)
    n = 6000
    logits = STREAMS[name](r, n)
    found = BudgetedFilter(logits.shape[1], share).choose(logits, r.random(n))
    sampling = 3 * math.sqrt(share * (1 - share) / n)
    assert abs(found.keep.mean() - share) < max(0.2 * share, sampling)


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("other", ["certain", "uncertain", "mixed"])
def test_the_budget_is_kept_again_within_500_samples_of_a_shift(name, other):
    r = rng(9)
    before = STREAMS[other](r, 1500)
    after = STREAMS[name](r, 4500)
    if before.shape[1] != after.shape[1]:
        before = peaks(r, 1500, after.shape[1], 30.0 if other == "certain" else 4.0)
    filter_ = BudgetedFilter(after.shape[1], 0.1)
    filter_.choose(before, r.random(len(before)))
    at_once = filter_.choose(after[:500], r.random(500))
    found = filter_.choose(after[500:], r.random(4000))
    assert 0.07 < at_once.keep.mean() < 0.14, "nor does it starve or flood in between"
    assert abs(found.keep.mean() - 0.1) < 0.02


@pytest.mark.parametrize("scales", [(20.0, 0.1), (0.1, 20.0)], ids=["worse", "better"])
def test_a_stream_whose_entropy_never_rests_is_served_all_the_same(scales):
    r = rng(10)
    logits = np.concatenate([peaks(r, 50, 10, scale) for scale in np.linspace(*scales, 120)])
    found = BudgetedFilter(10, 0.1).choose(logits, r.random(len(logits)))
    assert abs(found.keep.mean() - 0.1) < 0.02
    ever_worse = np.linspace(0.0, 1.0, 4000)[:, None] * np.float32([[-8.0] * 9 + [0.0]]) + np.float32(
        [[0.0] * 9 + [9.0]]
    )
    for stream in (ever_worse, ever_worse[::-1]):
        found = BudgetedFilter(10, 0.1).choose(stream.astype(np.float32), r.random(4000))
        assert abs(found.keep.mean() - 0.1) < 0.025


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(STREAMS)))
def test_one_by_one_is_the_same_as_in_batches(seed, name):
    """The choice is a function of the samples and their random numbers, however they are grouped."""
    r = rng(seed)
    n = 200
    logits, rand = STREAMS[name](r, n), r.random(n).astype(np.float32)
    logits[r.random(n) < 0.02] = np.nan
    together, alone, any_how = (BudgetedFilter(logits.shape[1], 0.3) for _ in range(3))
    whole = [together.choose(logits[i : i + 64], rand[i : i + 64]) for i in range(0, n, 64)]
    single = [alone.choose(logits[i : i + 1], rand[i : i + 1]) for i in range(n)]
    cuts = [0, *sorted(r.integers(n, size=5).tolist()), n]
    parts = [any_how.choose(logits[a:b], rand[a:b]) for a, b in itertools.pairwise(cuts)]
    reasons = [why for each in whole for why in each.reasons]
    assert [why for each in single for why in each.reasons] == reasons
    assert [why for each in parts for why in each.reasons] == reasons
    assert alone.snapshot() == together.snapshot() == any_how.snapshot()


def test_the_chosen_part_is_in_the_band_and_less_redundant_and_the_random_part_is_like_the_stream():
    r = rng(11)
    logits, rand = STREAMS["mixed"](r, 20_000), r.random(20_000)
    filter_ = BudgetedFilter(10, 0.1, explore=0.4)
    found = filter_.choose(logits, rand)
    reasons = np.array([why.value for why in found.reasons])
    explored, chosen = reasons == "explore", reasons == "informative"
    assert explored.mean() == pytest.approx(0.04, abs=0.006)
    assert chosen.mean() == pytest.approx(0.06, abs=0.008)
    low, high = np.quantile(found.entropy, (0.15, 0.85))
    assert ((found.entropy[chosen] > low) & (found.entropy[chosen] < high)).mean() > 0.97
    assert found.entropy[explored].mean() == pytest.approx(found.entropy.mean(), rel=0.05)
    # Where one class is nine tenths of the stream the chosen part has less of it.
    top = np.where(r.random(8000) < 0.9, 0, r.integers(1, 10, size=8000))
    skewed = peaks(r, 8000, 10, 0.5) + 5 * np.eye(10, dtype=np.float32)[top]
    found = BudgetedFilter(10, 0.1).choose(skewed, r.random(8000))
    chosen = np.array([why is Why.INFORMATIVE for why in found.reasons])
    assert (top[chosen] == 0).mean() < 0.85


def test_the_state_has_a_bound():
    r = rng(12)
    filter_ = BudgetedFilter(10)
    filter_.choose(STREAMS["mixed"](r, 2000), r.random(2000))
    assert {key: np.size(value) for key, value in filter_.snapshot().items()} == {
        "entropy": 512, "cosine": 512, "candidate": 128, "average": 10, "owed": 1,
    }  # fmt: skip


# --- how many a minute ------------------------------------------------------------------------------


def send(limit, times, nbytes):
    """How many samples go out if one is tried at each time."""
    tokens, sent = limit.full(times[0]), 0
    for now_s in times:
        tokens = refilled(limit, tokens, now_s)
        if wait_s(limit, tokens, nbytes) == 0.0:
            tokens, sent = spent(tokens, nbytes), sent + 1
    return sent


def test_the_rate_is_kept_in_samples_and_in_bytes():
    times = np.arange(0, 600, 0.05)
    assert send(RateLimit(samples_per_min=60), times, 1) == pytest.approx(600 + 10, abs=2)
    assert send(RateLimit(bytes_per_min=6000), times, 100) == pytest.approx(600 + 10, abs=2)
    assert send(RateLimit(60, 600), times, 100) == pytest.approx(60, abs=2)
    assert send(RateLimit(), times, 10**9) == len(times)
    assert send(RateLimit(samples_per_min=0), times, 1) == 1, "the full bucket, and never again"


def test_a_sample_larger_than_a_burst_goes_out_and_is_owed():
    limit = RateLimit(bytes_per_min=600)
    tokens = limit.full(0.0)
    assert wait_s(limit, tokens, 1000) == 0.0
    tokens = spent(tokens, 1000)
    assert wait_s(limit, tokens, 1) > 80
    assert send(limit, np.arange(0, 6000, 1.0), 1000) == pytest.approx(60, abs=2)


@given(
    st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=50),
    st.floats(0, 1e4),
    st.floats(0, 1e9),
    st.integers(0, 2**24),
)
def test_no_clock_does_harm(times, samples, size, nbytes):
    """Wherever it jumps, no more than a burst is had by it, and after the wait that was told a sample may go."""
    limit = RateLimit(samples, size)
    tokens = limit.full(times[0])
    for now_s in times:
        before = tokens
        tokens = refilled(limit, tokens, now_s)
        assert tokens.at_s == now_s
        assert tokens.samples <= limit.full(now_s).samples
        assert tokens.size <= limit.full(now_s).size
        if now_s <= before.at_s:
            assert (tokens.samples, tokens.size) == (before.samples, before.size)
        wait = wait_s(limit, tokens, nbytes)
        if wait == 0.0:
            tokens = spent(tokens, nbytes)
        elif wait < 1e6:
            later = refilled(limit, tokens, now_s + wait * 1.000001 + 1e-6)
            assert wait_s(limit, later, nbytes) < 1e-3
