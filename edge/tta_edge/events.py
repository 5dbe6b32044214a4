"""What the daemon did by itself or was told to do: every reject, reset and rollback with its reason code."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path

import msgspec

from tta_edge.stats import Stats
from tta_edge.wire import EventEntry

log = logging.getLogger(__name__)

_OWN = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # no file elsewhere, no pipe that nobody reads
KEPT = 1000  # events in memory; older ones are in the file of the state directory, if there is one


class Reason(str, Enum):
    """Why something happened. Slots that were set aside have the code of the `StateError` as their reason."""

    BATCH_SIZE = "batch-size"
    """The method cannot adapt on a batch of this size; it was only answered."""
    NON_FINITE_LOGITS = "non-finite-logits"
    """The logits were not finite: of a step, which was not committed, or of the stream, which was reset."""
    NON_FINITE_THETA = "non-finite-theta"
    """The theta of a step, or of an absorbed text, was not finite; it was not committed."""
    NON_FINITE_STATE = "non-finite-state"
    """The state of a step, or of an absorbed text, was not finite; it was not committed."""
    SHIFT = "shift"
    """The images have changed strongly: method auto begins a new window and steps often."""
    DRIFT = "drift"
    """The images have changed a little: method auto steps often for a while."""
    NO_GAIN = "no-gain"
    """Method auto has (hold), or no longer has (release), nothing to add to the source, which then serves."""
    LESS_INFORMATION = "less-information"
    """A candidate base says less of live samples than what serves; it was refused."""
    DISAGREES = "disagrees"
    """A candidate base calls nearly all live samples something else than what serves; it was refused."""
    NEWER = "newer"
    """A newer patch came while a candidate base was on probation; the newer one takes its place."""
    PATCH = "patch"
    """A patch has passed its probation, or begins it."""
    MODE = "mode"
    """The daemon's mode takes no patches."""
    BALL = "ball"
    """The step would leave the ball around the source theta; the stream was reset."""
    COLLAPSE = "collapse"
    """Predictions fell into few classes where the frozen source's do not; the stream was rolled back."""
    PERIODIC = "periodic"
    """The backstop: so many steps since the last reset."""
    REQUESTED = "requested"
    """A client asked for it."""
    STALE = "stale"
    """Theta changed while a background step was computed; the step was thrown away."""
    ENGINE = "engine-failed"
    """The engine failed in a background step, or for a text; nothing has changed."""
    MEMORY_CAP = "memory-cap"
    """`max_streams` were in memory, or as many sessions as may be; the least recently used one went to disk."""
    DISK_CAP = "disk-cap"
    """`max_stored_streams` were on disk; the least recently used one was deleted."""
    DISK_ERROR = "disk-error"
    """The state directory could not be written; the daemon goes on in memory."""
    DISK_OK = "disk-ok"
    """The state directory can be written again."""
    SPOOL_FULL = "spool-full"
    """The spool holds as many samples or bytes as it may, or the disk is full; the oldest samples were dropped."""
    SPOOL_DAMAGED = "spool-damaged"
    """A file of the spool is not what was written; its damaged samples were left out."""
    START = "start"
    """Found when the daemon started."""
    RETURNED = "returned"
    """A stream or a session that was on disk is used again."""
    OTHER_BUNDLE = "other-bundle"
    """After a reload the stream does not fit the bundle; it starts from the new source. A session ends."""
    BUNDLE_REFUSED = "bundle-refused"
    """A reload found a bundle that cannot be served; the old one goes on."""


@dataclass(frozen=True)
class Event:
    """Something that happened to one stream, or to the daemon.

    Attributes:
        bundle: name of the bundle; empty for the whole daemon.
        stream: id of the stream; empty for the whole bundle or daemon.
        action: `skip` (answered, not adapted on; or a patch that a newer one overtook), `refuse` (step not
            committed), `reset`, `rollback`, `suspend`,
            `quarantine` (a state file was set aside), `restore`, `evict`, `forget`, `wake` (auto steps often again),
            `hold` and `release` (auto lets the source serve, or no longer), `stage` (a base is on probation), `commit`
            (a base serves), `switch`, `reload`, `disk` or `spool`.
        reason: a `Reason`, or the code of an error.
        detail: the values behind it, in words.
    """

    bundle: str
    stream: str
    action: str
    reason: str
    detail: str


Tell = Callable[[Event], None]
"""Somebody who wants to know of events."""

_QUIET = ("skip", "evict", "restore", "wake", "hold", "release", "stage", "commit")
"""Actions of everyday life: counted, but not worth a warning; `skip` may come with every request."""


def utc_now() -> datetime:
    """The wall clock. Nothing but the time stamps of events hangs on it."""
    return datetime.now(timezone.utc)


class EventLog:
    """The newest events in memory, counters of all, and a line for each where it is kept. For any thread.

    Args:
        stats: counts events.
        keep: takes one line (JSON, with its newline) for a file; it must not block.
        wall_clock: for the time stamps.
    """

    def __init__(
        self,
        stats: Stats,
        keep: Callable[[bytes], None] | None = None,
        wall_clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._stats = stats
        self._keep = keep
        self._wall_clock = wall_clock
        self._lock = threading.Lock()
        self._newest: deque[EventEntry] = deque(maxlen=KEPT)
        self._seq = 0

    def add(self, event: Event) -> None:
        """Count an event, log it and keep it; one that only says that a batch was not adapted on is counted."""
        self._stats.happened(event.action, event.reason)
        fields = {
            "bundle": event.bundle, "stream": event.stream, "action": event.action, "reason": event.reason,
        }  # fmt: skip
        log.log(
            logging.DEBUG if event.action in _QUIET else logging.WARNING,
            "%s%s %s (%s): %s",
            event.bundle,
            f"/{event.stream}" if event.stream else "",
            event.action,
            event.reason,
            event.detail,
            extra={"event": fields},
        )
        if event.action == "skip":
            return
        with self._lock:
            self._seq += 1
            time = self._wall_clock().isoformat(timespec="milliseconds")
            entry = EventEntry(seq=self._seq, time=time, **fields, detail=event.detail)
            self._newest.append(entry)
            if self._keep is not None:
                self._keep(msgspec.json.encode(entry) + b"\n")

    def newest(self, limit: int) -> list[EventEntry]:
        """The newest events, oldest first."""
        with self._lock:
            return list(self._newest)[-limit:]


class EventFile:
    """JSON lines of bounded size: at `max_bytes` the file becomes `NAME.1`, whose predecessor is dropped.

    Args:
        path: of the file.
        max_bytes: size at which it is rotated.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.max_bytes = max_bytes

    def append(self, line: bytes) -> None:
        """Add a line.

        Raises:
            OSError: from the operating system; the line is not there then.
        """
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _OWN, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size == 0 or size + len(line) <= self.max_bytes:
                if os.write(fd, line) < len(line):
                    os.ftruncate(fd, size)  # the disk is full: the next line must not follow half of one
                return
        finally:
            os.close(fd)
        os.replace(self.path, self.path.with_name(f"{self.path.name}.1"))
        self.append(line)
