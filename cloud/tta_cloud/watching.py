"""What the HTTP server asks of the service: its figures, what the store holds, and whether it makes progress."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tta_cloud import agreement, edges, ledger
from tta_cloud.errors import CloudError, DamagedRecord
from tta_cloud.metrics import Group, Moment, exposition
from tta_cloud.quarantine import BESIDE
from tta_cloud.stats import Stats
from tta_cloud.store import Store
from tta_runtime import __version__
from tta_runtime.memory import resident_bytes

STALLED_S = 60.0
"""After which a loop that does not turn counts as stalled; it turns every few seconds whatever happens."""


class Watching:
    """See `tta_runtime.health.Watched`.

    Args:
        stats: of the service.
        store: that it holds.
        turned_s: when its loop turned last, on the monotonic clock.
        accepting: whether edges are answered.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        stats: Stats,
        store: Store,
        turned_s: Callable[[], float],
        accepting: Callable[[], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stats = stats
        self._store = store
        self._turned_s = turned_s
        self._accepting = accepting
        self._clock = clock
        self._began_s = clock()

    def exposition(self) -> bytes:
        """Everything of one moment as Prometheus text. A store that cannot be read leaves out what it holds."""
        groups: dict[str, Group] = {}
        with suppress(CloudError):
            groups = self._store.read(look)
        return exposition(
            Moment(
                version=__version__,
                uptime_s=self._clock() - self._began_s,
                rss_bytes=resident_bytes(),
                store_bytes=store_bytes(self._store.path),
                groups=groups,
                figures=self._stats.figures(),
            )
        )

    def alive(self) -> bool:
        """Whether the loop turns."""
        return self._clock() - self._turned_s() < STALLED_S

    def accepting(self) -> bool:
        """Whether edges are answered."""
        return self._accepting()


def store_bytes(path: Path) -> int:
    """Size of a store's file and those beside it."""
    found = 0
    for ending in ("", *BESIDE):
        with suppress(OSError):
            found += path.with_name(path.name + ending).stat().st_size
    return found


def look(db: sqlite3.Connection) -> dict[str, Group]:
    """What the store has of each group, by name; a damaged patch is none."""
    totals = {
        name: (count, size) for name, count, size in db.execute("SELECT grp, samples, bytes FROM totals")
    }
    unused = dict(db.execute("SELECT grp, count(*) FROM samples WHERE used = 0 GROUP BY grp"))
    known, found = edges.listed(db), {}
    agreed = agreement.known(db)
    for name in sorted({*totals, *ledger.groups(db), *(edge.group for edge in known)}):
        count, size = totals.get(name, (0, 0))
        compared = [
            agreed[e.key] for e in known if (e.group, e.state) == (name, "active") and e.key in agreed
        ]
        try:
            served = ledger.served(db, name)
        except DamagedRecord:
            served = None
        found[name] = Group(
            samples=count,
            unused=unused.get(name, 0),
            bytes=size,
            epoch=0 if served is None else served.epoch,
            seq=0 if served is None else served.seq,
            pinned=served is not None and served.state == "pinned",
            agreed=sum(round(each.share * each.samples) for each in compared),
            compared=sum(each.samples for each in compared),
        )
    return found
