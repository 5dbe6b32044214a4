"""What the cloud has promised to edges outlives its store: one small file."""

from __future__ import annotations

import errno
from pathlib import Path

import msgspec
import pytest

from cloud_records import EDGE, OTHER
from disks import Failing
from tta_cloud.promises import AHEAD_S, Promises
from tta_cloud.records import Edge

EDGES = tuple(
    Edge(key=key, name=name, group="g", state=state, first_seen_ms=1, last_seen_ms=1)  # type: ignore[arg-type]
    for key, name, state in ((EDGE, "north", "active"), (OTHER, "south", "revoked"))
)


def test_promises_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "promises.json"
    first = Promises(path, 1)
    assert (first.edges, first.newest("g"), first.damaged) == ((), (0, ""), "")
    first.keep(EDGES)
    first.give("g", 3, "ab")
    first.give("g", 2, "cd")  # a number never goes back
    assert first.date(1000.5) == 1000
    again = Promises(path, 1)
    assert set(again.edges) == set(EDGES)
    assert again.newest("g") == (3, "ab")
    assert path.stat().st_mode & 0o077 == 0


def test_what_edges_report_is_not_worth_a_write(tmp_path: Path) -> None:
    path = tmp_path / "promises.json"
    promises = Promises(path, 1)
    promises.keep(EDGES)
    before = path.stat().st_mtime_ns
    promises.keep(msgspec.structs.replace(edge, seq=9, progress="staged 9", last_seen_ms=5) for edge in EDGES)
    assert path.stat().st_mtime_ns == before


def test_dates_never_go_back_also_over_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "promises.json"
    promises = Promises(path, 1)
    assert [promises.date(now_s) for now_s in (100.0, 1e9, 200.0, 1e9 + 1)] == [100, 10**9, 10**9, 10**9 + 1]
    again = Promises(path, 1)
    assert 10**9 + 1 <= again.date(300.0) <= 10**9 + 1 + AHEAD_S


def test_dates_are_written_once_a_minute(tmp_path: Path) -> None:
    disk = Failing()
    promises = Promises(tmp_path / "promises.json", 1, disk=disk)
    for now_s in range(1000, 1000 + AHEAD_S):
        promises.date(now_s)
    first = disk.count
    promises.date(1000 + AHEAD_S + 1)
    assert disk.count == 2 * first


def test_a_new_epoch_forgets_numbers_and_dates_but_not_edges(tmp_path: Path) -> None:
    path = tmp_path / "promises.json"
    first = Promises(path, 1)
    first.keep(EDGES)
    first.give("g", 3, "ab")
    first.date(1e9)
    new = Promises(path, 2)
    assert (set(new.edges), new.newest("g"), new.date(50.0)) == (set(EDGES), (0, ""), 50)


@pytest.mark.parametrize(
    "harm", [lambda d: d[:-9], lambda d: d.replace(b'"seq":0', b'"seq":1', 1), lambda d: b"\xff"]
)
def test_a_damaged_file_is_told_and_written_anew(tmp_path: Path, harm) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "promises.json"
    Promises(path, 1).keep(EDGES)
    path.write_bytes(harm(path.read_bytes()))
    again = Promises(path, 1)
    assert again.damaged
    assert again.edges == ()
    again.keep(EDGES)
    assert Promises(path, 1).damaged == ""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_is_no_reason_to_stop(tmp_path: Path, number: int) -> None:
    disk = Failing(0, number)
    promises = Promises(tmp_path / "promises.json", 1, disk=disk)
    disk.broken = True
    promises.give("g", 1, "ab")
    assert promises.newest("g") == (1, "ab")
    disk.broken = False
    promises.give("g", 2, "cd")
    assert Promises(tmp_path / "promises.json", 1).newest("g") == (2, "cd")
