"""The cloud's store: one SQLite file in a directory of its own. One service at a time.

    lock                        held while a service uses the directory
    cloud.db, -wal, -shm        samples, ledger, edges, tokens, learners
    cloud.db.corrupt-N          a damaged store that was set aside, with its -wal and -shm; the newest 8

What was acknowledged is durable: `submit` tells of an outcome after the commit was fsynced. Losing power loses what
was not acknowledged. A damaged file is set aside, and a new one begun.

Operations are made by `samples`, `ledger`, `edges` and `learners`; those modules also read, from the connection that
`read` hands out.
"""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from tta_cloud import database, quarantine, schema
from tta_cloud.errors import (
    BadRecord,
    CloudError,
    Internal,
    StoreBusy,
    StoreClosed,
    StoreDamaged,
    StoreFull,
    StoreInUse,
    StoreUnusable,
)
from tta_cloud.operations import Done, Operation, Outcome
from tta_cloud.readers import Readers
from tta_cloud.writer import FailPoint, GroupCommit, Timed, Writer
from tta_runtime.atomic import DISK, Disk, make_durable
from tta_runtime.files import reason
from tta_runtime.lock import existing, take

log = logging.getLogger(__name__)

FILE = "cloud.db"
T = TypeVar("T")
_FIX = "Correct its permissions, free space, or name another directory"


@dataclass(frozen=True)
class StoreEvent:
    """Something that happened to the store.

    Attributes:
        action: `quarantine`.
        reason: code of the error behind it.
        detail: the values behind it, in words.
    """

    action: str
    reason: str
    detail: str


Tell = Callable[[StoreEvent], None]
"""Somebody who wants to know of events."""


@dataclass(frozen=True)
class StoreOptions:
    """How the store is kept.

    Attributes:
        commit: when commits are made and how much may wait for one.
        checkpoint_pages: pages of 4 KiB in the WAL file beyond which they are moved into the main file; 0 never.
        max_pages: of the main file; one more is refused with `StoreFull`. 0 for as many as the disk holds.
    """

    commit: GroupCommit = field(default_factory=GroupCommit)
    checkpoint_pages: int = 1000
    max_pages: int = 0


def _nothing(point: str) -> None:
    """The fail point of everyday life."""


