"""Looking into a store beside the service that holds it: read-only, for commands."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tta_cloud import agreement, edges, ledger
from tta_cloud.errors import StoreUnusable
from tta_cloud.records import Edge
from tta_runtime.atomic import write_atomic
from tta_runtime.files import read_at_most

T = TypeVar("T")
DATA = "data"
NOTES = "service.json"
"""What the service that used the store last was told."""


class Served(msgspec.Struct, frozen=True):
    """What the service that used the store last was told.

    Attributes:
        student: directory of the edges' bundle.
        teacher: as in the configuration.
    """

    student: str = ""
    teacher: str = ""


def read(store: Path, query: Callable[[sqlite3.Connection], T]) -> T:
    """What a query finds.

    Raises:
        StoreUnusable: there is no store, or it cannot be read.
    """
    from tta_cloud.store import FILE

    path = store / DATA / FILE
    if not path.is_file():
        raise StoreUnusable(
            f"there is no store in {store}", "Name the --store of a service that has run once"
        )
    try:
        db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            return query(db)
        finally:
            db.close()
    except sqlite3.Error as error:
        raise StoreUnusable(f"{path} cannot be read: {error}", "Look at the service's log") from error


def remember(store: Path, served: Served) -> None:
    """Leave word of what is served, for commands; a disk that refuses is none of theirs."""
    with suppress(OSError):
        write_atomic(store / NOTES, msgspec.json.encode(served), mode=0o600)


def remembered(store: Path) -> Served:
    """What was left by `remember`; empty where nothing was."""
    try:
        return msgspec.json.decode(read_at_most(store / NOTES, 64 << 10), type=Served)
    except (OSError, msgspec.DecodeError, ValueError):
        return Served()


def fleet(store: Path, now_ms: int | None = None) -> list[dict[str, Any]]:
    """Every edge with how far it is behind its group, and how often it agrees with the teacher.

    Args:
        store: directory of the service.
        now_ms: milliseconds since 1970.

    Returns:
        A row for each edge. `lag` is in numbers, `lag_s` since the first patch that it has not got was made.
        `agreement` is None where nothing was compared yet, else a share of `agreement_samples`.

    Raises:
        StoreUnusable: as `read`.
    """
    now = int(time.time() * 1000) if now_ms is None else now_ms

    def look(db: sqlite3.Connection) -> list[dict[str, Any]]:
        rows, agreed = [], agreement.known(db)
        for edge in edges.listed(db):
            newest = ledger.served(db, edge.group)
            epoch, seq = (0, 0) if newest is None else (newest.epoch, newest.seq)
            behind = max(0, seq - edge.seq if epoch == edge.epoch else seq)
            since_ms = _missing_since_ms(db, edge, now) if behind else now
            found = agreed.get(edge.key)
            rows.append(
                {
                    "name": edge.name, "group": edge.group, "state": edge.state, "epoch": edge.epoch, "seq": edge.seq,
                    "lag": behind, "lag_s": max(0, now - since_ms) / 1000, "last_seen_ms": edge.last_seen_ms,
                    "last_seen_s": max(0, now - edge.last_seen_ms) / 1000, "progress": edge.progress,
                    "agreement": None if found is None else found.share,
                    "agreement_samples": 0 if found is None else found.samples,
                    "theta_digest": edge.theta_digest, "key": edge.key,
                }
            )  # fmt: skip
        return rows

    return read(store, look)


def _missing_since_ms(db: sqlite3.Connection, edge: Edge, now_ms: int) -> int:
    """When the first patch was made that the group has and this edge has not."""
    missing = ledger.after(db, edge.group, edge.epoch, edge.seq)
    return min((entry.created_ms for entry in missing if entry.state in ledger.SERVED), default=now_ms)
