"""A thread that steps: it takes the samples that streams have collected, when the policy says so.

Requests are answered by another thread meanwhile, with the theta that is active; a step's theta' flips in when it
has passed the guards.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from tta_edge.adapt import Stream
from tta_edge.hosting import give_way
from tta_edge.policy import Credit, Policy, delay_s, due, earned, spent, step_size
from tta_edge.stats import Stats
from tta_edge.window import Window
from tta_runtime.errors import InputError

log = logging.getLogger(__name__)

BURST_S = 10.0  # seconds whose budget may be saved up


@dataclass
class _Waiting:
    """A stream with its window; that of a method which keeps one itself stays empty."""

    stream: Stream
    size: int
    window: Window
    shape: tuple[int, ...]
    queued: bool = False


class Stepper:
    """Collects samples of streams and steps on them. `offer` and `drop` are for the answering thread.

    Args:
        policy: when to step.
        max_bytes: of all windows together. For a sample beyond it the windows of other streams are dropped, first
            those that are not due, and of these the one that got no sample for the longest: streams that have
            gone quiet must not keep the others from adapting.
        adapting: the daemon's kill switch.
        stats: counts steps and dropped samples.
        clock: seconds.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_bytes: int,
        adapting: Callable[[], bool],
        stats: Stats,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._max_bytes = max_bytes
        self._adapting = adapting
        self._stats = stats
        self._clock = clock
        self._waiting: OrderedDict[tuple[str, str], _Waiting] = OrderedDict()  # the last one was fed last
        self._due: deque[_Waiting] = deque()
        self._bytes = 0
        self._credit = Credit(0.0, clock())
        self._cost_s = 0.0
        self._changed = threading.Condition()
        self._ending = False
        self._stepping = False
        self._thread = threading.Thread(target=self._work, name="tta-stepper", daemon=True)

    def start(self) -> None:
        """Begin to step."""
        self._thread.start()

    def offer(self, stream: Stream, x: NDArray[Any]) -> bool:
        """Collect the samples of an answered request; those of a method with a window of its own are in it already.

        Args:
            stream: that answered it and may adapt.
            x: [batch, ...].

        Returns:
            Whether they were taken: not where a step of the method has more samples than the window, or more bytes
            than all windows may have.
        """
        if stream.auto is not None:
            return self._offer_own(stream)
        spec = stream.model.spec
        size = step_size(self._policy, fixed=spec.batch, least=spec.min_batch)
        sample_bytes = max(1, x[0].nbytes)
        if size is None or size * sample_bytes > self._max_bytes:
            return False
        with self._changed:
            if self._ending:
                return False
            waiting = self._waiting.get(stream.key)
            # Named dimensions of the input may differ between requests; those of one step may not.
            if waiting is None or waiting.stream is not stream or waiting.shape != x.shape[1:]:
                self._forget(stream.key)
                capacity = min(self._policy.window, self._max_bytes // sample_bytes)
                waiting = self._waiting[stream.key] = _Waiting(stream, size, Window(capacity), x.shape[1:])
            self._waiting.move_to_end(stream.key)
            self._make_room(waiting, waiting.window.growth(len(x)) * sample_bytes)
            before = waiting.window.nbytes
            self._stats.dropped(waiting.window.put(x))
            self._bytes += waiting.window.nbytes - before
            self._queue(waiting)
        return True

    def _offer_own(self, stream: Stream) -> bool:
        with self._changed:
            if self._ending:
                return False
            waiting = self._waiting.get(stream.key)
            if waiting is None or waiting.stream is not stream:
                self._forget(stream.key)
                waiting = self._waiting[stream.key] = _Waiting(stream, 0, Window(1), ())
            self._queue(waiting)
        return True

    def drop(self, stream: Stream) -> None:
        """Forget a stream's window; it leaves memory, or went back to the source."""
        with self._changed:
            self._forget(stream.key)

    def drop_all(self) -> None:
        """Forget all windows; adaptation was switched off."""
        with self._changed:
            for key in list(self._waiting):
                self._forget(key)

    def waiting(self, stream: Stream) -> int:
        """How many samples of a stream wait."""
        with self._changed:
            found = self._waiting.get(stream.key)
            return len(found.window) if found is not None else 0

    def idle(self, timeout_s: float) -> bool:
        """Wait until no step is due or under way; False if that took too long. For tests and for the end."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._due and not self._stepping, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Step no more; wait at most so long for a step that is under way."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    # ------------------------------------------------------------------------------------------ inside

    def _queue(self, waiting: _Waiting) -> None:
        window = waiting.window
        if waiting.stream.auto is not None:
            wanted = waiting.stream.wants_step
        else:
            wanted = due(self._policy, waiting.size, waiting=len(window), fresh=window.fresh)
        if waiting.queued or not wanted:
            return
        waiting.queued = True
        self._due.append(waiting)
        self._changed.notify_all()

    def _make_room(self, waiting: _Waiting, nbytes: int) -> None:
        """Drop windows of other streams until so many further bytes fit."""
        if self._bytes + nbytes <= self._max_bytes:
            return
        others = [other for other in self._waiting.values() if other is not waiting and other.window.nbytes]
        others.sort(
            key=lambda other: other.queued
        )  # stable: within each kind the longest without samples first
        for other in others:
            self._forget(other.stream.key)
            if self._bytes + nbytes <= self._max_bytes:
                return

    def _forget(self, key: tuple[str, str]) -> None:
        waiting = self._waiting.pop(key, None)
        if waiting is None:
            return
        self._bytes -= waiting.window.nbytes
        self._stats.dropped(waiting.window.clear())
        with suppress(ValueError):
            self._due.remove(waiting)
        self._changed.notify_all()

    def _work(self) -> None:
        give_way()
        while (found := self._next()) is not None:
            self._step(*found)
            del (
                found
            )  # the next may be long in coming, and a stream that has left must not stay because of it

    def _step(self, waiting: _Waiting, x: NDArray[Any] | None) -> None:
        stream = waiting.stream
        allowed, began_s = self._adapting(), self._clock()
        committed: bool | None = None
        try:
            if allowed:
                if x is None:
                    committed = stream.step_on_window(allowed=self._adapting)
                else:
                    committed = stream.step_on(x, allowed=self._adapting)
        except InputError as error:
            log.warning("stream %s: a window could not be stepped on: %s", stream.name, error)
        except Exception:
            log.exception("a defect while stepping stream %s", stream.name)
        took_s = max(0.0, self._clock() - began_s)
        if committed is None:
            self._stats.dropped(0 if x is None else len(x))
        else:
            self._stats.stepped(stream.bundle, "committed" if committed else "refused", took_s)
        with self._changed:
            self._stepping = False
            if allowed:
                self._cost_s = took_s if self._cost_s == 0.0 else 0.8 * self._cost_s + 0.2 * took_s
                self._credit = spent(self._credit, took_s)
            if self._waiting.get(stream.key) is waiting:
                self._queue(waiting)
            self._changed.notify_all()

    def _next(self) -> tuple[_Waiting, NDArray[Any] | None] | None:
        """The stream whose turn it is, with its samples unless it has its own; waits for one. None at the end."""
        with self._changed:
            while not self._ending:
                wait_s = self._affordable_in_s() if self._due else None
                if wait_s == 0.0:
                    waiting = self._due.popleft()
                    waiting.queued = False
                    self._stepping = True
                    if waiting.stream.auto is not None:
                        return waiting, None
                    before = waiting.window.nbytes
                    x, dropped = waiting.window.take(waiting.size, newest=self._policy.kind == "every")
                    self._bytes += waiting.window.nbytes - before
                    self._stats.dropped(dropped)
                    return waiting, x
                self._changed.wait(wait_s)
            return None

    def _affordable_in_s(self) -> float:
        if self._policy.kind != "budget":
            return 0.0
        share = self._policy.budget
        self._credit = earned(self._credit, self._clock(), share=share, most_s=share * BURST_S)
        return delay_s(self._credit, min(self._cost_s, share * BURST_S), share=share)
