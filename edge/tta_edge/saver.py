"""A thread that writes: checkpoints and events reach the disk without anybody waiting for it.

For each stream only the newest job waits. What cannot be written is told once, the daemon goes on in memory, and
the next job tries again.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from tta_edge.adapt import Keeper, Stream
from tta_edge.events import Event, Reason
from tta_edge.store import Key, StateStore
from tta_runtime.errors import StateUnwritable
from tta_runtime.files import reason
from tta_runtime.model import Checkpoint

log = logging.getLogger(__name__)

MAX_LINES = 1000  # events that wait for the disk; beyond it the oldest are only in memory

Job = Callable[[], None]


class Saver(Keeper):
    """Writes what streams hand it, in a thread of its own.

    Args:
        store: the state directory.

    Attributes:
        error: why the last write failed; empty when it succeeded.
    """

    def __init__(self, store: StateStore) -> None:
        self.error = ""
        self._store = store
        self._jobs: dict[Key, Job] = {}
        self._lines: deque[bytes] = deque(maxlen=MAX_LINES)
        self._wanted = threading.Condition()
        self._writing = threading.Lock()
        self._ending = False
        self._thread = threading.Thread(target=self._work, name="tta-saver", daemon=True)
        self._thread.start()

    def keep(self, stream: Stream, checkpoint: Checkpoint, notes: str) -> None:
        """Save a checkpoint soon."""
        self._put(stream.key, lambda: self._store.save(stream, checkpoint, notes))

    def returned(self, stream: Stream, checkpoint: Checkpoint | None, notes: str) -> None:
        """Make what is saved agree soon with a stream that went back."""
        self._put(stream.key, lambda: self._store.replace(stream, checkpoint, notes))

    def line(self, line: bytes) -> None:
        """Write an event's line soon."""
        with self._wanted:
            self._lines.append(line)
            self._wanted.notify()

    def save_now(self, stream: Stream) -> None:
        """Save a stream as it is now, in place of any job of it that waits.

        Raises:
            StateUnwritable: the operating system refuses.
        """
        with self._writing:  # after a job of this stream that is being written
            with self._wanted:
                self._jobs.pop(stream.key, None)
            self._try(lambda: self._store.save(stream, stream.model.checkpoint, stream.notes()))

    def settle(self, stream: Stream) -> bool:
        """Write the job of a stream that waits, now; gives whether the disk holds what it should."""
        with self._writing:
            with self._wanted:
                job = self._jobs.pop(stream.key, None)
            with suppress(StateUnwritable):
                if job is not None:
                    self._try(job)
                return True
        return False

    def save_switch(self, adapt: bool) -> bool:
        """Make the kill switch survive; gives whether it does."""
        with self._writing, suppress(StateUnwritable):
            self._try(lambda: self._store.save_switch(adapt))
            return True
        return False

    def close(self) -> None:
        """Write what waits, then end."""
        with self._wanted:
            self._ending = True
            self._wanted.notify()
        self._thread.join()

    # ------------------------------------------------------------------------------------------ inside

    def _put(self, key: Key, job: Job) -> None:
        with self._wanted:
            self._jobs[key] = job
            self._wanted.notify()

    def _work(self) -> None:
        while True:
            with self._wanted:
                while not (self._jobs or self._lines or self._ending):
                    self._wanted.wait()
                if self._ending and not (self._jobs or self._lines):
                    return
            self._write_lines()
            with self._writing:
                with self._wanted:
                    job = self._jobs.pop(next(iter(self._jobs))) if self._jobs else None
                if job is not None:
                    with suppress(StateUnwritable):
                        self._try(job)

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

    def _try(self, job: Job) -> None:
        try:
            job()
        except StateUnwritable as error:
            self._note(error.cause)
            raise
        self._note("")

    def _note(self, error: str) -> None:
        before, self.error = self.error, error
        if error and not before:
            self._store.tell(Event("", "", "disk", Reason.DISK_ERROR.value, error))
        elif before and not error:
            self._store.tell(
                Event("", "", "disk", Reason.DISK_OK.value, "the state directory is written again")
            )
