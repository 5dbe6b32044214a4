"""Model: predict, step, commit, reset, swap, roll back; every refusal leaves files and theta unchanged."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import tiny_bundle
from bad_bundles import reseal
from snapshots import learnt, unchanged
from tiny_bundle import C, D, P
from tta_runtime import Engines, Limits, Model, errors
from tta_runtime.numerics import entropy, uniforms

F32 = np.float32


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    path = tmp_path_factory.mktemp("tiny") / "bundle"
    tiny_bundle.build(path)
    return Engines.load(path)


@pytest.fixture
def model(engines: Engines) -> Model:
    """A model that has adapted twice, so that theta, state and steps differ from the source's."""
    model = Model(engines)
    for seed in (1, 2):
        model.adapt(batch(16, seed=seed))
    return model


def batch(n: int = 16, seed: int = 0) -> np.ndarray:
    return tiny_bundle.samples(n, seed=seed, shift=1.0)[0]


# ---------------------------------------------------------------------------------- the good path


def test_twenty_steps_agree_with_the_formulas(engines):
    model = Model(engines)
    theta, momentum = model.theta0.copy(), np.zeros(2 * D, F32)
    for seed in range(20):
        x, weight = batch(8 + seed, seed=seed), (np.arange(8 + seed) % 3 > 0).astype(F32)
        logits, theta, momentum = tiny_bundle.reference_tent(x, weight, theta, momentum)
        step = model.adapt(x, weight)
        np.testing.assert_allclose(step.logits, logits, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(model.theta, theta, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(model.state["momentum"], momentum, rtol=1e-4, atol=1e-5)
    assert model.steps == 20


def test_and_a_flipped_sign_would_be_seen(engines):
    """The companion: the comparison above must be able to fail."""
    x, weight = batch(), np.ones(16, F32)
    _, wrong, _ = tiny_bundle.reference_tent(x, weight, engines.bundle.theta0, np.zeros(2 * D, F32), lr=-0.05)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(Model(engines).adapt(x).theta, wrong, rtol=1e-4, atol=1e-5)


def test_predict_is_the_reference_forward(model):
    x = batch()
    expected, _, _ = tiny_bundle.reference_tent(x, np.ones(16, F32), model.theta, np.zeros(2 * D, F32))
    got = model.predict(x)
    np.testing.assert_allclose(got.logits, expected, rtol=1e-4, atol=1e-5)
    assert got.features is not None
    assert got.features.shape == (16, D)


def test_the_source_answers_as_if_nothing_had_been_learnt(model, engines):
    x = batch()
    fresh = Model(engines).predict(x).logits
    np.testing.assert_array_equal(model.predict(x, source=True).logits, fresh)
    assert not np.array_equal(model.predict(x).logits, fresh)


def test_the_report_is_named_and_true(engines):
    model = Model(engines)
    x = batch()
    weight = np.ones(16, F32)
    weight[:4] = 0
    step = model.step(x, weight)
    assert list(step.report) == ["loss", "entropy", "accepted", "update_norm"]
    assert step.report["accepted"] == 0.75
    assert step.report["entropy"] == pytest.approx(float(entropy(step.logits).mean()), rel=1e-5)
    assert step.report["loss"] == pytest.approx(float(entropy(step.logits)[4:].mean()), rel=1e-5)


def test_a_sample_of_weight_zero_counts_for_nothing_but_is_answered(engines):
    x = batch()
    weight = np.ones(16, F32)
    weight[5] = 0
    other = x.copy()
    other[5] = 100.0
    a, b = Model(engines).step(x, weight), Model(engines).step(other, weight)
    np.testing.assert_array_equal(a.theta, b.theta)
    assert not np.array_equal(a.logits[5], b.logits[5])


def test_if_all_weights_are_zero_theta_stays(engines):
    model = Model(engines)
    step = model.adapt(batch(), np.zeros(16, F32))
    np.testing.assert_array_equal(step.theta, model.theta0)


def test_a_step_is_pure(model):
    x = batch()
    kept = x.copy()
    before = learnt(model)
    one, two = model.step(x), model.step(x)
    assert learnt(model) == before
    np.testing.assert_array_equal(x, kept)
    np.testing.assert_array_equal(one.theta, two.theta)
    np.testing.assert_array_equal(one.logits, two.logits)


def test_source_only_serves(engines):
    model = Model(engines, "source")
    before = learnt(model)
    step = model.adapt(batch())
    assert step.report == {}
    np.testing.assert_array_equal(step.logits, model.predict(batch()).logits)
    assert learnt(model) == before
    assert not model.takes_weight
    assert model.roll_back() is False


def test_a_teacher_in_the_state_serves(engines):
    model = Model(engines, "teacher", seed=4)
    np.testing.assert_array_equal(model.state["average"], model.theta0)
    model.adapt(batch())
    noise = (uniforms(4, 0, P) - F32(0.5)) * engines.bundle.anchor["center"]
    np.testing.assert_allclose(model.theta, model.theta0 + noise, rtol=1e-6)
    np.testing.assert_allclose(model.state["average"], model.theta0 + noise / 2, rtol=1e-6)
    assert model.state["count"].tolist() == [1]
    w, b = tiny_bundle.weights()
    scale, bias, mean = model.state["average"].reshape(3, D)
    np.testing.assert_allclose(
        model.predict(batch()).logits, ((batch() - mean) * scale + bias) @ w + b, rtol=1e-4, atol=1e-5
    )


def test_the_same_seed_replays_bit_for_bit_and_another_does_not(engines):
    def run(seed: int) -> Model:
        model = Model(engines, "teacher", seed=seed)
        for i in range(3):
            model.adapt(batch(seed=i))
        return model

    assert learnt(run(1)) == learnt(run(1))
    assert run(1).digest != run(2).digest


def test_streams_share_engines_and_nothing_else(engines):
    one, two = Model(engines), Model(engines)
    one.adapt(batch())
    assert two.steps == 0
    assert two.distance == 0.0
    np.testing.assert_array_equal(two.theta, two.theta0)


def test_hyper_parameters(engines):
    assert Model(engines).hyper == {"lr": 0.05, "momentum": 0.9, "alpha": 0.1}
    still = Model(engines, hyper={"lr": 0, "alpha": 0.0})
    still.adapt(batch())
    np.testing.assert_array_equal(still.theta, still.theta0)
    far = Model(engines, hyper={"lr": np.float32(0.5)})
    near = Model(engines)
    assert far.adapt(batch()).report["update_norm"] == pytest.approx(
        10 * near.adapt(batch()).report["update_norm"]
    )


def test_uint8_inputs(tmp_path):
    tiny_bundle.build(tmp_path / "bundle", dtype="uint8")
    model = Model.open(tmp_path / "bundle")
    x = np.random.default_rng(0).integers(0, 256, (4, D)).astype(np.uint8)
    step = model.adapt(x)
    expected, theta, _ = tiny_bundle.reference_tent(
        x.astype(F32) / 255, np.ones(4, F32), model.theta0, np.zeros(2 * D, F32)
    )
    np.testing.assert_allclose(step.logits, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.theta, theta, rtol=1e-4, atol=1e-5)
    with pytest.raises(errors.WrongDtype, match="float32, the model takes uint8"):
        model.predict(x.astype(F32))


def test_open_loads_only_what_the_method_needs(engines):
    model = Model.open(engines.bundle.path, method="source")
    assert model.engines.providers.keys() == {"forward"}
    assert Model.open(engines.bundle.path).method == "tent"


# ---------------------------------------------------------------------------------- bad batches


GOOD = batch(4)


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (GOOD.astype(np.float64), errors.WrongDtype, ("float64", "float32")),
        (GOOD.astype(">f4"), errors.WrongDtype, (">f4", "float32")),
        (GOOD.astype(np.uint8), errors.WrongDtype, ("uint8", "float32")),
        (GOOD.tolist(), errors.WrongDtype, ("float64",)),
        ([[1.0], [1.0, 2.0]], errors.WrongShape, ("not an array",)),
        (np.array([["a"] * D]), errors.WrongDtype, ("<U1",)),
        (np.array(None), errors.WrongDtype, ("object",)),
        (GOOD[0], errors.WrongShape, ("[8]", "['batch', 8]", "x[None]")),
        (GOOD[:, :7], errors.WrongShape, ("[4, 7]", "['batch', 8]")),
        (GOOD[None], errors.WrongShape, ("[1, 4, 8]",)),
        (GOOD[:0], errors.EmptyBatch, ("[0, 8]",)),
        (np.float32(1), errors.WrongShape, ("[]",)),
        (np.where(np.arange(D) == 3, F32("nan"), GOOD), errors.NonFinite, ("sample 0",)),
        (np.concatenate([GOOD, np.full((1, D), np.inf, F32)]), errors.NonFinite, ("sample 4",)),
        (np.concatenate([GOOD, np.full((1, D), -np.inf, F32)]), errors.NonFinite, ("sample 4",)),
        (np.tile(GOOD, (400, 1)), errors.TooLarge, ("1600", "1024")),
        (np.tile(GOOD, (2_561, 1)), errors.TooLarge, ("10244", "1024")),
    ],
)
def test_bad_batches(model, engines, x, error, says):
    for call in (model.predict, model.step, model.adapt, model.check_input):
        with unchanged(engines.bundle.path, model), pytest.raises(error) as refusal:
            call(x)
        for part in says:
            assert part in str(refusal.value)
    model.predict(GOOD)


