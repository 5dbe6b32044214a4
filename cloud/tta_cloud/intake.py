"""What the cloud takes of what an edge sends, and who makes up a round. No edge may decide alone what is learned.

Samples are filtered again with the group's present student; a round takes from every edge in turn.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta_cloud.gate import held_out
from tta_cloud.learner import METHOD, image_form
from tta_runtime import jpeg
from tta_runtime.errors import EngineError, InputError, JpegRefused
from tta_runtime.link import Encoding
from tta_runtime.model import Engines, Model
from tta_runtime.numerics import entropy, softmax
from tta_runtime.theta import Vector

ACTIVE_MS = 600_000
"""An edge that has sent something within so long before the newest sample counts as one of the group."""
RECORD = 16
"""Samples of an edge that its record is made of."""
JUDGED_FROM = 4
"""Samples below which an edge has no record."""
MIN_EDGES = 5
"""Edges below which none can be told to be unlike the others."""
LEAST_SPREAD = 0.15
"""Deviation of the divergences that is assumed at least, as a share of their median."""
LEAST_APART = 0.5
"""The same of the features' distances."""
_TINY = 1e-12


@dataclass(frozen=True)
class IntakeOptions:
    """What is refused.

    Attributes:
        min_entropy: in units of ln C; the group's present student is surer than that of an uninformative sample.
        max_entropy: in units of ln C; 1 refuses none for being uncertain.
        redundancy: largest cosine of a sample's probabilities and those of one among the newest of the same edge; 1
            refuses none. Another edge's samples silence nobody.
        remembered: how many of the newest it is compared with.
        quota_per_minute: samples that one edge may have taken in a minute; 0 is no limit.
        max_waiting: samples of one edge that may wait for a round; beyond it the oldest are given up.
        max_share: of a round that one edge may have where there are others, so that none teaches alone.
        fairness: how many times an equal share of a round one edge may have, whatever it sends.
        oddness: how unlike those of the group's other edges the samples of an edge may be, in robust deviations; see
            :func:`odd_ones`. Nothing is learned from an edge beyond it. 0: no limit.
    """

    min_entropy: float = 0.0
    max_entropy: float = 1.0
    redundancy: float = 1.0
    remembered: int = 256
    quota_per_minute: int = 0
    max_waiting: int = 512
    max_share: float = 0.5
    fairness: float = 1.5
    oddness: float = 4.0


def refusals(logits: NDArray[np.float32], recent: NDArray[np.float32], options: IntakeOptions) -> list[str]:
    """Why each sample is refused; "" where it is taken.

    Args:
        logits: [n, C] of the group's student as it is now: an edge that lags behind may be unsure of what the group has
            learned meanwhile.
        recent: [m, C] probabilities of the newest samples of the group that were taken.
        options: see :class:`IntakeOptions`.

    Returns:
        `bad-sample` (not finite), `uninformative`, `uncertain`, `redundant` or "".
    """
    classes = logits.shape[1]
    finite = np.asarray(np.isfinite(logits).all(axis=1))
    clean = np.where(finite[:, None], logits, 0).astype(np.float32)
    h, p = entropy(clean) / math.log(max(2, classes)), softmax(clean.astype(np.float64))
    known = [row / np.linalg.norm(row) for row in recent[-options.remembered :]]
    found: list[str] = []
    for i in range(len(logits)):
        direction = p[i] / np.linalg.norm(p[i])
        if not finite[i]:
            found.append("bad-sample")
        elif h[i] < options.min_entropy:
            found.append("uninformative")
        elif h[i] > options.max_entropy:
            found.append("uncertain")
        elif options.redundancy < 1 and any(float(row @ direction) > options.redundancy for row in known):
            found.append("redundant")
        else:
            known = [*known, direction][-options.remembered :]
            found.append("")
    return found


