"""Auto: when a stream steps, on which samples, and what the order of its labels says; decided from the stream alone.

A stream begins awake. While awake it steps on its window often; when its window has been renewed without a change in
the images it rests and steps rarely. A weak change in the images wakes it; a strong one also empties the window, for
what it holds is of another world.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta_edge.gallery import Contents, Gallery, Shelf
from tta_edge.prior import Prior
from tta_edge.sight import CHUNK, Change, Floats, Watch, sight
from tta_runtime.errors import EngineError
from tta_runtime.model import Model, Step
from tta_runtime.numerics import entropy, softmax
from tta_runtime.theta import Vector

OFTEN = 64  # fresh samples between two steps while awake
RARELY = 2048  # and while resting
SETTLED = 8  # steps after the last change until it rests


DULL = 0.01  # standard deviation, in units of the input's range, below which a frame shows nothing
LEAST = 8  # samples that are like the others; of fewer there are no moments
FAR = 3.5  # spreads from the median, beyond which a sample of the window is not like the others
SPREAD = 0.05  # added to spreads: samples that are alike have none
GAIN = 0.02  # nats of information that a step must add to what the source's predictions hold
TURN = (
    0.2  # of the window's samples that a step takes for others than before, beyond which it is another model
)
SHIFTED = 1.0  # squared spreads from the source, beyond which images are of another world
LOSS = (
    0.1  # nats that a step may lose there: a source that is sure of what it does not know informs of nothing
)


@dataclass(frozen=True, eq=False)
class Task:
    """What a step is made on.

    Attributes:
        contents: of the window.
        weight: [n], 0 for samples that are not like the others.
    """

    contents: Contents
    weight: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a step is worth.

    Attributes:
        step: to commit: as it was, or one that returns to the source.
        held: whether the source serves because the step has nothing to add.
        gain: nats of information beyond the source's.
    """

    step: Step
    held: bool
    gain: float


@dataclass(frozen=True, eq=False)
class Typical:
    """What the samples of a window look like.

    An attacker whose pixels are free, a frame of noise, a burst of another scene: what is rare in a window and far from
    the rest shall not move the rest. Outliers drag median and median deviation along, so the more there are the farther
    off they must be to be told: about 4 spreads where they are few, 9 where they are a fifth, 16 at two fifths.

    Attributes:
        median: [S].
        spread: [S], from the median deviation.
    """

    median: Floats
    spread: Floats

    @classmethod
    def of(cls, sights: Floats) -> Typical:
        """From sights [n, S]."""
        median = np.median(sights, axis=0)
        return cls(median, 1.4826 * np.median(np.abs(sights - median), axis=0) + SPREAD)

    def holds(self, sights: Floats) -> NDArray[np.bool_]:
        """[n], which samples are not far from it."""
        return np.asarray((np.abs(sights - self.median) / self.spread).max(axis=1) <= FAR)


def information(logits: NDArray[np.float32]) -> float:
    """How much predictions say about samples: the entropy of their mean less their mean entropy, in nats.

    Args:
        logits: [n, C], finite.

    Source: Bridle, Heading and MacKay, Unsupervised Classifiers, Mutual Information and Phantom Targets, NeurIPS 1991.
    """
    p = softmax(logits.astype(np.float64))
    mean = p.mean(axis=0)
    return float(-(mean * np.log(mean + 1e-300)).sum() - entropy(logits).mean())


