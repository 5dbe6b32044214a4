"""The tables of the store, their version, and whether a file holds exactly them."""

from __future__ import annotations

import sqlite3
from functools import cache

from tta_cloud.errors import StoreTooNew
from tta_cloud.records import EDGE_STATES, PATCH_STATES, seal

VERSION = 3
MAX_FORGOTTEN = 65_536
"""Keys of deleted samples that are still known as duplicates."""


def _names(values: tuple[str, ...]) -> str:
    return ", ".join(f"'{value}'" for value in values)


# A trigger keeps the totals: whatever inserts or deletes, they agree with the rows in every transaction.
TABLES = f"""
CREATE TABLE meta (
    name TEXT NOT NULL PRIMARY KEY, value INTEGER NOT NULL, seal BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE samples (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, edge TEXT NOT NULL, grp TEXT NOT NULL,
    stream TEXT NOT NULL, taken_ms INTEGER NOT NULL, received_ms INTEGER NOT NULL, seq INTEGER NOT NULL,
    entropy REAL NOT NULL, encoding TEXT NOT NULL, dtype TEXT NOT NULL, shape TEXT NOT NULL,
    used INTEGER NOT NULL DEFAULT 0 CHECK (used >= 0), seal BLOB NOT NULL, x BLOB NOT NULL
);
CREATE INDEX samples_order ON samples (grp, used, number);
CREATE INDEX samples_edge ON samples (edge, received_ms);
CREATE INDEX samples_age ON samples (received_ms);
CREATE TABLE forgotten (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, edge TEXT NOT NULL, received_ms INTEGER NOT NULL
);
CREATE INDEX forgotten_edge ON forgotten (edge, received_ms);
CREATE TABLE totals (
    grp TEXT NOT NULL PRIMARY KEY, samples INTEGER NOT NULL, bytes INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TRIGGER samples_in AFTER INSERT ON samples BEGIN
    INSERT INTO totals VALUES (NEW.grp, 1, length(NEW.x))
        ON CONFLICT (grp) DO UPDATE SET samples = samples + 1, bytes = bytes + length(NEW.x);
END;
CREATE TRIGGER samples_out AFTER DELETE ON samples BEGIN
    UPDATE totals SET samples = samples - 1, bytes = bytes - length(OLD.x) WHERE grp = OLD.grp;
    INSERT OR IGNORE INTO forgotten (key, edge, received_ms) VALUES (OLD.key, OLD.edge, OLD.received_ms);
    DELETE FROM forgotten WHERE number <= (SELECT max(number) FROM forgotten) - {MAX_FORGOTTEN};
END;
CREATE TABLE refusals (
    grp TEXT NOT NULL, reason TEXT NOT NULL, count INTEGER NOT NULL, PRIMARY KEY (grp, reason)
) WITHOUT ROWID;
CREATE TABLE patches (
    grp TEXT NOT NULL, epoch INTEGER NOT NULL, seq INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ({_names(PATCH_STATES)})), reason TEXT NOT NULL,
    created_ms INTEGER NOT NULL, seal BLOB NOT NULL, content_seal BLOB NOT NULL,
    body BLOB NOT NULL, signatures BLOB NOT NULL, payload BLOB NOT NULL,
    PRIMARY KEY (grp, epoch, seq)
);
CREATE TABLE counters (
    grp TEXT NOT NULL, epoch INTEGER NOT NULL, last_seq INTEGER NOT NULL, seal BLOB NOT NULL,
    PRIMARY KEY (grp, epoch)
) WITHOUT ROWID;
CREATE TABLE edges (
    key TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, grp TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ({_names(EDGE_STATES)})),
    first_seen_ms INTEGER NOT NULL, last_seen_ms INTEGER NOT NULL, epoch INTEGER NOT NULL, seq INTEGER NOT NULL,
    theta_digest TEXT NOT NULL, progress TEXT NOT NULL, seal BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE tokens (
    hash BLOB NOT NULL PRIMARY KEY, name TEXT NOT NULL, grp TEXT NOT NULL, expires_ms INTEGER NOT NULL,
    used_by TEXT NOT NULL, used_ms INTEGER NOT NULL, seal BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE learners (
    grp TEXT NOT NULL PRIMARY KEY, generation INTEGER NOT NULL, saved_ms INTEGER NOT NULL, seal BLOB NOT NULL,
    snapshot BLOB NOT NULL
);
"""
ADDED = {
    2: """
CREATE TABLE agreement (
    edge TEXT NOT NULL PRIMARY KEY, answers TEXT NOT NULL, updated_ms INTEGER NOT NULL, seal BLOB NOT NULL
) WITHOUT ROWID;
""",
    3: """
CREATE TABLE origins (
    grp TEXT NOT NULL PRIMARY KEY, parent TEXT NOT NULL, epoch INTEGER NOT NULL, seq INTEGER NOT NULL,
    distance REAL NOT NULL, samples INTEGER NOT NULL, reason TEXT NOT NULL, decided_ms INTEGER NOT NULL,
    seal BLOB NOT NULL
) WITHOUT ROWID;
""",
}
"""What each later version has beside `TABLES`."""


