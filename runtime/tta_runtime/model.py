"""A model that adapts: theta, a method's state and the engines that use them.

with_old = model.predict(x).logits
step = model.step(x)        # pure: logits, theta', state', report
model.commit(step)          # the flip
model.roll_back()           # undone, theta and state together
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from . import inputs, state_file, theta
from .arrays import frozen, owned
from .atomic import write_atomic
from .bundle import Bundle
from .engine import Engine, EngineOptions, Loader
from .engine_ort import OrtEngine
from .errors import (
    BadValue,
    BatchTooSmall,
    EngineFailed,
    LayoutMismatch,
    NonFiniteState,
    StaleBase,
    StateUnwritable,
    TargetMissing,
    TargetUnsupported,
    UnknownHyper,
    UnknownMethod,
    WeightUnsupported,
    WrongBatch,
    did_you_mean,
)
from .files import reason
from .held import Held, HostView, finite, hidden, host, on_host, unfetched, where
from .inputs import Limits
from .manifest import FORWARD, Manifest, MethodSpec, Port
from .manifest_check import MAX_HYPER, expect_task
from .numerics import uniforms

_log = logging.getLogger(__name__)
Vector = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Prediction:
    """The answer for one batch."""

    logits: NDArray[np.float32]
    """[batch, classes], unnormalised."""
    features: NDArray[np.float32] | None
    """[batch, F], what the last layer sees; None if the graph does not return it."""


@on_host("theta")
@dataclass(frozen=True, eq=False)
class Step:
    """What one step of the method would change. Nothing is changed until it is committed.

    A guard may hand on a changed one: `dataclasses.replace(step, theta=nearer)`.
    """

    logits: NDArray[np.float32]
    """[batch, classes], of the theta before or after the update, as the method says."""
    theta: Vector
    """[P], the new theta; fetched from the engine's device when it is looked at."""
    state: Mapping[str, NDArray[Any]]
    """The method's new state by name."""
    report: Mapping[str, float]
    """The step's named numbers, e.g. loss and mean entropy."""
    origin: object = field(default=None, repr=False)
    """What the step started from; `commit` refuses a step that started from something else than is active."""


