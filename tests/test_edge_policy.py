"""When a step runs, as pure functions: due, step sizes, and a budget that is kept whatever steps cost."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tta_edge.policy import Credit, Policy, delay_s, due, earned, spent, step_size

ALWAYS = Policy("always", step_batch=64, every_samples=256, budget=0.25, inline_min_batch=16, window=256)
EVERY = dataclasses.replace(ALWAYS, kind="every")
INLINE = dataclasses.replace(ALWAYS, kind="inline")
BUDGET = dataclasses.replace(ALWAYS, kind="budget")

seconds = st.floats(0, 100, allow_nan=False)


@pytest.mark.parametrize(
    ("fixed", "least", "window", "expected"),
    [
        (None, 1, 256, 64),  # the daemon's wish
        (None, 100, 256, 100),  # a method that cannot step on so few
        (32, 1, 256, 32),  # compiled for one size only
        (128, 1, 256, 128),
        (None, 1, 64, 64),  # just fits
        (None, 1, 63, None),
        (512, 1, 256, None),
        (None, 300, 256, None),
    ],
)
def test_a_step_has_the_samples_that_daemon_and_method_agree_on(fixed, least, window, expected):
    policy = dataclasses.replace(ALWAYS, window=window)
    assert step_size(policy, fixed=fixed, least=least) == expected


@pytest.mark.parametrize(
    ("policy", "waiting", "fresh", "expected"),
    [
        (ALWAYS, 63, 10_000, False),
        (ALWAYS, 64, 0, True),
        (INLINE, 63, 63, False),
        (INLINE, 64, 64, True),  # requests too small to be adapted on in the pass that answers them
        (BUDGET, 64, 1, True),  # whether it is affordable is asked later
        (EVERY, 64, 255, False),
        (EVERY, 64, 256, True),
        (EVERY, 63, 10_000, False),  # never on fewer than a step's samples
    ],
)
def test_due(policy, waiting, fresh, expected):
    assert due(policy, 64, waiting=waiting, fresh=fresh) is expected


def test_only_policy_inline_adapts_in_the_pass_that_answers_and_not_on_small_requests():
    assert [INLINE.inline(n) for n in (1, 15, 16, 1000)] == [False, False, True, True]
    assert not any(policy.inline(1000) for policy in (ALWAYS, EVERY, BUDGET))


def steps_of(costs, share, most_s, *, expected):
    """Simulate a daemon whose steps are always due: (start, cost) of each. `expected` foresees a cost."""
    now, credit, done = 0.0, Credit(0.0, 0.0), []
    for cost in costs:
        credit = earned(credit, now, share=share, most_s=most_s)
        wait = delay_s(credit, min(expected(done), most_s), share=share)
        assert wait >= 0
        now += wait
        credit = earned(credit, now, share=share, most_s=most_s)
        done.append((now, cost))
        now += cost
        credit = spent(credit, cost)
    return done


def running_mean(done):
    costs = [cost for _, cost in done]
    return sum(costs) / len(costs) if costs else 0.0


@given(
    st.lists(st.floats(0.001, 5.0), min_size=1, max_size=60),
    st.floats(0.01, 1.0),
    st.floats(0.5, 20.0),
)
def test_a_budget_is_kept_over_every_window_of_time_whatever_steps_cost(costs, share, burst_s):
    most_s = share * burst_s
    done = steps_of(costs, share, most_s, expected=running_mean)
    dearest = max(costs)
    for first in range(len(done)):
        for last in range(first, len(done)):
            length = done[last][0] + done[last][1] - done[first][0]
            used = sum(cost for _, cost in done[first : last + 1])
            # What may go over the share: what had been saved up, and one step that was dearer than foreseen.
            assert used <= share * length + most_s + dearest + 1e-6


@given(st.floats(0.01, 1.0), st.floats(0.001, 2.0))
def test_steps_of_a_steady_cost_take_exactly_their_share(share, cost):
    done = steps_of([cost] * 200, share, share * 10, expected=lambda past: cost if past else 0.0)
    span = done[-1][0] - done[0][0]
    used = cost * (len(done) - 1)
    assert used <= share * span + 2 * cost + 1e-6
    assert used >= 0.9 * share * span - 2 * cost  # and the budget is used


@given(seconds, seconds, st.floats(0.01, 1.0))
def test_a_quiet_hour_does_not_buy_a_busy_minute(saved, most_s, share):
    credit = earned(Credit(min(saved, most_s), 0.0), 3600.0, share=share, most_s=most_s)
    assert credit.seconds <= most_s


@given(st.floats(-50, 50), seconds, st.floats(0.01, 1.0), seconds)
def test_credit_only_grows_with_time_and_is_never_taken_away(start, passed, share, most_s):
    credit = earned(Credit(start, 10.0), 10.0 + passed, share=share, most_s=most_s)
    assert credit.seconds >= start
    assert credit.seconds <= max(start, min(most_s, start + share * passed)) + 1e-9


def test_a_clock_that_jumps_back_earns_nothing_and_takes_nothing():
    credit = Credit(0.5, 100.0)
    back = earned(credit, 40.0, share=0.5, most_s=10.0)
    assert back == Credit(0.5, 40.0)
    assert earned(back, 42.0, share=0.5, most_s=10.0).seconds == 1.5


@given(st.floats(-50, 50), st.floats(0, 10), st.floats(0.01, 1.0))
def test_after_the_delay_the_step_is_affordable(have, cost, share):
    credit = Credit(have, 0.0)
    wait = delay_s(credit, cost, share=share)
    later = earned(credit, wait, share=share, most_s=max(cost, have))
    assert later.seconds >= cost - 1e-6
    assert (wait == 0) == (have >= cost)
