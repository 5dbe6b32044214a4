"""Checks of what the service keeps: its store, the disk below it, the dates in it, learners and edges."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from rich.filesize import decimal

from tta_cloud import edges, learners, ledger, quarantine, schema
from tta_cloud.config import Config
from tta_cloud.errors import DamagedRecord
from tta_cloud.reading import DATA, read
from tta_cloud.store import FILE
from tta_cloud.watching import look, store_bytes
from tta_runtime.checks import Check, fail, ok, warn
from tta_runtime.errors import TtaError
from tta_runtime.lock import existing
from tta_runtime.machine import SLOW_FSYNC_S, write_time_s

MIN_FREE_BYTES = 256 << 20
WAITS_S = 3600.0
"""After which samples that are enough for a round should have been learned from."""
BEHIND_S = 60.0
"""How far the clock may be behind the last date in the store."""


def checks(
    config: Config, running: bool, *, silent_s: float, clock_s: Callable[[], float] = time.time
) -> Iterator[Check]:
    """Store, disk, dates, learning and edges.

    Args:
        config: of the service.
        running: whether a service runs with this store.
        silent_s: an edge that has not been heard of for so long is named.
        clock_s: seconds since 1970.
    """
    store, now_s = Path(config.store), clock_s()
    yield check_store(store, running)
    yield check_disk(store, config.max_sample_bytes)
    if not (store / DATA / FILE).is_file():
        return
    of_store: tuple[Callable[[], Check], ...] = (
        partial(check_dates, store, now_s),
        partial(check_learning, store, config.learner.new, now_s),
        partial(check_edges, store, silent_s, now_s),
    )
    for check in of_store:
        try:
            yield check()
        except TtaError as error:
            yield fail("store", f"{error.code}: {error.cause}", error.fix)


def check_store(store: Path, running: bool) -> Check:
    """The store is whole and readable."""
    path = store / DATA / FILE
    if not path.is_file():
        return ok("store", f"there is none in {store} yet; the service makes it when it starts")
    held = "a service holds it" if running else "no service runs"
    try:
        read(store, schema.check)
        groups = read(store, look)
        damaged = sum(len(found) for found in read(store, _damaged).values())
    except TtaError as error:
        fix = "Correct its permissions; a damaged one is set aside by a start, restore a backup if one is needed"
        return fail("store", f"{error.code}: {error.cause}", fix)
    samples = sum(group.samples for group in groups.values())
    text = f"{path}, {decimal(store_bytes(path))}, {samples} samples of {len(groups)} groups; {held}"
    aside = quarantine.kept(path)
    if aside:
        names = ", ".join(target.name for _, target in aside)
        return warn(
            "store",
            f"{text}; damaged ones were set aside: {names}",
            "Look at the disk; delete them when done",
        )
    if damaged:
        return warn("store", f"{text}; {damaged} patches are damaged and left out", "Look at the disk")
    return ok("store", text)


def check_disk(store: Path, max_bytes: int) -> Check:
    """The disk is quick, can be written and has room for what may be kept."""
    place = existing(store / DATA)
    try:
        fsync_s = write_time_s(place)
    except OSError as error:
        return fail("disk", f"{place} cannot be written: {error.strerror}", "Let the service's user write it")
    free = shutil.disk_usage(place).free
    text = f"{place}, fsync {fsync_s * 1e3:.1f} ms, {decimal(free)} free"
    if free < MIN_FREE_BYTES:
        return fail("disk", f"{text}, at least {decimal(MIN_FREE_BYTES)} are needed", "Free space")
    if free < max_bytes:
        text = f"{text}, one group may keep {decimal(max_bytes)}"
        return warn("disk", text, "Free space, or lower max_sample_bytes")
    if fsync_s > SLOW_FSYNC_S:
        return warn("disk", f"{text}: slow, and every sample waits for it", "Use another disk")
    return ok("disk", text)


def check_dates(store: Path, now_s: float) -> Check:
    """The clock is not behind what was signed or stored last: edges refuse heads that go back."""
    query = (
        "SELECT max(d) FROM (SELECT max(created_ms) AS d FROM patches UNION ALL SELECT max(received_ms) FROM samples "
        "UNION ALL SELECT max(last_seen_ms) FROM edges)"
    )
    last_ms = int(read(store, lambda db: db.execute(query).fetchone()[0]) or 0)
    if not last_ms:
        return ok("dates", "nothing has been stored yet")
    behind_s = last_ms / 1000 - now_s
    text = f"the last thing that was stored is of {_date(last_ms / 1000)}, now it is {_date(now_s)}"
    if behind_s > BEHIND_S:
        return fail(
            "dates",
            f"{text}: the clock was set back by {_span(behind_s)}",
            "Set the clock, for example with NTP",
        )
    return ok("dates", text)


def check_learning(store: Path, new: int, now_s: float) -> Check:
    """What waits is learned from."""
    waiting, saved = [], []

    def query(db: sqlite3.Connection) -> None:
        for group, there in look(db).items():
            try:
                learner = learners.load(db, group)
            except DamagedRecord:
                waiting.append(f"{group}: its learner is damaged and starts anew")
                continue
            saved_s = 0.0 if learner is None else learner.saved_ms / 1000
            saved.append(saved_s)
            oldest = db.execute(
                "SELECT min(received_ms) FROM samples WHERE grp = ? AND used = 0", (group,)
            ).fetchone()[0]
            since_s = max(saved_s, (oldest or 0) / 1000)
            if there.unused >= 2 * new and now_s - since_s > WAITS_S:
                waiting.append(f"{group}: {there.unused} samples wait since {_span(now_s - since_s)}")

    read(store, query)
    if waiting:
        return warn(
            "learning",
            "; ".join(waiting),
            "Start the service, or look into its log: one edge alone gets no more than intake.max_share of a round",
        )
    newest = max(saved, default=0.0)
    return ok("learning", f"last at {_date(newest)}" if newest else "nobody has learned yet")


def check_edges(store: Path, silent_s: float, now_s: float) -> Check:
    """Edges are heard of."""
    active = [edge for edge in read(store, edges.listed) if edge.state == "active"]
    silent = [edge for edge in active if now_s - edge.last_seen_ms / 1000 > silent_s]
    if silent:
        names = ", ".join(f"{e.name} ({_span(now_s - e.last_seen_ms / 1000)})" for e in silent[:20])
        more = f" and {len(silent) - 20} more" if len(silent) > 20 else ""
        return warn(
            "edges",
            f"{len(silent)} of {len(active)} have not been heard of for long: {names}{more}",
            "See `tta-edge status` there; `tta-cloud keys revoke NAME` for those that are gone",
        )
    return ok("edges", f"{len(active)} are let in, all were heard of" if active else "none is enrolled yet")


def snapshots(store: Path) -> dict[str, bytes]:
    """What learners have left, by group; raises StoreUnusable."""

    def query(db: sqlite3.Connection) -> dict[str, bytes]:
        return dict(db.execute("SELECT grp, snapshot FROM learners").fetchall())

    return read(store, query)


def _damaged(db: sqlite3.Connection) -> dict[str, list[int]]:
    """Patches whose row does not carry its seal, by group."""
    found: dict[str, list[int]] = {}
    for group in ledger.groups(db):
        there = [seq for (seq,) in db.execute("SELECT seq FROM patches WHERE grp = ?", (group,))]
        good = {entry.seq for entry in ledger.entries(db, group, len(there))}
        found[group] = [seq for seq in there if seq not in good]
    return found


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _span(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
