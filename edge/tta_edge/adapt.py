"""Predict, maybe step, guard, account: what happens to one batch of one stream.

Every guard has its home here. A guard that objects has a reason code, a counter and an event, and a step that
it refuses is never committed: there is nothing to undo.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta_runtime import theta as thetas
from tta_runtime.errors import BatchTooSmall, NonFinite, WrongBatch
from tta_runtime.model import Model, Step
from tta_runtime.numerics import entropy


class Reason(str, Enum):
    """Why a batch was not adapted on, or why a stream went back to the source."""

    BATCH_SIZE = "batch-size"
    """The method cannot adapt on a batch of this size; it was only answered."""
    NON_FINITE_LOGITS = "non-finite-logits"
    NON_FINITE_THETA = "non-finite-theta"
    NON_FINITE_STATE = "non-finite-state"
    BALL = "ball"
    """The step would leave the ball around the source theta; the stream was reset."""
    PERIODIC = "periodic"
    """The backstop: so many steps since the last reset."""
    REQUESTED = "requested"
    """A client asked for a reset."""


@dataclass(frozen=True)
class Guards:
    """Settings of the guards that are always on.

    Attributes:
        max_distance: radius of the ball around the source theta, as relative L2 distance.
        reset_every_steps: back to the source after so many steps; 0 turns the backstop off.
    """

    max_distance: float
    reset_every_steps: int


@dataclass(frozen=True)
class Event:
    """Something a guard did.

    Attributes:
        stream: id of the stream.
        action: `skip` (answered, not adapted on), `refuse` (step not committed) or `reset`.
        reason: the reason code.
        detail: the values behind it, in words.
    """

    stream: str
    action: str
    reason: Reason
    detail: str


@dataclass(frozen=True)
class Answer:
    """What one batch got.

    Attributes:
        logits: [batch, classes], float32.
        source_logits: the frozen source's, where they were asked for.
        adapted: whether the batch's step was committed.
        reason: of the last event this batch caused; None where there was none.
        report: the step's named numbers; empty where no step was committed.
    """

    logits: NDArray[np.float32]
    source_logits: NDArray[np.float32] | None
    adapted: bool
    reason: Reason | None
    report: dict[str, float]


def objection(step: Step, theta0: NDArray[np.float32], guards: Guards) -> tuple[Reason, str] | None:
    """Why a step must not be committed.

    Args:
        step: uncommitted.
        theta0: [P], the source theta.
        guards: the settings.

    Returns:
        The reason code and the values behind it; None where nothing speaks against the step.
    """
    if not _finite(step.logits):
        return Reason.NON_FINITE_LOGITS, "the step's logits hold NaN or Inf"
    if not _finite(step.theta):
        return Reason.NON_FINITE_THETA, "the step's theta holds NaN or Inf"
    for name, array in step.state.items():
        if not _finite(array):
            return Reason.NON_FINITE_STATE, f"the step's state `{name}` holds NaN or Inf"
    distance = thetas.distance(step.theta, theta0)
    if distance > guards.max_distance:
        return (
            Reason.BALL,
            f"distance {distance:.4g} from the source, max_distance is {guards.max_distance:.4g}",
        )
    return None


def _finite(array: NDArray[Any]) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _ignore(_: Event) -> None:
    """The listener of a stream nobody listens to."""


@dataclass
class GuardedModel:
    """One stream: a model with its own theta and state, and the guards around it.

    Attributes:
        stream: the stream's id.
        model: nothing else may adapt it.
        guards: the settings.
        on_event: told of everything a guard does.
        counts: reason code -> how often.
        last_event: `action: reason` of the newest event.
        last_entropy: mean entropy of the newest answer, in nats.
    """

    stream: str
    model: Model
    guards: Guards
    on_event: Callable[[Event], None] = _ignore
    counts: Counter[str] = field(default_factory=Counter)
    last_event: str = ""
    last_entropy: float | None = None

    @property
    def adapts(self) -> bool:
        """Whether the method has a step at all."""
        return self.model.spec.step is not None

    def answer(self, x: NDArray[Any], *, adapt: bool = True, compare: bool = False) -> Answer:
        """Predict one batch and, where allowed, adapt to it in the same pass.

        Args:
            x: [batch, ...] as the bundle's input says.
            adapt: whether the batch may change theta.
            compare: whether the frozen source answers too.

        Raises:
            InputError: the batch is not what the bundle takes; nothing has changed.
            EngineError: the engine failed; nothing has changed.
        """
        # First the frozen source: if its engine failed after a commit, an error would have changed theta.
        source = self.model.predict(x, source=True).logits if compare else None
        step, reason = self._step(x) if adapt and self.adapts else (None, None)
        if step is None:
            logits, returned = self._serve(x)
            reason = returned or reason
        else:
            logits = step.logits
        self.last_entropy = float(entropy(logits).mean())
        return Answer(logits, source, step is not None, reason, dict(step.report) if step is not None else {})

    def reset(self, reason: Reason = Reason.REQUESTED, detail: str = "asked for by a client") -> None:
        """Return theta and state to the source."""
        self.model.reset()
        self._tell("reset", reason, detail)

    def _step(self, x: NDArray[Any]) -> tuple[Step | None, Reason | None]:
        """A committed step, or why there is none."""
        try:
            step = self.model.step(x)
        except (BatchTooSmall, WrongBatch) as error:
            self._tell("skip", Reason.BATCH_SIZE, error.cause)
            return None, Reason.BATCH_SIZE
        refused = objection(step, self.model.theta0, self.guards)
        if refused is not None:
            return None, self._refuse(*refused)
        self.model.commit(step)
        if 0 < self.guards.reset_every_steps <= self.model.steps:
            self.reset(Reason.PERIODIC, f"{self.model.steps} steps since the last reset")
            return step, Reason.PERIODIC
        return step, None

    def _refuse(self, reason: Reason, detail: str) -> Reason:
        self._tell("refuse", reason, detail)
        if reason is Reason.BALL and self.model.steps:
            # Theta has drifted to the edge of the ball, where the next steps would be refused as well. After
            # a refused first step from the source there is nothing to go back from.
            self.reset(reason, detail)
        return reason

    def _serve(self, x: NDArray[Any]) -> tuple[NDArray[np.float32], Reason | None]:
        """The serve graph's answer; from the source if only the active theta gives no finite logits."""
        logits = self.model.predict(x).logits
        if _finite(logits):
            return logits, None
        if not self.model.steps or not _finite(self.model.predict(x, source=True).logits):
            spec = self.model.manifest.input
            raise NonFinite(
                f"the logits of this batch hold NaN or Inf, its values reach {np.abs(x).max():.3g}",
                f"Send values from {spec.low:g} to {spec.high:g}",
            )
        self.reset(Reason.NON_FINITE_LOGITS, "the serve graph's logits hold NaN or Inf")
        return self.model.predict(x).logits, Reason.NON_FINITE_LOGITS

    def _tell(self, action: str, reason: Reason, detail: str) -> None:
        self.counts[reason.value] += 1
        self.last_event = f"{action}: {reason.value}"
        self.on_event(Event(self.stream, action, reason, detail))
