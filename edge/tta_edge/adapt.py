"""Predict, maybe step, guard, account: what happens to one batch of one stream.

Every guard has its home here. A guard that objects has a reason code, a counter and an event, and a step that
it refuses is never committed: there is nothing to undo.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tta_edge.auto import Auto, Task
from tta_edge.events import Event, Reason, Tell
from tta_edge.gallery import Shelf
from tta_edge.monitor import Monitor
from tta_edge.sight import Change
from tta_edge.wire import StreamState
from tta_runtime import theta as thetas
from tta_runtime.arrays import is_finite
from tta_runtime.errors import BatchTooLarge, BatchTooSmall, EngineError, NonFinite, StaleBase, WrongBatch
from tta_runtime.held import finite, where
from tta_runtime.model import Checkpoint, Model, Step
from tta_runtime.state_file import MAX_NOTES
from tta_runtime.theta import Vector

CHECKPOINTS = 2
"""Good states of a stream that are kept to return to."""
MAX_STRIKES = 3
"""Collapses without `CALM_CHECKPOINTS` good checkpoints after them, until a stream is suspended."""
CALM_CHECKPOINTS = 10


@dataclass(frozen=True)
class Guards:
    """Settings of the guards that are always on.

    Attributes:
        max_distance: radius of the ball around the source theta, as relative L2 distance.
        reset_every_steps: back to the source after so many steps; 0 turns the backstop off.
        min_diversity: see monitor.py; 0 turns the collapse detector off.
        checkpoint_steps: steps between two checkpoints.
    """

    max_distance: float
    reset_every_steps: int
    min_diversity: float = 0.3
    checkpoint_steps: int = 20


STANDARD = Guards(max_distance=1.0, reset_every_steps=1000)
"""What the daemon has unless it is told otherwise."""


@dataclass(frozen=True)
class Answer:
    """What one batch got.

    Attributes:
        logits: [batch, classes], float32.
        source_logits: the frozen source's, where they were asked for.
        adapted: whether a step was committed.
        refused: whether a step was made and not committed.
        reason: of the last event this batch caused; None where there was none.
        report: the step's named numbers; empty where no step was committed.
    """

    logits: NDArray[np.float32]
    source_logits: NDArray[np.float32] | None
    adapted: bool
    refused: bool
    reason: Reason | None
    report: dict[str, float]


class Keeper:
    """Where a stream's checkpoints go. This one keeps nothing; see saver.py for the one that writes files."""

    def keep(self, stream: Stream, checkpoint: Checkpoint, notes: str) -> None:
        """Save a checkpoint soon."""

    def returned(self, stream: Stream, checkpoint: Checkpoint | None, notes: str) -> None:
        """Make what is saved agree soon with a stream that went back to a checkpoint, or to the source."""


def objection(step: Step, theta0: NDArray[np.float32], guards: Guards) -> tuple[Reason, str] | None:
    """Why a step must not be committed.

    Args:
        step: uncommitted.
        theta0: [P], the source theta.
        guards: the settings.

    Returns:
        The reason code and the values behind it; None where nothing speaks against the step.
    """
    if not is_finite(step.logits):
        return Reason.NON_FINITE_LOGITS, "the step's logits hold NaN or Inf"
    if not is_finite(step.theta):
        return Reason.NON_FINITE_THETA, "the step's theta holds NaN or Inf"
    for name in step.state:
        if not finite(where(step.state, name)):  # asked on the device, where the engine has one
            return Reason.NON_FINITE_STATE, f"the step's state `{name}` holds NaN or Inf"
    distance = thetas.distance(step.theta, theta0)
    if distance > guards.max_distance:
        return (
            Reason.BALL,
            f"distance {distance:.4g} from the source, max_distance is {guards.max_distance:.4g}",
        )
    return None


def _ignore(_: Event) -> None:
    """The listener of a stream nobody listens to."""


def _always() -> bool:
    """The switch of a stream that nobody switches."""
    return True


