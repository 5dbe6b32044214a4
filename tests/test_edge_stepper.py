"""The thread that steps, with real streams: whose samples it takes, what it drops, and that nothing stops it."""

from __future__ import annotations

import dataclasses
import gc
import threading
import time
import weakref
from contextlib import contextmanager

import numpy as np
import pytest

import tiny_bundle
from tta_edge.adapt import Guards, Stream
from tta_edge.policy import Policy
from tta_edge.stats import Stats
from tta_edge.stepper import Stepper
from tta_runtime import Bundle, Engines, Model
from tta_runtime.errors import EngineFailed

PATIENCE_S = 30.0
WIDE = Guards(max_distance=1e9, reset_every_steps=0)
ALWAYS = Policy("always", step_batch=16, every_samples=40, budget=0.25, inline_min_batch=16, window=64)
SAMPLE = 8 * 4  # bytes


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    tiny_bundle.build(path)
    return Engines.load(Bundle.open(path))


class Watched(Model):
    """A model that says when it steps and does not go on until it may."""

    def __init__(self, *args):
        super().__init__(*args)
        self.began, self.may, self.batches = threading.Semaphore(0), threading.Semaphore(0), []

    def step(self, x, weight=None):
        self.batches.append(x)
        self.began.release()
        assert self.may.acquire(timeout=PATIENCE_S)
        return super().step(x, weight)


def make(engines, name, model=Model, method="tent"):
    return Stream(name, model(engines, method), WIDE)


def x(count, seed=0):
    return tiny_bundle.samples(count, seed=seed, shift=1.0)[0]


class Switch:
    def __init__(self):
        self.on = True

    def __call__(self):
        return self.on


@contextmanager
def stepping(policy=ALWAYS, *, max_bytes=2**20, start=True):
    """A stepper with its stats and switch."""
    stats, switch = Stats(), Switch()
    stepper = Stepper(policy, max_bytes=max_bytes, adapting=switch, stats=stats)
    if start:
        stepper.start()
    yield stepper, stats, switch
    stepper.close(PATIENCE_S)


def theta_after(engines, *batches):
    model = Model(engines, "tent")
    for batch in batches:
        model.adapt(batch)
    return model.digest


def test_a_step_takes_exactly_the_samples_of_its_stream_in_their_order(engines):
    one, two = make(engines, "one"), make(engines, "two")
    first, second = x(32, seed=1), x(32, seed=2)
    with stepping() as (stepper, stats, _):
        for k in range(32):  # sample by sample, turn by turn
            assert stepper.offer(one, first[k : k + 1])
            assert stepper.offer(two, second[k : k + 1])
        assert stepper.idle(PATIENCE_S)
        assert one.model.digest == theta_after(engines, first[:16], first[16:])
        assert two.model.digest == theta_after(engines, second[:16], second[16:])
        figures = stats.figures()
        assert (dict(figures.steps), figures.dropped) == ({("default", "committed"): 4}, 0)


def test_streams_take_turns(engines):
    one, two = make(engines, "one", Watched), make(engines, "two", Watched)
    with stepping() as (stepper, _, _):
        stepper.offer(one, x(48))
        assert one.model.began.acquire(timeout=PATIENCE_S)
        stepper.offer(two, x(48))
        for turn in (one, two, one, two, one):
            turn.model.may.release()
            following = two if turn is one else one
            assert following.model.began.acquire(timeout=PATIENCE_S)
        two.model.may.release()
        assert stepper.idle(PATIENCE_S)
        assert (one.model.steps, two.model.steps) == (3, 3)


def test_policy_every_steps_on_the_newest_and_drops_those_before(engines):
    one = make(engines, "one")
    batch = x(40)
    with stepping(dataclasses.replace(ALWAYS, kind="every")) as (stepper, stats, _):
        stepper.offer(one, batch[:39])
        assert stepper.idle(PATIENCE_S)
        assert one.model.steps == 0
        stepper.offer(one, batch[39:])
        assert stepper.idle(PATIENCE_S)
        assert one.model.digest == theta_after(engines, batch[24:])
        assert (stats.figures().dropped, stepper.waiting(one)) == (24, 0)


