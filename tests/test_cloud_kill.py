"""kill -9 of the whole `tta-cloud serve`, and of edges, at any moment: what was acknowledged or published stays."""

from __future__ import annotations

import itertools
import random
import signal
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from cloud_records import unused
from clouds import POINTS, Cloud, Edge, Program, content, look
from disks import Crashing
from networks import SIZE
from running import PATIENCE_S
from serving import until
from tta_cloud import ledger, samples
from tta_cloud.reading import read
from tta_cloud.store import Store
from tta_edge.base import Base, BaseStore, own
from tta_edge.client import Client
from tta_edge.errors import ConnectionLost, DeadlineExceeded, Unreachable
from tta_runtime import theta
from tta_runtime.bundle import Bundle

GROUP = "yard"


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
            fresh = store.read(lambda db: unused(db, GROUP, 10**6))
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
        assert fresh.damaged == used.damaged == ()
        there = [each.sample.key for each in (*fresh.samples, *used.samples)]
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


def converged(edge: Edge) -> None:
    """Wait until an edge has the newest patch that it is told of, and nothing waits."""
    look(
        lambda: (edge.phase, len(edge.kept), edge.link_head(), "{}.{}".format(*edge.base.order), edge.staged),
        lambda f: f[:2] == ("online", 0) and f[2] == f[3] and f[4],
    )


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
            converged(edge)
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


@pytest.mark.parametrize(
    "point",
    [name if name.startswith("after") else pytest.param(name, marks=pytest.mark.slow) for name in POINTS],
)
def test_killed_at_named_points(program: Program, bundle: Bundle, quick_path: Path, point: str) -> None:
    """A service that dies just there, twice at another turn, and one that takes up what it has left."""
    found = Found()
    with Cloud(program, quick_path / "cloud", bundle.path) as cloud:
        cloud.start()
        cloud.enrol(quick_path / "edge")
        cloud.end()
        with Edge(quick_path / "edge", bundle) as edge:
            for nth in (1, 3):
                cloud.launch((point, nth))
                edge.take(60, seed=nth)
                assert cloud.ended() == -signal.SIGKILL
                found.check(cloud.data, [edge])
            left = max(found.patches, default=(1, 0))
            cloud.start()
            converged(edge)
            if point in ("after-ledger", "after-push"):
                assert edge.staged[-1] >= left, "a patch that was durable is never offered"
                assert left in edge.patches or edge.staged[-1] > left
            assert cloud.end() == 0
            found.check(cloud.data, [edge])
            assert not [line for line in cloud.log if "replay" in line]
            assert edge.info(seen=0, chosen=0).patches_refused == 0, "a head went back"


def states(cloud: Cloud) -> dict[int, str]:
    """The ledger beside a service that runs: number -> state."""
    return {entry.seq: entry.state for entry in read(cloud.store, lambda db: ledger.entries(db, GROUP))}


def told(edges: list[Edge]) -> list[str]:
    """What each edge says is the newest patch."""
    return [edge.link_head() for edge in edges]


def test_a_rollout_that_a_kill_has_broken_off_goes_on_with_its_canaries(
    program: Program, bundle: Bundle, quick_path: Path
) -> None:
    settings = "[rollout]\ncanary_share = 0.3\ncanary_timeout_s = 600.0\n"
    with Cloud(program, quick_path / "cloud", bundle.path, settings) as cloud, ExitStack() as stack:
        cloud.start()
        edges = []
        for name in ("a", "b", "c"):
            cloud.enrol(quick_path / name, name)
            edges.append(stack.enter_context(Edge(quick_path / name, bundle, verdict="staged")))
        look(lambda: [edge.phase for edge in edges] == ["online"] * 3)
        edges[0].take(15, seed=1)  # for one patch and no more
        look(lambda: [1 for edge in edges if edge.staged])
        look(lambda: states(cloud).get(1) == "canary")
        (canary,) = [edge for edge in edges if edge.staged]
        others = [edge for edge in edges if edge is not canary]
        cloud.kill()
        cloud.start()
        look(lambda: told([canary]) == ["1.1"] and told(others) == ["1.0"] * 2)
        assert states(cloud)[1] == "canary"
        assert [edge.staged for edge in others] == [[], []], (
            "the group has it before its canaries have tried it"
        )
        cloud.kill()
        canary.base = Base(
            1, 1, canary.base.theta, 1, 1
        )  # it commits while the cloud is away, and says so in its hello
        canary.present_now()
        cloud.start()
        look(lambda: [edge.staged for edge in others] == [[(1, 1)]] * 2)
        look(lambda: states(cloud)[1] == "published")  # the ledger follows what edges are told
        assert [edge.info(seen=0, chosen=0).patches_refused for edge in edges] == [0] * 3


