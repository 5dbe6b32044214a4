"""Faults of the line between an edge and a cloud that are processes of their own, with a TCP relay between them."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from clouds import EAGER, Cloud, Edge, Program, look
from relay import Relay, Way
from running import PATIENCE_S
from tta_cloud.errors import StoreUnusable
from tta_cloud.reading import read
from tta_edge.enrol import load
from tta_edge.uplink_options import UplinkOptions
from tta_runtime.bundle import Bundle
from tta_runtime.link import Fetch, Hello, encode_message

MB = 1 << 20
HEALED_S = 10.0
"""Within which an edge must have caught up when a line has healed."""


@pytest.fixture
def cloud(program: Program, bundle: Bundle, tmp_path: Path) -> Iterator[Cloud]:
    with Cloud(program, tmp_path / "cloud", bundle.path) as made:
        made.start()
        yield made


def stored(cloud: Cloud) -> dict[str, bytes]:
    """What the store holds: key -> bytes of the sample."""

    def rows() -> dict[str, bytes] | None:
        try:
            return read(cloud.store, lambda db: dict(db.execute("SELECT key, x FROM samples").fetchall()))
        except StoreUnusable:  # it is locked for a moment
            return None

    found: dict[str, bytes] = look(rows, lambda each: each is not None)
    return found


class State(str):
    """How an edge is; true where it has the newest patch that it has been told of, and nothing waits."""

    def __bool__(self) -> bool:
        return self == "well"


def newest(edge: Edge) -> State:
    """How an edge is."""
    info = edge.info(seen=0, chosen=0)
    order = f"{edge.base.epoch}.{edge.base.seq}" if edge.base.seq else "1.0"
    if info.phase == "online" and info.waiting == 0 and info.head == order:
        return State("well")
    return State(f"{info}, base {edge.base.order}, {edge._uplink._asks}")


def whole(cloud: Cloud, *edges: Edge) -> None:
    """Every sample that was handed in is stored once, as it was; nothing was applied twice or dropped."""
    rows = stored(cloud)
    for edge in edges:
        assert set(edge.kept.keys) <= rows.keys()
        assert set(edge.acknowledged) == set(edge.kept.keys)
        assert edge.twice == edge.given_up == []
        assert edge.kept.counters.dropped == edge.kept.counters.damaged == 0
        assert edge.staged == sorted(set(edge.staged)), "a patch was taken twice, or an older one"


# --- partition --------------------------------------------------------------------------------------


def parted(
    cloud: Cloud, bundle: Bundle, path: Path, options: UplinkOptions | None, seconds: float, loses: bool
) -> float:
    """An edge that is cut off for so long while others teach the group; seconds from healing to convergence."""
    pause = threading.Event()
    for name in ("far", "near"):
        cloud.enrol(path / name, name)
    with (
        Relay(cloud.endpoint) as relay,
        Edge(path / "far", bundle, options=options, endpoint=relay.endpoint) as far,
        Edge(path / "near", bundle) as near,
    ):
        far.take(24, seed=1)
        near.take(24, seed=2)
        look(lambda: (newest(far), far.staged), all)
        (relay.blackhole if loses else relay.partition)()
        began_s, seed = time.monotonic(), 10
        before = far.base.seq
        while time.monotonic() - began_s < seconds:
            seed += 1
            far.take(3, seed=seed)
            near.take(8, seed=1000 + seed)
            pause.wait(0.25)
        if options is EAGER or seconds >= 20:
            assert far.phase != "online"
            assert far.problem
        look(lambda: near.base.seq, lambda seq: seq > before)
        assert far.base.seq == before
        relay.heal()
        healed_s = time.monotonic()
        look(lambda: newest(far) and (far.base.seq >= near.base.seq or State("behind")))
        took_s = time.monotonic() - healed_s
        look(lambda: newest(near) and newest(far) and far.base.seq == near.base.seq)
        whole(cloud, far, near)
        return took_s


@pytest.mark.parametrize("loses", [False, True], ids=["everything waits", "everything vanishes"])
def test_a_partition_longer_than_the_patience_of_the_link_heals(
    cloud: Cloud, bundle: Bundle, tmp_path: Path, loses: bool
) -> None:
    print(f"converged after {parted(cloud, bundle, tmp_path, EAGER, 4.0, loses):.2f} s")


@pytest.mark.slow
@pytest.mark.parametrize("loses", [False, True], ids=["everything waits", "everything vanishes"])
def test_a_partition_of_a_minute_heals_within_ten_seconds(
    cloud: Cloud, bundle: Bundle, tmp_path: Path, loses: bool
) -> None:
    """With the settings that edges have."""
    took_s = parted(cloud, bundle, tmp_path, None, 60.0, loses)
    print(f"converged {took_s:.2f} s after a partition of 60 s")
    assert took_s < HEALED_S


def test_the_waits_of_a_link_add_up_to_less_than_ten_seconds() -> None:
    """From the moment at which a line heals, whatever the link is waiting for just then."""
    options = UplinkOptions()
    assert options.connect_s + options.max_wait_s < HEALED_S


def test_a_cloud_that_accepts_and_never_answers_is_left_and_found_again(
    cloud: Cloud, bundle: Bundle, tmp_path: Path
) -> None:
    cloud.enrol(tmp_path / "edge")
    with Relay(cloud.endpoint) as relay:
        relay.blackhole()
        with Edge(tmp_path / "edge", bundle, endpoint=relay.endpoint) as edge:
            edge.take(8, seed=1)
            look(lambda: relay.accepted, lambda count: count >= 2)
            assert edge.phase != "online"
            relay.heal()
            look(lambda: newest(edge))
            whole(cloud, edge)


def test_a_cloud_that_stands_still_is_noticed_and_goes_on(
    cloud: Cloud, bundle: Bundle, tmp_path: Path
) -> None:
    """SIGSTOP for longer than the patience of the link, then SIGCONT."""
    cloud.enrol(tmp_path / "edge")
    with Edge(tmp_path / "edge", bundle) as edge:
        edge.take(8, seed=1)
        look(lambda: edge.phase == "online")
        cloud.send(signal.SIGSTOP)
        try:
            edge.take(24, seed=2)
            look(lambda: edge.phase, lambda phase: phase != "online")
            assert "nothing was heard" in edge.problem
        finally:
            cloud.send(signal.SIGCONT)
        look(lambda: (newest(edge), len(edge.kept.keys) == 32), all)
        whole(cloud, edge)


def test_a_line_that_breaks_again_and_again_loses_and_doubles_nothing(
    cloud: Cloud, bundle: Bundle, tmp_path: Path
) -> None:
    cloud.enrol(tmp_path / "edge")
    pause = threading.Event()
    with Relay(cloud.endpoint) as relay, Edge(tmp_path / "edge", bundle, endpoint=relay.endpoint) as edge:
        for number in range(12):
            edge.take(6, seed=number)
            pause.wait(0.15)
            (relay.cut if number % 2 else relay.reset)()
        look(lambda: newest(edge))
        assert relay.accepted > 4
        whole(cloud, edge)


# --- bytes ------------------------------------------------------------------------------------------

HARMS: dict[str, Callable[[Relay, Way, int], threading.Event]] = {
    "flipped": Relay.flip, "doubled": Relay.double, "swapped": Relay.swap, "cut short": Relay.truncate,
}  # fmt: skip


@pytest.mark.parametrize(
    "harm",
    [
        name if name in ("flipped", "cut short") else pytest.param(name, marks=pytest.mark.slow)
        for name in HARMS
    ],
)
def test_bytes_that_are_changed_on_their_way_change_nothing_else(
    cloud: Cloud, bundle: Bundle, tmp_path: Path, harm: str
) -> None:
    """In both directions, within the greeting, the handshake and messages: the link is made anew, nothing else is."""
    cloud.enrol(tmp_path / "edge")
    with Relay(cloud.endpoint) as relay, Edge(tmp_path / "edge", bundle, endpoint=relay.endpoint) as edge:
        edge.take(8, seed=0)
        look(lambda: newest(edge))
        for number, (way, after) in enumerate([(w, n) for w in Way for n in (0, 3000)]):
            done = HARMS[harm](relay, way, after)
            while not done.is_set():
                edge.take(4, seed=100 * number + len(edge.kept.keys))
                done.wait(0.1)
            look(lambda: newest(edge))
        for way in Way:  # in what a connection begins with
            for after in (5, 70, 200):
                before = relay.accepted
                done = HARMS[harm](relay, way, after)
                relay.reset()
                assert done.wait(PATIENCE_S), newest(edge)
                look(lambda: newest(edge))
                assert relay.accepted > before
        whole(cloud, edge)


def test_a_slow_line_with_jitter_is_not_taken_for_a_dead_one(
    cloud: Cloud, bundle: Bundle, tmp_path: Path
) -> None:
    """150 to 250 ms each way and 32 KB/s, with the settings that edges have."""
    cloud.enrol(tmp_path / "edge")
    with Relay(cloud.endpoint) as relay:
        relay.slow(delay_s=0.15, jitter_s=0.1, bytes_per_s=32 * 1024)
        with Edge(tmp_path / "edge", bundle, options=None, endpoint=relay.endpoint) as edge:
            edge.take(16, seed=1)
            look(lambda: (newest(edge), edge.staged), all)
            assert relay.accepted == 1, "a false alarm"
            whole(cloud, edge)


# --- who does not read ------------------------------------------------------------------------------


def test_an_edge_that_does_not_read_costs_the_cloud_little_and_the_others_nothing(
    cloud: Cloud, bundle: Bundle, tmp_path: Path
) -> None:
    """A stranger to manners: it asks for patches without end and reads no answer."""
    for name in ("rude", "near"):
        cloud.enrol(tmp_path / name, name)
    with Edge(tmp_path / "near", bundle) as near:
        near.take(16, seed=1)
        look(lambda: newest(near) and near.staged)
        before = cloud.rss()
        found = load(tmp_path / "rude")
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, 1)
        socket.setsockopt(zmq.SNDHWM, 10)
        socket.setsockopt(zmq.RCVBUF, 4096)
        socket.setsockopt(zmq.CURVE_SERVERKEY, found.link.server_key.encode())
        socket.setsockopt(zmq.CURVE_PUBLICKEY, found.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, found.secret)
        socket.connect(cloud.endpoint)
        try:
            hello = Hello(
                id=1, version="0", bundle_digest=bundle.digest, mode="cloud", epoch=0, seq=0,
                theta_digest="ab" * 32,
            )  # fmt: skip
            socket.send_multipart(encode_message(hello))
            assert socket.poll(20_000)
            socket.recv_multipart()
            sent = 0
            while sent < 60_000 and socket.poll(500, zmq.POLLOUT):
                socket.send_multipart(encode_message(Fetch(id=2 + sent)))
                sent += 1
            near.take(40, seed=2)
            seq = near.base.seq
            look(lambda: newest(near) and near.base.seq > seq)
            grown = cloud.rss() - before
            print(f"{sent} patches asked for; the cloud has grown by {grown / MB:.1f} MB")
            assert sent > 500
            assert grown < 32 * MB
        finally:
            socket.close(linger=0)
            context.term()
        whole(cloud, near)


def test_an_edge_that_sleeps_through_many_patches_takes_the_newest_one_only(
    cloud: Cloud, bundle: Bundle, tmp_path: Path
) -> None:
    """Its line takes nothing while the cloud publishes; what it was not sent is not kept for it."""
    for name in ("slow", "near"):
        cloud.enrol(tmp_path / name, name)
    with (
        Relay(cloud.endpoint) as relay,
        Edge(tmp_path / "slow", bundle, endpoint=relay.endpoint) as slow,
        Edge(tmp_path / "near", bundle) as near,
    ):
        near.take(16, seed=1)
        look(lambda: newest(slow) and newest(near) and slow.staged)
        before = cloud.rss()
        relay.partition()
        for number in range(12):
            seq = near.base.seq
            near.take(24, seed=10 + number)
            look(lambda seq=seq: newest(near) and near.base.seq > seq)  # type: ignore[misc]
        count, missed = len(slow.staged), near.base.seq - slow.base.seq
        assert missed >= 12
        assert cloud.rss() - before < 48 * MB
        relay.heal()
        look(lambda: newest(slow) and slow.base.seq == near.base.seq)
        assert len(slow.staged) - count <= 3, "it has taken patches one after the other"
        np.testing.assert_array_equal(slow.base.theta, near.base.theta)
        whole(cloud, slow, near)
