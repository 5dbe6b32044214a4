"""From where each group started, and why: decided once, kept with the first patch and the learner that followed."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

from tta_cloud.errors import DamagedRecord
from tta_cloud.operations import Operation
from tta_cloud.records import Origin, checked, restored, seal

_COLUMNS = "grp, parent, epoch, seq, distance, samples, reason, decided_ms, seal"


def note(origin: Origin) -> Operation[None]:
    """Keep a decision; an earlier one of the same group, which only a damaged row can be, is replaced.

    Raises:
        BadRecord: a value is out of range.
    """
    values = _values(checked(origin))

    def run(db: sqlite3.Connection) -> None:
        db.execute(f"INSERT OR REPLACE INTO origins ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)

    return Operation("origins.note", run)


def get(db: sqlite3.Connection, group: str) -> Origin | None:
    """From where a group started; None where that was not decided.

    Raises:
        DamagedRecord: it is not what was stored.
    """
    row = db.execute(f"SELECT {_COLUMNS} FROM origins WHERE grp = ?", (group,)).fetchone()
    return None if row is None else _decoded(row)


def listed(db: sqlite3.Connection) -> list[Origin]:
    """Of every group, by name; damaged rows are left out."""
    found = []
    for row in db.execute(f"SELECT {_COLUMNS} FROM origins ORDER BY grp"):
        try:
            found.append(_decoded(row))
        except DamagedRecord:
            continue
    return found


def _values(origin: Origin) -> tuple[Any, ...]:
    values = (
        origin.group, origin.parent, origin.epoch, origin.seq, origin.distance, origin.samples, origin.reason,
        origin.decided_ms,
    )  # fmt: skip
    return (*values, seal(*values))


def _decoded(row: Sequence[Any]) -> Origin:
    *sealed, found = row
    return restored(Origin, dict(zip(Origin.__struct_fields__, sealed, strict=True)), found, sealed)
