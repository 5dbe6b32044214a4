"""Predict, maybe step, guard, account, on a real small bundle. A refused step leaves theta as it was."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import tiny_bundle
from tta_edge.adapt import GuardedModel, Guards, Reason, objection
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
    guarded = GuardedModel("s", Model(engines, method, hyper=hyper), guards, on_event=events.append)
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
    assert guarded.last_entropy == pytest.approx(step.report["entropy"], rel=1e-5)
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
    before = guarded.model.digest, guarded.model.steps, guarded.last_entropy
    for bad in (X[:, :-1], X[:0], X.astype(np.float64), np.full_like(X, np.nan)):
        with pytest.raises(runtime_errors.InputError):
            guarded.answer(bad, adapt=adapt, compare=compare)
    assert (guarded.model.digest, guarded.model.steps, guarded.last_entropy) == before
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