def test_a_method_that_never_fits_is_not_collected_for(engines, tmp_path):
    one = make(engines, "one")
    with stepping(dataclasses.replace(ALWAYS, step_batch=65)) as (stepper, _, _):
        assert not stepper.offer(one, x(16))
    with stepping(max_bytes=15 * SAMPLE) as (stepper, _, _):
        assert not stepper.offer(one, x(16))
    tiny_bundle.build(tmp_path / "fixed", fixed_batch=20)
    fixed = make(Engines.load(tmp_path / "fixed"), "fixed")
    with stepping() as (stepper, _, _):
        assert stepper.offer(fixed, x(20))  # compiled for another size than `step_batch`
        assert stepper.idle(PATIENCE_S)
        assert fixed.model.steps == 1


# --- bounds ---------------------------------------------------------------------------------------


def held(stepper, *streams):
    return [stepper.waiting(stream) for stream in streams]


def test_a_window_is_bounded_and_what_leaves_it_is_counted(engines):
    one = make(engines, "one")
    with stepping(start=False) as (stepper, stats, _):
        for _ in range(10):
            stepper.offer(one, x(15))
        assert held(stepper, one) == [64]
        assert stats.figures().dropped == 150 - 64


def test_the_bytes_of_one_stream_are_bounded_too(engines):
    one = make(engines, "one")
    with stepping(max_bytes=20 * SAMPLE, start=False) as (stepper, stats, _):
        for _ in range(3):
            assert stepper.offer(one, x(15))
        assert held(stepper, one) == [20]
        assert stats.figures().dropped == 25


def test_streams_that_went_quiet_do_not_keep_others_from_adapting(engines):
    """Two streams with half a step each fill the memory: neither could ever step if both were kept."""
    quiet, other, busy = (make(engines, name) for name in ("quiet", "other", "busy"))
    batch = x(16, seed=5)
    with stepping(max_bytes=30 * SAMPLE) as (stepper, stats, _):
        stepper.offer(quiet, x(15))
        stepper.offer(other, x(15))
        for k in range(16):
            assert stepper.offer(busy, batch[k : k + 1])
        assert stepper.idle(PATIENCE_S)
        assert busy.model.digest == theta_after(engines, batch)
        # The one without samples for the longest lost them first, and that was enough for 15 of 16.
        assert stats.figures().dropped == 30
        assert held(stepper, quiet, other, busy) == [0, 0, 0]


def test_a_window_that_is_due_is_dropped_last(engines):
    blocker, due, quiet, busy = (
        make(engines, name, Watched if name == "blocker" else Model)
        for name in ("blocker", "due", "quiet", "busy")
    )
    with stepping(max_bytes=40 * SAMPLE) as (stepper, _, _):
        stepper.offer(blocker, x(16))
        assert blocker.model.began.acquire(timeout=PATIENCE_S)
        stepper.offer(due, x(16))
        stepper.offer(quiet, x(15))
        stepper.offer(busy, x(15))
        assert held(stepper, due, quiet, busy) == [16, 0, 15]
        blocker.model.may.release()
        assert stepper.idle(PATIENCE_S)
        assert due.model.steps == 1


def test_a_full_window_needs_no_room_and_takes_none_from_others(engines):
    full, other = make(engines, "full"), make(engines, "other")
    with stepping(max_bytes=79 * SAMPLE, start=False) as (stepper, _, _):
        stepper.offer(full, x(64))
        stepper.offer(other, x(15))
        stepper.offer(full, x(60))
        assert held(stepper, full, other) == [64, 15]


# --- switching, leaving, failing ------------------------------------------------------------------


def test_a_step_under_way_is_not_committed_once_adaptation_is_switched_off(engines):
    one, two = make(engines, "one", Watched), make(engines, "two")
    with stepping() as (stepper, stats, switch):
        stepper.offer(one, x(16))
        assert one.model.began.acquire(timeout=PATIENCE_S)
        stepper.offer(two, x(20))
        switch.on = False
        stepper.drop_all()
        one.model.may.release()
        assert stepper.idle(PATIENCE_S)
        assert (one.model.steps, two.model.steps) == (0, 0)
        assert held(stepper, one, two) == [0, 0]
        assert stats.figures().dropped == 36
        assert dict(stats.figures().steps) == {}
        switch.on = True
        stepper.offer(two, x(15))  # with the 4 from before it would be due
        assert stepper.idle(PATIENCE_S)
        assert two.model.steps == 0


