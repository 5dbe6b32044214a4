"""Requests that wait for the answering thread, and which of them share a run of the engine."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from tta_edge.session import Arrived

Call = Callable[[], None]
"""Something else that the answering thread shall do between two requests."""


@dataclass(frozen=True)
class Mergeable:
    """That a request may be answered together with others.

    Attributes:
        key: requests of the same key fit into one batch.
        samples: of this request.
    """

    key: Hashable
    samples: int


Merge = Callable[[Arrived], Mergeable | None]
"""Says of a request whether it can share a run; None: it stands alone."""


def group(waiting: Sequence[Arrived | Call], merge: Merge, most: int) -> list[int]:
    """Which of the waiting requests are answered together next.

    The first one, and of those behind it the ones with the same key while they fit. Requests of other streams are
    passed by, so that streams do not wait for each other; within a stream nothing is overtaken, and a command
    (reset, switch) or a call is a fence for all.

    Args:
        waiting: in the order of arrival, not empty.
        merge: see `Merge`.
        most: samples in one run; a first request with more is answered by itself.

    Returns:
        Places in `waiting`, ascending, beginning with 0.
    """
    first = waiting[0]
    if len(waiting) == 1 or not isinstance(first, Arrived):
        return [0]
    mine = merge(first)
    if mine is None:
        return [0]
    places, samples = [0], mine.samples
    for place in range(1, len(waiting)):
        other = waiting[place]
        if not isinstance(other, Arrived) or "x" not in other.tensors:
            break
        theirs = merge(other)
        if theirs is not None and theirs.key == mine.key:
            if samples + theirs.samples > most:
                break
            places.append(place)
            samples += theirs.samples
        elif _same_stream(first, other):
            break  # an inline step in between changes what later requests of the stream are answered with
    return places


def _same_stream(one: Arrived, other: Arrived) -> bool:
    """Whether it may be: the empty name of a bundle stands for one of the names."""
    bundles = {getattr(request.message, "bundle", "") for request in (one, other)}
    streams = {getattr(request.message, "stream", "") for request in (one, other)}
    return len(streams) == 1 and len(bundles - {""}) <= 1


class Inbox:
    """Requests and calls for one thread. `put` and `close` are for any thread, `take` for that one.

    Args:
        merge: see `Merge`.
        most: samples in one run.
        wait_s: how long the first request may wait for others.
        clock: seconds.
    """

    def __init__(
        self, merge: Merge, *, most: int, wait_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._merge = merge
        self._most = most
        self._wait_s = wait_s
        self._clock = clock
        self._waiting: deque[Arrived | Call] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: Arrived | Call) -> None:
        """Add something at the end."""
        with self._changed:
            self._waiting.append(item)
            self._changed.notify()

    def close(self) -> None:
        """`take` gives what still waits, then nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def take(self) -> list[Arrived] | Call | None:
        """What to do next: requests that share a run, or a call; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            if self._wait_s:
                self._linger()
            places = group(self._waiting, self._merge, self._most)
            first = self._waiting[0]
            if not isinstance(first, Arrived):
                self._waiting.popleft()
                return first
            taken = [self._waiting[place] for place in places]
            for place in reversed(places):
                del self._waiting[place]
            return [item for item in taken if isinstance(item, Arrived)]

    def _linger(self) -> None:
        """Wait for company, no longer than the first request may."""
        first = self._waiting[0]
        if not isinstance(first, Arrived) or self._merge(first) is None:
            return
        until_s = first.at_s + self._wait_s

        def full() -> bool:
            places = group(self._waiting, self._merge, self._most)
            requests = [item for place in places if isinstance(item := self._waiting[place], Arrived)]
            sizes = [found.samples for item in requests if (found := self._merge(item)) is not None]
            return self._closed or len(places) < len(self._waiting) or sum(sizes) >= self._most

        # More than that is left only where the clock jumped back.
        while not full() and 0 < (left_s := until_s - self._clock()) <= self._wait_s:
            self._changed.wait(left_s)
