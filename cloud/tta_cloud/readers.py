"""Connections for reading: each call has one to itself, and waits neither for the writer nor for other readers."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from tta_cloud import database
from tta_cloud.errors import StoreClosed

MAX_IDLE = 4


class Readers:
    """A few connections that are kept open between reads. For any thread; a read must not be inside another.

    Args:
        connect: opens one more.
    """

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self._connect = connect
        self._changed = threading.Condition()
        self._idle: list[sqlite3.Connection] = []
        self._active = 0
        self._shut = False
        self._closed = False

    @contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """A connection on which everything that is read is from one moment.

        Raises:
            StoreClosed: the store is closed.
            sqlite3.Error: from SQLite.
        """
        with self._changed:
            while self._shut and not self._closed:
                self._changed.wait()
            if self._closed:
                raise StoreClosed("the store is closed")
            db = self._idle.pop() if self._idle else None
            self._active += 1
        good = True
        try:
            db = db or self._connect()
            db.execute("BEGIN")
            yield db
            db.execute("COMMIT")
        except sqlite3.Error:
            good = False
            raise
        finally:
            with self._changed:
                self._active -= 1
                if db is not None:
                    self._give_back(db, good)
                self._changed.notify_all()

    @contextmanager
    def shut(self) -> Iterator[None]:
        """A time without any connection: SQLite deletes a WAL file by its name, which must not be a new store's."""
        with self._changed:
            self._shut = True
            while self._active:
                self._changed.wait()
            self._close_idle()
        try:
            yield
        finally:
            with self._changed:
                self._shut = False
                self._changed.notify_all()

    def close(self) -> None:
        """Refuse further reads, wait for those under way, and close the connections."""
        with self._changed:
            self._closed = self._shut = True
            self._changed.notify_all()
            while self._active:
                self._changed.wait()
            self._close_idle()

    def _give_back(self, db: sqlite3.Connection, good: bool) -> None:
        with suppress(sqlite3.Error):
            if db.in_transaction:  # the query has raised: its snapshot must not keep the WAL from being reset
                db.execute("ROLLBACK")
            if good and not self._shut and len(self._idle) < MAX_IDLE:
                self._idle.append(db)
                return
        database.close(db)

    def _close_idle(self) -> None:
        for db in self._idle:
            database.close(db)
        self._idle.clear()
