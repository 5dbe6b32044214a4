"""Connections to the store's file, and SQLite's errors by our names."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote

from tta_cloud.errors import BadRecord, CloudError, Internal, StoreDamaged, StoreFull, StoreUnusable

BUSY_S = 5.0
"""How long SQLite may wait for a lock; ours are only held by the recovery of a killed service's file."""
_FIX = "Correct the permissions of the store's directory, or name another one"
# Messages, because Python 3.10 does not give the codes. They have been the same for as long as SQLite 3 exists.
_FULL = ("database or disk is full",)
_DAMAGE = (
    "file is not a database",
    "file is encrypted",
    "malformed",
    "unsupported file format",
    "database corruption",
)


def connect(path: Path) -> sqlite3.Connection:
    """A connection to a file that exists, of which nothing was read yet; raises sqlite3.Error."""
    return sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?mode=rw",
        uri=True,
        isolation_level=None,  # transactions begin where we say so
        timeout=BUSY_S,
        check_same_thread=False,  # a connection goes from thread to thread, and is with one at a time
    )


def configure(db: sqlite3.Connection, *, checkpoint_pages: int, read_only: bool = False) -> None:
    """Bring a connection into WAL mode, where it makes every commit durable.

    Args:
        db: the connection.
        checkpoint_pages: pages of the WAL file beyond which a commit moves them into the file itself; 0 never.
        read_only: whether it is for reading.

    Raises:
        sqlite3.Error: from SQLite.
    """
    db.text_factory = _text
    (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise sqlite3.OperationalError(f"unable to open in WAL mode, it stays in mode {mode}")
    for pragma in (
        "synchronous = FULL",  # in WAL mode: fsync at each commit, not only at checkpoints
        f"wal_autocheckpoint = {checkpoint_pages}",
        f"journal_size_limit = {64 << 20}",  # a WAL that a long reader has made grow is cut again
        "trusted_schema = OFF",
        "cell_size_check = ON",
        "temp_store = MEMORY",
        *(["query_only = ON"] if read_only else []),
    ):
        with closing(db.execute(f"PRAGMA {pragma}")) as cursor:
            cursor.fetchall()


def typed(error: sqlite3.Error, path: Path, *, opening: bool = False) -> CloudError:
    """What an error of SQLite means for the caller.

    Args:
        error: from SQLite.
        path: of the store's file.
        opening: whether it came from the first write to it.
    """
    text = str(error)
    if any(word in text for word in _FULL):
        return StoreFull(f"{path} cannot grow: {text}", "Free space, or lower what is kept of the samples")
    if any(word in text for word in _DAMAGE) or (opening and _claims_to_be_read_only(text, path)):
        return StoreDamaged(f"{path} is damaged: {text}", "Restore a backup if one is needed")
    if isinstance(error, (sqlite3.IntegrityError, sqlite3.DataError)) or "too big" in text:
        return BadRecord(f"the record cannot be stored: {text}", "Correct the value")
    if isinstance(error, (sqlite3.ProgrammingError, sqlite3.InterfaceError)):
        return Internal(f"the store was used wrongly: {text}", "Report it with the service's log")
    return StoreUnusable(f"{path} cannot be used: {text}", _FIX)


def close(db: sqlite3.Connection) -> None:
    """Close, whatever state the file is in."""
    with suppress(sqlite3.Error):
        if db.in_transaction:
            db.execute("ROLLBACK")
    with suppress(sqlite3.Error):
        db.close()


def _claims_to_be_read_only(text: str, path: Path) -> bool:
    """A flipped bit in the header can say that only newer versions may write; permissions say otherwise then."""
    return "readonly database" in text and os.access(path, os.W_OK)


def _text(data: bytes) -> str:
    """Damaged text must not fail a whole query: its row's seal refuses it."""
    return data.decode("utf-8", "replace")