def test_the_limits_are_limits(engines):
    model = Model(engines, limits=Limits(max_batch=4))
    model.predict(batch(4))
    with (
        unchanged(engines.bundle.path, model),
        pytest.raises(errors.TooLarge, match=r"5 samples, the limit is 4"),
    ):
        model.predict(batch(5))
    model = Model(engines, limits=Limits(max_bytes=4 * D * 4))
    model.predict(batch(4))
    with (
        unchanged(engines.bundle.path, model),
        pytest.raises(errors.TooLarge, match="160 bytes, the limit is 128"),
    ):
        model.predict(batch(5))


def test_values_outside_of_the_range_are_no_error(model):
    model.predict(batch() * 1000)


def test_arrays_that_are_not_contiguous_are_fine(model):
    x = batch(8)
    np.testing.assert_array_equal(model.predict(np.asfortranarray(x)).logits, model.predict(x).logits)
    np.testing.assert_array_equal(model.predict(x[::2]).logits, model.predict(x[::2].copy()).logits)


@pytest.mark.parametrize(
    "weight",
    [
        np.ones(15, F32),
        np.ones((16, 1), F32),
        np.ones(16),
        np.ones(16, bool),
        np.full(16, np.nan, F32),
        np.full(16, np.inf, F32),
        -np.ones(16, F32),
        [1.0] * 16,
    ],
)
def test_bad_weights(model, engines, weight):
    with unchanged(engines.bundle.path, model), pytest.raises(errors.BadWeight):
        model.adapt(batch(), weight)


