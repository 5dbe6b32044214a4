"""Who answers a stream: a method of a bundle, bare or inside the daemon's guards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tta_edge.adapt import STANDARD, Guards, Stream
from tta_edge.evaluate import step_and_answer
from tta_edge.suite.errors import UnknownPlayer
from tta_edge.suite.meter import Meter
from tta_runtime.arrays import is_finite
from tta_runtime.bundle import Bundle
from tta_runtime.engine import EngineOptions
from tta_runtime.errors import NonFinite, did_you_mean
from tta_runtime.manifest import Manifest
from tta_runtime.model import Engines, Model

GUARDED = "+guards"
"""Behind a method's name: that method inside the daemon's guards."""


@dataclass(frozen=True, eq=False)
class Answered:
    """What a player gave for a batch.

    Attributes:
        logits: float32 [batch, classes]; of a sample that it could not answer, NaN.
        forwards: what the batch cost, in forward passes of one sample (a backward pass counts as two): predicting 64
            samples costs 64. None where a bundle does not say what its steps cost.
        adapted: whether theta changed.
        refused: whether something of the batch was thrown away: samples, or a step.
    """

    logits: NDArray[np.float32]
    forwards: float | None
    adapted: bool = False
    refused: bool = False


class Player(Protocol):
    """Answers the batches of a stream, one after the other."""

    name: str

    def reset(self) -> None:
        """Be as new: before each stream."""

    def answer(self, x: NDArray[Any]) -> Answered:
        """The answer to a batch, and whatever the player learns from it.

        Args:
            x: [batch, ...] as the bundle's input says; samples may hold NaN.
        """


def make_player(
    name: str,
    bundle: Bundle,
    *,
    options: EngineOptions | None = None,
    seed: int = 0,
    hyper: Mapping[str, float] | None = None,
) -> Player:
    """The player of that name.

    Args:
        name: a method of the bundle, or a method with `+guards` behind it. One that keeps a window has no bare form.
        bundle: opened.
        options: threads and provider.
        seed: of the method's random numbers.
        hyper: values that replace a method's defaults.

    Raises:
        UnknownPlayer: there is none of that name for this bundle.
        TtaError: what loading the graphs raises.
    """
    manifest = bundle.manifest
    if not can_play(name, manifest):
        raise UnknownPlayer(
            f"the bundle of {manifest.model_id} has no method `{name}` that adapts by itself"
            + did_you_mean(name, [each for each in manifest.methods if can_play(each, manifest)]),
            "Build it with that method, or leave it out",
        )
    method = name.removesuffix(GUARDED)
    guarded = name.endswith(GUARDED) or manifest.methods[method].window > 0
    meter = Meter(manifest)
    engines = Engines.load(bundle, methods=[method], options=options, loader=meter.loader)
    model = Model(engines, method, hyper=hyper or {}, seed=seed)
    return GuardedMethod(name, model, meter) if guarded else BareMethod(name, model, meter)


def can_play(name: str, manifest: Manifest) -> bool:
    """Whether a bundle has what the player of that name needs.

    A method that learns from a teacher cannot adapt by itself.
    """
    method = name.removesuffix(GUARDED)
    return method in manifest.methods and not manifest.needs_teacher(method)


class BareMethod:
    """A published method as it is: it steps on every batch that it can step on, and no guard acts.

    Two things the runtime itself never does, and so neither does a bare method: samples with NaN do not reach an
    engine, and a theta or a state with NaN is not committed.

    Args:
        name: of the player.
        model: nothing else may adapt it.
        meter: counts what its engines run.
    """

    def __init__(self, name: str, model: Model, meter: Meter) -> None:
        self.name = name
        self._model = model
        self._meter = meter

    def reset(self) -> None:
        """Theta and state back to the source."""
        self._model.reset()
        self._meter.take()

    def answer(self, x: NDArray[Any]) -> Answered:
        """The method's logits, having stepped where it can.

        A batch with NaN is not stepped on: its finite samples are predicted.
        """
        finite = finite_samples(x)
        model, before = self._model, self._model.steps
        if not finite.all():
            return self._answered(predicted(model, x, finite), before, refused=True)
        logits, good = step_and_answer(model, x)
        return self._answered(logits, before, refused=not good)

    def _answered(self, logits: NDArray[np.float32], before: int, *, refused: bool = False) -> Answered:
        return Answered(logits, self._meter.take(), self._model.steps != before, refused)


class GuardedMethod:
    """A fixed method as the daemon runs it inline: with its ball, collapse detector, resets and rollback.

    Args:
        name: of the player.
        model: nothing else may adapt it.
        meter: counts what its engines run.
        guards: settings; None: the daemon's defaults.
    """

    def __init__(self, name: str, model: Model, meter: Meter, guards: Guards | None = None) -> None:
        self.name = name
        self._model = model
        self._meter = meter
        self._guards = guards or STANDARD
        self._stream = self._new()

    def reset(self) -> None:
        """A new stream from the source."""
        self._model.reset()
        self._stream = self._new()
        self._meter.take()

    def answer(self, x: NDArray[Any]) -> Answered:
        """The stream's logits. A batch with NaN, which the daemon refuses, is sent again without the bad samples."""
        finite = finite_samples(x)
        logits = np.full((len(x), self._model.manifest.classes), np.nan, dtype=np.float32)
        adapted = False
        if finite.any():
            try:
                answer = self._stream.answer(x[finite])
            except NonFinite:  # neither theta nor the source gives finite logits for the batch
                return Answered(logits, self._meter.take(), False, True)
            logits[finite] = answer.logits
            adapted = answer.adapted
        return Answered(logits, self._meter.take(), adapted, not finite.all())

    def _new(self) -> Stream:
        return Stream(self.name, self._model, self._guards)


def finite_samples(x: NDArray[Any]) -> NDArray[np.bool_]:
    """[batch], whether each sample is free of NaN and Inf."""
    if x.dtype.kind != "f" or is_finite(x):
        return np.ones(len(x), dtype=np.bool_)
    return np.asarray(np.isfinite(x).reshape(len(x), -1).all(axis=1))


def predicted(model: Model, x: NDArray[Any], finite: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The serving graph's logits of the finite samples, NaN of the others.

    Args:
        model: predicts, does not adapt.
        x: [batch, ...].
        finite: [batch], see `finite_samples`.

    Returns:
        [batch, classes].
    """
    if finite.all():
        return model.predict(x).logits
    logits = np.full((len(x), model.manifest.classes), np.nan, dtype=np.float32)
    if finite.any():
        logits[finite] = model.predict(x[finite]).logits
    return logits
