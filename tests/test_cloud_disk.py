"""Full and damaged disks under a cloud and an edge that are processes of their own: up, honest, and well later."""

from __future__ import annotations

import ctypes
import itertools
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clouds import Cloud, Edge, Program, look
from networks import SIZE
from running import PATIENCE_S, daemon
from serving import until
from tta_cloud import control, ledger
from tta_cloud.promises import FILE as PROMISES
from tta_cloud.reading import fleet, read
from tta_cloud.store import FILE, Store
from tta_edge.client import Client
from tta_edge.enrol import load
from tta_runtime.bundle import Bundle

GROUP = "yard"
DISK_BYTES = 6 << 20


# --- disks that can be filled -------------------------------------------------------------------------


class Limited:
    """No file of a process may grow any more: what RLIMIT_FSIZE does, for a process that runs."""

    def fill(self, pid: int) -> None:
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, hard))

    def free(self, pid: int) -> None:
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))


class Small:
    """A file system of a few megabytes."""

    def __init__(self, path: Path) -> None:
        self._filler = path / "filler"

    def fill(self, pid: int) -> None:
        with open(self._filler, "wb", buffering=0) as file:
            size = 1 << 16
            while size:
                try:
                    file.write(bytes(size))
                except OSError:
                    size //= 2

    def free(self, pid: int) -> None:
        self._filler.unlink()


LIMIT, SMALL = "a limit", "a small file system"


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Any]]:
    """A directory, and what fills the disk under it."""
    root = tmp_path / "disk"
    root.mkdir()
    if request.param == LIMIT:
        yield root, Limited()
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(root), b"tmpfs", 0, f"size={DISK_BYTES}".encode()):
        pytest.skip(f"no file system can be mounted here: {os.strerror(ctypes.get_errno())}")
    try:
        yield root, Small(root)
    finally:
        libc.umount2(os.fsencode(root), 2)  # MNT_DETACH


def keys(cloud: Cloud) -> set[str]:
    """The samples that a store holds, read when no service runs."""
    store = Store(cloud.data, lambda event: pytest.fail(event.detail))
    try:
        return set(store.read(lambda db: [key for (key,) in db.execute("SELECT key FROM samples")]))
    finally:
        store.close()


def well(edge: Edge) -> bool:
    """Whether an edge has the newest patch it is told of, and nothing waits."""
    info = edge.info(seen=0, chosen=0)
    order = f"{edge.base.epoch}.{edge.base.seq}" if edge.base.seq else "1.0"
    return (info.phase, info.waiting, info.head, info.problem) == ("online", 0, order, "")


# --- full ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("disk", [LIMIT, pytest.param(SMALL, marks=pytest.mark.slow)], indirect=True)
def test_a_cloud_whose_disk_is_full_says_so_and_no_sample_is_lost(
    program: Program, bundle: Bundle, disk: tuple[Path, Any], tmp_path: Path
) -> None:
    root, full = disk
    with Cloud(program, root / "cloud", bundle.path) as cloud:
        cloud.start()
        for name in ("edge", "other"):
            cloud.enrol(tmp_path / name, name)
        with Edge(tmp_path / "edge", bundle) as edge, Edge(tmp_path / "other", bundle) as other:
            edge.take(16, seed=1)
            look(lambda: well(edge) and edge.staged and well(other))
            full.fill(cloud.pid)
            before = len(edge.acknowledged)
            edge.take(24, seed=2)
            look(lambda: edge.problem.startswith("busy: store-"))
            rounds = len([line for line in cloud.log if "a sample is not stored" in line]) + 33
            look(lambda: len([line for line in cloud.log if "a sample is not stored" in line]) > rounds)
            # Its answers go on; whoever is to be shut out is, though it cannot be written down.
            assert edge.phase == "online"
            if isinstance(full, Small):
                full.free(cloud.pid)  # for the note
                control.leave(cloud.store, control.ShutOut(load(tmp_path / "other").public.decode()))
                full.fill(cloud.pid)
            else:
                control.leave(cloud.store, control.ShutOut(load(tmp_path / "other").public.decode()))
            look(lambda: "revoked" in other.problem or "not enrolled" in other.problem)
            stored = set(read(cloud.store, lambda db: [k for (k,) in db.execute("SELECT key FROM samples")]))
            assert set(edge.acknowledged) <= stored
            full.free(cloud.pid)
            look(lambda: well(edge) and len(edge.acknowledged) == before + 24)
            assert edge.given_up == edge.twice == []
            look(lambda: not list((cloud.store / "control").glob("*.note")))
            cloud.kill()
        assert set(edge.kept.keys) <= keys(cloud)
        states = {row["name"]: row["state"] for row in fleet(cloud.store)}
        assert states == {"edge": "active", "other": "revoked"}