def test_a_step_without_weights_does_not_ignore_them(engines):
    model = Model(engines, "teacher")
    model.step(batch(), np.ones(16, F32))
    with unchanged(engines.bundle.path, model), pytest.raises(errors.WeightUnsupported, match="16 samples"):
        model.adapt(batch(), np.zeros(16, F32))


def test_too_few_samples_for_a_step_are_still_answered(model, engines):
    model.predict(batch(1))
    with (
        unchanged(engines.bundle.path, model),
        pytest.raises(errors.BatchTooSmall, match=r"1 samples.*needs 2"),
    ):
        model.adapt(batch(1))


def test_a_method_of_fixed_batch(tmp_path):
    tiny_bundle.build(tmp_path / "bundle", fixed_batch=4)
    model = Model.open(tmp_path / "bundle")
    model.adapt(batch(4))
    model.predict(batch(7))
    with unchanged(tmp_path, model), pytest.raises(errors.WrongBatch, match=r"5 samples.*compiled for 4"):
        model.adapt(batch(5))


# ---------------------------------------------------------------------------------- bad names and values


def test_unknown_names(engines):
    with pytest.raises(errors.UnknownMethod, match="did you mean `tent`"):
        Model(engines, "tnt")
    with pytest.raises(errors.UnknownHyper, match="did you mean `lr`"):
        Model(engines, hyper={"lrr": 1.0})
    only = Engines.load(engines.bundle, methods=["source"])
    with pytest.raises(errors.UnknownMethod, match="not loaded; loaded: source"):
        Model(only, "tent")


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), 1e300, "fast", None])
def test_bad_hyper_values(engines, value):
    with pytest.raises(errors.BadValue, match="`lr`"):
        Model(engines, hyper={"lr": value})


@pytest.mark.parametrize("seed", [-1, 1 << 128])
def test_bad_seeds(engines, seed):
    with pytest.raises(errors.BadValue, match="seed"):
        Model(engines, seed=seed)


# ---------------------------------------------------------------------------------- commit


def changed(step, **values):
    return dataclasses.replace(step, **values)