class Intake:
    """Filters what arrives for each group. For one thread.

    Args:
        student: graphs of the edges' bundle.
        options: see :class:`IntakeOptions`.

    Attributes:
        form: of the images that the student takes; None where it takes none that a JPEG can hold.
    """

    def __init__(self, student: Engines, options: IntakeOptions) -> None:
        self.form = image_form(student)
        self._student = student
        self._options = options
        self._models: dict[str, Model] = {}
        self._recent: dict[str, deque[NDArray[np.float32]]] = {}

    def teach(self, group: str, theta: Vector) -> None:
        """The group's student has learned; until then it is the source.

        Args:
            group: whose.
            theta: [P].
        """
        self._model(group).swap(theta)

    def refused(self, group: str, edge: str, x: NDArray[Any], encoding: Encoding = "raw") -> str:
        """Why a sample is refused before it is stored; "" where it is taken.

        Args:
            group: of the edge.
            edge: that sends it.
            x: [...], one sample; a JPEG file as uint8 [n].
            encoding: which of both.

        Raises:
            ImagesExtraMissing: it is a JPEG, and Pillow is not installed.
        """
        try:
            if encoding == "jpeg":
                if self.form is None:
                    return "bad-encoding"
                x = jpeg.decode(x.tobytes(), self.form)
        except JpegRefused as error:
            return error.code
        try:
            logits = self._model(group).predict(x[None]).logits
        except (InputError, EngineError):
            return "bad-sample"
        recent = self._recent.setdefault(edge, deque(maxlen=max(1, self._options.remembered)))
        known = np.array(recent, dtype=np.float32).reshape(len(recent), logits.shape[1])
        (reason,) = refusals(logits, known, self._options)
        if not reason and self._options.redundancy < 1:
            recent.append(softmax(logits[0].astype(np.float64)).astype(np.float32))
        return reason

    def _model(self, group: str) -> Model:
        if group not in self._models:
            self._models[group] = Model(self._student, METHOD)
        return self._models[group]


@dataclass(frozen=True)
class Waits:
    """A sample that waits for a round, by name.

    Attributes:
        number: of its arrival.
        edge: that sent it.
        received_ms: when.
    """

    number: int
    edge: str
    received_ms: int


@dataclass(frozen=True)
class Chosen:
    """A round, by the numbers of its samples.

    Attributes:
        new: to learn from, in order of arrival; none where there are not enough.
        held: to be held out, those that arrived before the last of them.
        surplus: to be given up: their edge has more waiting than it may.
    """

    new: tuple[int, ...]
    held: tuple[int, ...]
    surplus: tuple[int, ...]


def choose(
    waiting: Sequence[Waits], senders: Mapping[str, int], wanted: int, options: IntakeOptions
) -> Chosen:
    """Which waiting samples make a round.

    Args:
        waiting: in order of arrival.
        senders: when each edge of the group has sent last, in ms, those that wait included.
        wanted: samples of a round.
        options: see :class:`IntakeOptions`.
    """
    queues: dict[str, list[Waits]] = {}
    for each in waiting:
        queues.setdefault(each.edge, []).append(each)
    surplus = [each for queue in queues.values() for each in queue[: -options.max_waiting]]
    given_up = {each.number for each in surplus}
    left = [each for each in waiting if each.number not in given_up]
    aside = {each.number for each in left if held_out(each.number)}
    fresh = [each for each in left if each.number not in aside]
    share = fair_share(senders, options)
    places = balanced([each.edge for each in fresh], wanted, share)
    numbers = tuple(sorted(given_up))
    if len(places) < wanted:
        # One edge alone may not fill a round where others are; what it has waits for theirs.
        return Chosen((), (), numbers)
    new = tuple(fresh[place].number for place in places)
    held = tuple(sorted(number for number in aside if number < new[-1]))
    return Chosen(new, held, numbers)


def fair_share(senders: Mapping[str, int], options: IntakeOptions) -> float:
    """What one edge may have of a round: somewhat more than an equal share among those that have sent lately.

    Args:
        senders: when each edge has sent last, in ms.
        options: `max_share` and `fairness` of it.
    """
    newest = max(senders.values(), default=0)
    active = sum(newest - at_ms <= ACTIVE_MS for at_ms in senders.values())
    return 1.0 if active < 2 else min(options.max_share, options.fairness / active)


