"""The learner of a group: its rounds beside eager torch, its snapshots, and that what is refused leaves no trace."""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from exported import options as build_options
from networks import CLASSES, SIZE
from tta_cloud.errors import SnapshotUnreadable, TeacherUnfit
from tta_cloud.learner import METHOD, Learner, LearnerOptions, Round, check_fit
from tta_exporters.build import Built, build
from tta_runtime import Model, errors
from tta_runtime.engine import EngineOptions
from tta_runtime.engine_ort import OrtEngine
from tta_runtime.model import Engines

EXAMPLES = int(os.environ.get("TTA_EXAMPLES", "200"))
many = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
METHODS = (METHOD,)
ONE_THREAD = EngineOptions(threads=1)
OPTIONS = LearnerOptions(student_lr=0.1, teacher_lr=0.2)


def images(seed: int, count: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 3, SIZE, SIZE), dtype=np.float32)


def replays(seed: int, rounds: int = 3, count: int = 12) -> list[np.ndarray]:
    return [images(1000 + 10 * seed + i, count) for i in range(rounds)]


def convolutions(*widths: int) -> nn.Module:
    """A few convolutions with BatchNorms away from their initial values: small, because each is compiled."""
    torch.manual_seed(len(widths) + widths[0])
    layers: list[nn.Module] = []
    for before, width in zip((3, *widths), widths, strict=False):
        norm = nn.BatchNorm2d(width)
        norm.weight.data, norm.bias.data = 0.5 + torch.rand(width), 0.2 * torch.randn(width)
        norm.running_mean, norm.running_var = 0.2 * torch.randn(width), 0.5 + torch.rand(width)
        layers += [nn.Conv2d(before, width, 3, 2, 1, bias=False), norm, nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], CLASSES)
    ).eval()


NETWORKS = {
    "student": lambda: convolutions(6),
    "teacher": lambda: convolutions(8, 10),
    "stranger": lambda: convolutions(7),
}


@functools.cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tta-test-learner-")


@functools.cache
def made(name: str) -> Built:
    return build(NETWORKS[name](), build_options(name, (METHOD,)), Path(_directory().name) / name)


@dataclass(frozen=True)
class Pair:
    student: Engines
    teacher: Engines

    def learner(self, **options: Any) -> Learner:
        return Learner(self.student, self.teacher, replace(OPTIONS, **options))


def loaded(name: str) -> Engines:
    return Engines.load(made(name).path, methods=[METHOD], options=ONE_THREAD)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair(loaded("student"), loaded("teacher"))


def facts(learner: Learner) -> tuple[object, ...]:
    """All that a learner has learnt, bit for bit."""
    return learner.snapshot(), learner.theta.tobytes(), learner.digest, learner.rounds


@contextmanager
def unchanged(learner: Learner) -> Iterator[None]:
    before, answers = facts(learner), learner.teach(images(77))
    yield
    assert facts(learner) == before
    np.testing.assert_array_equal(learner.teach(images(77)), answers)


# --- beside eager torch -------------------------------------------------------------------------------


class Norm(nn.Module):
    """A BatchNorm that serves by its running statistics and learns by them with the batch's gradient."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.register_buffer("running_mean", norm.running_mean.clone())
        self.register_buffer("running_var", norm.running_var.clone())
        self.learning = False

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean.clone(), self.running_var.clone()
        if self.learning:
            observed = x.mean([0, 2, 3]), x.var([0, 2, 3], unbiased=False)
            spread = torch.sqrt(observed[1] + self.eps)
            r = (spread / torch.sqrt(var + self.eps)).detach()
            d = ((observed[0] - mean) / torch.sqrt(var + self.eps)).detach()
            y = (x - observed[0][:, None, None]) / spread[:, None, None] * r[:, None, None] + d[:, None, None]
            self.running_mean.copy_((0.9 * mean + 0.1 * observed[0]).detach())
            self.running_var.copy_((0.9 * var + 0.1 * observed[1]).detach())
        else:
            y = (x - mean[:, None, None]) / torch.sqrt(var + self.eps)[:, None, None]
        return y * self.weight[:, None, None] + self.bias[:, None, None]


class Eager:
    """A network in float64 with torch's optimiser."""

    def __init__(self, name: str, lr: float) -> None:
        self.adapter = made(name).adapter
        self.network = copy.deepcopy(NETWORKS[name]()).double().eval().requires_grad_(False)
        for parent in list(self.network.modules()):
            for child, module in list(parent.named_children()):
                if isinstance(module, nn.BatchNorm2d):
                    setattr(parent, child, Norm(module).requires_grad_(True))
        self.norms = [module for module in self.network.modules() if isinstance(module, Norm)]
        self.optimizer = torch.optim.SGD(
            [p for norm in self.norms for p in (norm.weight, norm.bias)], lr=lr, momentum=0.9
        )

    def __call__(self, x: np.ndarray, *, learning: bool) -> Tensor:
        for norm in self.norms:
            norm.learning = learning
        return self.network(torch.from_numpy(x).double())

    def descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def theta(self) -> np.ndarray:
        known = {**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}
        return torch.cat([known[e.name].detach().reshape(-1) for e in self.adapter.tensors]).numpy()