def bad_vector(step, index: int, value: float) -> np.ndarray:
    vector = step.theta.copy()
    vector[index] = value
    return vector


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (lambda s: changed(s, theta=bad_vector(s, 20, np.nan)), errors.NonFiniteTheta, "norm.mean"),
        (lambda s: changed(s, theta=bad_vector(s, 0, np.inf)), errors.NonFiniteTheta, "norm.scale"),
        (lambda s: changed(s, theta=s.theta[:-1]), errors.LayoutMismatch, "[23]"),
        (lambda s: changed(s, theta=s.theta.astype(np.float64)), errors.LayoutMismatch, "float64"),
        (
            lambda s: changed(s, state={"momentum": np.full(2 * D, np.nan, F32)}),
            errors.NonFiniteState,
            "momentum",
        ),
        (lambda s: changed(s, state={}), errors.LayoutMismatch, "momentum"),
        (lambda s: changed(s, state={"momentum": np.zeros(3, F32)}), errors.LayoutMismatch, "[3]"),
        (
            lambda s: changed(s, state=dict(s.state) | {"more": np.zeros(1, F32)}),
            errors.LayoutMismatch,
            "more",
        ),
        (lambda s: changed(s, origin=None), errors.StaleBase, "active theta"),
    ],
)
def test_commit_refuses(model, engines, spoil, error, says):
    step = spoil(model.step(batch()))
    with unchanged(engines.bundle.path, model), pytest.raises(error) as refusal:
        model.commit(step)
    assert says in str(refusal.value)
    model.commit(model.step(batch()))


def test_a_step_from_before_a_change_is_stale(model, engines):
    for change in (lambda: model.adapt(batch(seed=9)), model.reset, lambda: model.swap(model.theta0)):
        late = model.step(batch())
        change()
        with unchanged(engines.bundle.path, model), pytest.raises(errors.StaleBase):
            model.commit(late)


def test_a_step_of_another_stream_is_refused(model, engines):
    other = Model(engines)
    with unchanged(engines.bundle.path, model), pytest.raises(errors.StaleBase):
        model.commit(other.step(batch()))


def test_a_guard_may_hand_on_a_nearer_theta(model):
    step = model.step(batch())
    half = (model.theta + step.theta) / 2
    model.commit(dataclasses.replace(step, theta=half))
    np.testing.assert_array_equal(model.theta, half)
    half[:] = 0  # the model took a copy
    assert model.theta.any()


def test_what_is_handed_out_cannot_be_written_to(model):
    step = model.step(batch())
    for array in (model.theta, model.theta0, step.theta, *model.state.values(), *step.state.values()):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1.0
    model.state.clear()
    model.hyper.clear()
    assert model.state
    assert model.hyper


def test_a_diverging_run_stops_at_the_last_good_theta(engines):
    """A learning rate that blows up: refused when it does, and the model answers on with what it had."""
    model = Model(engines, hyper={"lr": 1e38, "momentum": 1.0})
    step = model.step(batch())
    while np.isfinite(step.theta).all() and np.isfinite(step.state["momentum"]).all():
        model.commit(step)
        step = model.step(batch())
        assert model.steps < 100
    with unchanged(engines.bundle.path, model), pytest.raises((errors.NonFiniteTheta, errors.NonFiniteState)):
        model.commit(step)
    assert np.isfinite(model.theta).all()


# ---------------------------------------------------------------------------------- reset, swap, roll back


def test_reset_makes_it_a_new_model(model, engines):
    model.reset()
    assert learnt(model) == learnt(Model(engines))
    assert model.roll_back() is False
    again = model.adapt(batch())
    np.testing.assert_array_equal(again.theta, Model(engines).adapt(batch()).theta)


def test_roll_back_undoes_theta_and_state_once(model):
    before = learnt(model)
    model.adapt(batch())
    assert learnt(model) != before
    assert model.roll_back() is True
    assert learnt(model) == before
    assert model.roll_back() is False
    assert learnt(model) == before


def test_swap_replaces_theta_and_starts_the_state_anew(engines):
    model = Model(engines, "teacher")
    model.adapt(batch())
    before = learnt(model)
    new = model.theta0 + F32(0.25)
    model.swap(new, base=model.digest)
    new[:] = 0  # the model took a copy
    np.testing.assert_array_equal(model.theta, model.theta0 + F32(0.25))
    np.testing.assert_array_equal(model.state["average"], model.theta)
    assert model.state["count"].tolist() == [0]
    assert model.roll_back() is True
    assert learnt(model) == before


@pytest.mark.parametrize(
    ("vector", "base", "error"),
    [
        (np.zeros(P, F32), "0" * 64, errors.StaleBase),
        (np.full(P, np.nan, F32), None, errors.NonFiniteTheta),
        (np.zeros(P + 1, F32), None, errors.LayoutMismatch),
        (np.zeros(P), None, errors.LayoutMismatch),
        ([0.0] * P, None, errors.LayoutMismatch),
    ],
)
def test_swap_refuses(model, engines, vector, base, error):
    with unchanged(engines.bundle.path, model), pytest.raises(error):
        model.swap(vector, base=base)
    assert model.roll_back() is True  # the last good from before is still there


def test_stale_base_names_both(model):
    with pytest.raises(errors.StaleBase, match=f"base 3f9c.*active is {model.digest[:12]}"):
        model.swap(model.theta0, base="3f9c" * 16)


