"""How long something takes, as counts below fixed bounds. No clock, no I/O."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

BOUNDS_S = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""Upper bounds of the histograms' buckets, in seconds."""


@dataclass
class Histogram:
    """How many values fell below each bound, as Prometheus counts them.

    Attributes:
        counts: one for each of `BOUNDS_S` and one for what is above; not cumulative.
        total: sum of all values, in seconds.
    """

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one value."""
        self.counts[bisect.bisect_left(BOUNDS_S, seconds)] += 1
        self.total += seconds

    def copy(self) -> Histogram:
        """The same figures, which go on by themselves."""
        return Histogram(list(self.counts), self.total)
