"""Samples: each is stored once, learnt from once, replayed for a while and then forgotten."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tta_cloud.errors import BadRecord, DamagedRecord, SampleTooLarge, StaleLearner
from tta_cloud.operations import Operation
from tta_cloud.records import MAX_TEXT, Sample, Stored, checked, restored, seal

Inserted = Literal["stored", "duplicate", "quota"]
_COLUMNS = "number, key, edge, grp, stream, taken_ms, received_ms, seq, entropy, encoding, dtype, shape, used, seal, x"


@dataclass(frozen=True)
class Caps:
    """How much is kept of a group; beyond it the oldest used samples go, then the oldest.

    Attributes:
        max_samples: of a group.
        max_bytes: of a group's samples.
    """

    max_samples: int = 16_384
    max_bytes: int = 2 << 30


@dataclass(frozen=True)
class Quota:
    """How much one edge may send.

    Attributes:
        max_samples: within the window.
        window_ms: length of the window.
    """

    max_samples: int
    window_ms: int


@dataclass(frozen=True)
class Drawn:
    """Samples that were asked for.

    Attributes:
        samples: those that are as they were stored.
        damaged: numbers of rows that are not; to be handed to `discard`.
    """

    samples: tuple[Stored, ...]
    damaged: tuple[int, ...] = ()


@dataclass(frozen=True)
class Totals:
    """What is stored of a group.

    Attributes:
        samples: in all.
        unused: of them, those that nobody learnt from.
        bytes: of all.
    """

    samples: int
    unused: int
    bytes: int


# ------------------------------------------------------------------------------------------ changes


def insert(
    sample: Sample, *, received_ms: int, caps: Caps = Caps(), quota: Quota | None = None
) -> Operation[Inserted]:
    """Store a sample unless its key is known, also from samples that were forgotten since.

    Args:
        sample: what to store.
        received_ms: now, by the cloud's clock.
        caps: of its group.
        quota: of its edge.

    Raises:
        BadRecord: a value is out of range.
        SampleTooLarge: it alone is over `caps.max_bytes`.
    """
    checked(sample)
    if len(sample.x) > caps.max_bytes:
        raise SampleTooLarge(
            f"the sample has {len(sample.x)} bytes, its group may have {caps.max_bytes}",
            "Send smaller samples or raise the cap",
        )

    def run(db: sqlite3.Connection) -> Inserted:
        if _known(db, sample.key):
            return "duplicate"
        since_ms = received_ms - (quota.window_ms if quota else 0)
        if quota and received(db, sample.edge, since_ms, received_ms) >= quota.max_samples:
            return "quota"
        # SQLite gives -0.0 back as 0.0, and an integer as a float: the seal is over what will be found.
        row = (
            sample.key, sample.edge, sample.group, sample.stream, sample.taken_ms, received_ms, sample.seq,
            float(sample.entropy) + 0.0, sample.encoding, sample.dtype, ",".join(map(str, sample.shape)),
        )  # fmt: skip
        db.execute(
            "INSERT INTO samples (key, edge, grp, stream, taken_ms, received_ms, seq, entropy, encoding, dtype, "
            "shape, seal, x) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*row, seal(*row, sample.x), sample.x),
        )
        _trim(db, sample.group, caps)
        return "stored"

    return Operation("samples.insert", run, len(sample.x))


def mark_used(group: str, keys: Sequence[str], generation: int) -> Operation[int]:
    """Say that a learner has learnt from samples; see `consume`. With its snapshot, `learners.save` does it."""
    if generation < 1:
        raise BadRecord(f"the generation is {generation}, expected at least 1")
    return Operation("samples.mark_used", lambda db: consume(db, group, keys, generation))


def discard(numbers: Iterable[int]) -> Operation[int]:
    """Delete samples by number, for those that are damaged; gives how many there were."""
    each = tuple(numbers)

    def run(db: sqlite3.Connection) -> int:
        return sum(db.execute("DELETE FROM samples WHERE number = ?", (n,)).rowcount for n in each)

    return Operation("samples.discard", run)


def expire(before_ms: int) -> Operation[int]:
    """Delete every sample that was received before a time, used or not; gives how many."""

    def run(db: sqlite3.Connection) -> int:
        return db.execute("DELETE FROM samples WHERE received_ms < ?", (before_ms,)).rowcount

    return Operation("samples.expire", run)


def refuse(group: str, reason: str, count: int = 1) -> Operation[None]:
    """Count samples that intake has refused.

    Raises:
        BadRecord: the reason is empty or too long.
    """
    if not 0 < len(reason) <= MAX_TEXT:
        raise BadRecord(f"the reason has {len(reason)} characters, expected 1 to {MAX_TEXT}")

    def run(db: sqlite3.Connection) -> None:
        db.execute(
            "INSERT INTO refusals VALUES (?, ?, ?) "
            "ON CONFLICT (grp, reason) DO UPDATE SET count = count + excluded.count",
            (group, reason, count),
        )

    return Operation("samples.refuse", run)


def consume(db: sqlite3.Connection, group: str, keys: Sequence[str], generation: int) -> int:
    """Mark samples as used, within the caller's transaction; gives how many are still stored.

    Raises:
        StaleLearner: one of them is used already; it would have been learnt from twice.
    """
    marked = 0
    for key in keys:
        changed = db.execute(
            "UPDATE samples SET used = ? WHERE key = ? AND grp = ? AND used = 0", (generation, key, group)
        ).rowcount
        if not changed:
            row = db.execute("SELECT used FROM samples WHERE key = ? AND grp = ?", (key, group)).fetchone()
            if row is not None:  # one that is gone was deleted by retention while it was learnt from
                raise StaleLearner(
                    f"sample {key} was used in generation {row[0]}, and again in {generation}",
                    "Load the learner's snapshot again",
                )
        marked += changed
    return marked


# ------------------------------------------------------------------------------------------ reading


def waiting(db: sqlite3.Connection, group: str) -> list[tuple[int, str, int]]:
    """Number, edge and time of arrival of the samples that nobody learnt from, oldest first; their bytes are not
    read.
    """
    query = "SELECT number, edge, received_ms FROM samples WHERE grp = ? AND used = 0 ORDER BY number"
    return db.execute(query, (group,)).fetchall()


def newest(db: sqlite3.Connection, group: str, count: int) -> list[tuple[int, str]]:
    """Number and edge of the newest samples of a group, used or not, oldest first; their bytes are not read."""
    query = "SELECT number, edge FROM samples WHERE grp = ? ORDER BY number DESC LIMIT ?"
    return db.execute(query, (group, count)).fetchall()[::-1]


def numbered(db: sqlite3.Connection, numbers: Sequence[int]) -> Drawn:
    """The samples with these numbers, in their order; those that are gone are left out."""
    query = f"SELECT {_COLUMNS} FROM samples WHERE number = ?"
    rows = (row for number in numbers for row in db.execute(query, (number,)))
    return _draw(rows, len(numbers))


def replay(db: sqlite3.Connection, group: str, count: int, *, newest: int, seed: int) -> Drawn:
    """Used samples of a group, drawn without replacement.

    Args:
        db: to read from.
        group: whose.
        count: how many at most.
        newest: of how many of those that were used last.
        seed: the same one draws the same samples from the same store.
    """
    numbers = [
        number
        for (number,) in db.execute(
            "SELECT number FROM samples WHERE grp = ? AND used > 0 ORDER BY used DESC, number DESC LIMIT ?",
            (group, newest),
        )
    ]
    order = np.random.default_rng(seed).permutation(len(numbers))

    def rows() -> Iterator[tuple[Any, ...]]:
        for at in order:
            yield from db.execute(f"SELECT {_COLUMNS} FROM samples WHERE number = ?", (numbers[at],))

    return _draw(rows(), count)


def received(db: sqlite3.Connection, edge: str, since_ms: int, until_ms: int = 2**63 - 1) -> int:
    """How many samples of an edge were stored within a time, those that are forgotten again included.

    What a clock that was ahead has dated later than `until_ms` does not count: it would for years.
    """
    query = "SELECT count(*) FROM {} WHERE edge = ? AND received_ms > ? AND received_ms <= ?"
    counts = [
        db.execute(query.format(table), (edge, since_ms, until_ms)) for table in ("samples", "forgotten")
    ]
    return sum(int(cursor.fetchone()[0]) for cursor in counts)


def totals(db: sqlite3.Connection, group: str) -> Totals:
    """What is stored of a group."""
    count, size = _totals(db, group)
    query = "SELECT count(*) FROM samples WHERE grp = ? AND used = 0"
    return Totals(count, int(db.execute(query, (group,)).fetchone()[0]), size)


def refusals(db: sqlite3.Connection, group: str) -> dict[str, int]:
    """How many samples of a group were refused, by reason."""
    return dict(db.execute("SELECT reason, count FROM refusals WHERE grp = ?", (group,)).fetchall())


def decode(row: Sequence[Any]) -> Stored:
    """A sample from its row.

    Raises:
        DamagedRecord: it is not what was stored.
    """
    (
        number,
        key,
        edge,
        group,
        stream,
        taken_ms,
        received_ms,
        seq,
        entropy,
        encoding,
        dtype,
        shape,
        used,
        found,
        x,
    ) = row
    sealed = (key, edge, group, stream, taken_ms, received_ms, seq, entropy, encoding, dtype, shape, x)
    sample = {
        "key": key, "edge": edge, "group": group, "stream": stream, "taken_ms": taken_ms, "seq": seq,
        "entropy": entropy, "encoding": encoding, "dtype": dtype, "shape": _shape(shape), "x": x,
    }  # fmt: skip
    values = {"number": number, "sample": sample, "received_ms": received_ms, "used": used}
    return restored(Stored, values, found, sealed)


# ------------------------------------------------------------------------------------------ inside


def _shape(text: object) -> object:
    """The numbers in "3,32,32"; what is no such text is left to be refused."""
    if not isinstance(text, str):
        return text
    parts = text.split(",") if text else []
    return (
        [int(part) for part in parts]
        if all(p.isascii() and p.isdigit() and len(p) < 12 for p in parts)
        else text
    )


def _draw(rows: Iterable[Sequence[Any]], limit: int) -> Drawn:
    good: list[Stored] = []
    damaged: list[int] = []
    if limit > 0:
        for row in rows:
            try:
                good.append(decode(row))
            except DamagedRecord:
                damaged.append(row[0])
            if len(good) == limit:
                break
    return Drawn(tuple(good), tuple(damaged))


def _known(db: sqlite3.Connection, key: str) -> bool:
    return any(
        db.execute(f"SELECT 1 FROM {table} WHERE key = ?", (key,)).fetchone() is not None
        for table in ("samples", "forgotten")
    )


def _totals(db: sqlite3.Connection, group: str) -> tuple[int, int]:
    row = db.execute("SELECT samples, bytes FROM totals WHERE grp = ?", (group,)).fetchone()
    return (int(row[0]), int(row[1])) if row is not None else (0, 0)


def _trim(db: sqlite3.Connection, group: str, caps: Caps) -> None:
    """Delete until the group is within its caps; the sample that came last stays, for it fits alone."""
    while True:
        count, size = _totals(db, group)
        if count <= 1 or (count <= caps.max_samples and size <= caps.max_bytes):
            return
        oldest = (
            db.execute(
                f"SELECT number FROM samples WHERE grp = ? AND {which} ORDER BY used, number LIMIT 1",
                (group,),
            ).fetchone()
            for which in ("used > 0", "used = 0")
        )
        number = next(row[0] for row in oldest if row is not None)
        db.execute("DELETE FROM samples WHERE number = ?", (number,))