def test_distance_and_digest_follow_theta(model):
    manifest = model.manifest
    assert model.distance > 0
    assert model.digest != manifest.theta.digest
    model.reset()
    assert model.distance == 0.0
    assert model.digest == manifest.theta.digest


def test_a_reader_in_another_thread_sees_whole_thetas_only(engines):
    """The writer flips between two thetas; every answer is that of one of them."""
    model = Model(engines)
    x = batch(4)
    one, two = model.theta0, model.theta0 + F32(1.0)
    allowed = []
    for vector in (one, two):
        model.swap(vector)
        allowed.append(model.predict(x).logits)
    done = threading.Event()
    wrong: list[np.ndarray] = []
    seen = [0]

    def read() -> None:
        while not done.is_set():
            logits = model.predict(x).logits
            seen[0] += 1
            if not any(np.array_equal(logits, a) for a in allowed):
                wrong.append(logits)

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(500):
        model.swap((one, two)[i % 2])
    done.set()
    reader.join()
    assert seen[0] > 0
    assert wrong == []


# ---------------------------------------------------------------------------------- any order of calls


class AnyOrder(RuleBasedStateMachine):
    """Any order of calls against the simplest model of them: a list of what was learnt."""

    engines: Engines

    @initialize(method=st.sampled_from(["tent", "teacher", "source"]), seed=st.integers(0, 3))
    def start(self, method: str, seed: int) -> None:
        self.model = Model(self.engines, method, seed=seed)
        self.first = learnt(self.model)
        self.now, self.last = self.first, None

    def moved(self) -> None:
        self.last, self.now = self.now, learnt(self.model)

    @rule(seed=st.integers(0, 3), n=st.integers(2, 5))
    def adapt(self, seed: int, n: int) -> None:
        step = self.model.adapt(batch(n, seed=seed))
        assert step.theta.tobytes() == self.model.theta.tobytes()
        if self.model.method != "source":
            self.moved()

    @rule(seed=st.integers(0, 3))
    def look(self, seed: int) -> None:
        self.model.predict(batch(3, seed=seed))
        self.model.step(batch(3, seed=seed))

    @rule(shift=st.floats(-1, 1, width=32))
    def swap(self, shift: float) -> None:
        self.model.swap(self.model.theta0 + F32(shift))
        self.moved()

    @rule()
    def refused(self) -> None:
        with pytest.raises(errors.NonFiniteTheta):
            self.model.swap(np.full(P, np.inf, F32))
        with pytest.raises(errors.EmptyBatch):
            self.model.adapt(np.zeros((0, D), F32))

    @rule()
    def reset(self) -> None:
        self.model.reset()
        self.now, self.last = self.first, None

    @rule()
    def roll_back(self) -> None:
        assert self.model.roll_back() is (self.last is not None)
        if self.last is not None:
            self.now, self.last = self.last, None

    @invariant()
    def as_expected(self) -> None:
        if hasattr(self, "model"):
            assert learnt(self.model) == self.now
            assert np.isfinite(self.model.theta).all()
            assert self.model.predict(GOOD).logits.shape == (4, C)


def test_any_order_of_calls(engines):
    class Machine(AnyOrder):
        pass

    Machine.engines = engines

    run_state_machine_as_test(
        Machine, settings=settings(max_examples=30, stateful_step_count=20, deadline=None)
    )


def test_a_graph_that_returns_another_shape_is_an_engine_failure(engines, tmp_path):
    """A dimension that depends on the data stays open in the file; the run itself must notice."""
    path = Path(shutil.copytree(engines.bundle.path, tmp_path / "bundle"))
    model = onnx.load(path / "step.tent.onnx", load_external_data=False)
    next(n for n in model.graph.node if n.output[0] == "report").output[0] = "all"
    model.graph.node.extend(
        [
            onnx.helper.make_node("Cast", ["wsum"], ["samples"], to=onnx.TensorProto.INT64),
            onnx.helper.make_node("Unsqueeze", ["samples", "c.axis0"], ["end"]),
            onnx.helper.make_node("Slice", ["all", "c.zero", "end"], ["report"]),
        ]
    )
    report = next(o for o in model.graph.output if o.name == "report")
    report.type.tensor_type.shape.dim[0].dim_param = "open"
    onnx.save(model, path / "step.tent.onnx")
    reseal(path)
    opened = Model.open(path)
    opened.adapt(batch(4))
    with (
        unchanged(tmp_path, opened),
        pytest.raises(errors.EngineFailed, match=r"report.*\[3\], expected \[4\]"),
    ):
        opened.adapt(batch(3))