class Stream:
    """One stream: a model with its own theta and state, and the guards around it.

    `answer` and `serve` belong to the thread that answers requests, `step_on` to the thread that steps in the
    background; what flips theta holds the lock.

    Args:
        name: the stream's id.
        model: nothing else may adapt it.
        guards: the settings.
        bundle: name of the bundle that the model belongs to.
        tell: told of everything a guard does.
        keeper: takes checkpoints.
        shelf: bounds the memory of windows that a method keeps; without it there is no bound.

    Attributes:
        enabled: false when switched off by a client.
        suspended: true when the guards gave up on it; it serves the source.
        restored: `source`, or what it was restored from.
        samples: answered since it was loaded.
        stands_on: epoch and number of the base; (0, 0) is the bundle's own theta.
        counts: reason code -> how often.
        last_event: `action: reason` of the newest event.
        checkpoints: good states, the newest last.
        monitor: of its predictions.
        auto: decides when to step and on what, for a method with a window of its own.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        guards: Guards,
        *,
        bundle: str = "default",
        tell: Tell = _ignore,
        keeper: Keeper | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        self.name = name
        self.bundle = bundle
        self.model = model
        self.guards = guards
        self.enabled = True
        self.suspended = False
        self.restored = "source"
        self.samples = 0
        self.stands_on = (0, 0)
        self.counts: Counter[str] = Counter()
        self.last_event = ""
        self.checkpoints: deque[Checkpoint] = deque(maxlen=CHECKPOINTS)
        self.monitor = Monitor(model.manifest.classes, guards.min_diversity)
        self.auto = Auto(model, shelf or Shelf(sys.maxsize)) if model.spec.window else None
        self._tell_all = tell
        self._keeper = keeper or Keeper()
        self._strikes = 0
        self._calm = 0
        self._closed = False
        self._lock = threading.RLock()

    @property
    def key(self) -> tuple[str, str]:
        """Bundle and name."""
        return self.bundle, self.name

    @property
    def adapts(self) -> bool:
        """Whether this stream may adapt, as far as it is concerned."""
        return self.model.spec.step is not None and self.enabled and not self.suspended

    def state(self, switch: bool) -> StreamState:
        """What the stream does, in the words of `status`; `switch` is the daemon's."""
        if self.model.spec.step is None:
            return "source"
        if not (switch and self.enabled):
            return "off"
        return "frozen" if self.suspended else "adapting"

    # ------------------------------------------------------------------------------------------ answering

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
        source = self._source(x, compare)
        with self._lock:
            adapt = adapt and self.adapts
            if self.auto is not None:
                return self._answer_by_auto(self.auto, x, source, adapt=adapt, compare=compare)
            step, reason = self._step(x) if adapt else (None, None)
            refused = step is None and reason not in (None, Reason.BATCH_SIZE)
            if step is None:
                logits, returned = self._serve(x)
                reason = returned or reason
            else:
                logits = step.logits
            reason = self._observe(logits, source) or reason
        report = dict(step.report) if step is not None else {}
        return Answer(logits, source if compare else None, step is not None, refused, reason, report)

    def serve(self, x: NDArray[Any], *, collect: bool = False, compare: bool = False) -> Answer:
        """Predict one batch with the serve graph; a step in the background is not waited for.

        Args:
            x: [batch, ...].
            collect: whether a method with a window of its own may keep the samples.
            compare: whether the frozen source answers too.

        Raises:
            InputError, EngineError: as `answer`.
        """
        source = self._source(x, compare)
        logits, reason = self._serve(x)
        with self._lock:
            reason = self._observe(logits, source) or reason
            if self.auto is not None and collect and self.adapts:
                self._watch(self.auto, x, logits)
                logits = self.auto.correct(logits)
        return Answer(logits, source if compare else None, False, False, reason, {})

    def step_on(self, x: NDArray[Any], *, allowed: Callable[[], bool] = _always) -> bool | None:
        """One background step.

        Args:
            x: [batch, ...] of samples that were answered before.
            allowed: the daemon's switch, asked when the step is about to be committed.

        Returns:
            True if it was committed, False if it was refused, None if theta changed, or adaptation was switched
            off, meanwhile.

        Raises:
            InputError: the method cannot step on such a batch.
        """
        try:
            step = self.model.step(x)
        except EngineError as error:
            return self._engine_failed(error)
        return self._conclude(allowed, lambda: self._settle(step) in (None, Reason.PERIODIC))

    def adopted(self, base: Vector, *, decay: float = 0.0) -> Vector:
        """Theta [P] if this stream stood on another base: nothing is changed.

        The trained part is the base's, plus what the stream has learned on its own base, decayed. Running statistics
        are the stream's own where its method keeps them current without learning, and the base's otherwise.

        Args:
            base: [P].
            decay: share of the stream's own difference that stays.
        """
        model, trained = self.model, self.model.manifest.theta.trained
        theta = np.array(base)
        if decay:
            theta[:trained] += np.float32(decay) * (model.theta[:trained] - model.base[:trained])
        if self.keeps_statistics and model.steps and not self.holds:
            theta[trained:] = model.theta[trained:]
        return theta

    @property
    def departed(self) -> bool:
        """Whether what serves may differ from the source: a step was made, or a base was taught."""
        return self.model.steps > 0 or self.stands_on != (0, 0)

    @property
    def keeps_statistics(self) -> bool:
        """Whether the method moves running statistics and trains nothing: then they stay the stream's own."""
        layout, spec = self.model.manifest.theta, self.model.spec
        return spec.step is not None and spec.backwards == 0 and layout.trained < layout.size

    @property
    def holds(self) -> bool:
        """Whether the source serves because the method has nothing to add."""
        return self.auto is not None and self.auto.held

    def adopt(self, base: Vector, order: tuple[int, int], *, decay: float = 0.0) -> None:
        """Stand on another base from now on; method state starts anew, and checkpoints of the old base are forgotten.

        Args:
            base: [P], finite.
            order: epoch and number of its patch.
            decay: see `adopted`.
        """
        with self._lock:
            self.model.rebase(base, self.adopted(base, decay=decay))
            self.stands_on = order
            self.checkpoints.clear()
            self.monitor.clear()  # what was seen under another base says nothing of this one
            if self.auto is not None:
                self.auto.realign()

    def step_on_window(self, *, allowed: Callable[[], bool] = _always) -> bool | None:
        """One step of a method with a window of its own, on that.

        Args:
            allowed: as for `step_on`.

        Returns:
            As `step_on`; None also where the method has no window, or too little is in it.
        """
        auto = self.auto
        with self._lock:
            task = None if auto is None else auto.task()
        if auto is None or task is None:
            return None
        try:
            known = auto.asked_source(task)
            # After a hold theta is the source's; a step begins at what was taught all the same.
            start = self.model.base if auto.held else None
            step = self.model.step(known.contents.x, known.weight, known.contents.logits, start=start)
        except EngineError as error:
            return self._engine_failed(error)
        return self._conclude(allowed, lambda: self._settle_window(auto, known, step))

    def _engine_failed(self, error: EngineError) -> bool:
        with self._lock:
            self._tell("refuse", Reason.ENGINE, error.cause)
        return False

    def _conclude(self, allowed: Callable[[], bool], settle: Callable[[], bool]) -> bool | None:
        """Settle a step unless something has come between."""
        with self._lock:
            if self._closed or not self.adapts or not allowed():
                return None
            try:
                return settle()
            except StaleBase as error:
                self._tell("refuse", Reason.STALE, error.cause)
                return None

    def switch(self, on: bool) -> None:
        """Let the stream adapt, a suspended one too, or not; a step that is under way is not committed then."""
        with self._lock:
            self.enabled = on
            self.suspended = self.suspended and not on
            if not on:
                self.drop_window()

    def fence(self) -> None:
        """Return when no commit is under way; the next one asks anew whether it is allowed."""
        with self._lock:
            return

    def close(self) -> None:
        """From now on nothing is committed: the stream goes to disk, or to another bundle."""
        with self._lock:
            self._closed = True
            self.drop_window()

    def drop_window(self) -> None:
        """Forget the samples that a method keeps; what came before must not be adapted on later."""
        with self._lock:
            if self.auto is not None:
                self.auto.begin_anew()

    @property
    def wants_step(self) -> bool:
        """Whether a method with a window of its own wants a step now."""
        return self.auto is not None and self.auto.due

    def reopen(self) -> None:
        """The stream stays after all."""
        with self._lock:
            self._closed = False

    # ------------------------------------------------------------------------------------------ stepping back

    def reset(self, reason: Reason = Reason.REQUESTED, detail: str = "asked for by a client") -> None:
        """Return theta and state to the source, with nothing to roll back to, and adapt again."""
        with self._lock:
            self.suspended = False
            self._strikes = self._calm = 0
            self._to_source()
            self._tell("reset", reason, detail)
            self._returned(None)

    def roll_back(self, reason: Reason = Reason.REQUESTED, detail: str = "asked for by a client") -> bool:
        """Return theta and state together to the newest checkpoint; a further call to the one before.

        Returns:
            False where there was none, and the stream went back to the source.
        """
        with self._lock:
            found = bool(self.checkpoints)
            if found:
                checkpoint = self.checkpoints.pop()
                self.model.restore(checkpoint)
                self._forget()
            else:
                self._to_source()
            self._tell("rollback", reason, f"{detail}; now at {self.model.steps} steps")
            self._returned(self.model.checkpoint if found else None)
            return found

    def resume(self, checkpoint: Checkpoint, notes: str, *, before: Checkpoint | None, restored: str) -> None:
        """Go on from what was saved.

        Args:
            checkpoint: of this stream.
            notes: saved with it; those of another version are not taken.
            before: an older checkpoint, to roll back to.
            restored: where from.
        """
        with self._lock:
            self.model.restore(checkpoint)
            self.checkpoints.clear()
            if before is not None:
                self.checkpoints.append(before)
            self.restored = restored
            self._take_notes(notes)

    def record(self, event: Event) -> None:
        """Count something that happened to this stream, and tell of it."""
        with self._lock:
            self.counts[event.reason] += 1
            self.last_event = f"{event.action}: {event.reason}"
        self._tell_all(event)

    def notes(self) -> str:
        """What must survive beside theta and state, so that the guards decide as if nothing had been."""
        with self._lock:
            form = {
                "enabled": self.enabled,
                "suspended": self.suspended,
                "strikes": self._strikes,
                "calm": self._calm,
                "counts": dict(self.counts),
                "last_event": self.last_event,
                "monitor": self.monitor.notes(),
                "stands_on": list(self.stands_on),
            }
            notes = msgspec.json.encode(form).decode()
            if (
                len(notes) > MAX_NOTES
            ):  # with tens of thousands of classes; such a file could not be read again
                notes = msgspec.json.encode({**form, "monitor": None}).decode()
            return notes

    def _take_notes(self, notes: str) -> None:
        try:
            form = msgspec.json.decode(notes) if notes else {}
            if form["monitor"] is not None:
                self.monitor.take_notes(form["monitor"])
            self.enabled, self.suspended = bool(form["enabled"]), bool(form["suspended"])
            self._strikes, self._calm = int(form["strikes"]), int(form["calm"])
            self.counts = Counter({str(name): int(count) for name, count in form["counts"].items()})
            self.last_event = str(form["last_event"])[:200]
            epoch, seq = form.get("stands_on", (0, 0))  # notes of before have none: the bundle's own theta
            self.stands_on = int(epoch), int(seq)
        except (msgspec.DecodeError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            self.monitor.clear()  # the checksum was right: another version wrote them

    # ------------------------------------------------------------------------------------------ inside

    def _answer_by_auto(
        self,
        auto: Auto,
        x: NDArray[Any],
        source: NDArray[np.float32] | None,
        *,
        adapt: bool,
        compare: bool,
    ) -> Answer:
        """Serve, watch, and where a step is due make it and serve again."""
        logits, reason = self._serve(x)
        before, stepped = self.model.checkpoint, None
        if adapt:
            self._watch(auto, x, logits)
            if auto.due:
                stepped = self.step_on_window()
            if self.model.checkpoint is not before:
                logits, returned = self._serve(x)
                reason = returned or reason
        reason = self._observe(logits, source) or reason
        if adapt:
            logits = auto.correct(logits)
        report = dict(auto.report) if stepped else {}
        return Answer(logits, source if compare else None, stepped is True, stepped is False, reason, report)

    def _watch(self, auto: Auto, x: NDArray[Any], logits: NDArray[np.float32]) -> None:
        """Let auto see what was answered, and tell of what it decides."""
        change = auto.observe(x, logits)
        if change is Change.STRONG:
            self._tell("wake", Reason.SHIFT, f"images moved by {auto.shift:.2f} standard deviations")
        elif change is Change.WEAK:
            self._tell("wake", Reason.DRIFT, f"images moved by {auto.shift:.2f} standard deviations")

    def _source(self, x: NDArray[Any], compare: bool) -> NDArray[np.float32] | None:
        if not compare and not (self.monitor.suspicious and self.departed):
            return None
        return self.model.predict(x, source=True).logits

    def _observe(self, logits: NDArray[np.float32], source: NDArray[np.float32] | None) -> Reason | None:
        self.samples += len(logits)
        collapse = self.monitor.observe(logits, source)
        if collapse is None or not self.departed:
            return None
        self._strikes += 1
        self._calm = 0
        self.roll_back(Reason.COLLAPSE, collapse)
        if self._strikes >= MAX_STRIKES:
            self.suspended = True
            self.model.rebase(self.model.theta0, self.model.theta0)  # a base may be what collapsed
            self.stands_on = (0, 0)
            self._to_source()
            self._tell("suspend", Reason.COLLAPSE, f"{self._strikes} collapses; reset it or switch it on")
            self._returned(None)
        return Reason.COLLAPSE

    def _forget(self) -> None:
        """What was seen under another theta says nothing of this one."""
        self.monitor.clear()
        if self.auto is not None:
            self.auto.begin_anew()

    def _to_source(self) -> None:
        self.model.reset()
        self.checkpoints.clear()
        self._forget()

    def _returned(self, checkpoint: Checkpoint | None) -> None:
        """Have it saved that the stream went back: to a checkpoint, or to the source."""
        if checkpoint is None and (self.suspended or not self.enabled):
            # A stream that is as new leaves nothing behind; one that stays suspended must be found so again.
            checkpoint = self.model.checkpoint
        self._keeper.returned(self, checkpoint, self.notes())

    def _step(self, x: NDArray[Any]) -> tuple[Step | None, Reason | None]:
        """A committed step, or why there is none."""
        try:
            step = self.model.step(x)
        except (BatchTooLarge, BatchTooSmall, WrongBatch) as error:
            self._tell("skip", Reason.BATCH_SIZE, error.cause)
            return None, Reason.BATCH_SIZE
        refused = self._settle(step)
        if refused is not None and refused is not Reason.PERIODIC:
            return None, refused
        return step, refused

    def _settle(self, step: Step) -> Reason | None:
        """Commit a step, or say why not; PERIODIC comes after a commit."""
        refused = objection(step, self.model.theta0, self.guards)
        if refused is not None:
            return self._refuse(*refused)
        self.model.commit(step)
        # Steps of auto begin at the source, each anew: nothing adds up that a reset would undo.
        if self.auto is None and 0 < self.guards.reset_every_steps <= self.model.steps:
            self.reset(Reason.PERIODIC, f"{self.model.steps} steps since the last reset")
            return Reason.PERIODIC
        if self.model.steps % self.guards.checkpoint_steps == 0 and not self.monitor.suspicious:
            self._check_in()
        return None

    def _settle_window(self, auto: Auto, task: Task, step: Step) -> bool:
        """Commit a step on a window, or the return to the source where the step has nothing to add."""
        finite = objection(step, self.model.theta0, self.guards)
        if finite is not None:
            self._refuse(*finite)
            auto.stepped(task, None)
            return False
        verdict = auto.judge(task, step)
        if verdict.held != auto.held:
            action = "hold" if verdict.held else "release"
            self._tell(action, Reason.NO_GAIN, f"a step gains {verdict.gain:.3f} nats on the source")
        self._settle(verdict.step)
        auto.stepped(task, verdict)
        return True

    def _check_in(self) -> None:
        """Remember the present as good."""
        self._calm += 1
        if self._calm >= CALM_CHECKPOINTS:
            self._strikes = 0
        self.checkpoints.append(self.model.checkpoint)
        self._keeper.keep(self, self.model.checkpoint, self.notes())

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
        if is_finite(logits):
            return logits, None
        source = self.model.predict(x, source=True).logits if self.departed else logits
        if not is_finite(source):
            spec = self.model.manifest.input
            raise NonFinite(
                f"the logits of this batch hold NaN or Inf, its values reach {np.abs(x).max():.3g}",
                f"Send values from {spec.low:g} to {spec.high:g}",
            )
        self.reset(Reason.NON_FINITE_LOGITS, "the serve graph's logits hold NaN or Inf")
        logits = self.model.predict(x).logits
        # Where the base itself is broken the source answers; whoever taught it is told by the reason.
        return (logits if is_finite(logits) else source), Reason.NON_FINITE_LOGITS

    def _tell(self, action: str, reason: Reason, detail: str) -> None:
        self.record(Event(self.bundle, self.name, action, reason.value, detail))
