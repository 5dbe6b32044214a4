"""The one thread that writes: operations that come close together share one commit, and so one fsync.

Each operation has a savepoint of its own in the shared transaction: one that refuses leaves no trace, the others are
committed. Where the shared commit fails (a full disk, for example), each is tried again alone, so that only those
fail that do not fit.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tta_cloud import database
from tta_cloud.errors import BadRecord, CloudError, Internal, StoreBusy, StoreClosed, StoreDamaged
from tta_cloud.operations import Done, Operation, Outcome

log = logging.getLogger(__name__)

T = TypeVar("T")
FailPoint = Callable[[str], None]
"""Called with the name of the point that is reached; a test may end the process there."""
Timed = Callable[[float], None]
"""Called with the seconds that a commit took, on the writer's thread."""


@dataclass(frozen=True)
class GroupCommit:
    """When a commit is made, and how much may wait for one.

    Attributes:
        max_rows: operations in one commit.
        max_bytes: in one commit, unless a single operation has more.
        linger_s: how long the first one waits for others; 0 commits what is there.
        max_waiting: operations that may wait.
        max_waiting_bytes: that may wait, unless nothing else does.
    """

    max_rows: int = 64
    max_bytes: int = 32 << 20
    linger_s: float = 0.020
    max_waiting: int = 1024
    max_waiting_bytes: int = 256 << 20


@dataclass(frozen=True)
class _Waiting:
    operation: Operation[Any]
    done: Done[Any]
    since_s: float


