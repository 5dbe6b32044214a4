"""Players, what they cost, and frames that show no scene."""

from __future__ import annotations

import numpy as np
import pytest

import tiny_bundle
from tta_edge.streams.preprocess import preprocess
from tta_edge.suite import order as orders
from tta_edge.suite.errors import UnknownPlayer
from tta_edge.suite.images import make_pool, render, truth
from tta_edge.suite.meter import Meter, graph_costs
from tta_edge.suite.order import PLAIN, Kind
from tta_edge.suite.play import play, predicted_classes, variety
from tta_edge.suite.players import Answered, can_play, finite_samples, make_player
from tta_runtime.bundle import Bundle
from tta_runtime.engine import EngineOptions
from tta_runtime.model import Engines, Model

OPTIONS = EngineOptions(threads=1)
SHAPE = (2, 4, 1)
N = 48


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    tiny_bundle.build(path)
    return Bundle.open(path)


@pytest.fixture(scope="module")
def pool():
    x, y = tiny_bundle.samples(N, shift=0.5)
    return make_pool(
        (np.clip((x + 2) / 6, 0, 1) * 255).astype(np.uint8).reshape(N, *SHAPE), y.astype(np.int64)
    )


@pytest.fixture(scope="module")
def to_input():
    return preprocess(SHAPE, dtype="float32", shape=["batch", 8], low=0.0, high=1.0)


def player(name, bundle, **options):
    return make_player(name, bundle, options=OPTIONS, **options)


def model_of(bundle, name):
    return Model(Engines.load(bundle, methods=[name], options=OPTIONS), name)


def batches(pool, to_input, size=8):
    return [to_input(pool.images[k : k + size]) for k in range(0, N, size)]


# --------------------------------------------------------------------------------------- players


@pytest.mark.parametrize("name", ["source", "tent", "teacher"])
def test_a_bare_method_is_the_loop_of_its_steps(bundle, pool, to_input, name):
    ours, model = player(name, bundle), model_of(bundle, name)
    for x in batches(pool, to_input):
        if model.spec.step is None:
            wanted = model.predict(x).logits
        else:
            step = model.step(x)
            model.commit(step)
            wanted = step.logits
        answered = ours.answer(x)
        np.testing.assert_array_equal(answered.logits, wanted)
        assert answered.adapted == (model.spec.step is not None)
        assert not answered.refused


@pytest.mark.parametrize("name", ["tent", "tent+guards"])
def test_a_reset_player_is_as_new(bundle, pool, to_input, name):
    ours = player(name, bundle)
    first = [ours.answer(x).logits for x in batches(pool, to_input)]
    ours.reset()
    again = [ours.answer(x).logits for x in batches(pool, to_input)]
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("name", ["source", "tent", "tent+guards"])
def test_nan_reaches_no_theta_and_costs_no_other_sample_its_answer(bundle, pool, to_input, name):
    ours, model = player(name, bundle), model_of(bundle, "source")
    x = batches(pool, to_input)[0].copy()
    x[2] = np.nan
    answered = ours.answer(x)
    assert answered.refused
    assert np.isnan(answered.logits[2]).all()
    finite = np.arange(len(x)) != 2
    assert np.isfinite(answered.logits[finite]).all()
    if name != "tent+guards":  # which adapts to the finite ones
        np.testing.assert_allclose(answered.logits[finite], model.predict(x[finite]).logits, rtol=1e-6)
        assert not answered.adapted
    empty = ours.answer(np.full_like(x, np.nan))
    assert np.isnan(empty.logits).all()
    assert not empty.adapted


def test_a_step_that_would_break_theta_is_refused(bundle, pool, to_input):
    ours = player("tent", bundle, hyper={"lr": 3e38})
    answered = [ours.answer(x) for x in batches(pool, to_input)]
    assert any(each.refused for each in answered)
    assert all(np.isfinite(each.logits).all() for each in answered)


def test_a_batch_below_what_a_method_steps_on_is_predicted(bundle, pool, to_input):
    ours = player("tent", bundle)
    answered = ours.answer(batches(pool, to_input)[0][:1])
    assert (answered.adapted, answered.refused, answered.forwards) == (False, False, 1.0)


def test_names(bundle):
    names = ["auto", "tent", "tent+guards", "source", "+guards"]
    assert [name for name in names if can_play(name, bundle.manifest)] == ["tent", "tent+guards", "source"]
    with pytest.raises(UnknownPlayer, match="did you mean `tent`"):
        make_player("tnet", bundle)
    with pytest.raises(UnknownPlayer, match=r"no method `rdumb\+guards`"):
        make_player("rdumb+guards", bundle)