def divergences(teacher: NDArray[np.float32], student: NDArray[np.float32]) -> NDArray[np.float64]:
    """[n], KL of what a student says from what its teacher says, in nats; infinite where one has no answer.

    Args:
        teacher: [n, C] logits.
        student: [n, C] logits.
    """
    clean = np.isfinite(teacher).all(axis=1) & np.isfinite(student).all(axis=1)
    found = np.full(len(teacher), np.inf)
    p, q = (softmax(each[clean].astype(np.float64)) for each in (teacher, student))
    found[clean] = (p * (np.log(p + _TINY) - np.log(q + _TINY))).sum(axis=1)
    return found


@dataclass(frozen=True, eq=False)
class Looked:
    """What the networks make of one sample.

    Attributes:
        divergence: of the student from the teacher, in nats.
        features: [F] of the student.
    """

    divergence: float
    features: NDArray[np.float32]


def odd_ones(records: Mapping[str, Sequence[Looked]], oddness: float) -> frozenset[str]:
    """Edges whose samples are unlike those of the others.

    Two things are told. Samples that are made to mislead are learned from where teacher and student differ, so there
    the teacher contradicts the student more. And what moves the statistics of a batch has features of its own. An edge
    whose images are hard, or of its own mix of classes, differs a little from the others; distances are in deviations
    that a few edges cannot move.

    Args:
        records: what was made of the newest samples of each edge; with fewer than `JUDGED_FROM` it is not judged yet.
        oddness: see :class:`IntakeOptions`.
    """
    known = {edge: list(each) for edge, each in records.items() if len(each) >= JUDGED_FROM}
    if oddness <= 0 or len(known) < MIN_EDGES:
        return frozenset()
    contradicted = np.array([np.mean([one.divergence for one in each]) for each in known.values()])
    apart = _apart([np.stack([one.features for one in each]) for each in known.values()])
    odd = _far(contradicted, oddness, LEAST_SPREAD) | _far(apart, oddness, LEAST_APART)
    return frozenset(edge for edge, far in zip(known, odd, strict=True) if far)


def _apart(features: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """[edges], distance of each edge's mean features [n, F] from the median edge's, in standard errors."""
    means = np.stack([each.astype(np.float64).mean(axis=0) for each in features])
    middle = np.median(means, axis=0)
    spread = np.median(np.stack([each.astype(np.float64).std(axis=0) for each in features]), axis=0) + _TINY
    counts = np.array([len(each) for each in features], dtype=np.float64)
    return np.asarray(np.sqrt(counts * (((means - middle) / spread) ** 2).mean(axis=1)))


def _far(values: NDArray[np.float64], oddness: float, least: float) -> NDArray[np.bool_]:
    """[n], which values are far above the median; what is no number is."""
    finite = np.isfinite(values)
    middle = float(np.median(values[finite])) if finite.any() else 0.0
    spread = float(np.median(np.abs(values[finite] - middle))) if finite.any() else 0.0
    return np.asarray(~finite | (values > middle + oddness * max(1.4826 * spread, least * middle)))


def balanced(edges: Sequence[str], wanted: int, max_share: float) -> list[int]:
    """Which waiting samples make a round: in turn by edge, oldest first, none with more than its share.

    Args:
        edges: [n], who sent each, oldest first.
        wanted: samples of a round.
        max_share: of one edge, rounded up: else a round of many edges would be out of reach.

    Returns:
        Places in ascending order; fewer than wanted where there are not enough.
    """
    queues: dict[str, list[int]] = {}
    for place, edge in enumerate(edges):
        queues.setdefault(edge, []).append(place)
    most = max(1, math.ceil(max_share * wanted - 1e-9))
    taken: list[int] = []
    for turn in range(most):
        for queue in queues.values():
            if len(taken) < wanted and turn < len(queue):
                taken.append(queue[turn])
    return sorted(taken)
