"""Whether a candidate may be published: it must not lose on samples that nobody has learned from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tta_runtime.numerics import softmax

HOLD_OUT = 8
"""One sample in so many is held out."""


@dataclass(frozen=True)
class GateOptions:
    """What a candidate must keep.

    Attributes:
        tolerance: how much of the score a candidate may lose against the head, as a fraction.
        min_samples: held-out samples below which the gate has no say; until then the edges' own probation judges alone.
        trim: share of edges, at each end, whose scores do not count: a few edges must not decide for all.
    """

    tolerance: float = 0.005
    min_samples: int = 16
    trim: float = 0.2


@dataclass(frozen=True)
class Verdict:
    """What the gate says.

    Attributes:
        passed: whether the candidate may be published.
        reason: "" or why not: `few-samples`, `non-finite`, `lost`, `lost-labelled`.
        score: of the candidate; NaN where it could not be told.
        head: of what is published now.
        samples: that were held out and say something.
    """

    passed: bool
    reason: str
    score: float
    head: float
    samples: int


def held_out(number: int) -> bool:
    """Whether a sample is held out; the same for ever, and told by nothing else.

    By the order of arrival, which is the cloud's to say: an edge writes its own keys, and must not choose what judges
    its patches. The same arrivals make the same rounds.

    Args:
        number: of the sample's arrival, see `records.Stored`.
    """
    return hashlib.sha256(b"hold-out %d" % number).digest()[0] % HOLD_OUT == 0


def jury(edges: Sequence[str], most: int) -> list[int]:
    """Which held-out samples judge: in turn by edge, the newest first, so that who sends most drives out nobody.

    Args:
        edges: [n], who sent each, oldest first.
        most: how many.

    Returns:
        Places in ascending order.
    """
    queues: dict[str, list[int]] = {}
    for place in reversed(range(len(edges))):
        queues.setdefault(edges[place], []).append(place)
    turns = sorted((turn, -place) for queue in queues.values() for turn, place in enumerate(queue))
    return sorted(-place for _, place in turns[:most])


def answered(logits: NDArray[np.float32]) -> NDArray[np.bool_]:
    """[n], whether logits [n, C] are all finite."""
    return np.asarray(np.isfinite(logits).all(axis=1))


def scores(logits: NDArray[np.float32], target: NDArray[np.float32]) -> NDArray[np.float64]:
    """[n], the probability that a student gives to the teacher's class; less ragged than whether both agree.

    Args:
        logits: [n, C] of the student; what is not finite is no answer, and scores 0.
        target: [n, C] of the teacher, finite.
    """
    answers = answered(logits)
    found = np.zeros(len(logits))
    rows = softmax(logits[answers].astype(np.float64)) if answers.any() else logits[answers]
    found[answers] = rows[np.arange(len(rows)), target[answers].argmax(axis=1)]
    return found


def trimmed(count: int, trim: float) -> int:
    """How many of so many values do not count at each end, one at least where there are five.

    Args:
        count: of the values, >= 1.
        trim: share at each end, below 0.5.
    """
    return min(max(math.floor(trim * count), 1 if count >= 5 else 0), (count - 1) // 2)


def trimmed_mean(values: NDArray[np.float64], trim: float) -> float:
    """Mean without the lowest and the highest share of the values; see `trimmed`.

    Args:
        values: [n], n >= 1.
        trim: share at each end, below 0.5.
    """
    cut = trimmed(len(values), trim)
    return _mean(np.sort(values)[cut : len(values) - cut])


def _mean(values: NDArray[np.float64]) -> float:
    """Mean of [n]; summed without rounding, so that the order of samples cannot turn a verdict."""
    return math.fsum(values) / len(values)


def gain(
    candidate: NDArray[np.float64], head: NDArray[np.float64], edges: Sequence[str], trim: float
) -> float:
    """What a candidate gains on the head: the trimmed mean over edges of each edge's own mean difference.

    Edges have a say each, not samples: who sends most must not decide. Differences are trimmed, not scores: an edge
    with hard images is no liar.

    Args:
        candidate: [n] scores.
        head: [n] scores on the same samples.
        edges: [n], who sent each sample.
        trim: see `trimmed_mean`.
    """
    senders = np.array(edges)
    each = np.array(
        [_mean((candidate - head)[senders == edge]) for edge in dict.fromkeys(edges)], dtype=np.float64
    )
    return trimmed_mean(each, trim)


def judge(
    candidate: NDArray[np.float32],
    head: NDArray[np.float32],
    target: NDArray[np.float32],
    edges: Sequence[str],
    options: GateOptions,
) -> Verdict:
    """Judge a candidate on held-out samples.

    Args:
        candidate: [n, C] logits of the candidate.
        head: [n, C] of what is published now (of the source, before the first patch).
        target: [n, C] of the teacher.
        edges: [n], who sent each sample.
        options: see :class:`GateOptions`.
    """
    # Sensors and liars send values on which any network overflows: where neither student or no teacher has an
    # answer, a sample says nothing of the candidate.
    able = answered(candidate)
    kept = answered(target) & (able | answered(head))
    n, senders = int(kept.sum()), [edge for edge, keep in zip(edges, kept, strict=True) if keep]
    if n == 0 < len(edges):
        return Verdict(False, "non-finite", math.nan, math.nan, n)
    if n < max(options.min_samples, 1):
        return Verdict(False, "few-samples", math.nan, math.nan, n)
    # So few may be hostile that the gain is told without them; from more the candidate would take the answer away.
    silenced = {edge for edge, answers in zip(senders, able[kept], strict=True) if not answers}
    if len(silenced) > trimmed(len(set(senders)), options.trim):
        return Verdict(False, "non-finite", math.nan, math.nan, n)
    mine, before = scores(candidate[kept], target[kept]), scores(head[kept], target[kept])
    lost = gain(mine, before, senders, options.trim) < -options.tolerance
    return Verdict(not lost, "lost" if lost else "", _mean(mine), _mean(before), n)


def judge_labelled(
    candidate: NDArray[np.float32],
    head: NDArray[np.float32],
    labels: NDArray[np.int64],
    options: GateOptions,
) -> Verdict:
    """The same against true labels, where an operator has some.

    Args:
        candidate: [n, C] logits.
        head: [n, C] logits.
        labels: [n].
        options: see :class:`GateOptions`.
    """
    if not len(labels):
        return Verdict(False, "few-samples", math.nan, math.nan, 0)
    if not np.isfinite(candidate).all():
        return Verdict(False, "non-finite", math.nan, math.nan, len(labels))
    mine = float((candidate.argmax(axis=1) == labels).mean())
    before = float((answered(head) & (head.argmax(axis=1) == labels)).mean())
    lost = mine < before - options.tolerance
    return Verdict(not lost, "lost-labelled" if lost else "", mine, before, len(labels))
