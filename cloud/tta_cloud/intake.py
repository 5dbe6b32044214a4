"""What the cloud takes of what an edge sends: the filter again, with the group's present student. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tta_runtime.numerics import entropy, softmax


@dataclass(frozen=True)
class IntakeOptions:
    """What is refused.

    Attributes:
        min_entropy: in units of ln C; the group's present student is surer than that of an uninformative sample.
        max_entropy: in units of ln C; 1 refuses none for being uncertain.
        redundancy: largest cosine of a sample's probabilities and those of one among the newest; 1 refuses none.
        remembered: how many of the newest it is compared with.
        quota_per_minute: samples that one edge may have taken in a minute; 0 is no limit.
        max_share: of a round that one edge may have where there are others, so that none teaches alone.
    """

    min_entropy: float = 0.0
    max_entropy: float = 1.0
    redundancy: float = 1.0
    remembered: int = 256
    quota_per_minute: int = 0
    max_share: float = 0.5


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


def balanced(edges: Sequence[str], wanted: int, max_share: float) -> list[int]:
    """Which waiting samples make a round: in turn by edge, oldest first, none with more than its share.

    Args:
        edges: [n], who sent each, oldest first.
        wanted: samples of a round.
        max_share: of one edge, where another edge has any.

    Returns:
        Places in ascending order; fewer than wanted where there are not enough.
    """
    queues: dict[str, list[int]] = {}
    for place, edge in enumerate(edges):
        queues.setdefault(edge, []).append(place)
    most = wanted if len(queues) < 2 else max(1, math.floor(max_share * wanted))
    taken: list[int] = []
    for turn in range(most):
        for queue in queues.values():
            if len(taken) < wanted and turn < len(queue):
                taken.append(queue[turn])
    return sorted(taken)
