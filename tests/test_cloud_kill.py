"""kill -9 of the whole `tta-cloud serve`, and of edges, at any moment: what was acknowledged or published stays."""

from __future__ import annotations

import random
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import exported
from clouds import Cloud, Edge, Program, content, look
from tta_cloud import ledger, samples
from tta_cloud.store import Store
from tta_runtime.bundle import Bundle

METHODS = ("source", "distill")
GROUP = "yard"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(exported.built("resnet", METHODS).path)


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    with Program() as made:
        yield made


@pytest.fixture
def quick_path(tmp_path: Path) -> Any:
    """A directory in memory where there is one: what survives a kill need not reach a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as path:
        yield Path(path)


# --- the cloud --------------------------------------------------------------------------------------


class Found:
    """What a store holds after a kill, beside what has been seen of it before.

    Attributes:
        patches: (epoch, seq) -> content, of every patch that any look has found.
        published: those that any look has found published.
    """

    def __init__(self) -> None:
        self.patches: dict[tuple[int, int], str] = {}
        self.published: set[tuple[int, int]] = set()

    def check(self, data: Path, edges: list[Edge]) -> None:
        """Nothing that an edge was told, or that was there before, is missing or another."""
        told: list[str] = []
        store = Store(data, lambda event: told.append(event.detail))
        try:
            unused = store.read(lambda db: samples.unused(db, GROUP, 10**6))
            used = store.read(lambda db: samples.replay(db, GROUP, 10**6, newest=10**6, seed=0))
            entries = store.read(lambda db: ledger.entries(db, GROUP, 10**6))
            patches = {
                (entry.epoch, entry.seq): store.read(
                    lambda db, entry=entry: ledger.get(db, GROUP, entry.epoch, entry.seq)  # type: ignore[misc]
                )
                for entry in entries
            }
            last = store.read(lambda db: ledger.last_seq(db, GROUP, 1))
        finally:
            store.close()
        assert told == [], "a kill is no damage"
        assert unused.damaged == used.damaged == ()
        there = [each.sample.key for each in (*unused.samples, *used.samples)]
        assert len(set(there)) == len(there)
        for edge in edges:
            acknowledged = {key for key, (stored, why) in list(edge.acknowledged.items())}
            assert acknowledged <= set(there), "an acknowledged sample is lost"
            assert set(there) & set(edge.kept.keys) | acknowledged <= set(edge.kept.keys)
            assert edge.given_up == []
            for name, found in list(edge.patches.items()):
                patch = patches[name]
                assert content(patch.body, patch.payload) == found, f"{name} is another one now"
        now = {name: content(patch.body, patch.payload) for name, patch in patches.items()}
        assert self.patches.items() <= now.items(), "a patch is lost, or its number was used again"
        assert [seq for _, seq in sorted(now)] == list(range(1, last + 1))
        published = {(e.epoch, e.seq) for e in entries if e.state == "published"}
        assert self.published <= published
        self.patches, self.published = now, self.published | published


def kill_at_random(program: Program, path: Path, bundle: Bundle, kills: int, seed: int) -> tuple[int, int]:
    """Kill the service while an edge uploads, again and again; samples acknowledged and patches published."""
    draw, found, pause = random.Random(seed), Found(), threading.Event()
    with Cloud(program, path / "cloud", bundle.path) as cloud:
        cloud.start()
        cloud.enrol(path / "edge")
        with Edge(path / "edge", bundle) as edge:
            for number in range(kills):
                if not cloud.pid:
                    cloud.launch()
                edge.take(draw.randrange(30, 60), seed=number)
                if draw.random() < 0.8:  # else while it starts, or has just started
                    wanted = len(edge.acknowledged) + draw.randrange(1, 30)
                    look(lambda wanted=wanted: len(edge.acknowledged) >= wanted)  # type: ignore[misc]
                pause.wait(draw.random() * 0.2)
                assert cloud.kill() == -signal.SIGKILL
                found.check(cloud.data, [edge])
            cloud.launch()
            edge.take(8, seed=kills)
            edge.settled(1)
            newest = look(
                lambda: (edge.staged[-1:], edge.link_head()),
                lambda f: f[0] and "{}.{}".format(*f[0][0]) == f[1],
            )
            assert newest
            assert cloud.end() == 0
            found.check(cloud.data, [edge])
            assert sorted(edge.staged) == edge.staged, "an older patch was taken again"
            assert len(set(edge.staged)) == len(edge.staged)
            return len(edge.acknowledged), len(found.published)


def test_killed_at_a_few_moments_while_an_edge_uploads(
    program: Program, bundle: Bundle, quick_path: Path
) -> None:
    acknowledged, published = kill_at_random(program, quick_path, bundle, 5, seed=1)
    print(f"5 kills, {acknowledged} samples acknowledged, {published} patches published")


@pytest.mark.slow
def test_killed_at_fifty_moments_while_an_edge_uploads(
    program: Program, bundle: Bundle, quick_path: Path
) -> None:
    totals = [0, 0]
    for number in range(5):
        path = quick_path / str(number)
        path.mkdir()
        for at, count in enumerate(kill_at_random(program, path, bundle, 10, seed=100 + number)):
            totals[at] += count
    print(f"50 kills, {totals[0]} samples acknowledged, {totals[1]} patches published")