@pytest.mark.parametrize("disk", [pytest.param(LIMIT, marks=pytest.mark.slow), SMALL], indirect=True)
def test_an_edge_whose_disk_is_full_serves_on_says_so_and_is_taught_again_later(
    program: Program, bundle: Bundle, disk: tuple[Path, Any], tmp_path: Path
) -> None:
    root, full = disk
    state = root / "edge"
    draw = np.random.default_rng(1)
    with Cloud(program, tmp_path / "cloud", bundle.path) as cloud:
        cloud.start()
        for path in (state, tmp_path / "near"):
            cloud.enrol(path, path.name)
        arguments = (
            bundle.path, "--mode", "cloud", "--method", "source", "--state-dir", state, "--upload", "all",
            "--probation-samples", "16", "--max-distance", "1000000",
        )  # fmt: skip
        with (
            daemon(*arguments) as edge,
            Client(edge.endpoint, timeout_s=PATIENCE_S) as client,
            Edge(tmp_path / "near", bundle) as near,
        ):

            def base() -> str:
                client.predict(draw.random((8, 3, SIZE, SIZE), dtype=np.float32))
                return client.status().bundles[0].base

            until(base)
            full.fill(edge.process.pid)
            seeds = itertools.count(1)

            def refused() -> bool:
                near.take(8, seed=next(seeds))  # so that there are patches to refuse
                base()
                found = client.status().cloud
                reasons = {(each.action, each.reason) for each in client.events().events}
                return ("disk", "disk-error") in reasons and found is not None and found.dropped > 0

            until(refused)
            served = client.status().bundles[0].base
            x = draw.random((8, 3, SIZE, SIZE), dtype=np.float32)
            answer = client.predict(x, adapt=False)
            assert [base() for _ in range(3)] == [served] * 3, "what cannot be kept does not serve"
            assert client.predict(x, adapt=False).theta_digest == answer.theta_digest
            full.free(edge.process.pid)
            until(base, lambda found: found != served)
            found = client.status().cloud
            assert found is not None
            assert found.phase == "online"
            sent = found.sent
            until(lambda: (base(), client.status().cloud)[1], lambda found: found.sent > sent)  # type: ignore[union-attr]
            edge.stop(signal.SIGKILL)
        with daemon(*arguments) as again, Client(again.endpoint, timeout_s=PATIENCE_S) as client:
            assert client.status().bundles[0].base != served


# --- damaged ------------------------------------------------------------------------------------------


