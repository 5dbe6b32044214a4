"""Running figures of a daemon: counters, histograms and latency quantiles, of bounded size. No clock, no I/O."""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from tta_runtime.histogram import Histogram

Use = Literal["scored", "generated", "absorbed"]
"""What a language model did with tokens."""
USES: tuple[Use, ...] = get_args(Use)
WINDOW = 2048  # values a quantile looks back on; older ones are forgotten, so memory never grows


def quantile(values: Iterable[float], q: float) -> float:
    """The nearest-rank quantile of some values.

    Args:
        values: any order, any unit; not modified.
        q: between 0 and 1; 0.5 is the median.

    Returns:
        A value that occurs in `values`; NaN where there are none.
    """
    ordered = sorted(values)
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


@dataclass(frozen=True)
class Figures:
    """All figures at one moment.

    Attributes:
        answered: message name -> requests that got what they asked for.
        refused: error code -> requests that got an error, or replies that could not be delivered.
        events: (action, reason) -> how often; actions and reasons are those of adapt.py and the store.
        steps: (bundle, result) -> steps of the method; the result is `committed` or `refused`.
        samples: bundle -> samples answered.
        runs: bundle -> runs of the serve graph or of an inline step.
        dropped: samples that left a window without having been adapted on.
        request_s, queue_s, compute_s, step_s: bundle -> time of a prediction from arrival to answer, of that in
            the queue, of that in the engine; and time of a background or inline step.
        latency_ms: the last predictions' times from arrival to answer.
        tokens: (bundle, use) -> tokens of language models; the use is one of `USES`.
        first_s, token_s: bundle -> time from a `generate`'s arrival to its first token, and of each token in the
            engine.
    """

    answered: Mapping[str, int]
    refused: Mapping[str, int]
    events: Mapping[tuple[str, str], int]
    steps: Mapping[tuple[str, str], int]
    samples: Mapping[str, int]
    runs: Mapping[str, int]
    dropped: int
    request_s: Mapping[str, Histogram]
    queue_s: Mapping[str, Histogram]
    compute_s: Mapping[str, Histogram]
    step_s: Mapping[str, Histogram]
    latency_ms: tuple[float, ...]
    tokens: Mapping[tuple[str, str], int]
    first_s: Mapping[str, Histogram]
    token_s: Mapping[str, Histogram]

    @property
    def ok(self) -> int:
        """How many requests got what they asked for."""
        return sum(self.answered.values())

    @property
    def failed(self) -> int:
        """How many requests got an error, or a reply that could not be delivered."""
        return sum(self.refused.values())

    def latency(self) -> dict[str, float]:
        """`p50` and `p99` in milliseconds; empty while nothing has been measured."""
        if not self.latency_ms:
            return {}
        return {"p50": quantile(self.latency_ms, 0.5), "p99": quantile(self.latency_ms, 0.99)}


class Stats:
    """What one daemon has done since it started. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answered: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._events: Counter[tuple[str, str]] = Counter()
        self._steps: Counter[tuple[str, str]] = Counter()
        self._samples: Counter[str] = Counter()
        self._runs: Counter[str] = Counter()
        self._dropped = 0
        self._request_s: dict[str, Histogram] = {}
        self._queue_s: dict[str, Histogram] = {}
        self._compute_s: dict[str, Histogram] = {}
        self._step_s: dict[str, Histogram] = {}
        self._latency_ms: deque[float] = deque(maxlen=WINDOW)
        self._tokens: Counter[tuple[str, str]] = Counter()
        self._first_s: dict[str, Histogram] = {}
        self._token_s: dict[str, Histogram] = {}

    def answered(self, kind: str) -> None:
        """Count a request that got what it asked for, by the message's name."""
        with self._lock:
            self._answered[kind] += 1

    def predicted(
        self, bundle: str, samples: int, *, queue_s: float, compute_s: float, total_s: float
    ) -> None:
        """Note a prediction's size and times, beside `answered`."""
        with self._lock:
            self._samples[bundle] += samples
            for histograms, seconds in (
                (self._request_s, total_s), (self._queue_s, queue_s), (self._compute_s, compute_s),
            ):  # fmt: skip
                histograms.setdefault(bundle, Histogram()).add(seconds)
            self._latency_ms.append(total_s * 1e3)

    def ran(self, bundle: str) -> None:
        """Count a run of the engine that answered one request or several."""
        with self._lock:
            self._runs[bundle] += 1

    def stepped(self, bundle: str, result: str, seconds: float) -> None:
        """Count a step of the method, with its result and time."""
        with self._lock:
            self._steps[bundle, result] += 1
            self._step_s.setdefault(bundle, Histogram()).add(seconds)

    def refused(self, code: str) -> None:
        """Count a request that was answered with an error, by the error's code."""
        with self._lock:
            self._refused[code] += 1

    def happened(self, action: str, reason: str) -> None:
        """Count an event."""
        with self._lock:
            self._events[action, reason] += 1

    def dropped(self, samples: int) -> None:
        """Count samples that left a window without having been adapted on."""
        with self._lock:
            self._dropped += samples

    def read(self, bundle: str, use: Use, tokens: int) -> None:
        """Count tokens of a language model."""
        with self._lock:
            self._tokens[bundle, use] += tokens

    def generated(self, bundle: str, *, compute_s: float, first_s: float | None = None) -> None:
        """Note a token that was generated, with its time; the first one with the time that it was waited for."""
        with self._lock:
            self._tokens[bundle, "generated"] += 1
            self._token_s.setdefault(bundle, Histogram()).add(compute_s)
            if first_s is not None:
                self._first_s.setdefault(bundle, Histogram()).add(first_s)

    def figures(self) -> Figures:
        """All figures as they are now."""

        def copies(histograms: dict[str, Histogram]) -> dict[str, Histogram]:
            return {name: histogram.copy() for name, histogram in histograms.items()}

        with self._lock:
            return Figures(
                dict(self._answered),
                dict(self._refused),
                dict(self._events),
                dict(self._steps),
                dict(self._samples),
                dict(self._runs),
                self._dropped,
                copies(self._request_s),
                copies(self._queue_s),
                copies(self._compute_s),
                copies(self._step_s),
                tuple(self._latency_ms),
                dict(self._tokens),
                copies(self._first_s),
                copies(self._token_s),
            )
