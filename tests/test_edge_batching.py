"""Which requests share a run: never those of two streams, never past a command, in order, without waiting long."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tta_edge import wire
from tta_edge.batching import Inbox, Mergeable, group
from tta_edge.session import Arrived, ServerSession

PATIENCE_S = 20.0
X = np.zeros((1, 8), np.float32)


def merge(arrived):
    """As a daemon with policy `inline` from 16 samples on: `Responder.merge` without a daemon."""
    message, x = arrived.message, arrived.tensors.get("x")
    if x is None or (message.adapt and len(x) >= 16):
        return None
    key = (
        message.bundle or "default",
        message.stream,
        message.adapt,
        message.compare,
        x.dtype.str,
        x.shape[1:],
    )
    return Mergeable(key, len(x))


def request(number, samples=1, *, stream="a", bundle="", adapt=True, compare=False, width=8, at_s=0.0):
    x = np.zeros((samples, width), np.float32)
    message = wire.Predict(
        id=number, bundle=bundle, stream=stream, adapt=adapt, compare=compare, x=wire.declare(x)
    )
    return Arrived(b"peer", message, {"x": x}, at_s)


def command(number):
    return Arrived(b"peer", wire.Reset(id=number, stream="a"), {}, 0.0)


def call():
    """Something between two requests."""


items = st.one_of(
    st.builds(
        lambda samples, stream, bundle, adapt, compare, width: (
            "request", samples, stream, bundle, adapt, compare, width,
        ),
        st.integers(1, 20),
        st.sampled_from("ab"),
        st.sampled_from(["", "default", "other"]),
        st.booleans(),
        st.booleans(),
        st.sampled_from([8, 9]),
    ),
    st.just(("command",)),
    st.just(("call",)),
)  # fmt: skip


def made(drawn):
    waiting = []
    for number, item in enumerate(drawn):
        if item[0] == "request":
            _, samples, stream, bundle, adapt, compare, width = item
            waiting.append(
                request(
                    number, samples, stream=stream, bundle=bundle, adapt=adapt, compare=compare, width=width
                )
            )
        else:
            waiting.append(command(number) if item[0] == "command" else call)
    return waiting


def owner(arrived):
    return arrived.message.bundle or "default", arrived.message.stream


def is_predict(item):
    return isinstance(item, Arrived) and isinstance(item.message, wire.Predict)


@given(st.lists(items, min_size=1, max_size=12), st.integers(1, 40))
def test_what_is_answered_together_fits_together_and_overtakes_nothing_it_must_not(drawn, most):
    waiting = made(drawn)
    places = group(waiting, merge, most)
    assert places[0] == 0
    assert places == sorted(set(places))
    if len(places) == 1:
        return
    together = [waiting[place] for place in places]
    # Never two streams, bundles, shapes or kinds of answer in one run, and never more than asked for.
    assert len({merge(each).key for each in together}) == 1
    assert sum(len(each.tensors["x"]) for each in together) <= most
    overtaken = [waiting[k] for k in range(places[-1]) if k not in places]
    # No command and no call is overtaken, and no request of the same stream.
    assert all(is_predict(each) for each in overtaken)
    assert owner(together[0]) not in {owner(each) for each in overtaken}


@given(st.lists(items, min_size=1, max_size=12), st.integers(1, 40))
def test_everything_is_answered_once_and_each_stream_in_its_order(drawn, most):
    inbox = Inbox(merge, most=most, wait_s=0.0)
    waiting = made(drawn)
    for item in waiting:
        inbox.put(item)
    inbox.close()
    done = []
    while (work := inbox.take()) is not None:
        done += work if isinstance(work, list) else [work]
    assert sorted(map(id, done)) == sorted(map(id, waiting))
    for stream in {owner(each) for each in waiting if is_predict(each)}:
        mine = [each for each in waiting if not is_predict(each) or owner(each) == stream]
        assert [each for each in done if not is_predict(each) or owner(each) == stream] == mine


def test_those_that_fit_share_a_run_and_other_streams_are_passed_by():
    waiting = [request(0), request(1, stream="b"), request(2), request(3, stream="c", samples=16), request(4)]
    assert group(waiting, merge, 64) == [0, 2, 4]
    assert group(waiting, merge, 2) == [0, 2]


@pytest.mark.parametrize(
    "between",
    [
        command(9),
        call,
        request(9, samples=16),  # an inline step of the same stream
        request(9, samples=16, bundle="default"),  # the same stream by its bundle's name
        request(9, adapt=False),  # the same stream, another kind of answer
        request(9, width=9),  # the same stream, another shape
    ],
)
def test_a_fence_is_not_overtaken(between):
    assert group([request(0), between, request(1)], merge, 64) == [0]


def test_the_first_bundle_has_two_names():
    assert group([request(0), request(1, bundle="default")], merge, 64) == [0, 1]
    named = [request(k, bundle=name) for k, name in enumerate(["default", "other", "default"])]
    assert group(named, merge, 64) == [0, 2]  # the same stream name in two bundles: two streams


def test_a_first_request_that_is_too_large_is_answered_by_itself():
    assert group([request(0, samples=9, adapt=False), request(1, adapt=False)], merge, 8) == [0]


# --- waiting for company --------------------------------------------------------------------------


class Clock:
    """A clock that a test moves. `looked` is released whenever somebody reads it."""

    def __init__(self, now_s=0.0):
        self.now_s = now_s
        self.looked = threading.Semaphore(0)

    def __call__(self):
        self.looked.release()
        return self.now_s


def taking(inbox):
    """What `take` gives, in a list, from a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(inbox.take()), daemon=True)
    thread.start()
    return thread, found