def entropies(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


def reference_round(
    student: Eager,
    teacher: Eager,
    new: np.ndarray,
    draws: list[np.ndarray],
    options: LearnerOptions,
    *,
    mistake: str = "",
) -> tuple[float, float, float]:
    """Algorithm 2: eq. 5 for the teacher on what is new, eq. 6 for the student on it and on what is remembered."""
    bound = 0.4 * math.log(CLASSES)
    if options.adapt_teacher:
        beside = options.teacher_replay and mistake != "teacher forgets" and len(draws[0])
        h = entropies(teacher(np.concatenate([new, draws[0]]) if beside else new, learning=True))
        teacher.descend((h if mistake == "unweighted" else torch.exp(bound - h.detach()) * h).mean())
    for draw in draws:
        x = np.concatenate([new, draw]) if len(draw) and mistake != "forgets" else new
        with torch.no_grad():
            target = teacher(x, learning=mistake == "teacher learns twice")
        z = student(x, learning=True)
        apart = nn.functional.kl_div(
            (z / options.temperature).log_softmax(1),
            (target / options.temperature).log_softmax(1),
            reduction="none",
            log_target=True,
        ).sum(1)
        named = nn.functional.cross_entropy(z, target.argmax(1), reduction="none")
        own, sure = entropies(z), torch.exp(bound - entropies(target))
        loss = (
            options.alpha * torch.exp(bound - own.detach()) * own
            + options.beta * sure * options.temperature**2 * apart
            + options.gamma * sure * named
        ).mean()
        agreement = float((z.argmax(1) == target.argmax(1)).double().mean())
        student.descend(loss)
    return float(loss.detach()), float(apart.detach().mean()), agreement


def off_by(pair: Pair, options: LearnerOptions, **more: Any) -> tuple[float, float, list[Any]]:
    """Largest errors of the student's and the teacher's theta in units of how far each has moved; the rounds."""
    learner = Learner(pair.student, pair.teacher, options)
    student, teacher = Eager("student", options.student_lr), Eager("teacher", options.teacher_lr)
    start = student.theta(), teacher.theta()
    figures = []
    for seed in range(3):
        new, draws = images(seed), replays(seed, options.rounds)
        if seed == 2:
            draws[0] = images(0, 0)
        found = learner.learn(new, draws)
        figures.append((found, reference_round(student, teacher, new, draws, options, **more)))
    both = []
    for mine, theirs, before in (
        (learner._student, student, start[0]),
        (learner._teacher, teacher, start[1]),
    ):
        error, moved = np.abs(mine.theta - theirs.theta()), np.abs(theirs.theta() - before)
        t = mine.manifest.theta.trained
        both.append(
            max(
                float(error[part].max() / max(moved[part].max(), 1e-4)) for part in (slice(t), slice(t, None))
            )
        )
    t = student.adapter.trained
    assert np.abs(student.theta() - start[0])[:t].max() > 0.01, "far above rounding"
    return both[0], both[1], figures


VARIANTS = {
    "as published": OPTIONS,
    "all terms": replace(OPTIONS, alpha=2.0, beta=1.5, gamma=0.5, temperature=2.0),
    "a fixed teacher": replace(OPTIONS, adapt_teacher=False),
    "a teacher as in the paper": replace(OPTIONS, teacher_replay=False),
    "one step": replace(OPTIONS, rounds=1),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_rounds_beside_the_reference(pair: Pair, name: str) -> None:
    student, teacher, figures = off_by(pair, VARIANTS[name])
    assert student < 5e-4
    assert teacher < 5e-4
    for found, (loss, divergence, agreement) in figures:
        assert found.loss == pytest.approx(loss, rel=1e-3)
        assert found.divergence == pytest.approx(divergence, rel=2e-3)
        assert found.agreement == pytest.approx(agreement)
        assert (found.samples, found.refused) == (8, False)


@pytest.mark.parametrize("mistake", ["unweighted", "forgets", "teacher learns twice", "teacher forgets"])
def test_the_comparison_objects_to_another_round(pair: Pair, mistake: str) -> None:
    """The companion: the test above must be able to fail."""
    student, teacher, _ = off_by(pair, OPTIONS, mistake=mistake)
    assert max(student, teacher) > 5e-3


# --- a shifted toy problem ----------------------------------------------------------------------------


def toy(seed: int, count: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Images of a template each with noise; the shift takes contrast away and adds light."""
    rng = np.random.default_rng(seed)
    templates = np.random.default_rng(5).random((CLASSES, 3, SIZE, SIZE))
    y = rng.integers(0, CLASSES, count)
    x = templates[y] + rng.normal(0, 2.0, (count, 3, SIZE, SIZE))
    return ((1 - 0.7 * shift) * x + 1.5 * shift).astype(np.float32), y


def trained(width: int, seed: int, shifts: tuple[float, ...]) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(3 * SIZE * SIZE, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, CLASSES)
    )  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for step in range(60):
        x, y = toy(100 + step, 64, shifts[step % len(shifts)])
        loss = nn.functional.cross_entropy(network.train()(torch.from_numpy(x)), torch.from_numpy(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("toys")
    build(trained(16, 1, (0.0,)), build_options("small", METHODS), folder / "student")
    build(trained(48, 2, (0.0, 0.5, 1.0)), build_options("large", METHODS), folder / "teacher")
    return Pair(
        *(
            Engines.load(folder / name, methods=[METHOD], options=ONE_THREAD)
            for name in ("student", "teacher")
        )
    )


def test_a_student_follows_its_teacher_where_the_world_has_shifted(toys: Pair) -> None:
    learner = Learner(toys.student, toys.teacher, LearnerOptions())
    unseen, truth = toy(1, 400, 1.0)

    def standing() -> tuple[float, float]:
        named = learner.predict(learner.theta, unseen).argmax(1)
        return float((named == learner.teach(unseen).argmax(1)).mean()), float((named == truth).mean())

    memory, found = toy(2, 96, 1.0)[0], [standing()]
    for turn in range(20):
        made = learner.learn(toy(10 + turn, 32, 1.0)[0], [memory] * 3)
        assert not made.refused
        if turn in (4, 19):
            found.append(standing())
    agreement, accuracy = zip(*found, strict=True)
    assert agreement[0] + 0.1 < agreement[1] < agreement[2], found
    assert agreement[2] > 0.8, found
    assert accuracy[2] > accuracy[0] + 0.1, found


# --- parts of a round ---------------------------------------------------------------------------------


def test_a_fixed_teacher_stays_and_the_student_moves(pair: Pair) -> None:
    learner = pair.learner(adapt_teacher=False)
    before, theta = learner.teach(images(9)), learner.theta
    learner.learn(images(0), replays(0))
    np.testing.assert_array_equal(learner.teach(images(9)), before)
    assert learner._teacher.steps == 0
    assert not np.array_equal(learner.theta, theta)


def test_a_teacher_without_a_rate_moves_its_statistics_only(pair: Pair) -> None:
    learner = pair.learner(teacher_lr=0.0)
    before = learner._teacher.theta
    learner.learn(images(0), replays(0))
    t = learner._teacher.manifest.theta.trained
    np.testing.assert_array_equal(learner._teacher.theta[:t], before[:t])
    assert not np.array_equal(learner._teacher.theta[t:], before[t:])


def test_draws_of_nothing_are_rounds_on_what_is_new(pair: Pair) -> None:
    one, other = pair.learner(), pair.learner()
    for nothing in (images(0, 0), np.zeros(0, np.float32)):
        assert one.learn(images(0), [nothing] * 2) == other.learn(images(0), [images(0, 0)] * 2)
    assert facts(one) == facts(other)
    assert one.rounds == 2


def test_each_step_takes_its_own_draw(pair: Pair) -> None:
    one, other = pair.learner(), pair.learner()
    a, b, c = replays(0)
    one.learn(images(0), [a, b, c])
    other.learn(images(0), [a, b, b])
    assert one.digest != other.digest
    assert one._student.steps == 3


def test_a_prediction_is_that_of_an_edge_and_changes_nothing(pair: Pair) -> None:
    learner = pair.learner()
    learner.learn(images(0), replays(0))
    edge = Model(pair.student, METHOD)
    with unchanged(learner):
        for theta in (edge.theta0, learner.theta, (edge.theta0 + learner.theta) / 2):
            edge.swap(theta)
            found = learner.predict(theta, images(3))
            np.testing.assert_array_equal(found, edge.predict(images(3)).logits)
        with pytest.raises(errors.LayoutMismatch):
            learner.predict(learner.theta[:-1], images(3))
        with pytest.raises(errors.InputError):
            learner.predict(learner.theta, images(3)[:, :1])
    np.testing.assert_array_equal(
        learner.predict(learner.theta, images(3)), learner._student.predict(images(3)).logits
    )


def test_a_start_from_a_theta_is_the_students_alone(pair: Pair) -> None:
    learner, fresh = pair.learner(), pair.learner()
    learner.learn(images(0), replays(0))
    teacher, rounds = learner.teach(images(9)), learner.rounds
    learner.start_from(fresh.theta)
    assert learner.digest == fresh.digest
    assert all((array == 0).all() for array in learner._student.state.values()), "the optimiser begins anew"
    np.testing.assert_array_equal(learner.teach(images(9)), teacher)
    assert learner.rounds == rounds
    for bad, error in (
        (fresh.theta[:-1], errors.LayoutMismatch),
        (np.full_like(fresh.theta, np.nan), errors.NonFiniteTheta),
        (fresh.theta.astype(np.float64), errors.LayoutMismatch),
    ):
        with unchanged(learner), pytest.raises(error):
            learner.start_from(bad)


def test_theta_is_for_reading(pair: Pair) -> None:
    with pytest.raises(ValueError, match="read-only"):
        pair.learner().theta[0] = 1


# --- what is refused ----------------------------------------------------------------------------------

WRONG = {
    "no sample": images(0, 0),
    "one image": images(0)[0],
    "a channel": images(0)[:, :1],
    "doubles": images(0).astype(np.float64),
    "bytes": (255 * images(0)).astype(np.uint8),
    "NaN": np.full((2, 3, SIZE, SIZE), np.nan, np.float32),
    "Inf": np.full((2, 3, SIZE, SIZE), np.inf, np.float32),
}


@pytest.mark.parametrize("name", WRONG)
def test_samples_that_the_models_do_not_take(pair: Pair, name: str) -> None:
    learner = pair.learner()
    learner.learn(images(5), replays(5))
    with unchanged(learner), pytest.raises(errors.InputError):
        learner.learn(WRONG[name], replays(0))
    if name != "no sample":
        for place in range(3):  # midway
            draws = replays(0)
            draws[place] = WRONG[name]
            with unchanged(learner), pytest.raises(errors.InputError):
                learner.learn(images(0), draws)
    with unchanged(learner), pytest.raises(errors.EmptyBatch, match="one draw for each step"):
        learner.learn(images(0), [])


class Faulty:
    """An engine that does as another does, and at one of the calls to any of its kind something else."""

    def __init__(
        self, engine: OrtEngine, calls: list[str], fault: Callable[[str, dict[str, Any]], Any]
    ) -> None:
        self.spec, self.provider = engine.spec, engine.provider
        self._engine, self._calls, self._fault = engine, calls, fault

    def run(self, inputs: Any) -> dict[str, Any]:
        outputs = {name: array.copy() for name, array in self._engine.run(inputs).items()}
        self._calls.append(self.spec.role)
        self._fault(self.spec.role, outputs)
        return outputs


ROUND = ["step", *["serve", "step"] * 3, "serve"]
"""Calls of a round: the teacher's step, three times its answers and the student's step, the last theta's answers."""


def faulty(fault: Callable[[int, str, dict[str, Any]], None]) -> tuple[Learner, list[str]]:
    calls: list[str] = []

    def at(role: str, outputs: dict[str, Any]) -> None:
        fault(len(calls) - 1, role, outputs)

    def loader(bundle: Any, graph: str, options: EngineOptions) -> Any:
        return Faulty(OrtEngine(bundle, graph, options), calls, at)

    engines = [
        Engines.load(made(name).path, methods=[METHOD], options=ONE_THREAD, loader=loader)
        for name in ("student", "teacher")
    ]
    return Learner(*engines, OPTIONS), calls


def test_what_a_round_costs() -> None:
    learner, calls = faulty(lambda call, role, outputs: None)
    learner.learn(images(0), replays(0))
    assert calls == ROUND


@pytest.mark.parametrize("error", [errors.EngineFailed("out of memory", ""), KeyboardInterrupt()])
def test_an_engine_that_fails_anywhere_in_a_round(pair: Pair, error: BaseException) -> None:
    when = -1

    def fault(call: int, role: str, outputs: dict[str, Any]) -> None:
        if call == when:
            raise error

    learner, calls = faulty(fault)
    twin = pair.learner()
    for one in (learner, twin):
        one.learn(images(5), replays(5))
    for place in range(len(ROUND)):
        with unchanged(learner):
            when = len(calls) + place
            with pytest.raises(type(error)):
                learner.learn(images(0), replays(0))
            when = -1
    assert learner.learn(images(0), replays(0)) == twin.learn(images(0), replays(0))
    assert facts(learner) == facts(twin)


def test_what_is_not_finite_anywhere_refuses_the_round_as_a_whole(pair: Pair) -> None:
    when, spoilt, value = -1, 0, math.nan

    def fault(call: int, role: str, outputs: dict[str, Any]) -> None:
        if call == when:
            name = [key for key in sorted(outputs) if key not in ("report", "features")][spoilt]
            outputs[name].reshape(-1)[-1] = value

    learner, calls = faulty(fault)
    twin = pair.learner()
    for one in (learner, twin):
        one.learn(images(5), replays(5))
    for place, role in enumerate(ROUND):
        for spoilt in range(3 if role == "step" else 1):  # logits, the momentum, theta
            value = (math.nan, math.inf, -math.inf)[(place + spoilt) % 3]
            with unchanged(learner):
                when = len(calls) + place
                found = learner.learn(images(0), replays(0))
                assert len(calls) == when + 1, "nothing is computed on top of it"
                when = -1
            assert (found.refused, found.samples) == (True, 8)
            assert math.isnan(found.loss)
            assert math.isnan(found.divergence)
            assert math.isnan(found.agreement)
    assert learner.learn(images(0), replays(0)) == twin.learn(images(0), replays(0))
    assert facts(learner) == facts(twin)


def test_a_rate_that_bursts_is_refused_in_earnest(pair: Pair) -> None:
    learner = pair.learner(teacher_lr=1e38)
    with unchanged(learner):
        assert learner.learn(images(0), replays(0)).refused


# --- snapshots ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grown(pair: Pair) -> Learner:
    learner = pair.learner()
    for seed in range(2):
        learner.learn(images(seed), replays(seed))
    return learner


def test_a_learner_goes_on_from_its_snapshot_bit_for_bit(pair: Pair) -> None:
    one = pair.learner()
    for seed in range(2):
        one.learn(images(seed), replays(seed))
    other = pair.learner()
    other.restore(one.snapshot())
    assert facts(other) == facts(one)
    assert other.rounds == 2
    for seed in range(2, 4):
        assert one.learn(images(seed), replays(seed)) == other.learn(images(seed), replays(seed))
    assert facts(other) == facts(one)


def test_the_optimiser_is_part_of_a_snapshot(pair: Pair, grown: Learner) -> None:
    """The companion: from theta alone it would not go on alike."""
    whole, part = pair.learner(adapt_teacher=False), pair.learner(adapt_teacher=False)
    whole.restore(grown.snapshot())
    part.restore(grown.snapshot())
    part.start_from(grown.theta)
    for learner in (whole, part):
        learner.learn(images(7), replays(7))
    assert whole.digest != part.digest


def test_a_snapshot_outlives_other_rates(pair: Pair, grown: Learner) -> None:
    other = pair.learner(student_lr=1e-4, beta=0.5)
    other.restore(grown.snapshot())
    assert other.digest == grown.digest


def refuses(learner: Learner, data: bytes) -> None:
    with unchanged(learner), pytest.raises(SnapshotUnreadable) as caught:
        learner.restore(data)
    assert caught.value.fix


def test_a_snapshot_of_other_bundles_is_refused(pair: Pair, grown: Learner) -> None:
    turned = Pair(pair.teacher, pair.student).learner()
    refuses(turned, grown.snapshot())
    group = loaded("stranger")
    for strangers in (Pair(group, pair.teacher), Pair(pair.student, group)):
        refuses(strangers.learner(), grown.snapshot())
        refuses(grown, strangers.learner().snapshot())


@many
@given(st.binary(max_size=200))
@example(b"")
def test_bytes_are_no_snapshot(grown: Learner, data: bytes) -> None:
    refuses(grown, data)


def sealed(body: bytes) -> bytes:
    return hashlib.sha256(b"tta-learner-1\n" + body).digest() + body


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@many
@given(
    st.binary(max_size=60)
    | values.map(msgspec.msgpack.encode)
    | st.fixed_dictionaries({"student": values, "teacher": values, "rounds": values}).map(
        msgspec.msgpack.encode
    )
)
@example(b"\x81\xa2\xff\xff\x01")
@example(b"\x83\xa7student\xc4\x01\xff\xa7teacher\xc4\x00\xa6rounds\xff")
@example(b"\x91" * 5000)
def test_whatever_has_the_right_checksum_is_looked_at_all_the_same(grown: Learner, body: bytes) -> None:
    refuses(grown, sealed(body))


def test_the_parts_of_a_snapshot_are_looked_at(grown: Learner) -> None:
    body = msgspec.msgpack.decode(grown.snapshot()[32:])
    assert sealed(msgspec.msgpack.encode(body)) == grown.snapshot(), "the format is as the tests know it"
    for change in (
        {"rounds": -1},
        {"rounds": "2"},
        {"student": body["teacher"]},
        {"teacher": b""},
        {"more": 1},
    ):
        refuses(grown, sealed(msgspec.msgpack.encode({**body, **change})))


@many
@given(st.data())
def test_a_flipped_bit_or_a_missing_end_is_noticed(grown: Learner, data: st.DataObject) -> None:
    good = grown.snapshot()
    place, bit = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        refuses(grown, good[:place])
    else:
        refuses(grown, good[:place] + bytes([good[place] ^ (1 << bit)]) + good[place + 1 :])
    refuses(grown, good + b"\0")


# --- teachers that do not fit -------------------------------------------------------------------------


NAMES = [f"class {i}" for i in range(CLASSES)]
UNFIT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "classes": ({"classes": 5, "class_names": None}, {}, "knows 5 classes, the student `student` 7"),
    "size": ({}, {"shape": ["batch", 3, 8, 8]}, r"float32 \['batch', 3, 8, 8\]"),
    "range": ({}, {"high": 255.0}, r"in 0\.\.255"),
    "dtype": ({}, {"dtype": "uint8"}, "takes uint8"),
    "order": ({"class_names": NAMES[::-1]}, {}, "class 0 is `class 6` for the teacher"),
    "other words": ({"class_names": [name.title() for name in NAMES]}, {}, ""),
    "no names": ({"class_names": None}, {}, ""),
    "the same": ({}, {}, ""),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_teacher_of_other_classes_or_input_is_unfit(pair: Pair, name: str) -> None:
    more, spec, says = UNFIT[name]
    model = Model(pair.student, METHOD)
    model.manifest = msgspec.structs.replace(model.manifest, class_names=NAMES)
    manifest = model.manifest
    changed = msgspec.structs.replace(manifest, input=msgspec.structs.replace(manifest.input, **spec), **more)
    teacher = Model(pair.student, METHOD)
    teacher.manifest = changed
    if says:
        with pytest.raises(TeacherUnfit, match=says) as caught:
            check_fit(model, teacher)
        assert caught.value.fix
    else:
        check_fit(model, teacher)


def test_a_learner_is_not_made_with_an_unfit_teacher(pair: Pair) -> None:
    bundle = pair.teacher.bundle
    fewer = replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, classes=5))
    engines = {key: pair.teacher[key] for key in ("forward", f"step.{METHOD}")}
    with pytest.raises(TeacherUnfit):
        Learner(pair.student, Engines(fewer, engines, [METHOD]), OPTIONS)


def test_a_round_says_what_it_did(pair: Pair) -> None:
    found = pair.learner().learn(images(0), replays(0))
    assert isinstance(found, Round)
    assert 0 <= found.agreement <= 1
    assert found.divergence > 0
