"""From where a new group starts: the group whose samples are nearest, told by what one network makes of both. Pure.

The network is the student as the bundle has it, the same for all groups, so what one of them was taught moves no
distance. Its features are compared in their means and deviations, one by one: the Wasserstein distance of order 2 of
two Gaussians with diagonal covariances, each feature in units of what the two groups' deviations have in common.

    d(a, b)^2 = 1/F sum_f [ (m_af - m_bf)^2 + (s_af - s_bf)^2 ] / v_f        v_f = (s_af^2 + s_bf^2) / 2

As many samples are taken of each group, so that chance adds as much to each distance: about sqrt(3 / n) where two
groups are alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

LEAST = 1e-3
"""Share of the mean v_f that each v_f has at least: a feature that is nearly always 0 must not decide."""
NAMED = 8
"""Groups that a reason names, the nearest ones."""


def distance(mine: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """How unlike two sets of samples are; 0 where means and deviations agree, infinite where one cannot be told.

    Args:
        mine: [n, F] features of the same network.
        other: [m, F].
    """
    a, b = mine.astype(np.float64), other.astype(np.float64)
    if not len(a) or not len(b) or not np.isfinite(a).all() or not np.isfinite(b).all():
        return math.inf
    common = (a.var(axis=0) + b.var(axis=0)) / 2
    common = np.maximum(common, LEAST * common.mean())
    apart = (a.mean(axis=0) - b.mean(axis=0)) ** 2 + (a.std(axis=0) - b.std(axis=0)) ** 2
    # Features that never move in either set, and agree, say nothing.
    terms = np.divide(apart, common, out=np.where(apart > 0, math.inf, 0.0), where=common > 0)
    return float(np.sqrt(terms.mean()))


def ranked(distances: Mapping[str, float]) -> list[tuple[str, float]]:
    """Groups by distance, the nearest first; by name where they are equal. Those that cannot be told are left out."""
    known = [(group, value) for group, value in distances.items() if math.isfinite(value)]
    return sorted(known, key=lambda each: (each[1], each[0]))


def described(places: list[tuple[str, float]]) -> str:
    """The nearest groups with their distances, for people."""
    named = ", ".join(f"{group} {value:.2f}" for group, value in places[:NAMED])
    return named + (f" and {len(places) - NAMED} more" if len(places) > NAMED else "")
