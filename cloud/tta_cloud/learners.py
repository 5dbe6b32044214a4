"""What learners have learnt, saved together with the samples that they have learnt it from.

Both are one transaction: wherever the service is killed, a sample is marked as used exactly if it is in the snapshot.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from tta_cloud.errors import StaleLearner
from tta_cloud.operations import Operation
from tta_cloud.records import Learner, checked, restored, seal
from tta_cloud.samples import consume


def save(
    group: str, snapshot: bytes, consumed: Sequence[str], *, after: int, saved_ms: int
) -> Operation[int]:
    """Replace a learner's snapshot and mark what it has consumed since the one before; gives its generation.

    Args:
        group: whose learner.
        snapshot: everything that it needs to go on.
        consumed: keys of the samples that it has learnt from since.
        after: generation that it went on from, see `generation`.
        saved_ms: now.

    Raises:
        BadRecord: a value is out of range.
        StaleLearner: another snapshot was saved since, or a sample is used already; raised by the operation.
    """
    made = checked(Learner(group=group, generation=after + 1, snapshot=snapshot, saved_ms=saved_ms))
    keys = tuple(consumed)

    def run(db: sqlite3.Connection) -> int:
        current = generation(db, group)
        if current != after:
            raise StaleLearner(
                f"the snapshot follows generation {after}, stored is {current}", "Load the newest snapshot"
            )
        consume(db, group, keys, made.generation)
        values = (made.group, made.generation, made.saved_ms)
        db.execute(
            "INSERT OR REPLACE INTO learners (grp, generation, saved_ms, seal, snapshot) VALUES (?, ?, ?, ?, ?)",
            (*values, seal(*values, snapshot), snapshot),
        )
        return made.generation

    return Operation("learners.save", run, len(snapshot))


def forget(group: str) -> Operation[None]:
    """Delete a learner's snapshot, for one that is damaged or must start anew. What it has used stays used."""

    def run(db: sqlite3.Connection) -> None:
        db.execute("DELETE FROM learners WHERE grp = ?", (group,))

    return Operation("learners.forget", run)


def load(db: sqlite3.Connection, group: str) -> Learner | None:
    """A learner's snapshot; None if there is none.

    Raises:
        DamagedRecord: it is not what was stored; `forget` it.
    """
    row = db.execute(
        "SELECT grp, generation, saved_ms, snapshot, seal FROM learners WHERE grp = ?", (group,)
    ).fetchone()
    if row is None:
        return None
    *sealed, found = row
    values = dict(zip(("group", "generation", "saved_ms", "snapshot"), sealed, strict=True))
    return restored(Learner, values, found, sealed)


def generation(db: sqlite3.Connection, group: str) -> int:
    """Of the newest snapshot, also where it was forgotten but samples are marked with it; 0 for none.

    Raises:
        DamagedRecord: as `load`.
    """
    learner = load(db, group)
    marked = db.execute("SELECT max(used) FROM samples WHERE grp = ?", (group,)).fetchone()[0] or 0
    return max(int(marked), learner.generation if learner is not None else 0)