class Store:
    """Samples, patches, edges and learners on disk. For any thread.

    Args:
        root: the directory; made if need be, and readable by nobody else from now on.
        tell: told of a store that was set aside; it must not wait for the store.
        options: how it is kept.
        disk: what renames and syncs directories; SQLite writes its files itself.
        fail_point: told of `commit.before`, `commit.after` (see `Writer`) and `quarantine.after`.
        timed: told how long each commit took, in seconds.

    Raises:
        StoreInUse: another service holds the directory.
        StoreTooNew: a newer version wrote the store.
        StoreFull, StoreUnusable: it cannot be made, read or written.
    """

    def __init__(
        self,
        root: Path,
        tell: Tell,
        *,
        options: StoreOptions = StoreOptions(),
        disk: Disk = DISK,
        fail_point: FailPoint = _nothing,
        timed: Timed = lambda seconds: None,
    ) -> None:
        self.root = root
        self.path = root / FILE
        self._tell = tell
        self._options = options
        self._disk = disk
        self._fail_point = fail_point
        self._lock = _locked(root, disk)
        try:
            db = self._open()
        except BaseException:
            self._lock.close()
            raise
        self._readers = Readers(self._reader)
        self._writer = Writer(
            self.path, db, self._reopen, commit=options.commit, fail_point=fail_point, timed=timed
        )

    def close(self) -> None:
        """Commit what waits, and let another service have the directory."""
        self._writer.close()
        self._readers.close()
        self._lock.close()

    def submit(self, operation: Operation[T], done: Done[T]) -> None:
        """Hand in a change; `done` is told of its outcome once that is durable.

        Args:
            operation: the change.
            done: called exactly once, on the writer's thread; it must not wait for the store. The outcome's error
                is what the operation raised, or `StoreFull`, `StoreUnusable`, `StoreDamaged`, `BadRecord`,
                `Internal`; nothing of the operation is in the store then.

        Raises:
            StoreBusy: too much waits already; `done` is not called.
            StoreClosed: the store is closed; `done` is not called.
        """
        self._writer.submit(operation, done)

    def leave(self, operation: Operation[Any]) -> None:
        """Hand in a change that nobody waits for; that it was not carried out is logged."""
        try:
            self.submit(operation, _logged)
        except CloudError as error:
            log.warning("the store does not follow: %s", error)

    def call(self, operation: Operation[T]) -> T:
        """Carry out a change and wait until it is durable; raises what `submit` raises or tells."""
        if self._writer.is_this_thread():
            raise Internal("the writer's thread cannot wait for itself", "Use submit")
        ended = threading.Event()
        outcomes: list[Outcome[T]] = []

        def done(outcome: Outcome[T]) -> None:
            outcomes.append(outcome)
            ended.set()

        self.submit(operation, done)
        ended.wait()
        return outcomes[0].get()

    def read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Read what is committed, everything in one call as of one moment.

        Args:
            query: reads from the connection that it is given, and keeps nothing of it. It must not read through the
                store again.

        Raises:
            StoreClosed, StoreUnusable, StoreDamaged: it cannot be read.
            CloudError: what the query raises.
        """
        try:
            with self._readers.snapshot() as db:
                return query(db)
        except sqlite3.Error as error:
            refused = database.typed(error, self.path)
            if isinstance(refused, StoreDamaged):
                self._look_closer()
            raise refused from error
        except (OverflowError, UnicodeEncodeError) as error:
            raise BadRecord(f"a value of the query cannot be in the store: {error}") from error

    # ------------------------------------------------------------------------------------------ inside

    def _look_closer(self) -> None:
        """Let the writer read the file anew from the disk, not from its cache, and begin a new one if need be."""

        def suspect(_: sqlite3.Connection) -> None:
            raise schema.Malformed("malformed: a reader has found that")

        with suppress(StoreBusy, StoreClosed):
            self._writer.submit(Operation("store.suspect", suspect), lambda _: None)

    def _reader(self) -> sqlite3.Connection:
        db = database.connect(self.path)
        try:
            database.configure(db, checkpoint_pages=0, read_only=True)
        except BaseException:
            database.close(db)
            raise
        return db

    def _reopen(self) -> sqlite3.Connection:
        with self._readers.shut():
            return self._open()

    def _open(self) -> sqlite3.Connection:
        """The writer's connection to the store, or to a new one in the place of one that is damaged."""
        try:
            target = quarantine.finish(self.path, self._disk)
            if target is not None:
                cause = f"{self.path} was set aside by a service that was killed meanwhile"
                self._say(StoreEvent("quarantine", StoreDamaged.code, f"{cause}; moved to {target}"))
            return self._connect()
        except StoreDamaged:  # it was set aside
            return self._connect()
        except OSError as error:
            raise _unusable(self.path, error) from error

    def _connect(self) -> sqlite3.Connection:
        """A connection to the store; one that is damaged is set aside before StoreDamaged is raised."""
        _make_file(self.path, self._disk)
        db = database.connect(self.path)
        try:
            wal = self.path.with_name(f"{self.path.name}-wal")
            if self.path.stat().st_size == 0 and wal.exists() and wal.stat().st_size > 0:
                raise schema.Malformed("malformed: it is empty, and its WAL file is not")
            database.configure(db, checkpoint_pages=self._options.checkpoint_pages)
            schema.prepare(db)
            if self._options.max_pages:
                db.execute(f"PRAGMA max_page_count = {self._options.max_pages}").fetchall()
            self._note_opening(db)
        except sqlite3.Error as error:
            refused = database.typed(error, self.path, opening=True)
            try:
                if isinstance(refused, StoreDamaged):
                    self._set_aside(refused)  # before it is closed, which would fold the WAL in and delete it
            finally:
                database.close(db)
            raise refused from error
        except BaseException:
            database.close(db)
            raise
        return db

    def _note_opening(self, db: sqlite3.Connection) -> None:
        """A first small commit: a file that says that it is read-only is found out before anybody relies on it."""
        try:
            db.execute("BEGIN IMMEDIATE")
            schema.recount(db)
            schema.put_meta(db, "openings", schema.meta(db, "openings") + 1)
            db.execute("COMMIT")
        except sqlite3.Error as error:
            with suppress(sqlite3.Error):
                if db.in_transaction:
                    db.execute("ROLLBACK")
            if not isinstance(database.typed(error, self.path), StoreFull):
                raise
            log.warning("the store can be read but not written now: %s", error)

    def _set_aside(self, damage: StoreDamaged) -> None:
        try:
            target = quarantine.set_aside(self.path, self._disk)
        except OSError as error:
            raise _unusable(self.path, error) from error
        self._fail_point("quarantine.after")
        self._say(StoreEvent("quarantine", damage.code, f"{damage.cause}; moved to {target}"))

    def _say(self, event: StoreEvent) -> None:
        log.warning("%s (%s): %s", event.action, event.reason, event.detail)
        try:
            self._tell(event)
        except Exception:
            log.exception("a defect in what is told of events")


def _locked(root: Path, disk: Disk) -> IO[bytes]:
    """The lock file, locked, after the directory was made; raises StoreUnusable, StoreInUse."""
    try:
        make_durable(root, existing(root), disk)
        os.chmod(root, 0o700)
        lock = take(root / "lock")
    except OSError as error:
        raise _unusable(root, error) from error
    if lock is None:
        raise StoreInUse(f"another service uses the store {root}", "Stop it, or name another store directory")
    return lock


def _make_file(path: Path, disk: Disk) -> None:
    """A file with our permissions, which SQLite gives to -wal and -shm too; raises StoreUnusable."""
    try:
        with suppress(FileExistsError):
            os.close(disk.create(path, 0o600))
            disk.sync_directory(path.parent)
        if not stat.S_ISREG(path.lstat().st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        os.chmod(path, 0o600)
    except OSError as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: OSError) -> StoreUnusable:
    return StoreUnusable(f"{path} cannot be used: {reason(error)}", _FIX)


def _logged(outcome: Outcome[Any]) -> None:
    try:
        outcome.get()
    except CloudError as error:
        log.warning("the ledger does not follow: %s", error)