def test_a_stream_that_is_dropped_while_it_steps_is_not_stepped_on_again(engines):
    one = make(engines, "one", Watched)
    with stepping() as (stepper, _, _):
        stepper.offer(one, x(48))
        assert one.model.began.acquire(timeout=PATIENCE_S)
        one.close()
        stepper.drop(one)
        one.model.may.release()
        assert stepper.idle(PATIENCE_S)
        assert (one.model.steps, len(one.model.batches)) == (0, 1)


def test_nothing_of_a_stream_that_has_left_is_kept(engines):
    """After a reload the old engines must go, and the stepping thread may have nothing to do for long."""
    one = make(engines, "one")
    with stepping() as (stepper, _, _):
        stepper.offer(one, x(16))
        assert stepper.idle(PATIENCE_S)
        stepper.drop(one)
        gone = threading.Event()
        weakref.finalize(one.model, gone.set)
        del one
        gc.collect()
        assert gone.wait(PATIENCE_S)


def test_samples_of_another_shape_start_the_window_anew_and_the_thread_lives(engines):
    """Named dimensions may differ between requests. The window was due, and has too few of the new ones."""
    one, two = make(engines, "one"), make(engines, "two")
    with stepping(start=False) as (stepper, stats, _):
        stepper.offer(one, x(20))
        stepper.offer(one, np.zeros((3, 9), np.float32))
        assert held(stepper, one) == [3]
        assert stats.figures().dropped == 20
        stepper.start()
        stepper.offer(two, x(16))
        assert stepper.idle(PATIENCE_S)
        assert two.model.steps == 1


class Failing(Model):
    failure: Exception = RuntimeError("a defect")

    def step(self, x, weight=None):
        raise self.failure


@pytest.mark.parametrize(
    ("failure", "dropped"),
    [(RuntimeError("a defect"), 16), (EngineFailed("out of memory", "Smaller"), 0), (MemoryError(), 16)],
)
def test_a_step_that_fails_changes_nothing_and_the_next_stream_steps(engines, failure, dropped):
    one, two = make(engines, "one", Failing), make(engines, "two")
    one.model.failure = failure
    with stepping() as (stepper, stats, _):
        stepper.offer(one, x(16))
        stepper.offer(two, x(16))
        assert stepper.idle(PATIENCE_S)
        assert (one.model.steps, two.model.steps) == (0, 1)
        assert stats.figures().dropped == dropped


def test_samples_that_the_method_cannot_take_are_dropped_and_the_thread_lives(engines):
    one, two = make(engines, "one"), make(engines, "two")
    with stepping() as (stepper, stats, _):
        stepper.offer(one, np.full((16, 8), np.nan, np.float32))
        stepper.offer(two, x(16))
        assert stepper.idle(PATIENCE_S)
        assert (one.model.steps, two.model.steps) == (0, 1)
        assert stats.figures().dropped == 16


def test_closing_waits_for_a_step_no_longer_than_it_may(engines):
    one = make(engines, "one", Watched)
    with stepping() as (stepper, _, _):
        stepper.offer(one, x(32))
        assert one.model.began.acquire(timeout=PATIENCE_S)
        stepper.close(0.0)
        assert not stepper.offer(one, x(16))
        one.model.may.release()
        stepper.close(PATIENCE_S)
        assert len(one.model.batches) == 1  # a second was due
        assert one.model.steps == 1


def test_a_budget_is_charged_what_steps_really_took(engines):
    """A step takes 0.03 s of the clock: at a quarter of the time one may begin each 0.12 s, not more often."""
    begins = []

    def clock():
        return time.monotonic() + 0.03 * len(begins)

    class Costly(Model):
        def step(self, x, weight=None):
            begins.append(clock())  # and 0.03 s have passed
            return super().step(x, weight)

    one = make(engines, "one", Costly)
    policy = dataclasses.replace(ALWAYS, kind="budget")
    stepper = Stepper(policy, max_bytes=2**20, adapting=Switch(), stats=Stats(), clock=clock)
    stepper.start()
    stepper.offer(one, x(64))
    stepper.offer(make(engines, "other"), x(16))  # that another one is due does not help either
    assert stepper.idle(PATIENCE_S)
    stepper.close(PATIENCE_S)
    assert one.model.steps == 4
    assert begins[3] - begins[0] >= 3 * 0.12