def test_finite_samples():
    x = np.zeros((3, 2, 2), np.float32)
    x[1, 0, 1] = np.inf
    np.testing.assert_array_equal(finite_samples(x), [True, False, True])
    assert finite_samples(np.zeros((2, 3), np.uint8)).all()


# --------------------------------------------------------------------------------------- cost


def test_costs_are_those_of_the_manifest(bundle):
    assert graph_costs(bundle.manifest)["forward"] == 1.0
    spec = bundle.manifest.methods["tent"]
    assert graph_costs(bundle.manifest)["step.tent"] == spec.forward_equivalents


def test_a_meter_adds_up_what_runs_and_forgets_what_was_taken(bundle, pool, to_input):
    meter = Meter(bundle.manifest)
    model = Model(Engines.load(bundle, methods=["source"], options=OPTIONS, loader=meter.loader), "source")
    x = batches(pool, to_input)[0]
    model.predict(x)
    model.predict(x[:3])
    assert meter.take() == len(x) + 3
    assert meter.take() == 0
    meter.count(2, 3.0)
    assert meter.take() == 6.0
    meter.count(1, None)
    meter.count(1, 1.0)
    assert meter.take() is None
    assert meter.take() == 0


# --------------------------------------------------------------------------------------- frames


def test_every_kind_of_frame(pool, to_input):
    plain = orders.series([(PLAIN, np.array([4, 5, 6]))], batch=4)
    kinds = np.array([Kind.NAN, Kind.BLACK, Kind.NOISE, Kind.NOISE], dtype=np.uint8)
    order = orders.insert(plain, np.array([1, 1, 2, 3]), kinds, batch=4)
    x = render(order, {PLAIN: pool.images}, 0, order.samples, to_input, 0)
    images = order.kind == Kind.IMAGE
    np.testing.assert_array_equal(x[images], to_input(pool.images[[4, 5, 6]]))
    assert np.isnan(x[order.kind == Kind.NAN]).all()
    assert (x[order.kind == Kind.BLACK] == 0).all()
    noise = x[order.kind == Kind.NOISE]
    assert set(np.unique(noise)) == {0.0, 1.0}
    assert (noise[0] != noise[1]).any()
    parts = [render(order, {PLAIN: pool.images}, k, k + 1, to_input, 0) for k in range(order.samples)]
    np.testing.assert_array_equal(np.concatenate(parts), x, "any cut gives the same frames")
    np.testing.assert_array_equal(truth(order, {PLAIN: pool.labels})[images], pool.labels[[4, 5, 6]])


class Scripted:
    """Answers with given classes; None: with NaN."""

    name = "scripted"

    def __init__(self, classes):
        self.classes, self.at = classes, 0

    def reset(self):
        self.at = 0

    def answer(self, x):
        part = self.classes[self.at : self.at + len(x)]
        self.at += len(x)
        logits = np.full((len(x), 3), np.nan, np.float32)
        for k, each in enumerate(part):
            if each is not None:
                logits[k] = np.eye(3)[each]
        return Answered(logits, 2.0 * len(x), True, None in part)


def test_only_honest_samples_count(pool, to_input):
    plain = orders.series([(PLAIN, np.arange(8))], batch=4)
    order = orders.insert(plain, np.array([0, 4]), np.full(2, Kind.BLACK, np.uint8), batch=4)
    right = list(pool.labels[:8])
    answers = [None, *right[:4], 0, *right[4:]]
    answers[2] = (right[1] + 1) % 3
    answers[9] = None  # no answer to an honest sample is a wrong one
    played = play(
        order, {PLAIN: pool.images}, {PLAIN: pool.labels}, Scripted(answers), to_input, classes=3, seed=0
    )
    np.testing.assert_array_equal(played.wrong, [False, True, False, False, False, False, False, True])
    assert played.forwards == 2.0 * 10
    assert (played.adapted, played.refused) == (3, 2)


def test_an_unknown_cost_stays_unknown(pool, to_input):
    class Silent(Scripted):
        def answer(self, x):
            answered = super().answer(x)
            return Answered(answered.logits, None if self.at == 4 else 1.0)

    order = orders.series([(PLAIN, np.arange(8))], batch=4)
    played = play(
        order, {PLAIN: pool.images}, {PLAIN: pool.labels}, Silent([0] * 8), to_input, classes=3, seed=0
    )
    assert played.forwards is None


def test_variety():
    assert variety(np.array([1, 1, 1]), 3) == 0
    assert variety(np.array([0, 1, 2, -1]), 3) == pytest.approx(1)
    assert variety(np.array([-1]), 3) == 0
    logits = np.array([[0, 2, 1], [np.nan, 1, 2], [np.inf, 0, 0]], np.float32)
    np.testing.assert_array_equal(predicted_classes(logits), [1, -1, -1])
