"""Whether a candidate may be published: it must not lose on samples that nobody has learned from."""

from __future__ import annotations

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
        samples: that were held out.
    """

    passed: bool
    reason: str
    score: float
    head: float
    samples: int


def held_out(key: str) -> bool:
    """Whether the sample with an idempotency key is held out; the same for ever, and told by nothing else.

    Args:
        key: 32 hex digits of a digest.
    """
    return int(key[-4:], 16) % HOLD_OUT == 0


def scores(logits: NDArray[np.float32], target: NDArray[np.float32]) -> NDArray[np.float64]:
    """[n], the probability that a student gives to the teacher's class; less ragged than whether both agree.

    Args:
        logits: [n, C] of the student.
        target: [n, C] of the teacher.
    """
    return np.asarray(softmax(logits.astype(np.float64))[np.arange(len(logits)), target.argmax(axis=1)])


def trimmed_mean(values: NDArray[np.float64], trim: float) -> float:
    """Mean without the lowest and the highest share of the values, one at each end at least where there are five.

    Args:
        values: [n], n >= 1.
        trim: share at each end, below 0.5.
    """
    cut = max(math.floor(trim * len(values)), 1 if len(values) >= 5 else 0)
    cut = min(cut, (len(values) - 1) // 2)
    return float(np.sort(values)[cut : len(values) - cut].mean())


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
        [(candidate - head)[senders == edge].mean() for edge in dict.fromkeys(edges)], dtype=np.float64
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
    n = len(edges)
    if n < options.min_samples:
        return Verdict(False, "few-samples", math.nan, math.nan, n)
    if not np.isfinite(candidate).all() or not np.isfinite(target).all():
        return Verdict(False, "non-finite", math.nan, math.nan, n)
    mine, before = scores(candidate, target), scores(head, target)
    lost = gain(mine, before, edges, options.trim) < -options.tolerance
    return Verdict(not lost, "lost" if lost else "", float(mine.mean()), float(before.mean()), n)


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
    if not np.isfinite(candidate).all():
        return Verdict(False, "non-finite", math.nan, math.nan, len(labels))
    mine = float((candidate.argmax(axis=1) == labels).mean())
    before = float((head.argmax(axis=1) == labels).mean())
    lost = mine < before - options.tolerance
    return Verdict(not lost, "lost-labelled" if lost else "", mine, before, len(labels))
