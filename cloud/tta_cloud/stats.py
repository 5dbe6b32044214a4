"""Running figures of a service: counters and histograms of bounded size. No clock, no I/O; for any thread."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from tta_runtime.histogram import Histogram


@dataclass(frozen=True)
class Figures:
    """All figures at one moment. Counters begin with the service.

    Attributes:
        samples: (group, outcome) -> samples that came; the outcome is `stored`, `duplicate`, or why not.
        sample_bytes: group -> bytes of those that were stored.
        refused: code -> messages of edges that got an error.
        connections: (domain, reason) -> connections that were not let in.
        heads: that were sent.
        sent: patches that were sent.
        rounds: (group, result) -> rounds, `learned` or `refused`.
        verdicts: (group, verdict) -> what the gate said, `passed` or why not.
        patches: (group, state) -> patches that came into a state.
        round_s: group -> time of a round of learning.
        commit_s: time of a commit of the store, its fsync included.
        online: group -> edges that are there now.
        rollouts: group -> stage of the newest patch.
    """

    samples: Mapping[tuple[str, str], int]
    sample_bytes: Mapping[str, int]
    refused: Mapping[str, int]
    connections: Mapping[tuple[str, str], int]
    heads: int
    sent: int
    rounds: Mapping[tuple[str, str], int]
    verdicts: Mapping[tuple[str, str], int]
    patches: Mapping[tuple[str, str], int]
    round_s: Mapping[str, Histogram]
    commit_s: Histogram
    online: Mapping[str, int]
    rollouts: Mapping[str, str]


@dataclass
class _Counters:
    samples: Counter[tuple[str, str]] = field(default_factory=Counter)
    sample_bytes: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    connections: Counter[tuple[str, str]] = field(default_factory=Counter)
    rounds: Counter[tuple[str, str]] = field(default_factory=Counter)
    verdicts: Counter[tuple[str, str]] = field(default_factory=Counter)
    patches: Counter[tuple[str, str]] = field(default_factory=Counter)
    heads: int = 0
    sent: int = 0


class Stats:
    """What one service has done since it started."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters = _Counters()
        self._round_s: dict[str, Histogram] = {}
        self._commit_s = Histogram()
        self._online: dict[str, int] = {}
        self._rollouts: dict[str, str] = {}

    def came(self, group: str, outcome: str, size_bytes: int = 0) -> None:
        """Count a sample by what became of it, and its bytes where it was stored."""
        with self._lock:
            self._counters.samples[group, outcome] += 1
            self._counters.sample_bytes[group] += size_bytes

    def refused(self, code: str) -> None:
        """Count a message that was answered with an error, by the error's code."""
        with self._lock:
            self._counters.refused[code] += 1

    def shut_out(self, domain: str, reason: str) -> None:
        """Count a connection that was not let in."""
        with self._lock:
            self._counters.connections[domain, reason] += 1

    def told(self, edges: int) -> None:
        """Count heads that were sent."""
        with self._lock:
            self._counters.heads += edges

    def handed_out(self) -> None:
        """Count a patch that was sent."""
        with self._lock:
            self._counters.sent += 1

    def learned(self, group: str, result: str, seconds: float) -> None:
        """Count a round, with its result and time."""
        with self._lock:
            self._counters.rounds[group, result] += 1
            self._round_s.setdefault(group, Histogram()).add(seconds)

    def judged(self, group: str, verdict: str) -> None:
        """Count what the gate said of a candidate."""
        with self._lock:
            self._counters.verdicts[group, verdict] += 1

    def moved(self, group: str, state: str) -> None:
        """Count a patch that came into a state."""
        with self._lock:
            self._counters.patches[group, state] += 1

    def committed(self, seconds: float) -> None:
        """Note the time of a commit of the store."""
        with self._lock:
            self._commit_s.add(seconds)

    def now(self, online: Mapping[str, int], rollouts: Mapping[str, str]) -> None:
        """Note what is there at this moment."""
        with self._lock:
            self._online, self._rollouts = dict(online), dict(rollouts)

    def figures(self) -> Figures:
        """All figures as they are now."""
        with self._lock:
            counters = self._counters
            return Figures(
                samples=dict(counters.samples),
                sample_bytes=dict(counters.sample_bytes),
                refused=dict(counters.refused),
                connections=dict(counters.connections),
                heads=counters.heads,
                sent=counters.sent,
                rounds=dict(counters.rounds),
                verdicts=dict(counters.verdicts),
                patches=dict(counters.patches),
                round_s={name: histogram.copy() for name, histogram in self._round_s.items()},
                commit_s=self._commit_s.copy(),
                online=dict(self._online),
                rollouts=dict(self._rollouts),
            )
