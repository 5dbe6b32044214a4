"""The collapse detector by itself: what it sees, when it speaks, and that a restart changes nothing."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tta_edge.monitor import (
    MIN_SAMPLES,
    PROBE_SAMPLES,
    QUIET_SAMPLES,
    Monitor,
    Running,
    diversity,
)

C = 4


def logits(classes, sharpness=20.0):
    """[n, C] that are sure of the given classes."""
    return (sharpness * np.eye(C, dtype=np.float32))[np.asarray(classes)]


EVEN, ONE = logits([0, 1, 2, 3] * 8), logits([0] * 32)
SUSPECT, PROBE = MIN_SAMPLES // 32, PROBE_SAMPLES // 32


def fed(monitor, batch, times, source=None):
    """What each observation said; the source answers where it is wanted, as a stream has it."""
    said = []
    for _ in range(times):
        said.append(monitor.observe(batch, source if monitor.suspicious else None))
    return said


def test_diversity_of_known_distributions():
    assert diversity(np.full(C, 0.25)) == pytest.approx(1.0)
    assert diversity(np.array([1.0, 0, 0, 0])) == 0.0
    assert diversity(np.array([0.5, 0.5, 0, 0])) == pytest.approx(0.5)
    assert diversity(np.array([7.0])) == 1.0  # of one class nothing can collapse


@given(st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=20), st.floats(1e-3, 1e3))
def test_diversity_is_a_fraction_and_does_not_depend_on_the_sum(values, factor):
    p = np.array(values)
    assert -1e-9 <= diversity(p) <= 1 + 1e-9
    assert diversity(p * factor) == pytest.approx(diversity(p), abs=1e-9)


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 600)), min_size=1, max_size=30))
def test_a_running_mean_lies_among_its_values_and_counts_samples_not_calls(values):
    one, split = Running(np.zeros(())), Running(np.zeros(()))
    for value, samples in values:
        one.add(value, samples)
        for part in (samples // 2, samples - samples // 2):
            split.add(value, part)
    seen = [value for value, _ in values]
    assert min(seen) - 1e-9 <= one.mean <= max(seen) + 1e-9
    assert float(split.mean) == pytest.approx(float(one.mean), abs=1e-9)


def test_before_the_first_sample_there_is_nothing_to_say():
    monitor = Monitor(C, 0.3)
    assert (monitor.entropy, monitor.agreement, monitor.diversity) == (None, None, None)
    assert not monitor.suspicious


def test_an_even_stream_is_never_suspected():
    monitor = Monitor(C, 0.3)
    assert fed(monitor, EVEN, 200) == [None] * 200
    assert monitor.diversity == pytest.approx(1.0, abs=1e-3)
    assert not monitor.suspicious


def test_one_class_is_suspected_then_compared_then_called_a_collapse():
    monitor = Monitor(C, 0.3)
    said = fed(monitor, ONE, SUSPECT - 1, source=EVEN)
    assert not monitor.suspicious  # too few samples to say
    said += fed(monitor, ONE, 1, source=EVEN)
    assert monitor.suspicious
    said += fed(monitor, ONE, PROBE, source=EVEN)
    assert said[:-1] == [None] * (SUSPECT + PROBE - 1)
    assert "diversity of 128 predictions is 0.000, the frozen source's 1.000" in said[-1]
    assert not monitor.suspicious


def test_an_honest_stream_of_one_class_is_suspected_asked_about_once_and_left_alone():
    """A camera that sees one class: source and stream agree, so nothing has collapsed."""
    monitor = Monitor(C, 0.3)
    assert fed(monitor, ONE, SUSPECT + PROBE, source=ONE) == [None] * (SUSPECT + PROBE)
    assert not monitor.suspicious
    assert monitor.agreement == 1.0
    quiet = QUIET_SAMPLES // 32
    assert fed(monitor, ONE, quiet - 1, source=ONE) == [None] * (quiet - 1)
    assert not monitor.suspicious  # the source's second answer is not asked for all the time
    fed(monitor, ONE, 1, source=ONE)
    assert monitor.suspicious  # and later it is asked again


@pytest.mark.parametrize(
    ("source", "collapsed"), [([0, 0, 0, 1] * 8, True), ([0] * 31 + [1], False), ([0, 1] * 16, True)]
)
def test_the_source_must_be_clearly_more_diverse(source, collapsed):
    monitor = Monitor(C, 0.3)
    said = fed(monitor, ONE, SUSPECT + PROBE, source=logits(source))
    assert (said[-1] is not None) is collapsed


def test_a_stream_that_recovers_while_it_is_compared_is_not_called_collapsed():
    monitor = Monitor(C, 0.3)
    fed(monitor, ONE, SUSPECT, source=EVEN)
    assert monitor.suspicious
    assert fed(monitor, EVEN, PROBE, source=EVEN) == [None] * PROBE
    assert not monitor.suspicious


def test_zero_turns_it_off():
    monitor = Monitor(C, 0.0)
    assert fed(monitor, ONE, 100, source=EVEN) == [None] * 100
    assert not monitor.suspicious


def test_clear_forgets_everything():
    monitor = Monitor(C, 0.3)
    fed(monitor, ONE, SUSPECT + 1, source=EVEN)
    monitor.clear()
    assert monitor.notes() == Monitor(C, 0.3).notes()


def test_entropy_and_agreement_are_those_of_the_samples():
    monitor = Monitor(C, 0.3)
    flat = np.zeros((10, C), np.float32)
    monitor.observe(flat, logits([0] * 7 + [1] * 3))
    assert monitor.entropy == pytest.approx(math.log(C))
    assert monitor.agreement == pytest.approx(0.7)


batches = st.lists(st.tuples(st.integers(1, 200), st.integers(0, 2**31)), min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(batches, batches)
def test_notes_through_json_are_exact_to_the_last_bit_and_it_goes_on_the_same(before, after):
    def drawn(samples, seed):
        rng = np.random.default_rng(seed)
        batch = rng.normal(0, 5, (samples, C)).astype(np.float32)
        batch[:, 0] += 15 if seed % 3 else 0  # often suspicious
        return batch, rng.normal(0, 5, (samples, C)).astype(np.float32)

    one = Monitor(C, 0.3)
    for samples, seed in before:
        batch, source = drawn(samples, seed)
        one.observe(batch, source if one.suspicious else None)
    other = Monitor(C, 0.3)
    other.take_notes(json.loads(json.dumps(one.notes())))
    assert other.notes() == one.notes()
    assert other.suspicious == one.suspicious
    for samples, seed in after:
        batch, source = drawn(samples, seed)
        said = [each.observe(batch, source if each.suspicious else None) for each in (one, other)]
        assert said[0] == said[1]
        assert other.notes() == one.notes()


@pytest.mark.parametrize(
    "change",
    [
        {"mean": ["", 1.0]},
        {"mean": ["AAAA", 1.0]},
        {"mean": "x"},
        {"observed": None},
        {"entropy": []},
        {"probe": ["AAAA", "AAAA", 1]},
        {"agreement": ["x", 1.0]},
    ],
)
def test_notes_of_something_else_are_an_error_that_the_stream_knows(change):
    monitor = Monitor(C, 0.3)
    monitor.observe(EVEN)
    with pytest.raises((ValueError, KeyError, TypeError, IndexError)):
        Monitor(C, 0.3).take_notes({**monitor.notes(), **change})


@pytest.mark.parametrize("missing", ["observed", "quiet_until", "mean", "entropy", "agreement", "probe"])
def test_notes_with_something_missing_are_an_error(missing):
    notes = Monitor(C, 0.3).notes()
    del notes[missing]
    with pytest.raises(KeyError):
        Monitor(C, 0.3).take_notes(notes)


def test_notes_that_are_not_finite_are_an_error():
    notes = Monitor(2, 0.3).notes()
    spoilt = Monitor(2, 0.3)
    spoilt._mean.total[:] = np.nan
    with pytest.raises(ValueError, match="finite"):
        Monitor(2, 0.3).take_notes({**notes, "mean": spoilt.notes()["mean"]})