class Malformed(sqlite3.DatabaseError):
    """What the file holds is not a store, though SQLite can read it."""


def prepare(db: sqlite3.Connection) -> None:
    """Make the tables in an empty file, or make sure that they are there, whole, and of this version.

    Raises:
        StoreTooNew: a newer version wrote them.
        sqlite3.Error: from SQLite; `Malformed` where the file is none of ours.
    """
    there = _tables(db)
    if not there:
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        if pages > 1:
            raise Malformed(f"malformed: it has {pages} pages and no table")
        _make(db, _statements(TABLES), range(1, VERSION + 1))
        return
    version = _checked_version(db)
    if there != _expected(version):
        raise Malformed("malformed: its tables are not those of a store")
    check(db)
    if version < VERSION:
        _make(db, [], range(version + 1, VERSION + 1))


def _make(db: sqlite3.Connection, statements: list[str], versions: range) -> None:
    """Make tables, and what the given versions have added."""
    db.execute("BEGIN IMMEDIATE")
    try:
        for statement in (*statements, *(s for v in versions for s in _statements(ADDED.get(v, "")))):
            db.execute(statement)
        put_meta(db, "version", VERSION)
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def check(db: sqlite3.Connection) -> None:
    """Read every page; raises `Malformed`, or another sqlite3.Error, if one is broken."""
    (answer,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    if answer != "ok":
        raise Malformed(f"malformed: {answer}")


def recount(db: sqlite3.Connection) -> None:
    """Make the totals anew from the rows, within the caller's transaction; a total has no seal."""
    db.execute("DELETE FROM totals")
    db.execute("INSERT INTO totals SELECT grp, count(*), sum(length(x)) FROM samples GROUP BY grp")


def put_meta(db: sqlite3.Connection, name: str, value: int) -> None:
    """Set a number of the store's own."""
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?, ?)", (name, value, seal(name, value)))


def meta(db: sqlite3.Connection, name: str) -> int:
    """A number of the store's own, 0 where it was never set; raises `Malformed` if it is damaged."""
    row = db.execute("SELECT value, seal FROM meta WHERE name = ?", (name,)).fetchone()
    if row is None:
        return 0
    value = row[0]
    if not isinstance(value, int) or row[1] != seal(name, value):
        raise Malformed(f"malformed: the number `{name}` is damaged")
    return value


def _checked_version(db: sqlite3.Connection) -> int:
    try:
        version = meta(db, "version")
    except sqlite3.OperationalError as error:
        if "no such" in str(error):
            raise Malformed(f"malformed: {error}") from error
        raise
    if version > VERSION:
        raise StoreTooNew(
            f"the store has version {version}, this service knows up to {VERSION}",
            "Install the newer service again, or name another store directory",
        )
    if version < 1:
        raise Malformed(f"malformed: it says that its version is {version}")
    return version


def _tables(db: sqlite3.Connection) -> list[tuple[object, ...]]:
    return db.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name").fetchall()


@cache
def _expected(version: int) -> list[tuple[object, ...]]:
    db = sqlite3.connect(":memory:")
    try:
        for text in (TABLES, *(ADDED.get(v, "") for v in range(2, version + 1))):
            for statement in _statements(text):
                db.execute(statement)
        return _tables(db)
    finally:
        db.close()


def _statements(text: str) -> list[str]:
    """One statement each; `executescript` would commit the transaction that they must share."""
    found, waiting = [], ""
    for line in text.splitlines(keepends=True):
        waiting += line
        if sqlite3.complete_statement(waiting):
            found.append(waiting.strip())
            waiting = ""
    return found