class Writer:
    """Carries out operations in the order in which they were submitted. `submit` is for any thread.

    Args:
        path: of the store's file, for messages.
        db: connection to it; it is closed with the writer.
        reopen: opens a store that was found damaged, or a new one in its place; called after `db` was closed.
        commit: when to commit.
        fail_point: told of `commit.before` and `commit.after`.
        timed: told how long each commit took, in seconds.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        path: Path,
        db: sqlite3.Connection,
        reopen: Callable[[], sqlite3.Connection],
        *,
        commit: GroupCommit,
        fail_point: FailPoint,
        timed: Timed = lambda seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = db
        self._reopen = reopen
        self._options = commit
        self._fail_point = fail_point
        self._timed = timed
        self._clock = clock
        self._wanted = threading.Condition()
        self._waiting: deque[_Waiting] = deque()
        self._bytes = 0
        self._ending = False
        self._thread = threading.Thread(target=self._work, name="store-writer", daemon=True)
        self._thread.start()

    def submit(self, operation: Operation[T], done: Done[T]) -> None:
        """Hand in an operation; `done` is told of its outcome after the commit is durable.

        Raises:
            StoreBusy: too much waits already.
            StoreClosed: the writer is closed or closing.
        """
        with self._wanted:
            if self._ending:
                raise StoreClosed("the store is closed")
            total = self._bytes + operation.size_bytes
            if len(self._waiting) >= self._options.max_waiting or (
                self._waiting and total > self._options.max_waiting_bytes
            ):
                raise StoreBusy(
                    f"{len(self._waiting)} operations of {self._bytes} bytes wait for the disk, at most "
                    f"{self._options.max_waiting} of {self._options.max_waiting_bytes} may",
                    "Try again later",
                )
            self._waiting.append(_Waiting(operation, done, self._clock()))
            self._bytes = total
            if len(self._waiting) == 1 or self._is_full():
                self._wanted.notify()

    def is_this_thread(self) -> bool:
        """Whether the caller runs on the writer's thread, where waiting for it would be for ever."""
        return threading.current_thread() is self._thread

    def close(self) -> None:
        """Commit what waits, then close the connection."""
        with self._wanted:
            self._ending = True
            self._wanted.notify()
        self._thread.join()

    # ------------------------------------------------------------------------------------------ the thread

    def _work(self) -> None:
        while group := self._next_group():
            for waiting, outcome in zip(group, self._commit(group), strict=True):
                try:
                    waiting.done(outcome)
                except Exception:
                    log.exception("a defect in what waits for %s", waiting.operation.name)
        if self._db is not None:
            database.close(self._db)

    def _next_group(self) -> list[_Waiting]:
        """Wait for what shares the next commit; empty at the end."""
        with self._wanted:
            while not self._waiting and not self._ending:
                self._wanted.wait()
            if not self._waiting:
                return []
            until_s = self._waiting[0].since_s + self._options.linger_s
            while not self._ending and not self._is_full() and (left_s := until_s - self._clock()) > 0:
                self._wanted.wait(left_s)
            group = [self._pop()]
            size = group[0].operation.size_bytes
            while self._waiting and len(group) < self._options.max_rows:
                size += self._waiting[0].operation.size_bytes
                if size > self._options.max_bytes:
                    break
                group.append(self._pop())
            return group

    def _pop(self) -> _Waiting:
        first = self._waiting.popleft()
        self._bytes -= first.operation.size_bytes
        return first

    def _is_full(self) -> bool:
        return len(self._waiting) >= self._options.max_rows or self._bytes >= self._options.max_bytes

    def _commit(self, group: list[_Waiting]) -> list[Outcome[Any]]:
        """Commit a group, or each of it alone where that fails."""
        try:
            return self._transaction(self._connected(), group)
        except CloudError as error:  # there is no store, and none can be made
            return [Outcome(error=error) for _ in group]
        except sqlite3.Error as error:
            refused = database.typed(error, self._path)
            if isinstance(refused, StoreDamaged):
                self._begin_anew()
            elif len(group) > 1:
                return [outcome for each in group for outcome in self._commit([each])]
            return [Outcome(error=refused) for _ in group]
        except Exception as error:  # whoever waits must not wait for ever
            log.exception("a defect while committing")
            defect = Internal(f"a commit failed with {type(error).__name__}", "Report it with the log")
            return [Outcome(error=defect) for _ in group]

    def _transaction(self, db: sqlite3.Connection, group: list[_Waiting]) -> list[Outcome[Any]]:
        db.execute("BEGIN IMMEDIATE")
        try:
            outcomes = [_carry_out(db, each.operation) for each in group]
            self._fail_point("commit.before")
            began_s = self._clock()
            db.execute("COMMIT")
            self._timed(self._clock() - began_s)
        except BaseException:
            with suppress(sqlite3.Error):  # SQLite may have rolled back by itself
                if db.in_transaction:
                    db.execute("ROLLBACK")
            raise
        self._fail_point("commit.after")
        return outcomes

    def _connected(self) -> sqlite3.Connection:
        if self._db is None:
            self._db = self._reopen()
        return self._db

    def _begin_anew(self) -> None:
        """Open the store again, which reads it all and sets it aside if it is damaged; else the next operation does."""
        if self._db is not None:
            database.close(self._db)
        self._db = None
        try:
            self._connected()
        except CloudError as error:
            log.error("no new store can be made: %s", error)


def _carry_out(db: sqlite3.Connection, operation: Operation[T]) -> Outcome[T]:
    """Run one operation in a savepoint; raises sqlite3.Error where the whole transaction is in question."""
    outcome: Outcome[T]
    db.execute("SAVEPOINT operation")
    try:
        outcome = Outcome(value=operation.run(db))
    except CloudError as error:
        outcome = Outcome(error=error)
    except sqlite3.Error:
        raise
    except (OverflowError, UnicodeEncodeError) as error:  # SQLite has 64 bits, and text is UTF-8
        outcome = Outcome(error=BadRecord(f"{operation.name} has a value that cannot be stored: {error}"))
    except Exception as error:
        log.exception("a defect in %s", operation.name)
        outcome = Outcome(
            error=Internal(f"{operation.name} failed with {type(error).__name__}", "Report it with the log")
        )
    if outcome.error is not None:
        db.execute("ROLLBACK TO operation")
    db.execute("RELEASE operation")
    return outcome