def test_edges_believe_the_cloud_also_when_a_rollout_was_stopped(
    program: Program, bundle: Bundle, quick_path: Path
) -> None:
    """Their canaries know the number of what was stopped: a head with the one before would be a replay to them."""
    settings = "[rollout]\ncanary_share = 0.3\n"
    with Cloud(program, quick_path / "cloud", bundle.path, settings) as cloud, ExitStack() as stack:
        cloud.start()
        edges = []
        for name in ("a", "b", "c"):
            cloud.enrol(quick_path / name, name)
            edges.append(stack.enter_context(Edge(quick_path / name, bundle, verdict="refused")))
        look(lambda: [edge.phase for edge in edges] == ["online"] * 3)
        edges[0].take(15, seed=1)  # for one patch and no more
        look(lambda: states(cloud).get(1) == "stopped")
        for _ in range(2):
            before = [len(edge.dates) for edge in edges]
            look(lambda before=before: all(len(e.dates) > n + 2 for e, n in zip(edges, before, strict=True)))  # type: ignore[misc]
            assert told(edges) == ["1.1"] * 3  # the word of the first was checked with the others
            assert [edge.info(seen=0, chosen=0).patches_refused for edge in edges] == [0] * 3
            cloud.kill()
            cloud.start()
            look(lambda: [edge.phase for edge in edges] == ["online"] * 3)


# --- an edge ----------------------------------------------------------------------------------------


def images(seed: int, n: int = 8) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).random((n, 3, SIZE, SIZE), dtype=np.float32)


class Served:
    """What an edge serves after each restart, beside what was committed and what the cloud has published."""

    def __init__(self, cloud: Cloud, bundle: Bundle, state: Path) -> None:
        self._cloud, self._bundle, self._state = cloud, bundle, state
        self.newest = (0, 0)

    def on_disk(self) -> tuple[tuple[int, int], str]:
        """Number and digest of the newest base that a slot holds; of the source where there is none."""
        found, refused = BaseStore(self._state / "bases" / "default", self._bundle).load()
        assert refused == [], "a kill is no damage"
        base = found[0] if found else own(self._bundle)
        return base.order, theta.digest(self._bundle.manifest.theta, np.asarray(base.theta))

    def check(self, client: Client) -> None:
        """It is what was committed, to the bit; it was published; and nothing that has served is forgotten."""
        order, digest = self.on_disk()
        assert order >= self.newest, "a committed base is lost"
        shown = client.status().bundles[0].base
        assert shown == ("" if order == (0, 0) else "{}.{}".format(*order))
        assert client.predict(images(0), adapt=False).theta_digest == digest
        if order != (0, 0):
            patch = read(self._cloud.store, lambda db: ledger.get(db, GROUP, *order))
            assert msgspec.msgpack.decode(patch.body)["theta_digest"] == digest
        self.newest = order

    def work(self, client: Client, seed: int) -> None:
        """One request; what is served then was committed before."""
        client.predict(images(seed))
        base = client.status().bundles[0].base
        if base:
            self.newest = max(self.newest, tuple(map(int, base.split("."))))  # type: ignore[assignment]


def kill_edges(program: Program, path: Path, bundle: Bundle, kills: list[tuple[int, str]], seed: int) -> int:
    """Kill an edge's daemon: at a call to the disk (from 1, and when), or (0) at a random moment; bases served."""
    draw, seeds, pause = random.Random(seed), itertools.count(1), threading.Event()
    state = path / "edge"
    with Cloud(program, path / "cloud", bundle.path) as cloud:
        cloud.start()
        cloud.enrol(state)
        config = {
            "bundle": str(bundle.path), "mode": "cloud", "method": "source", "state_dir": str(state),
            "upload": "all", "probation_samples": 16, "log_level": "error", "max_distance": 1e6,
        }  # fmt: skip
        served = Served(cloud, bundle, state)
        with Crashing(config, arm=path / "arm") as edge:
            for kill_at, when in kills:
                (path / "arm").unlink(missing_ok=True)
                with Client(edge.start(kill_at, when), timeout_s=PATIENCE_S) as client:
                    served.check(client)
                    if kill_at:
                        (path / "arm").touch()
                    rounds = draw.randrange(2, 30)
                    try:
                        while kill_at or rounds:
                            served.work(client, next(seeds))
                            rounds -= 1
                    except (ConnectionLost, DeadlineExceeded, Unreachable):
                        assert kill_at
                    pause.wait(draw.random() * 0.02)
                    edge.kill()
                assert edge.ended() == -signal.SIGKILL
            (path / "arm").unlink(missing_ok=True)
            with Client(edge.start(), timeout_s=PATIENCE_S) as client:
                served.check(client)
                before = served.newest
                until(lambda: served.work(client, next(seeds)) or served.newest > before)
    return served.newest[1]


def test_an_edge_that_is_killed_serves_a_committed_base(
    program: Program, bundle: Bundle, quick_path: Path
) -> None:
    kills = [(0, ""), (0, ""), (2, "half"), (4, "before"), (4, "after"), (0, "")]
    assert kill_edges(program, quick_path, bundle, kills, seed=1) > 1


@pytest.mark.slow
def test_an_edge_that_is_killed_often_serves_a_committed_base(
    program: Program, bundle: Bundle, quick_path: Path
) -> None:
    """Around every call to the disk of two commits, and at fifty random moments."""
    calls = [(nth, when) for nth in range(1, 13) for when in ("before", "half", "after")]
    last = kill_edges(program, quick_path, bundle, [*calls, *[(0, "")] * 50], seed=2)
    print(f"{len(calls)} kills at calls to the disk, 50 at random; base {last} serves")
