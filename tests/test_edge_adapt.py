"""Predict, maybe step, guard, account, on a real small bundle. A refused step leaves theta as it was."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import tiny_bundle
from tta_edge.adapt import MAX_STRIKES, Guards, Keeper, Stream, objection
from tta_edge.events import Reason
from tta_edge.monitor import MIN_SAMPLES, PROBE_SAMPLES
from tta_runtime import Bundle, Engines, Model
from tta_runtime import errors as runtime_errors

WIDE = Guards(max_distance=1e9, reset_every_steps=0)
X, _ = tiny_bundle.samples(16, seed=3, shift=1.0)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    tiny_bundle.build(path)
    return Engines.load(Bundle.open(path))


def stream(engines, guards=WIDE, method="tent", **hyper):
    events = []
    guarded = Stream("s", Model(engines, method, hyper=hyper), guards, tell=events.append)
    return guarded, events


def told(events):
    return [(event.action, event.reason) for event in events]


def test_a_step_that_nothing_speaks_against_is_committed(engines):
    guarded, events = stream(engines)
    reference = Model(engines, "tent")
    for _ in range(3):
        answer = guarded.answer(X, compare=True)
        step = reference.adapt(X)
        np.testing.assert_array_equal(answer.logits, step.logits)
        assert answer.adapted
        assert answer.reason is None
        assert answer.report == dict(step.report)
    assert guarded.model.digest == reference.digest
    assert 0 < guarded.monitor.entropy < np.log(3)
    assert guarded.samples == 48
    np.testing.assert_array_equal(answer.source_logits, reference.predict(X, source=True).logits)
    assert events == []


def test_adapt_false_leaves_theta(engines):
    guarded, events = stream(engines)
    answer = guarded.answer(X, adapt=False)
    assert (answer.adapted, answer.reason, answer.report, guarded.model.steps) == (False, None, {}, 0)
    np.testing.assert_array_equal(answer.logits, guarded.model.predict(X).logits)
    assert events == []


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("logits", Reason.NON_FINITE_LOGITS),
        ("theta", Reason.NON_FINITE_THETA),
        ("state", Reason.NON_FINITE_STATE),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_single_non_finite_value_is_an_objection(engines, part, reason, value):
    model = Model(engines, "tent")
    step = model.step(X)
    assert objection(step, model.theta0, WIDE) is None
    spoilt = np.array(step.state["momentum"] if part == "state" else getattr(step, part))
    spoilt.flat[-1] = value
    step = dataclasses.replace(step, **{part: {"momentum": spoilt} if part == "state" else spoilt})
    found = objection(step, model.theta0, WIDE)
    assert found is not None
    assert found[0] is reason


def test_integers_in_the_state_are_not_in_the_way(engines):
    guarded, _ = stream(engines, method="teacher")
    assert guarded.answer(X).adapted
    assert guarded.model.state["count"].dtype == np.int64


def test_a_diverging_step_is_refused_and_the_serve_graph_answers(engines):
    guarded, events = stream(engines, lr=1e38)
    momentum = {"momentum": np.full(16, 10, np.float32)}
    guarded.model.commit(
        dataclasses.replace(guarded.model.step(X), theta=guarded.model.theta0, state=momentum)
    )
    before = guarded.model.digest, guarded.model.steps
    answer = guarded.answer(X)
    assert not answer.adapted
    assert answer.reason is Reason.NON_FINITE_THETA
    assert answer.report == {}
    np.testing.assert_array_equal(answer.logits, guarded.model.predict(X).logits)
    assert (guarded.model.digest, guarded.model.steps) == before
    np.testing.assert_array_equal(guarded.model.state["momentum"], momentum["momentum"])
    assert told(events) == [("refuse", Reason.NON_FINITE_THETA)]
    assert guarded.counts == {"non-finite-theta": 1}


def test_leaving_the_ball_resets_to_the_source(engines):
    guarded, events = stream(engines, Guards(max_distance=0.3, reset_every_steps=0))
    for _ in range(100):
        steps = guarded.model.steps
        answer = guarded.answer(X)
        assert guarded.model.distance <= 0.3
        if not answer.adapted:
            break
    assert steps > 1
    assert answer.reason is Reason.BALL
    assert told(events) == [("refuse", Reason.BALL), ("reset", Reason.BALL)]
    assert "0.3" in events[0].detail
    assert guarded.model.digest == guarded.model.manifest.theta.digest
    assert guarded.last_event == "reset: ball"
    np.testing.assert_array_equal(answer.logits, guarded.model.predict(X, source=True).logits)
    assert guarded.answer(X).adapted  # and it starts anew


def test_a_first_step_that_leaves_the_ball_is_only_refused(engines):
    guarded, events = stream(engines, Guards(max_distance=1e-6, reset_every_steps=0))
    for _ in range(2):
        assert guarded.answer(X).reason is Reason.BALL
    assert told(events) == [("refuse", Reason.BALL)] * 2
    assert guarded.model.digest == guarded.model.manifest.theta.digest


def test_the_backstop_resets_after_exactly_so_many_steps(engines):
    guarded, events = stream(engines, Guards(max_distance=1e9, reset_every_steps=3))
    reasons = [guarded.answer(X).reason for _ in range(7)]
    assert reasons == [None, None, Reason.PERIODIC, None, None, Reason.PERIODIC, None]
    assert told(events) == [("reset", Reason.PERIODIC)] * 2
    assert guarded.counts == {"periodic": 2}
    assert guarded.model.steps == 1


def test_theta_that_gives_no_finite_logits_goes_back_to_the_source(engines):
    guarded, events = stream(engines)
    theta = np.full_like(guarded.model.theta0, 3e38)
    guarded.model.commit(dataclasses.replace(guarded.model.step(X), theta=theta))
    answer = guarded.answer(X, adapt=False)
    np.testing.assert_array_equal(answer.logits, guarded.model.predict(X, source=True).logits)
    assert answer.reason is Reason.NON_FINITE_LOGITS
    assert told(events) == [("reset", Reason.NON_FINITE_LOGITS)]
    assert guarded.model.steps == 0


def test_a_batch_that_overflows_even_the_source_is_refused_and_theta_stays(engines):
    guarded, _ = stream(engines)
    guarded.answer(X)
    before = guarded.model.digest
    with pytest.raises(runtime_errors.NonFinite, match=r"reach 3e\+38"):
        guarded.answer(np.full_like(X, 3e38))
    assert guarded.model.digest == before


@pytest.mark.parametrize("compare", [False, True])
@pytest.mark.parametrize("adapt", [False, True])
def test_a_bad_batch_changes_nothing_and_is_no_event(engines, adapt, compare):
    guarded, events = stream(engines)
    guarded.answer(X)
    before = guarded.model.digest, guarded.model.steps, guarded.monitor.entropy
    for bad in (X[:, :-1], X[:0], X.astype(np.float64), np.full_like(X, np.nan)):
        with pytest.raises(runtime_errors.InputError):
            guarded.answer(bad, adapt=adapt, compare=compare)
    assert (guarded.model.digest, guarded.model.steps, guarded.monitor.entropy) == before
    assert events == []


def test_too_small_a_batch_is_answered(engines):
    guarded, events = stream(engines)
    answer = guarded.answer(X[:1])
    assert answer.logits.shape == (1, 3)
    assert answer.reason is Reason.BATCH_SIZE
    assert told(events) == [("skip", Reason.BATCH_SIZE)]
    assert guarded.model.steps == 0


def test_a_method_compiled_for_one_batch_size_only_answers_others(tmp_path):
    tiny_bundle.build(tmp_path / "fixed", fixed_batch=16)
    guarded, events = stream(Engines.load(tmp_path / "fixed"))
    assert guarded.answer(X).adapted
    assert guarded.answer(X[:8]).reason is Reason.BATCH_SIZE
    assert told(events) == [("skip", Reason.BATCH_SIZE)]


# --- checkpoints, stepping back -------------------------------------------------------------------

EVERY_STEP = Guards(max_distance=1e9, reset_every_steps=0, checkpoint_steps=1)


def learnt(model):
    return model.digest, model.steps, {name: array.tobytes() for name, array in model.state.items()}


def test_a_rollback_returns_theta_and_state_together_then_one_further_then_the_source(engines):
    guarded, events = stream(engines, EVERY_STEP)
    seen = []
    for _ in range(4):
        guarded.answer(X)
        seen.append(learnt(guarded.model))
    assert guarded.roll_back()  # the newest checkpoint is the present
    assert learnt(guarded.model) == seen[3]
    assert guarded.roll_back()
    assert learnt(guarded.model) == seen[2]
    assert not guarded.roll_back()
    assert guarded.model.digest == guarded.model.manifest.theta.digest
    assert guarded.model.steps == 0
    assert told(events) == [("rollback", Reason.REQUESTED)] * 3


def test_a_stream_goes_on_from_a_rollback_exactly_as_it_did_before(engines):
    guarded, _ = stream(engines, Guards(max_distance=1e9, reset_every_steps=0, checkpoint_steps=2))
    for _ in range(2):
        guarded.answer(X)
    after = [guarded.answer(X).logits for _ in range(1)]
    guarded.roll_back()
    np.testing.assert_array_equal(guarded.answer(X).logits, after[0])


class Kept(Keeper):
    def __init__(self):
        self.calls = []

    def keep(self, stream, checkpoint, notes):
        self.calls.append(("keep", checkpoint.steps))

    def returned(self, stream, checkpoint, notes):
        self.calls.append(("returned", None if checkpoint is None else checkpoint.steps))


def test_the_keeper_hears_of_every_checkpoint_and_every_way_back(engines):
    kept = Kept()
    guards = Guards(max_distance=1e9, reset_every_steps=5, checkpoint_steps=2)
    guarded = Stream("s", Model(engines, "tent"), guards, keeper=kept)
    for _ in range(5):
        guarded.answer(X)
    guarded.answer(X)
    guarded.roll_back()
    assert kept.calls == [("keep", 2), ("keep", 4), ("returned", None), ("returned", None)]


def test_notes_bring_a_stream_back_as_it_was(engines):
    guarded, _ = stream(engines, EVERY_STEP)
    for _ in range(3):
        guarded.answer(X, compare=True)
    guarded.answer(X[:1])
    guarded.enabled = False
    notes, checkpoint = guarded.notes(), guarded.model.checkpoint
    other, _ = stream(engines, EVERY_STEP)
    other.resume(checkpoint, notes, before=guarded.checkpoints[0], restored="a.state")
    assert other.notes() == notes
    assert learnt(other.model) == learnt(guarded.model)
    assert (other.counts, other.last_event, other.restored) == (guarded.counts, guarded.last_event, "a.state")
    assert not other.adapts
    assert other.monitor.agreement == guarded.monitor.agreement


@pytest.mark.parametrize(
    "notes", ["", "{", "[]", "null", '{"monitor": {}}', '{"monitor": {"observed": "x"}}']
)
def test_notes_of_another_version_are_not_taken_and_theta_is(engines, notes):
    guarded, _ = stream(engines)
    guarded.answer(X)
    other, _ = stream(engines)
    other.resume(guarded.model.checkpoint, notes, before=None, restored="b.state")
    assert learnt(other.model) == learnt(guarded.model)
    assert other.monitor.observed == 0
    assert other.answer(X).adapted


# --- steps in the background ----------------------------------------------------------------------


def test_a_background_step_is_the_same_step(engines):
    guarded, events = stream(engines)
    reference = Model(engines, "tent")
    reference.adapt(X)
    assert guarded.step_on(X) is True
    assert guarded.model.digest == reference.digest
    assert events == []


def test_a_step_from_a_theta_that_changed_meanwhile_is_thrown_away(engines):
    guarded, events = stream(engines)
    guarded.answer(X)

    class Slow(Model):
        def step(self, x, weight=None):
            step = super().step(x, weight)
            guarded.reset()  # comes between the step and its commit
            return step

    guarded.model.__class__ = Slow
    assert guarded.step_on(X) is None
    assert guarded.model.steps == 0
    assert told(events) == [("reset", Reason.REQUESTED), ("refuse", Reason.STALE)]


@pytest.mark.parametrize("how", ["closed", "off", "suspended"])
def test_a_stream_that_may_not_adapt_commits_nothing_in_the_background(engines, how):
    guarded, events = stream(engines)
    if how == "closed":
        guarded.close()
    guarded.enabled, guarded.suspended = how != "off", how == "suspended"
    assert guarded.step_on(X) is None
    assert (guarded.model.steps, events) == (0, [])


def test_a_background_step_outside_of_the_ball_is_refused(engines):
    guarded, events = stream(engines, Guards(max_distance=1e-6, reset_every_steps=0))
    assert guarded.step_on(X) is False
    assert told(events) == [("refuse", Reason.BALL)]


# --- collapse -------------------------------------------------------------------------------------


def collapsed(guarded):
    """Make the stream call everything the first class, whatever the images show."""
    model = guarded.model
    theta = np.array(model.theta0)
    size = len(theta) // 3
    theta[:size] = 0.0  # scale
    weights, _ = tiny_bundle.weights()
    theta[size : 2 * size] = 30 * (weights[:, 0] - weights[:, 1:].mean(axis=1))  # bias
    model.commit(dataclasses.replace(model.step(X), theta=theta, state=model.state))


def observe(guarded, batches, seed=0):
    reasons = []
    for k in range(batches):
        x, _ = tiny_bundle.samples(64, seed=seed + k)
        reasons.append(guarded.answer(x, adapt=False).reason)
    return reasons


SUSPECT = -(-MIN_SAMPLES // 64)  # batches until a suspicion is possible
PROBE = -(-PROBE_SAMPLES // 64)


def test_predictions_that_fall_into_one_class_are_rolled_back(engines):
    guarded, events = stream(engines, EVERY_STEP)
    guarded.answer(X)
    good = learnt(guarded.model)
    collapsed(guarded)
    reasons = observe(guarded, SUSPECT + PROBE)
    assert reasons == [None] * (SUSPECT + PROBE - 1) + [Reason.COLLAPSE]
    assert learnt(guarded.model) == good
    assert told(events) == [("rollback", Reason.COLLAPSE)]
    assert "the frozen source's" in events[0].detail
    assert observe(guarded, SUSPECT + PROBE + 2) == [None] * (SUSPECT + PROBE + 2)


def test_a_stream_that_collapses_again_and_again_is_suspended_at_the_source(engines):
    guarded, events = stream(engines, EVERY_STEP)
    for _ in range(MAX_STRIKES):
        collapsed(guarded)
        observe(guarded, SUSPECT + PROBE)
    assert told(events)[-1] == ("suspend", Reason.COLLAPSE)
    assert guarded.state(True) == "frozen"
    assert guarded.model.digest == guarded.model.manifest.theta.digest
    assert not guarded.answer(X).adapted
    guarded.reset()
    assert guarded.answer(X).adapted


def test_an_honest_stream_of_one_class_is_not_a_collapse(engines):
    guarded, events = stream(engines, EVERY_STEP)
    guarded.answer(X)
    x, _ = tiny_bundle.samples(3000, seed=5)
    source = guarded.model.predict(x[:1000], source=True).logits
    one = x[:1000][source.argmax(axis=1) == 0]
    sure = one[np.argsort(-source[source.argmax(axis=1) == 0][:, 0])[:64]]
    for _ in range(40):
        guarded.answer(sure, adapt=False)
    assert [event for event in events if event.reason == Reason.COLLAPSE] == []


def test_the_detector_can_be_turned_off(engines):
    guarded, events = stream(engines, dataclasses.replace(EVERY_STEP, min_diversity=0.0))
    collapsed(guarded)
    observe(guarded, 20)
    assert events == []