@on_host("theta")
@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Theta, state and what the next random numbers follow from: what flips as one. Its arrays never change."""

    theta: Vector
    state: Mapping[str, NDArray[Any]]
    steps: int
    seed: int


class Engines:
    """The loaded graphs of a bundle, for any number of models. Stateless, safe for several threads."""

    def __init__(self, bundle: Bundle, engines: Mapping[str, Engine], methods: Sequence[str]) -> None:
        self.bundle = bundle
        self.methods = tuple(methods)
        self._engines = dict(engines)

    @classmethod
    def load(
        cls,
        bundle: Bundle | Path | str,
        *,
        methods: Sequence[str] | None = None,
        options: EngineOptions | None = None,
        step_options: EngineOptions | None = None,
        loader: Loader = OrtEngine,
        task: str = "classification",
    ) -> Engines:
        """Load the graphs that the given methods need, each once.

        Args:
            bundle: an opened bundle, or the path of one.
            methods: names; None: all of the bundle.
            options: threads, provider, memory.
            step_options: the same for the graphs of steps, which then have threads of their own; None: `options`.
            loader: what makes an engine of a graph.
            task: what the graphs shall do, "classification" or "text".

        Raises:
            BundleError: the bundle is refused.
            WrongTask: it is for another task.
            UnknownMethod: the bundle has no method of that name.
            EngineError: a graph cannot be loaded here.
        """
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle)
        expect_task(bundle.manifest, task)
        known = bundle.manifest.methods
        wanted = list(known) if methods is None else list(methods)
        keys = {FORWARD: None}  # a dict keeps the order
        for name in wanted:
            spec = method_of(known, name, known)
            keys |= {key: None for key in (spec.serve, spec.step) if key is not None}
        options = options or EngineOptions()
        steps = {known[name].step for name in wanted}
        return cls(
            bundle,
            {
                key: loader(bundle, key, (step_options or options) if key in steps else options)
                for key in keys
            },
            wanted,
        )

    def __getitem__(self, graph: str) -> Engine:
        return self._engines[graph]

    @property
    def providers(self) -> dict[str, str]:
        """What runs each graph."""
        return {key: engine.provider for key, engine in self._engines.items()}


class Model:
    """One stream's theta and state, with the engines that predict and adapt.

    A model has one writer: `commit`, `adapt`, `reset`, `swap`, `roll_back` and `load` must not run at the
    same time. Reading is free: `predict` and `step` in other threads see theta and state as they were
    before or after such a call, never a mix, because both flip with one assignment.

    Args:
        engines: from `Engines.load`; may be shared by many models.
        method: name; None: the manifest's default.
        hyper: values that replace the method's defaults.
        seed: names the random numbers of all steps; with it any run replays bit for bit.
        limits: bounds for one batch.

    Raises:
        WrongTask: the bundle is for text.
        UnknownMethod, UnknownHyper: no such name, with the nearest known one.
        BadValue: a hyper value or the seed is out of range.
    """

    def __init__(
        self,
        engines: Engines,
        method: str | None = None,
        *,
        hyper: Mapping[str, float] | None = None,
        seed: int = 0,
        limits: Limits | None = None,
    ) -> None:
        bundle = engines.bundle
        expect_task(bundle.manifest, "classification")
        self.engines = engines
        self.manifest: Manifest = bundle.manifest
        self.method: str = self.manifest.default_method if method is None else method
        self.spec: MethodSpec = method_of(self.manifest.methods, self.method, engines.methods)
        self.limits = limits or Limits()
        self.theta0: Vector = bundle.theta0
        self._hyper = _hyper(self.spec, self.method, hyper or {})
        self._hyper_vector = frozen(np.array(list(self._hyper.values()), dtype=np.float32))
        if not 0 <= seed < 1 << 128:
            raise BadValue(f"seed is {seed}", "Use a number from 0 to 2**128 - 1")
        self.base: Vector = bundle.theta0
        self._source = engines[FORWARD]
        self._serve = engines[self.spec.serve]
        self._step = None if self.spec.step is None else engines[self.spec.step]
        self._active = self._start(self.base, 0, seed)
        self._last_good: Checkpoint | None = None
        self._derived: tuple[Checkpoint, str, float] | None = None

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        method: str | None = None,
        hyper: Mapping[str, float] | None = None,
        seed: int = 0,
        options: EngineOptions | None = None,
        limits: Limits | None = None,
    ) -> Model:
        """A model from a bundle's path, with only the graphs that its method needs.

        Raises:
            TtaError: what `Bundle.open`, `Engines.load` and `Model` raise.
        """
        bundle = Bundle.open(path)
        name = bundle.manifest.default_method if method is None else method
        engines = Engines.load(bundle, methods=[name], options=options)
        return cls(engines, name, hyper=hyper, seed=seed, limits=limits)

    # -------------------------------------------------------------------------------- what it is now

    @property
    def theta(self) -> Vector:
        """The active theta, [P], read-only."""
        return self._active.theta

    @property
    def state(self) -> dict[str, NDArray[Any]]:
        """The active state by name, each array read-only."""
        return dict(self._active.state)

    @property
    def steps(self) -> int:
        """How many steps were committed since the source."""
        return self._active.steps

    @property
    def seed(self) -> int:
        """The seed of the steps' random numbers."""
        return self._active.seed

    @property
    def hyper(self) -> dict[str, float]:
        """The method's hyper-parameters in use."""
        return dict(self._hyper)

    @property
    def takes_weight(self) -> bool:
        """Whether a sample can be refused by weight 0."""
        return self._step is not None and any(p.key == "weight" for p in self._step.spec.inputs)

    @property
    def takes_target(self) -> bool:
        """Whether a step learns from a teacher's logits, and so needs them."""
        return self.manifest.takes_target(self.method)

    @property
    def digest(self) -> str:
        """Digest of the active theta; see `theta.digest`."""
        return self._facts()[1]

    @property
    def distance(self) -> float:
        """Relative Euclidean distance of the active theta from the source."""
        return self._facts()[2]

    # -------------------------------------------------------------------------------- predicting

    def check_input(self, x: NDArray[Any]) -> NDArray[Any]:
        """The batch as a C-contiguous array, if it is one that this model takes.

        A value outside of the manifest's low..high is not an error: real sensors clip and noise overshoots.

        Args:
            x: [batch, ...] of exactly the manifest's dtype and shape.

        Raises:
            InputError: WrongDtype, WrongShape, EmptyBatch, TooLarge or NonFinite.
        """
        return inputs.check_batch(self.manifest.input, self.limits, x)

    def predict(self, x: NDArray[Any], *, source: bool = False, instead: Vector | None = None) -> Prediction:
        """The answer for a batch.

        Args:
            x: [batch, ...] as the manifest's input says.
            source: True: the answer of the frozen source model, for comparison.
            instead: [P], finite: what plain inference with another theta would answer.

        Raises:
            InputError: the batch is refused.
            EngineFailed: the engine failed.
        """
        x = self.check_input(x)
        if source or instead is not None:
            return self._predict(self._source, x, self._active, self.theta0 if instead is None else instead)
        now = self._active
        return self._predict(self._serve, x, now, self._serving(now))

    # -------------------------------------------------------------------------------- adapting

    def step(
        self,
        x: NDArray[Any],
        weight: NDArray[np.float32] | None = None,
        target: NDArray[np.float32] | None = None,
        *,
        start: Vector | None = None,
    ) -> Step:
        """One step of the method on a batch; pure, nothing is changed.

        A method that only serves returns the prediction with theta and state as they are and an empty report.

        Args:
            x: [batch, ...] as the manifest's input says.
            weight: [batch] float32, finite, >= 0; 0 refuses a sample. None: all 1.
            target: [batch, classes] float32, finite: a teacher's logits, for a method that needs them.
            start: [P], the theta to step from in place of the active one.

        Raises:
            InputError: the batch, the weights or the targets are refused, or the method cannot step on so few samples.
            EngineFailed: the engine failed.
        """
        x = self.check_input(x)
        now = self._active
        weight = self._check_weight(weight, len(x))
        target = self._check_target(target, len(x))
        if self._step is None:
            logits = self._predict(self._serve, x, now, self._serving(now)).logits
            return Step(logits, hidden(unfetched(now, "theta")), now.state, {}, now)
        if len(x) < self.spec.min_batch:
            raise BatchTooSmall(
                f"x has {len(x)} samples, a step of `{self.method}` needs {self.spec.min_batch}",
                "Collect more samples, or only predict",
            )
        if self.spec.batch is not None and len(x) != self.spec.batch:
            raise WrongBatch(
                f"x has {len(x)} samples, the step of `{self.method}` is compiled for {self.spec.batch}",
                "Collect that many samples, or only predict",
            )
        begin = unfetched(now, "theta") if start is None else start
        outputs = self._run(self._step, x, weight, now, begin, target)
        report = host(outputs.pop(("report", ""), np.zeros(0, np.float32)))
        return Step(
            logits=host(outputs[("logits", "")]),
            theta=hidden(_fixed(outputs[("theta", "")])),
            state=_view({s.name: _fixed(outputs[("state", s.name)]) for s in self.spec.state}),
            report=dict(zip(self.spec.report, report.tolist(), strict=True)),
            origin=now,
        )

    def commit(self, step: Step) -> None:
        """Make the step's theta and state the active ones, and the present ones the last good.

        Raises:
            StaleBase: the step started from a theta and state that are no longer active.
            LayoutMismatch: an array of the step has another shape or dtype.
            NonFiniteTheta, NonFiniteState: NaN or Inf. Nothing is changed by any refusal.
        """
        now = self._active
        if step.origin is not now:
            raise StaleBase(
                f"the step did not start from the active theta {self.digest[:12]} at {now.steps} steps",
                "Compute the step again",
            )
        if self._step is None:
            return
        vector = self._check_theta(unfetched(step, "theta"))
        state = self._check_state(step.state)
        self._last_good = now
        self._active = Checkpoint(hidden(vector), state, now.steps + 1, now.seed)

    def adapt(
        self,
        x: NDArray[Any],
        weight: NDArray[np.float32] | None = None,
        target: NDArray[np.float32] | None = None,
    ) -> Step:
        """`step` and `commit`.

        Raises:
            TtaError: what these two raise.
        """
        step = self.step(x, weight, target)
        self.commit(step)
        return step

    def reset(self) -> None:
        """Back to the base: theta, state and steps as in a new model, with nothing to roll back to."""
        self._active = self._start(self.base, 0, self._active.seed)
        self._last_good = None

    def rest_on(self, base: Vector) -> None:
        """Name the base that theta stands on, which is what `reset` returns to; theta and state stay.

        Args:
            base: [P] float32, finite.

        Raises:
            LayoutMismatch, NonFiniteTheta: it is refused.
        """
        if self.base is not base:
            self.base = theta.check(self.manifest.theta, base)

    def rebase(self, base: Vector, vector: Vector) -> None:
        """Go on from another base: `reset` returns to it from now on. What is the source stays the source.

        Args:
            base: [P] float32, finite.
            vector: [P] float32, finite: theta from now on; the state starts anew beside it.

        Raises:
            LayoutMismatch, NonFiniteTheta: one of them is refused. Nothing is changed then.
        """
        checked = theta.check(self.manifest.theta, base)
        self.swap(vector)
        self.base = checked

    def swap(self, vector: Vector, *, base: str | None = None) -> None:
        """Replace theta by another vector; the state starts anew beside it. `roll_back` undoes it.

        Args:
            vector: [P] float32, finite.
            base: digest of the theta that the vector was made for; None: do not check.

        Raises:
            StaleBase: the active theta is not that base.
            LayoutMismatch, NonFiniteTheta: the vector is refused. Nothing is changed by any refusal.
        """
        if base is not None and base != self.digest:
            raise StaleBase(
                f"theta was made for base {base[:12]}, active is {self.digest[:12]}",
                "Fetch the theta for the active base, or a snapshot",
            )
        now = self._active
        vector = owned(theta.check(self.manifest.theta, np.asarray(vector)))
        self._last_good = now
        self._active = self._start(vector, now.steps, now.seed)

    def roll_back(self) -> bool:
        """Return to theta and state from before the last `commit` or `swap`; once.

        Returns:
            False if there is nothing to return to; then nothing is changed.
        """
        if self._last_good is None:
            return False
        self._active, self._last_good = self._last_good, None
        return True

    # -------------------------------------------------------------------------------- checkpoints and files

    @property
    def checkpoint(self) -> Checkpoint:
        """What is active now, to be returned to by `restore`. Costs nothing: arrays are replaced, not changed."""
        return self._active

    def restore(self, checkpoint: Checkpoint) -> None:
        """Make a checkpoint of this model, or of one like it, the active theta and state.

        Raises:
            LayoutMismatch, NonFiniteTheta, NonFiniteState: it does not fit. Nothing is changed then.
        """
        vector = self._check_theta(unfetched(checkpoint, "theta"))
        state = self._check_state(checkpoint.state)
        self._active = Checkpoint(hidden(vector), state, checkpoint.steps, checkpoint.seed)
        self._last_good = None

    def encode(self, checkpoint: Checkpoint, *, generation: int = 0, notes: str = "") -> bytes:
        """The bytes of a state file that holds a checkpoint of this model.

        Args:
            checkpoint: of this model.
            generation: grows with every save of the same stream.
            notes: found again by `decode`; at most `state_file.MAX_NOTES` characters.
        """
        saved = state_file.Saved(
            checkpoint.theta, checkpoint.state, self.method, self._hyper, checkpoint.steps, checkpoint.seed,
            generation, notes,
        )  # fmt: skip
        return state_file.encode(self.manifest, saved)

    def decode(self, data: bytes) -> tuple[Checkpoint, int, str]:
        """Checkpoint, generation and notes from the bytes of a state file.

        Raises:
            StateError: the subclass that names why they are refused.
        """
        saved = state_file.decode(data, self.manifest, self.method)
        if dict(saved.hyper) != self._hyper:
            _log.info("a state was made with hyper %s, going on with %s", saved.hyper, self._hyper)
        state = MappingProxyType({name: owned(array) for name, array in saved.state.items()})
        checkpoint = Checkpoint(owned(saved.theta), state, saved.steps, saved.seed)
        return checkpoint, saved.generation, saved.notes

    @property
    def max_state_bytes(self) -> int:
        """The largest size that a state file of this model can have."""
        return state_file.max_bytes(self.manifest, self.spec.state)

    def save(self, path: Path | str) -> None:
        """Write theta, state, steps and seed to a state file, atomically: old file or new, never a mix.

        Raises:
            StateUnwritable: the operating system refuses; a file at the path is as it was.
        """
        try:
            write_atomic(Path(path), self.encode(self._active))
        except OSError as error:
            raise StateUnwritable(
                f"{path} cannot be written: {reason(error)}", "Free space or choose another place"
            ) from error

    def load(self, path: Path | str) -> None:
        """Continue from a state file: its theta, state, steps and seed, with the hyper of this model.

        Raises:
            StateError: the subclass that names why the file is refused. Nothing is changed by any refusal.
        """
        self._active, _, _ = self.decode(state_file.read(path, self.max_state_bytes))
        self._last_good = None

    # -------------------------------------------------------------------------------- inside

    def _serving(self, now: Checkpoint) -> Held:
        """The vector that answers between steps: theta, or a teacher held in the state."""
        kind, _, key = self.spec.serve_vector.partition(":")
        return unfetched(now, "theta") if kind == "theta" else where(now.state, key)

    def _start(self, vector: Vector, steps: int, seed: int) -> Checkpoint:
        """The vector with the method's initial state beside it."""
        state = {}
        for s in self.spec.state:
            if s.init == "theta":
                state[s.name] = vector
            else:
                fill = np.zeros if s.init == "zeros" else np.ones
                state[s.name] = frozen(fill(s.shape, dtype=s.dtype))
        return Checkpoint(vector, MappingProxyType(state), steps, seed)

    def _facts(self) -> tuple[Checkpoint, str, float]:
        """Digest and distance of the active theta, computed once for each theta."""
        now, facts = self._active, self._derived
        if facts is None or facts[0] is not now:
            digest = theta.digest(self.manifest.theta, now.theta)
            facts = self._derived = (now, digest, theta.distance(now.theta, self.theta0))
        return facts

    def _check_weight(self, weight: NDArray[np.float32] | None, batch: int) -> NDArray[np.float32]:
        weight = inputs.check_weight(weight, batch)
        if self._step is not None and not self.takes_weight and not (weight == 1).all():
            raise WeightUnsupported(
                f"the step of `{self.method}` takes no weights, {int((weight != 1).sum())} samples have one",
                "Step without the samples that shall not count",
            )
        return weight

    def _check_target(self, target: NDArray[np.float32] | None, batch: int) -> NDArray[np.float32] | None:
        if target is None:
            if self.takes_target:
                raise TargetMissing(
                    f"the step of `{self.method}` learns from a teacher's logits, none were given",
                    "Give them as target, or use a method that needs no teacher",
                )
            return None
        if not self.takes_target:
            raise TargetUnsupported(
                f"the step of `{self.method}` takes no target, one for {len(target)} samples was given",
                "Leave the target out, or use a method that learns from a teacher",
            )
        return inputs.check_target(target, batch, self.manifest.classes)

    def _check_theta(self, vector: Held) -> Held:
        """The vector, read-only, if it can be theta; one on a device stays there."""
        if isinstance(vector, np.ndarray):
            return owned(theta.check(self.manifest.theta, vector))
        if vector.shape != (self.manifest.theta.size,) or not finite(vector):
            theta.check(self.manifest.theta, vector.host())  # says what is wrong
        return vector

    def _check_state(self, state: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        arrays = {name: where(state, name) for name in state}
        expected = {s.name: (s.dtype, s.shape) for s in self.spec.state}
        given = {name: (str(a.dtype), list(a.shape)) for name, a in arrays.items()}
        if given != expected:
            raise LayoutMismatch(
                f"the state is {given}, the method's is {expected}", "Commit what `step` returned"
            )
        for name, array in arrays.items():
            if not finite(array):
                raise NonFiniteState(
                    f"state `{name}` holds values that are not finite", "Keep the previous state"
                )
        return _view({n: owned(a) if isinstance(a, np.ndarray) else a for n, a in arrays.items()})

    def _predict(self, engine: Engine, x: NDArray[Any], now: Checkpoint, vector: Held) -> Prediction:
        outputs = self._run(engine, x, None, now, vector)
        features = outputs.get(("features", ""))
        return Prediction(host(outputs[("logits", "")]), None if features is None else host(features))

    def _run(
        self,
        engine: Engine,
        x: NDArray[Any],
        weight: Vector | None,
        now: Checkpoint,
        vector: Held,
        target: Vector | None = None,
    ) -> dict[tuple[str, str], Held]:
        """Outputs by (bind, key): every port gets what the manifest binds it to."""
        anchor = self.engines.bundle.anchor

        def bound(port: Port) -> Held:
            if port.bind == "batch":
                return x if port.key == "x" else cast(Vector, weight if port.key == "weight" else target)
            if port.bind == "theta":
                return vector
            if port.bind == "state":
                return where(now.state, port.key)
            if port.bind == "anchor":
                return anchor[port.key]
            if port.bind == "hyper":
                return self._hyper_vector
            return uniforms(now.seed, now.steps, self.spec.rand)

        outputs = engine.run({port.name: bound(port) for port in engine.spec.inputs})
        for port in engine.spec.outputs:
            check_output(port, outputs[port.name], len(x))
        return {(port.bind, port.key): outputs[port.name] for port in engine.spec.outputs}


def _fixed(value: Held) -> Held:
    """The array an engine made, read-only from now on; one on a device is so already."""
    return frozen(value) if isinstance(value, np.ndarray) else value


def _view(arrays: dict[str, Held]) -> Mapping[str, NDArray[Any]]:
    """Arrays by name, read-only; those on a device are fetched when they are looked at."""
    here = {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
    return MappingProxyType(here) if len(here) == len(arrays) else HostView(arrays)


def check_output(port: Port, value: Held, batch: int) -> None:
    """An open dimension of the file may turn out as anything; here is the last place to notice."""
    want = [batch if n == "batch" else n for n in port.shape]
    if len(want) != len(value.shape) or any(
        isinstance(n, int) and n != m for n, m in zip(want, value.shape, strict=True)
    ):
        raise EngineFailed(
            f"the graph returned `{port.name}` {list(value.shape)}, expected {want}", "Build the bundle again"
        )


def method_of(known: Mapping[str, MethodSpec], name: str, loaded: Collection[str]) -> MethodSpec:
    """The method of a name, whose graphs are loaded; raises UnknownMethod."""
    if name not in known:
        raise UnknownMethod(
            f"unknown method `{name}`" + did_you_mean(name, known), "Choose a method of the bundle"
        )
    if name not in loaded:
        raise UnknownMethod(
            f"method `{name}` is in the bundle but its graphs are not loaded; loaded: {', '.join(loaded)}",
            "Load the engines with that method",
        )
    return known[name]


def _hyper(spec: MethodSpec, method: str, given: Mapping[str, float]) -> dict[str, float]:
    names = [h.name for h in spec.hyper]
    for name in given:
        if name not in names:
            raise UnknownHyper(
                f"method `{method}` has no hyper-parameter `{name}`" + did_you_mean(name, names),
                "Use a name that the bundle lists",
            )
    values: dict[str, float] = {}
    for h in spec.hyper:
        wanted = given.get(h.name, h.default)
        try:
            value = float(wanted)
        except (TypeError, ValueError):
            value = math.nan  # in no range
        low = -MAX_HYPER if h.low is None else h.low
        high = MAX_HYPER if h.high is None else h.high
        if not (low <= value <= high and abs(value) <= MAX_HYPER):
            raise BadValue(
                f"hyper-parameter `{h.name}` is {wanted!r}, expected a number from {low:g} to {high:g}",
                "Use a value in that range",
            )
        values[h.name] = value
    return values
