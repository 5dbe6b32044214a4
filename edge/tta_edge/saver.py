"""A thread that writes: checkpoints and events reach the disk without anybody waiting for it.

For each stream only the newest job waits. What cannot be written is told once, the daemon goes on in memory, and
the job waits for the next one, or for a few seconds, to be tried again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace

from tta_edge.adapt import Keeper
from tta_edge.events import Event, Reason
from tta_edge.store import Kept, Key, StateStore
from tta_runtime.errors import StateUnwritable
from tta_runtime.files import reason
from tta_runtime.model import Checkpoint

log = logging.getLogger(__name__)

MAX_LINES = 1000  # events that wait for the disk; beyond it the oldest are only in memory
RETRY_S = 5.0  # until what could not be written is tried again, if nothing else is to be written before
SWITCH: Key = ("", "")
"""Stands for the kill switch where streams have their keys."""


@dataclass(frozen=True)
class Job:
    """What the disk shall hold of a stream.

    Attributes:
        stream: whose it is.
        checkpoint: None for a stream that is as new.
        notes: saved with the checkpoint.
        alone: whether what was saved before must go.
    """

    stream: Kept
    checkpoint: Checkpoint | None
    notes: str
    alone: bool

    def write(self, store: StateStore) -> None:
        """Carry it out; raises StateUnwritable."""
        if self.checkpoint is None:
            store.clear(self.stream)
        else:
            store.save(self.stream, self.checkpoint, self.notes, alone=self.alone)


@dataclass(frozen=True)
class Switching:
    """What the disk shall hold of the kill switch."""

    adapt: bool

    def write(self, store: StateStore) -> None:
        """Carry it out; raises StateUnwritable."""
        store.save_switch(self.adapt)


class Saver(Keeper):
    """Writes what streams hand it, in a thread of its own.

    Args:
        store: the state directory.
        retry_s: see `RETRY_S`.
    """

    def __init__(self, store: StateStore, *, retry_s: float = RETRY_S) -> None:
        self._store = store
        self._retry_s = retry_s
        self._jobs: dict[Key, Job | Switching] = {}
        self._lines: deque[bytes] = deque(maxlen=MAX_LINES)
        self._wanted = threading.Condition()
        self._writing = threading.Lock()
        self._failed: dict[Key, str] = {}
        self._at: Key | None = None  # what is being written
        self._resume_s = 0.0  # jobs wait until then, unless a new one comes
        self._ending = False
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="tta-saver", daemon=True)
        self._thread.start()

    @property
    def error(self) -> str:
        """Why something is not on disk that should be; empty where all is."""
        with self._wanted:
            return next(iter(self._failed.values()), "")

    def keep(self, stream: Kept, checkpoint: Checkpoint, notes: str) -> None:
        """Save a checkpoint soon."""
        self._put(Job(stream, checkpoint, notes, alone=False))

    def returned(self, stream: Kept, checkpoint: Checkpoint | None, notes: str) -> None:
        """Make what is saved agree soon with a stream that went back."""
        self._put(Job(stream, checkpoint, notes, alone=True))

    def drop(self, stream: Kept) -> None:
        """Forget the job of a stream that waits: what it holds fits the bundle no longer."""
        with self._writing:
            with self._wanted:
                self._jobs.pop(stream.key, None)
            self._note(stream.key, "")

    def line(self, line: bytes) -> None:
        """Write an event's line soon."""
        with self._wanted:
            self._lines.append(line)
            self._wanted.notify()

    def save_now(self, stream: Kept) -> None:
        """Save a stream as it is now, in place of any job of it that waits.

        Raises:
            StateUnwritable: the operating system refuses; it is tried again.
        """
        self.keep(stream, stream.model.checkpoint, stream.notes())
        self._write_now(stream.key)

    def settle(self, stream: Kept) -> bool:
        """Write the job of a stream that waits, now; gives whether the disk holds what it should."""
        with suppress(StateUnwritable):
            self._write_now(stream.key)
            return True
        return False

    def owes(self, key: Key) -> bool:
        """Whether something of a stream is still to be written; for any thread, and waits for no write."""
        with self._wanted:
            return key in self._jobs or key in self._failed or key == self._at

    def save_switch(self, adapt: bool) -> bool:
        """Make the kill switch survive; gives whether it does yet."""
        with self._wanted:
            self._jobs[SWITCH] = Switching(adapt)
        with suppress(StateUnwritable):
            self._write_now(SWITCH)
            return True
        return False

    def close(self) -> None:
        """Write what waits, what failed before once more, then end; from then on the directory is another's."""
        with self._wanted:
            self._ending = True
            self._wanted.notify()
        self._thread.join()
        with self._writing:
            self._closed = True

    # ------------------------------------------------------------------------------------------ inside

    def _put(self, job: Job) -> None:
        key = job.stream.key
        with self._wanted:
            waits = self._jobs.get(key)
            if isinstance(waits, Job) and waits.alone:
                job = replace(job, alone=True)  # what it was to delete is still there
            self._jobs[key] = job
            self._resume_s = 0.0
            self._wanted.notify()

    def _work(self) -> None:
        while True:
            with self._wanted:
                while (wait_s := self._idle_s()) != 0.0:
                    self._wanted.wait(wait_s)
                if self._ending and not (self._jobs or self._lines):
                    return
                due = self._jobs and (self._ending or time.monotonic() >= self._resume_s)
                key = next(iter(self._jobs)) if due else None
            self._write_lines()
            if key is not None:
                with suppress(StateUnwritable):
                    self._write_now(key)

    def _idle_s(self) -> float | None:
        """Seconds until there is something to write; None until somebody hands it in."""
        if self._lines or self._ending:
            return 0.0
        return max(0.0, self._resume_s - time.monotonic()) if self._jobs else None

    def _write_lines(self) -> None:
        while True:
            with self._wanted:
                if not self._lines:
                    return
                line = self._lines.popleft()
            try:
                self._store.append_event(line)
            except OSError as error:
                log.debug("an event was not written: %s", reason(error))

    def _write_now(self, key: Key) -> None:
        """Carry out the job that waits under a key, after one that is being written; if there is any."""
        with self._writing:
            if self._closed:
                raise StateUnwritable("the daemon has ended", "Start it again")
            with self._wanted:
                job = self._jobs.pop(key, None)
                failed = self._failed.get(key)
                self._at = None if job is None else key
            if job is None:
                if failed is not None:
                    raise StateUnwritable(failed, "Correct the state directory")
                return
            try:
                job.write(self._store)
            except StateUnwritable as error:
                with self._wanted:
                    if not self._ending:
                        self._again(key, job)
                self._note(key, error.cause)
                raise
            except Exception as error:
                log.exception("a defect while writing")  # trying again would not help
                self._note(key, f"a defect: {type(error).__name__}")
                raise StateUnwritable(
                    f"writing failed with {type(error).__name__}", "Report it with the daemon's log"
                ) from error
            self._note(key, "")

    def _again(self, key: Key, job: Job | Switching) -> None:
        """Let a job wait that failed, behind the others, unless a newer one does already."""
        newer = self._jobs.get(key)
        if newer is None:
            self._jobs[key] = job
        elif isinstance(newer, Job) and isinstance(job, Job) and job.alone:
            self._jobs[key] = replace(newer, alone=True)
        self._resume_s = time.monotonic() + self._retry_s
        self._wanted.notify()

    def _note(self, key: Key, error: str) -> None:
        with self._wanted:
            before = bool(self._failed)
            self._at = None
            self._failed.pop(key, None)
            if error:
                self._failed[key] = error
            now = bool(self._failed)
        if now and not before:
            self._store.tell(Event("", "", "disk", Reason.DISK_ERROR.value, error))
        elif before and not now:
            detail = "the state directory is written again"
            self._store.tell(Event("", "", "disk", Reason.DISK_OK.value, detail))
