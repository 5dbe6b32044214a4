"""Running figures of a daemon: counters by name and latency quantiles, of bounded size. No clock, no I/O."""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from dataclasses import dataclass, field

WINDOW = 2048  # values a quantile looks back on; older ones are forgotten, so memory never grows


def quantile(values: list[float], q: float) -> float:
    """The nearest-rank quantile of some values.

    Args:
        values: any order, any unit; not modified.
        q: between 0 and 1; 0.5 is the median.

    Returns:
        A value that occurs in `values`; NaN where there are none.
    """
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


@dataclass
class Quantiles:
    """The last `WINDOW` values of one measured quantity."""

    window: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, value: float) -> None:
        """Remember one value, forgetting the oldest when the window is full."""
        self.window.append(value)

    def at(self, q: float) -> float:
        """The quantile `q` of the window; NaN while it is empty."""
        return quantile(list(self.window), q)


class Stats:
    """What one daemon has done since it started. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answered: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._latency_ms = Quantiles()

    def answered(self, kind: str, latency_ms: float | None = None) -> None:
        """Count a request that got what it asked for.

        Args:
            kind: the message's name, such as `predict`.
            latency_ms: from arrival to answer, in milliseconds; None for messages that measure nothing.
        """
        with self._lock:
            self._answered[kind] += 1
            if latency_ms is not None:
                self._latency_ms.add(latency_ms)

    def refused(self, code: str) -> None:
        """Count a request that was answered with an error, by the error's code."""
        with self._lock:
            self._refused[code] += 1

    @property
    def ok(self) -> int:
        """How many requests got what they asked for."""
        with self._lock:
            return self._answered.total()

    @property
    def failed(self) -> int:
        """How many requests got an error, or a reply that could not be delivered."""
        with self._lock:
            return self._refused.total()

    def failures(self) -> dict[str, int]:
        """Error code -> how often."""
        with self._lock:
            return dict(self._refused)

    def latency(self) -> dict[str, float]:
        """`p50` and `p99` in milliseconds; empty while nothing has been measured."""
        with self._lock:
            if not self._latency_ms.window:
                return {}
            return {"p50": self._latency_ms.at(0.5), "p99": self._latency_ms.at(0.99)}