class Auto:
    """The decisions for one stream. For one thread at a time.

    Args:
        model: of the stream; its method has a window.
        shelf: bounds the memory of windows.

    Attributes:
        report: of the last committed step.
        held: whether the source serves, because the last step had nothing to add.
        gain: of the last step, in nats; None before the first.
    """

    def __init__(self, model: Model, shelf: Shelf) -> None:
        self._model = model
        self._low, self._high = model.manifest.input.low, model.manifest.input.high
        self._shelf = shelf
        self.gallery = Gallery(min(model.spec.window, model.limits.max_batch))
        self.prior = Prior(model.manifest.classes)
        self.report: Mapping[str, float] = {}
        self._begin()

    def _begin(self) -> None:
        self._watch = Watch()
        self._last: Floats | None = None
        self._typical: Typical | None = None
        self._fresh = self._since = 0
        self._pause = CHUNK
        self.held = False
        self.gain: float | None = None

    def begin_anew(self) -> None:
        """Theta was reset or rolled back: forget the window and wake."""
        self._shelf.clear(self.gallery)
        self.report = {}
        self._begin()

    def realign(self) -> None:
        """What was taught has changed: the next answer makes a step, on the window as it is."""
        self._fresh = max(self._fresh, RARELY)

    @property
    def resting(self) -> bool:
        """Whether it steps rarely."""
        return self._since >= SETTLED

    @property
    def shift(self) -> float:
        """How far the images last moved, in standard deviations of single ones."""
        return self._watch.effect

    def observe(self, x: NDArray[Any], logits: NDArray[np.float32]) -> Change:
        """Take samples that were answered.

        Args:
            x: [batch, ...], finite.
            logits: [batch, C], of the serving graph.

        Returns:
            What they say of the images.
        """
        seen = sight(x, self._low, self._high)
        shows = self._shows(seen)
        usual = shows if self._typical is None else shows & self._typical.holds(seen)
        if not shows.any():
            return Change.NONE
        change = self._watch.observe(seen[shows])
        if change is Change.STRONG:
            self._shelf.clear(self.gallery)
            self.prior.forget()
            self._typical = None
            self._pause = CHUNK
        if change is not Change.NONE:
            self._since = 0
        self.prior.observe(logits, usual)
        x, logits, seen = x[shows], logits[shows], seen[shows]
        self._fresh += self._shelf.add(
            self.gallery,
            x,
            logits,
            seen,
            source=self._model.distance == 0,
            favour=self.prior.favour,
            at_most=self._model.limits.max_bytes // max(1, x[0].nbytes),
        )
        return change

    def correct(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """An answer: where labels come in runs, with the present classes in favour.

        Args:
            logits: [batch, C], of the serving graph.
        """
        return self.prior.correct(logits)

    def _shows(self, seen: Floats) -> NDArray[np.bool_]:
        """[batch], which samples show a scene: not those without contrast, nor what is the same as one before it."""
        shows = np.exp(seen[:, 1]) >= DULL
        shows[1:] &= (seen[1:] != seen[:-1]).any(axis=1)
        if self._last is not None:
            shows[0] &= bool((seen[0] != self._last).any())
        self._last = seen[-1].copy()
        return shows

    @property
    def due(self) -> bool:
        """Whether a step is wanted now."""
        return self._fresh >= (RARELY if self.resting else self._pause) and len(self.gallery) >= CHUNK

    def task(self) -> Task | None:
        """What to step on; None where the window was emptied for those of other streams, or holds nothing alike."""
        self._fresh = 0
        found = self._shelf.contents(self.gallery, CHUNK)
        if found is None:
            return None
        self._typical = Typical.of(found.sights)
        weight = self._typical.holds(found.sights).astype(np.float32)
        return Task(found, weight) if weight.sum() >= LEAST else None

    def judge(self, task: Task, step: Step) -> Verdict:
        """Whether a step is worth committing.

        Where adapting helps, predictions say more about the samples than the source's do: they are more certain of
        each or less alike over all. Where they do not, the source serves. Far from the source about as much is enough:
        there the source may be certain and wrong.

        Args:
            task: that it was made on; what the source says of its samples is known.
            step: finite.
        """
        counts = task.weight > 0
        gain = information(step.logits[counts]) - information(task.contents.source[counts])
        held = gain < (-LOSS if step.report.get("shift", 0.0) > SHIFTED else GAIN)
        if not held:
            return Verdict(step, held, gain)
        return Verdict(replace(step, theta=self._unstepped(task, counts)), held, gain)

    def _unstepped(self, task: Task, counts: NDArray[np.bool_]) -> Vector:
        """What serves where a step has nothing to add: the source, or a taught base that says more than the source."""
        model = self._model
        if model.base is model.theta0:
            return model.theta0
        try:
            said = model.predict(task.contents.x[counts], instead=model.base).logits
        except EngineError:
            return model.theta0
        if not np.isfinite(said).all():
            return model.theta0
        more = information(said) > information(task.contents.source[counts])
        return model.base if more else model.theta0

    def stepped(self, task: Task, verdict: Verdict | None) -> None:
        """A step has been committed; None: it was refused."""
        self._since += 1
        self._pause = min(2 * self._pause, OFTEN)
        if verdict is None:
            return
        self.report, self.held, self.gain = verdict.step.report, verdict.held, verdict.gain
        source = task.contents.source
        logits = source if verdict.held else verdict.step.logits
        if (logits.argmax(1) != task.contents.logits.argmax(1)).mean() > TURN:
            # The model has changed, not the labels: a jump in its predictions is no run.
            self.prior.compare_anew()
        self._shelf.relabel(self.gallery, task.contents.keys, logits, source)

    def asked_source(self, task: Task) -> Task:
        """The task with what the source says of its samples, which is asked where it is not known.

        Raises:
            EngineError: the engine failed.
        """
        contents = task.contents
        unknown = np.isnan(contents.source[:, 0])
        if not unknown.any():
            return task
        source = contents.source.copy()
        source[unknown] = self._model.predict(contents.x[unknown], source=True).logits
        return replace(task, contents=replace(contents, source=source))
