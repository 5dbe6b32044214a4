"""Clocks that are ten years off, on either side and either way: what is refused, what goes on, how it is well again.

The cloud is a process whose clock a file moves; the edge's link takes a clock of the test's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clouds import Cloud, Edge, Program, look
from tta_cloud import identity
from tta_runtime.bundle import Bundle

TEN_YEARS_S = 10 * 365 * 86_400.0


class Clock:
    """A file that says by how much a service's clock is off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.off(0.0)

    def off(self, seconds: float) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(str(seconds))
        new.replace(self.path)


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path / "clock")


def taught(edge: Edge, seed: int) -> None:
    """A patch more than it had."""
    before, handed = edge.base.seq, len(edge.kept.keys)
    edge.take(24, seed)
    look(lambda: edge.base.seq > before and len(edge.kept) == 0 and len(edge.kept.keys) == handed + 24)


def refused(edge: Edge) -> int:
    return edge.info(seen=0, chosen=0).patches_refused


def more(see: Callable[[], int], count: int = 3) -> None:
    """Until it has grown by so much."""
    before = see()
    look(lambda: see() >= before + count)


def test_a_cloud_whose_clock_goes_ahead_and_back_is_believed_all_the_time(
    program: Program, bundle: Bundle, clock: Clock, tmp_path: Path
) -> None:
    """Heads keep the latest date; also over a restart; and new keys let dates begin anew."""
    settings = "[intake]\nquota_per_minute = 100\n"
    with Cloud(program, tmp_path / "cloud", bundle.path, settings, clock=clock.path) as cloud:
        cloud.start()
        cloud.enrol(tmp_path / "edge")
        with Edge(tmp_path / "edge", bundle) as edge:
            taught(edge, 1)
            clock.off(TEN_YEARS_S)
            for seed in (2, 3, 4):  # 72 samples
                taught(edge, seed)
            look(lambda: edge.dates[-1] > time.time() + TEN_YEARS_S / 2)
            clock.off(0.0)
            taught(edge, 5)  # what was sent in those ten years is not held against the edge
            assert {stored for stored, _ in edge.acknowledged.values()} == {True}
            assert edge.dates == sorted(edge.dates), "a date has gone back"
            assert any("Set the clock" in line for line in cloud.log)
            cloud.end()
            cloud.start()
            taught(edge, 6)
            more(lambda: len(edge.dates))
            assert edge.dates == sorted(edge.dates)
            assert refused(edge) == 0
            assert not edge.info(seen=0, chosen=0).stale
            cloud.end()
            identity.rotate(cloud.store, [])
            cloud.start()
            edge.take(24, seed=7)
            look(lambda: edge.base.epoch == 2 and len(edge.acknowledged) == 168)
            more(lambda: len(edge.dates))
            assert abs(edge.dates[-1] - time.time()) < 120
            taught(edge, 8)


def test_a_cloud_whose_clock_is_far_back_is_refused_and_recovers_with_its_clock(
    program: Program, bundle: Bundle, clock: Clock, tmp_path: Path
) -> None:
    clock.off(-TEN_YEARS_S)
    with Cloud(program, tmp_path / "cloud", bundle.path, clock=clock.path) as cloud:
        cloud.start()
        cloud.enrol(tmp_path / "edge")
        with Edge(tmp_path / "edge", bundle) as edge:
            edge.take(24, seed=1)
            more(lambda: refused(edge))
            look(lambda: len(edge.acknowledged) == 24)  # samples are taken all the same
            assert edge.phase == "online"
            assert (edge.staged, edge.link_head()) == ([], ""), "a head that has expired was believed"
            clock.off(0.0)
            look(lambda: edge.staged)
            before = refused(edge)
            clock.off(-TEN_YEARS_S)  # and now the cloud knows better
            taught(edge, 2)
            assert refused(edge) == before


def test_an_edge_whose_clock_is_ahead_believes_nothing_until_it_is_right(
    program: Program, bundle: Bundle, tmp_path: Path
) -> None:
    off = [TEN_YEARS_S]
    with Cloud(program, tmp_path / "cloud", bundle.path) as cloud:
        cloud.start()
        cloud.enrol(tmp_path / "edge")
        with Edge(tmp_path / "edge", bundle, wall_s=lambda: time.time() + off[0]) as edge:
            edge.take(24, seed=1)
            look(lambda: len(edge.acknowledged) == 24)
            more(lambda: refused(edge))
            assert (edge.staged, edge.link_head()) == ([], "")
            off[0] = 0.0
            look(lambda: edge.staged)
            off[0] = TEN_YEARS_S
            more(lambda: refused(edge))
            assert edge.phase == "online"
            off[0] = 0.0
            taught(edge, 2)


def test_an_edge_whose_clock_is_back_is_taught(program: Program, bundle: Bundle, tmp_path: Path) -> None:
    """As one without a battery that begins in 1970: the date of the last head is its clock."""
    with Cloud(program, tmp_path / "cloud", bundle.path) as cloud:
        cloud.start()
        cloud.enrol(tmp_path / "edge")
        with Edge(tmp_path / "edge", bundle, wall_s=lambda: 0.0) as edge:
            taught(edge, 1)
            taught(edge, 2)
            assert refused(edge) == 0
