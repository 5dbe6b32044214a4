"""Theta and state that stay where the engine computes: the same numbers, nothing copied that nobody looked at.

The code is the GPU's; here the device is the memory of the CPU, so that answers must agree to the bit.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import tiny_bundle
from agreement import check_answers_beside_steps, check_refused, check_steps
from tta_edge.adapt import STANDARD, Stream
from tta_edge.builtin import builtin_bundle
from tta_edge.events import Reason
from tta_runtime import Bundle, EngineOptions, Engines, Model, OrtEngine, errors
from tta_runtime.held import Resident, unfetched, where
from tta_runtime.sum_graph import sum_graph

STEPS = 20
RESIDENT = EngineOptions(threads=1, resident=True)
PLAIN = EngineOptions(threads=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "bundle"
    tiny_bundle.build(path)
    return path


def batches(path: Path, n: int = STEPS) -> list[np.ndarray]:
    spec = Bundle.open(path).manifest.input
    rng = np.random.default_rng(5)
    return [rng.random((8, *spec.shape[1:]), dtype=np.float32) for _ in range(n)]


def traffic(model: Model) -> tuple[int, int]:
    engines = {id(engine): engine for engine in (model._serve, model._step)}.values()
    return sum(e.traffic.to_host for e in engines), sum(e.traffic.to_device for e in engines)


@pytest.mark.parametrize(("bundle", "method"), [("tiny", "tent"), ("tiny", "teacher"), ("digits", "tent")])
def test_twenty_steps_agree_with_the_plain_path_to_the_bit(bundle, method, tiny):
    path = tiny if bundle == "tiny" else builtin_bundle()
    plain = Model.open(path, method=method, seed=3, options=PLAIN)
    there = Model.open(path, method=method, seed=3, options=RESIDENT)
    check_steps(plain, there, batches(path))
    assert isinstance(unfetched(there.checkpoint, "theta"), Resident)


def test_only_logits_and_report_come_to_the_host(tiny):
    model = Model.open(tiny, method="tent", options=RESIDENT)
    (x,) = batches(tiny, 1)
    model.adapt(x)
    before = traffic(model)
    step = model.adapt(x)
    to_host, to_device = traffic(model)
    asked = 4 * (1 + len(model.spec.state))  # whether theta and each state are finite
    assert to_host - before[0] == step.logits.nbytes + 4 * len(step.report) + asked
    assert to_device - before[1] == x.nbytes + 4 * len(
        x
    )  # the samples and their weights, no theta and no state


def test_theta_is_fetched_once_by_whoever_looks_and_nobody_can_write_to_it(tiny):
    model = Model.open(tiny, method="tent", options=RESIDENT)
    model.adapt(batches(tiny, 1)[0])
    before = traffic(model)[0]
    theta = model.theta
    assert model.theta is theta
    assert traffic(model)[0] - before == theta.nbytes
    with pytest.raises(ValueError, match="read-only"):
        theta[0] = 1.0
    with pytest.raises(ValueError, match="read-only"):
        next(iter(model.state.values()))[0] = 1.0


def test_going_back_is_a_change_of_references(tiny):
    model = Model.open(tiny, method="tent", options=RESIDENT)
    first, second, third = batches(tiny, 3)
    model.adapt(first)
    kept, theta = model.checkpoint, model.theta
    expected = model.step(second).logits
    model.adapt(second)
    assert not np.array_equal(model.theta, theta)
    model.roll_back()
    assert model.checkpoint is kept
    np.testing.assert_array_equal(model.theta, theta)
    model.adapt(third)
    before = traffic(model)[1]
    model.restore(kept)
    np.testing.assert_array_equal(model.step(second).logits, expected)
    assert traffic(model)[1] - before == second.nbytes + 4 * len(second)


@pytest.mark.parametrize("part", ["theta", "state"])
def test_what_is_not_finite_on_the_device_is_refused_there(part, tiny):
    model = Model.open(tiny, method="tent", options=RESIDENT)
    x = batches(tiny, 1)[0]
    good = model.step(x)
    start = np.array(model.theta)
    start[0] = np.inf
    spoilt = model.step(x, start=start)
    active = model.checkpoint
    if part == "theta":
        with pytest.raises(errors.NonFiniteTheta):
            model.commit(dataclasses.replace(good, theta=spoilt.theta))
        with pytest.raises(errors.NonFiniteTheta):
            model.commit(spoilt)
    else:
        with pytest.raises(errors.NonFiniteState):
            model.commit(dataclasses.replace(good, state=spoilt.state))
    assert model.checkpoint is active
    model.commit(good)


def test_values_whose_sum_overflows_are_looked_at_one_by_one(tiny):
    model = Model.open(tiny, method="tent", options=RESIDENT)
    vector = np.full(model.manifest.theta.size, 3e38, dtype=np.float32)
    model.swap(vector)
    device = unfetched(Model.open(tiny, options=RESIDENT).adapt(batches(tiny, 1)[0]), "theta").device
    import onnxruntime as ort

    from tta_runtime.held import Traffic
    from tta_runtime.ort_device import OrtResident

    def there(array: np.ndarray) -> OrtResident:
        return OrtResident(ort.OrtValue.ortvalue_from_numpy(array, "cpu", 0), device, Traffic())

    assert there(vector).is_finite()
    assert there(np.arange(6, dtype=np.float32).reshape(2, 3)).is_finite()
    assert there(np.array([3], dtype=np.int64)).is_finite()
    for bad in (np.inf, -np.inf, np.nan):
        vector[-1] = bad
        assert not there(vector).is_finite()


def test_an_engine_takes_what_another_left_on_its_device(tiny):
    bundle = Bundle.open(tiny)
    there = OrtEngine(bundle, "step.tent", RESIDENT)
    here = OrtEngine(bundle, "step.tent", PLAIN)
    model = Model.open(tiny, method="tent", options=RESIDENT)
    x = batches(tiny, 1)[0]
    step = model.step(x)
    feed = {
        "x": x,
        "weight": np.ones(len(x), np.float32),
        "theta": unfetched(step, "theta"),
        "state.momentum": where(step.state, "momentum"),
        "hyper": np.array(list(model.hyper.values()), np.float32),
    }
    assert isinstance(feed["theta"], Resident)
    assert isinstance(feed["state.momentum"], Resident)
    np.testing.assert_array_equal(here.run(feed)["logits"], there.run(feed)["logits"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.pop("theta"), "theta"),
        (lambda f: f.update(theta=np.zeros(23, np.float32)), "23"),
        (lambda f: f.update(theta=np.zeros(24)), "float"),
        (lambda f: f.update(x=np.zeros((2, 9), np.float32)), "9"),
        (lambda f: f.update(x="text"), "object"),
    ],
)
def test_wrong_inputs_are_refused_as_on_the_plain_path(change, says, tiny):
    bundle = Bundle.open(tiny)
    check_refused(bundle, OrtEngine(bundle, "forward", RESIDENT), batches(tiny, 1)[0], change, says)


def test_answers_beside_steps_are_of_one_theta(tiny):
    engines = Engines.load(tiny, methods=["tent"], options=RESIDENT)
    model, replay = Model(engines, "tent"), Model(engines, "tent")
    steps = batches(tiny, 40)
    check_answers_beside_steps(model, replay, steps, probe=steps[0])


def test_guards_fetch_theta_and_nothing_else(tiny):
    stream = Stream("s", Model.open(tiny, method="tent", options=RESIDENT), STANDARD)
    x = batches(tiny, 1)[0]
    stream.answer(x)
    before = traffic(stream.model)[0]
    answer = stream.answer(x)
    assert answer.adapted
    state = sum(value.nbytes for value in stream.model.state.values())
    fetched = traffic(stream.model)[0] - before - state
    asked = 4 * (1 + 2 * len(stream.model.spec.state))  # by the guard and by the commit
    assert fetched == answer.logits.nbytes + 4 * len(answer.report) + stream.model.theta.nbytes + asked


def test_a_guard_refuses_by_what_is_on_the_device(tiny):
    stream = Stream(
        "s",
        Model.open(tiny, method="tent", options=RESIDENT),
        dataclasses.replace(STANDARD, max_distance=1e-9),
    )
    before = stream.model.checkpoint
    answer = stream.answer(batches(tiny, 1)[0])
    assert answer.refused
    assert answer.reason is Reason.BALL
    assert stream.model.checkpoint is before


def test_a_saved_stream_goes_on_to_the_bit(tiny, tmp_path):
    model = Model.open(tiny, method="tent", options=RESIDENT)
    first, second = batches(tiny, 2)
    model.adapt(first)
    model.save(tmp_path / "s.state")
    other = Model.open(tiny, method="tent", options=RESIDENT)
    other.load(tmp_path / "s.state")
    np.testing.assert_array_equal(other.adapt(second).logits, model.adapt(second).logits)
    assert other.digest == model.digest


def test_the_graph_that_sums_is_an_onnx_model():
    import onnx

    model = onnx.load_from_string(sum_graph())
    assert [node.op_type for node in model.graph.node] == ["ReduceSum"]
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["values", "total"]
    assert model.SerializeToString() == sum_graph()