def numbers(work):
    return [arrived.message.id for arrived in work]


def test_a_request_waits_for_company_until_the_run_is_full():
    clock = Clock()
    inbox = Inbox(merge, most=3, wait_s=3600.0, clock=clock)
    thread, found = taking(inbox)
    for number in range(3):
        assert not found
        inbox.put(request(number))
    thread.join(PATIENCE_S)
    assert numbers(found[0]) == [0, 1, 2]


@pytest.mark.parametrize(
    "other", [command(1), call, request(1, stream="b"), request(1, samples=16), request(1, adapt=False)]
)
def test_nobody_waits_because_of_a_request_that_waits_for_company(other):
    inbox = Inbox(merge, most=64, wait_s=3600.0, clock=Clock())
    thread, found = taking(inbox)
    inbox.put(request(0))
    assert not found
    inbox.put(other)
    thread.join(PATIENCE_S)
    assert numbers(found[0]) == [0]


def test_a_request_waits_no_longer_than_it_may_counted_from_its_arrival():
    clock = Clock(now_s=100.0)
    inbox = Inbox(merge, most=64, wait_s=0.5, clock=clock)
    inbox.put(request(0, at_s=99.5))  # it waited elsewhere already
    thread, found = taking(inbox)
    thread.join(PATIENCE_S)
    assert numbers(found[0]) == [0]


def test_the_wait_ends_with_the_time_and_not_with_the_next_request():
    inbox = Inbox(merge, most=64, wait_s=0.01)
    inbox.put(request(0, at_s=time.monotonic()))
    thread, found = taking(inbox)
    thread.join(PATIENCE_S)
    assert numbers(found[0]) == [0]


def test_a_clock_that_jumps_back_makes_nobody_wait():
    inbox = Inbox(merge, most=64, wait_s=0.5, clock=Clock(now_s=-3600.0))
    inbox.put(request(0, at_s=0.0))
    thread, found = taking(inbox)
    thread.join(PATIENCE_S)
    assert numbers(found[0]) == [0]


def test_what_cannot_share_a_run_never_waits():
    inbox = Inbox(merge, most=64, wait_s=3600.0, clock=Clock())
    inbox.put(request(0, samples=16))
    assert numbers(inbox.take()) == [0]
    inbox.put(call)
    assert inbox.take() is call


def test_closing_gives_out_what_waits_then_nothing():
    inbox = Inbox(merge, most=64, wait_s=3600.0, clock=Clock())
    thread, found = taking(inbox)
    inbox.put(request(0))
    inbox.close()
    thread.join(PATIENCE_S)
    assert numbers(found[0]) == [0]
    assert inbox.take() is None


def test_a_refused_client_is_told_the_time_of_a_queue_whose_requests_share_runs():
    """Runs of 32 requests that take 0.32 s each: 64 that wait take 0.64 s, not the time of 64 runs, nor of none."""
    session, number, now_s = ServerSession(wire.Limits(), capacity=64, per_client=64), 0, 0.0

    def ask():
        nonlocal number
        number += 1
        frames = wire.encode(wire.Predict(id=number, x=wire.declare(X)), {"x": X})
        return session.receive(b"peer", frames, now_s)

    for _ in range(10):
        run = [ask()[0][0] for _ in range(32)]
        now_s += 0.32
        for arrived in run:
            session.answer(
                arrived, wire.ResetDone(id=arrived.message.id, stream="s", theta_digest="d"), {}, now_s
            )
    for _ in range(64):
        ask()
    (refused,), _ = ask()
    assert refused.error.code == "busy"
    assert 0.3 <= refused.error.retry_after_s <= 1.3
