"""The ledger: every patch that was ever built, under a number without gaps, and what became of it."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from tta_cloud.errors import DamagedRecord, IllegalTransition, OutOfOrder, UnknownPatch
from tta_cloud.operations import Operation
from tta_cloud.records import Entry, Patch, PatchState, checked, restored, seal

TRANSITIONS: Mapping[PatchState, frozenset[PatchState]] = {
    "built": frozenset({"canary", "published", "refused", "rolled-back"}),
    "refused": frozenset(),
    "canary": frozenset({"published", "stopped", "rolled-back"}),
    "published": frozenset({"pinned", "stopped", "rolled-back"}),
    "stopped": frozenset({"canary", "rolled-back"}),
    "pinned": frozenset({"published", "rolled-back"}),
    "rolled-back": frozenset(),
}
"""Where a patch may go from each state. `stopped`: its rollout was halted; `pinned`: nothing newer is published."""
INITIAL: frozenset[PatchState] = frozenset({"built", "refused", "canary", "published"})
"""States in which a patch may be appended."""
SERVED: frozenset[PatchState] = frozenset({"published", "pinned"})
"""States in which every edge of the group gets it."""
_ENTRY = "grp, epoch, seq, state, reason, created_ms, seal"
_PATCH = f"{_ENTRY}, body, signatures, payload, content_seal"

# ------------------------------------------------------------------------------------------ changes


def append(patch: Patch) -> Operation[None]:
    """Add the next patch of a group and epoch.

    Args:
        patch: its number must be the one after `last_seq`.

    Raises:
        BadRecord: a value is out of range.
        OutOfOrder: its number is not the next one, or its epoch is over; raised by the operation.
        IllegalTransition: it is in a state in which no patch begins.
    """
    entry = checked(patch).entry
    if entry.state not in INITIAL:
        raise IllegalTransition(
            f"a patch cannot begin as {entry.state}", f"Begin with one of {', '.join(sorted(INITIAL))}"
        )

    def run(db: sqlite3.Connection) -> None:
        newest = last_epoch(db, entry.group)
        if entry.epoch < newest:
            raise OutOfOrder(f"the patch is of epoch {entry.epoch}, group {entry.group} is in {newest}")
        last = last_seq(db, entry.group, entry.epoch)
        if entry.seq != last + 1:
            raise OutOfOrder(
                f"the patch has number {entry.seq}, the next one of {entry.group} in epoch {entry.epoch} is {last + 1}",
                "Build it again with that number",
            )
        db.execute(
            f"INSERT INTO patches ({_PATCH}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*_entry_row(entry), patch.body, patch.signatures, patch.payload, _content_seal(patch)),
        )
        _count(db, entry.group, entry.epoch, entry.seq)

    return Operation("ledger.append", run, len(patch.body) + len(patch.signatures) + len(patch.payload))


def move(group: str, epoch: int, seq: int, state: PatchState, reason: str = "") -> Operation[Entry]:
    """Bring a patch into another state; gives what stands in the ledger then.

    Raises:
        UnknownPatch: there is none; raised by the operation, as are the others.
        IllegalTransition: from its state it cannot go there.
        BadRecord: the reason is too long.
        DamagedRecord: what stands there cannot be believed.
    """

    def run(db: sqlite3.Connection) -> Entry:
        before = entry_of(db, group, epoch, seq)
        if state not in TRANSITIONS[before.state]:
            allowed = ", ".join(sorted(TRANSITIONS[before.state])) or "nowhere"
            raise IllegalTransition(
                f"patch {seq} of {group} in epoch {epoch} is {before.state} and cannot become {state}",
                f"From there it can go to: {allowed}",
            )
        after = checked(msgspec.structs.replace(before, state=state, reason=reason))
        db.execute(
            "UPDATE patches SET state = ?, reason = ?, seal = ? WHERE grp = ? AND epoch = ? AND seq = ?",
            (state, reason, _entry_row(after)[-1], group, epoch, seq),
        )
        return after

    return Operation("ledger.move", run)


def resume(group: str, epoch: int, seq: int) -> Operation[None]:
    """Go on after a number that edges know, where the ledger that gave it was lost or its counter is damaged.

    Raises:
        OutOfOrder: the ledger has come further; raised by the operation.
    """

    def run(db: sqlite3.Connection) -> None:
        query = "SELECT max(seq) FROM patches WHERE grp = ? AND epoch = ?"
        last = int(db.execute(query, (group, epoch)).fetchone()[0] or 0)
        with suppress(DamagedRecord):  # this is how it is repaired
            last = max(last, last_seq(db, group, epoch))
        if seq < last:
            raise OutOfOrder(f"the number {seq} was reported, {group} has come to {last} in epoch {epoch}")
        _count(db, group, epoch, seq)

    return Operation("ledger.resume", run)


def prune(group: str, keep: int) -> Operation[int]:
    """Delete the oldest patches but the newest `keep`, the pinned ones and the newest served one; gives how many."""

    def run(db: sqlite3.Connection) -> int:
        served = db.execute(
            "SELECT rowid FROM patches WHERE grp = ? AND state IN ('published', 'pinned') "
            "ORDER BY epoch DESC, seq DESC LIMIT 1",
            (group,),
        ).fetchone()
        return db.execute(
            "DELETE FROM patches WHERE grp = ?1 AND state <> 'pinned' AND rowid <> ?2 AND rowid NOT IN "
            "(SELECT rowid FROM patches WHERE grp = ?1 ORDER BY epoch DESC, seq DESC LIMIT ?3)",
            (group, served[0] if served else -1, keep),
        ).rowcount

    return Operation("ledger.prune", run)


# ------------------------------------------------------------------------------------------ reading


def newest(db: sqlite3.Connection, group: str) -> Patch | None:
    """The newest patch that every edge of a group gets; None if there is none.

    Raises:
        DamagedRecord: it is damaged. An older one would be refused by the edges as a replay: publish another.
    """
    row = db.execute(
        f"SELECT {_PATCH} FROM patches WHERE grp = ? AND state IN ('published', 'pinned') "
        "ORDER BY epoch DESC, seq DESC LIMIT 1",
        (group,),
    ).fetchone()
    return None if row is None else decode(row)


def last(db: sqlite3.Connection, group: str) -> Patch | None:
    """The newest patch of a group, whatever became of it; None if there is none.

    Raises:
        DamagedRecord: it is damaged.
    """
    row = db.execute(
        f"SELECT {_PATCH} FROM patches WHERE grp = ? ORDER BY epoch DESC, seq DESC LIMIT 1", (group,)
    ).fetchone()
    return None if row is None else decode(row)


def get(db: sqlite3.Connection, group: str, epoch: int, seq: int) -> Patch:
    """One patch.

    Raises:
        UnknownPatch: there is none.
        DamagedRecord: it is not what was stored.
    """
    return decode(_row(db, _PATCH, group, epoch, seq))


def entry_of(db: sqlite3.Connection, group: str, epoch: int, seq: int) -> Entry:
    """One patch without its bytes; raises as `get`."""
    return decode_entry(_row(db, _ENTRY, group, epoch, seq))


def entries(db: sqlite3.Connection, group: str, limit: int = 100) -> list[Entry]:
    """The newest patches of a group without their bytes, the newest first; damaged ones are left out."""
    found = []
    for row in db.execute(
        f"SELECT {_ENTRY} FROM patches WHERE grp = ? ORDER BY epoch DESC, seq DESC LIMIT ?", (group, limit)
    ):
        try:
            found.append(decode_entry(row))
        except DamagedRecord:
            continue
    return found


def served(db: sqlite3.Connection, group: str) -> Entry | None:
    """`newest` without its bytes."""
    return _newest_entry(db, group, "('published', 'pinned')")


def pinned(db: sqlite3.Connection, group: str) -> Entry | None:
    """The patch at which a group is to stay; None where it goes on.

    Raises:
        DamagedRecord: it is damaged.
    """
    return _newest_entry(db, group, "('pinned')")


def after(db: sqlite3.Connection, group: str, epoch: int, seq: int) -> list[Entry]:
    """Every later patch of a group, the oldest first; raises DamagedRecord."""
    query = f"SELECT {_ENTRY} FROM patches WHERE grp = ? AND (epoch, seq) > (?, ?) ORDER BY epoch, seq"
    return [decode_entry(row) for row in db.execute(query, (group, epoch, seq))]


def groups(db: sqlite3.Connection) -> list[str]:
    """The groups that have patches, by name."""
    return [name for (name,) in db.execute("SELECT DISTINCT grp FROM patches ORDER BY grp")]


def last_seq(db: sqlite3.Connection, group: str, epoch: int) -> int:
    """Number of the last patch of a group and epoch, deleted ones included; 0 if there was none.

    Raises:
        DamagedRecord: the counter is damaged; `resume` repairs it.
    """
    query = "SELECT last_seq, seal FROM counters WHERE grp = ? AND epoch = ?"
    row = db.execute(query, (group, epoch)).fetchone()
    if row is None:
        return 0
    last = row[0]
    if not isinstance(last, int) or row[1] != seal(group, epoch, last):
        raise DamagedRecord(
            f"the counter of {group} in epoch {epoch} is damaged", "Resume from what the edges report"
        )
    return last


def last_epoch(db: sqlite3.Connection, group: str) -> int:
    """The newest epoch of a group that has a patch; 0 if there is none."""
    return int(db.execute("SELECT max(epoch) FROM counters WHERE grp = ?", (group,)).fetchone()[0] or 0)


def decode_entry(row: Sequence[Any]) -> Entry:
    """An entry from its row.

    Raises:
        DamagedRecord: it is not what was stored.
    """
    *sealed, found = row
    return restored(Entry, dict(zip(Entry.__struct_fields__, sealed, strict=True)), found, sealed)


def decode(row: Sequence[Any]) -> Patch:
    """A patch from its row.

    Raises:
        DamagedRecord: it is not what was stored.
    """
    entry = decode_entry(row[:7])
    body, signatures, payload, found = row[7:]
    values = {"entry": entry, "body": body, "signatures": signatures, "payload": payload}
    sealed = (entry.group, entry.epoch, entry.seq, body, signatures, payload)
    return restored(Patch, values, found, sealed)


# ------------------------------------------------------------------------------------------ inside


def _newest_entry(db: sqlite3.Connection, group: str, states: str) -> Entry | None:
    row = db.execute(
        f"SELECT {_ENTRY} FROM patches WHERE grp = ? AND state IN {states} ORDER BY epoch DESC, seq DESC LIMIT 1",
        (group,),
    ).fetchone()
    return None if row is None else decode_entry(row)


def _row(db: sqlite3.Connection, columns: str, group: str, epoch: int, seq: int) -> Sequence[Any]:
    query = f"SELECT {columns} FROM patches WHERE grp = ? AND epoch = ? AND seq = ?"
    row: Sequence[Any] | None = db.execute(query, (group, epoch, seq)).fetchone()
    if row is None:
        raise UnknownPatch(f"the ledger holds no patch {seq} of {group} in epoch {epoch}")
    return row


def _entry_row(entry: Entry) -> tuple[Any, ...]:
    values = (entry.group, entry.epoch, entry.seq, entry.state, entry.reason, entry.created_ms)
    return (*values, seal(*values))


def _content_seal(patch: Patch) -> bytes:
    entry = patch.entry
    return seal(entry.group, entry.epoch, entry.seq, patch.body, patch.signatures, patch.payload)


def _count(db: sqlite3.Connection, group: str, epoch: int, seq: int) -> None:
    db.execute(
        "INSERT OR REPLACE INTO counters VALUES (?, ?, ?, ?)", (group, epoch, seq, seal(group, epoch, seq))
    )