def zero_header(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(bytes(100))


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """A byte of every 64, after the header."""
    data = bytearray(path.read_bytes())
    for at in range(4096, len(data), 64):
        data[at] ^= 0x55
    with open(path, "r+b") as file:
        file.write(data)


HARMS: dict[str, Callable[[Path], None]] = {"no header": zero_header, "half of it": halve, "flipped": flip}


def go_on(cloud: Cloud, edge: Edge, last: int, handed: int) -> None:
    """The edge needs no operator: it is let in, what it has is sent, and numbers go on."""
    edge.take(24, seed=7)
    look(lambda: well(edge) and edge.base.seq > last)
    assert set(edge.acknowledged) == set(edge.kept.keys)
    assert len(edge.kept.keys) == handed + 24
    assert edge.given_up == []
    assert edge.info(seen=0, chosen=0).patches_refused == 0
    assert list(cloud.data.glob(f"{FILE}.corrupt-*"))
    assert any("quarantine" in line for line in cloud.log)
    assert read(cloud.store, lambda db: ledger.last_seq(db, GROUP, 1)) > last


@pytest.mark.parametrize(
    "harm", ["no header", *(pytest.param(name, marks=pytest.mark.slow) for name in ("half of it", "flipped"))]
)
def test_a_store_that_was_damaged_while_the_service_was_down(
    program: Program, bundle: Bundle, tmp_path: Path, harm: str
) -> None:
    with Cloud(program, tmp_path / "cloud", bundle.path) as cloud:
        cloud.start()
        for name in ("edge", "other"):
            cloud.enrol(tmp_path / name, name)
        with Edge(tmp_path / "edge", bundle) as edge:
            edge.take(32, seed=1)
            look(lambda: well(edge) and edge.base.seq > 1)
            control.leave(cloud.store, control.ShutOut(load(tmp_path / "other").public.decode()))
            look(lambda: not list((cloud.store / "control").glob("*.note")))
            cloud.end()
            last = edge.base.seq
            edge.take(8, seed=2)
            look(lambda: len(edge.kept) == 8)
            HARMS[harm](cloud.data / FILE)
            cloud.start()
            go_on(cloud, edge, last, 40)
            states = {row["name"]: row["state"] for row in fleet(cloud.store)}
            assert states == {"edge": "active", "other": "revoked"}
            cloud.end()
            cloud.start()  # and the new store is a good one
            edge.take(24, seed=8)
            last = edge.base.seq
            look(lambda: well(edge) and edge.base.seq > last)


@pytest.mark.parametrize("harm", [pytest.param("half of it", marks=pytest.mark.slow), "flipped"])
def test_a_store_that_is_damaged_under_a_service_that_runs(
    program: Program, bundle: Bundle, tmp_path: Path, harm: str
) -> None:
    with Cloud(program, tmp_path / "cloud", bundle.path) as cloud:
        cloud.start()
        cloud.enrol(tmp_path / "edge")
        with Edge(tmp_path / "edge", bundle) as edge:
            edge.take(32, seed=1)
            look(lambda: well(edge) and edge.base.seq > 1)
            last, handed = edge.base.seq, 32
            cloud.end()  # so that everything is in the file itself
            cloud.start()
            look(lambda: well(edge))
            HARMS[harm](cloud.data / FILE)
            seeds = itertools.count(10)

            def noticed() -> bool:
                edge.take(4, seed=next(seeds))
                return any("quarantine" in line for line in cloud.log)

            look(noticed)
            look(lambda: well(edge))
            handed = len(edge.kept.keys)
            go_on(cloud, edge, last, handed)
            assert [row["state"] for row in fleet(cloud.store)] == ["active"]
            assert cloud.end() == 0


def test_what_was_promised_is_written_anew_where_that_file_is_damaged(
    program: Program, bundle: Bundle, tmp_path: Path
) -> None:
    with Cloud(program, tmp_path / "cloud", bundle.path) as cloud:
        cloud.start()
        cloud.enrol(tmp_path / "edge")
        with Edge(tmp_path / "edge", bundle) as edge:
            edge.take(24, seed=1)
            look(lambda: well(edge) and edge.staged)
            cloud.end()
            path = cloud.store / PROMISES
            good = path.read_bytes()
            path.write_bytes(good.replace(b'"seq":0', b'"seq":1'))
            last = edge.base.seq
            cloud.start()
            edge.take(24, seed=2)
            look(lambda: well(edge) and edge.base.seq > last)
            assert any("its checksum does not fit" in line for line in cloud.log)
            assert path.read_bytes() != good
            assert path.stat().st_mode & 0o077 == 0
            cloud.end()
            count = len(cloud.log)
            cloud.start()
            assert not any("checksum" in line for line in cloud.log[count:])


def test_a_samples_file_that_is_damaged_on_the_edge_costs_itself_only(
    program: Program, bundle: Bundle, tmp_path: Path
) -> None:
    """While nobody is there to take it: what is left is sent, and status says what was lost."""
    with Cloud(program, tmp_path / "cloud", bundle.path) as cloud:
        cloud.start()
        cloud.enrol(tmp_path / "edge")
        cloud.end()
        with Edge(tmp_path / "edge", bundle) as edge:
            edge.take(8, seed=1)
            look(lambda: len(edge.kept) == 8)
            edge.take(8, seed=2)
            look(lambda: len(edge.kept) == 16)
            newest = max((tmp_path / "edge" / "spool").glob("*.batch"))
            data = bytearray(newest.read_bytes())
            data[-100] ^= 1  # of the last sample
            newest.write_bytes(data)
            cloud.start()
            look(lambda: well(edge))
            assert len(edge.acknowledged) == 15
            assert edge.kept.counters.damaged == 1
        cloud.kill()
        assert len(keys(cloud)) == 15
