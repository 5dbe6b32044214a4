"""One test for each threat of docs/security.md that comes over the wire, by a patch or from an edge, named after it.

Real sockets, and processes where memory or a refusal to start is what counts. Each test ends by showing that nothing
has changed, and that an honest party still gets what it should.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np
import pytest
import zmq
import zmq.utils.monitor

import exported
import tiny_bundle
from impostor import Impostor, enrolled, head_message, patch_message
from running import PATIENCE_S, Daemon, daemon, process_environment, running
from serving import until
from tta_cloud import control, edges, identity
from tta_cloud.control import LetEnrol, ShutOut
from tta_cloud.identity import Identity
from tta_edge import cloud as edge_cloud
from tta_edge.client import Client
from tta_edge.enrol import enrol
from tta_runtime import sealed as seals
from tta_runtime.bundle import Bundle
from tta_runtime.enrolment import Ticket, encode_ticket
from tta_runtime.link import HeadMessage, Hello, Noted, Ping, Welcome, decode_from_cloud, encode_message
from tta_runtime.link import Sample as SampleMessage
from tta_runtime.patch import DOMAIN, HEAD_LIFE_S, MAX_JUMP, body_sha256, make_head, make_patch
from tta_runtime.sealed import Sealed, SignatureEntry
from tta_runtime.signing import SecretKey
from tta_runtime.wire import declare

X, _ = tiny_bundle.samples(64, seed=3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("bundle") / "tiny"
    tiny_bundle.build(path)
    return Bundle.open(path)


@pytest.fixture
def keys(tmp_path: Path) -> Identity:
    return identity.create(tmp_path / "cloud")


def made(keys: Identity, bundle: Bundle, seq: int, **changes: Any) -> tuple[Sealed, bytes]:
    """A patch that passes, and moves theta a little with each number."""
    theta = np.array(bundle.theta0) * np.float32(1 + 0.001 * (seq % 10))
    fields: dict[str, Any] = {
        "bundle_digest": bundle.digest, "channel": "yard", "epoch": keys.root.epoch, "seq": seq,
        "parent_digest": "cd" * 32, "samples": 32, "issued_s": int(time.time()),
    }  # fmt: skip
    signers = changes.pop("signers", [keys.publisher])
    return make_patch(theta, bundle.manifest.theta, signers, **{**fields, **changes})


def sent(found: tuple[Sealed, bytes]) -> list[bytes]:
    return patch_message(seals.encode(found[0]), found[1])


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


class Edge:
    """A daemon in mode `cloud` under test."""

    def __init__(self, client: Client) -> None:
        self.client = client

    @property
    def base(self) -> str:
        """The committed base, after a batch that decides on what is on probation."""
        self.client.predict(X)
        return self.client.status().bundles[0].base

    @property
    def refused(self) -> int:
        found = self.client.status().cloud
        return 0 if found is None else found.patches_refused

    @property
    def stale(self) -> bool:
        found = self.client.status().cloud
        return found is not None and found.stale


def options(state: str) -> dict[str, Any]:
    return {"mode": "cloud", "method": "source", "state_dir": state, "probation_samples": 64}


# --- T1 -------------------------------------------------------------------------------------------


def test_t1_a_forged_patch_through_a_relay_is_never_applied(
    keys: Identity, bundle: Bundle, tmp_path: Path
) -> None:
    good, payload = made(keys, bundle, 2)
    (signature,) = good.signatures
    stranger = SecretKey.generate()
    forged = [
        made(keys, bundle, 2, signers=[stranger]),
        made(keys, bundle, 2, signers=[keys.publisher, stranger]),
        (Sealed(flipped(good.body, 40), good.signatures), payload),
        (Sealed(good.body, (SignatureEntry(signature.key_id, flipped(signature.value, 9)),)), payload),
        (Sealed(good.body, ()), payload),
        (good, flipped(payload, 3)),
        (good, payload[:-4]),
    ]
    with Impostor(keys) as relay, running(
        bundle.path, **options(enrolled(tmp_path / "edge", keys, relay.endpoint))
    ) as daemon, Client(daemon.endpoint) as client:  # fmt: skip
        edge = Edge(client)
        before = client.predict(X).logits
        relay.push(*map(sent, forged))
        until(lambda: edge.refused, lambda count: count == len(forged))
        assert edge.base == ""
        np.testing.assert_array_equal(client.predict(X).logits, before)
        assert not relay.progress, "the cloud is told of a patch that it has not made"
        relay.push(sent((good, payload)))
        until(lambda: edge.base, lambda base: base == "1.2")


def test_t1_a_patch_that_was_broken_on_its_way_is_fetched_again(
    keys: Identity, bundle: Bundle, tmp_path: Path
) -> None:
    sealed, payload = made(keys, bundle, 1)
    head = make_head(
        [keys.publisher],
        channel="yard",
        epoch=1,
        seq=1,
        newest=body_sha256(sealed),
        issued_s=int(time.time()),
    )
    with Impostor(keys) as relay, running(
        bundle.path, **options(enrolled(tmp_path / "edge", keys, relay.endpoint))
    ) as daemon, Client(daemon.endpoint) as client:  # fmt: skip
        edge = Edge(client)
        relay.patch = seals.encode(sealed), flipped(payload, 5)
        relay.push(head_message(head))
        until(lambda: edge.refused)
        assert edge.base == ""
        relay.patch = seals.encode(sealed), payload
        until(lambda: edge.base, lambda base: base == "1.1")
        assert relay.fetches >= 2
        assert [each.state for each in relay.progress][:1] == ["staged"], (
            "the network's fault is laid to the patch"
        )


# --- T2 -------------------------------------------------------------------------------------------


def test_t2_every_earlier_message_replayed_after_a_restart_is_refused(
    keys: Identity, bundle: Bundle, tmp_path: Path
) -> None:
    patches = [made(keys, bundle, seq) for seq in (1, 2, 3)]
    with Impostor(keys) as relay:
        state = enrolled(tmp_path / "edge", keys, relay.endpoint)
        with running(bundle.path, **options(state)) as daemon, Client(daemon.endpoint) as client:
            edge = Edge(client)
            for seq, patch in enumerate(patches, start=1):
                relay.push(sent(patch))
                until(lambda: edge.base, lambda base, seq=seq: base == f"1.{seq}")  # type: ignore[misc]
        for _ in range(2):  # and after a second restart
            greeted = relay.greeted
            with running(bundle.path, **options(state)) as daemon, Client(daemon.endpoint) as client:
                edge = Edge(client)
                until(lambda: relay.greeted, lambda found, n=greeted: found > n)  # type: ignore[misc]
                before = client.predict(X).logits
                relay.push(*map(sent, patches))
                until(lambda e=edge: e.refused, lambda count: count == len(patches))  # type: ignore[misc]
                assert edge.base == "1.3"
                np.testing.assert_array_equal(client.predict(X).logits, before)


# --- T3 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relay_does", ["withholds heads", "repeats the last head"])
def test_t3_a_relay_that_freezes_the_fleet_is_noticed_and_serving_goes_on(
    keys: Identity, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relay_does: str
) -> None:
    assert edge_cloud.STALE_S <= HEAD_LIFE_S == 600, "ten minutes, whatever the clock says"
    monkeypatch.setattr(edge_cloud, "STALE_S", 1.0)
    head = make_head([keys.publisher], channel="yard", epoch=1, seq=0, newest="", issued_s=int(time.time()))
    with Impostor(keys) as relay, running(
        bundle.path, **options(enrolled(tmp_path / "edge", keys, relay.endpoint))
    ) as daemon, Client(daemon.endpoint) as client:  # fmt: skip
        edge = Edge(client)
        relay.push(head_message(head))
        until(lambda: client.status().cloud, lambda found: found is not None and found.head == "1.0")

        def frozen() -> bool:
            if relay_does.startswith("repeats"):
                relay.push(head_message(head))
            client.predict(X)
            return edge.stale

        until(frozen)
        client.predict(X)
        newer = make_head(
            [keys.publisher], channel="yard", epoch=1, seq=0, newest="", issued_s=int(time.time()) + 1
        )
        relay.push(head_message(newer))
        until(lambda: edge.stale, lambda stale: not stale)


def test_t3_a_head_past_its_time_is_no_sign_of_life(keys: Identity, bundle: Bundle, tmp_path: Path) -> None:
    old = int(time.time()) - HEAD_LIFE_S - 1
    with Impostor(keys) as relay, running(
        bundle.path, **options(enrolled(tmp_path / "edge", keys, relay.endpoint))
    ) as daemon, Client(daemon.endpoint) as client:  # fmt: skip
        edge = Edge(client)
        sealed, _ = made(keys, bundle, 5)
        relay.push(
            head_message(
                make_head(
                    [keys.publisher], channel="yard", epoch=1, seq=5, newest=body_sha256(sealed), issued_s=old
                )
            )
        )
        until(lambda: edge.refused)
        found = client.status().cloud
        assert found is not None
        assert found.head == ""
        assert not relay.fetches


# --- T4 -------------------------------------------------------------------------------------------


def test_t4_mix_and_match_is_refused_and_the_edge_resyncs(
    keys: Identity, bundle: Bundle, tmp_path: Path
) -> None:
    """A patch of another model, of another tenant, of another layout, a head of another group: all well signed."""
    sealed, payload = made(keys, bundle, 4)
    body = msgspec.msgpack.decode(sealed.body)

    def resigned(**changes: Any) -> list[bytes]:
        changed = msgspec.msgpack.encode({**body, **changes})
        found = keys.publisher.sign(DOMAIN, changed)
        return sent((Sealed(changed, (SignatureEntry(found.key_id, found.value),)), payload))

    other_head = make_head(
        [keys.publisher], channel="robots", epoch=1, seq=9, newest="ab" * 32, issued_s=int(time.time())
    )
    mixed = [
        resigned(bundle_digest="ee" * 32),
        resigned(channel="robots"),
        resigned(size=body["size"] + 1),
        resigned(dtype="float16"),
        resigned(theta_digest="00" * 32),
        head_message(other_head),
    ]
    with Impostor(keys) as relay, running(
        bundle.path, **options(enrolled(tmp_path / "edge", keys, relay.endpoint))
    ) as daemon, Client(daemon.endpoint) as client:  # fmt: skip
        edge = Edge(client)
        relay.push(*mixed)
        until(lambda: edge.refused, lambda count: count == len(mixed))
        assert edge.base == ""
        good, payload = made(keys, bundle, 5)
        relay.push(sent((good, payload)))
        until(lambda: edge.base, lambda base: base == "1.5")


# --- T5 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thief_seq", [2**53 - 1, 2**63 - 1, "the largest that passes"])
def test_t5_fast_forward_by_a_stolen_key_is_undone_by_a_rotation_without_a_wipe(
    keys: Identity, bundle: Bundle, tmp_path: Path, thief_seq: Any
) -> None:
    passes = isinstance(thief_seq, str)
    seq = MAX_JUMP if passes else thief_seq
    with Impostor(keys) as relay:
        endpoint, state = relay.endpoint, enrolled(tmp_path / "edge", keys, relay.endpoint)
        with running(bundle.path, **options(state)) as daemon, Client(daemon.endpoint) as client:
            edge = Edge(client)
            relay.push(sent(made(keys, bundle, seq)))
            if passes:
                until(lambda: edge.base, lambda base: base == f"1.{seq}")
                relay.push(sent(made(keys, bundle, 2)))  # the owner's own is shut out
                until(lambda: edge.refused)
            else:
                until(lambda: edge.refused)
                assert edge.base == ""
    new = identity.rotate(tmp_path / "cloud", [])
    with Impostor(new, endpoint, root_version=2) as honest:
        honest.roots = {root.version: seals.encode(sealed) for root, sealed in new.roots}
        sealed, payload = made(new, bundle, 1)
        honest.patch = seals.encode(sealed), payload
        head = make_head(
            [new.publisher],
            channel="yard",
            epoch=2,
            seq=1,
            newest=body_sha256(sealed),
            issued_s=int(time.time()),
        )
        with running(bundle.path, **options(state)) as daemon, Client(daemon.endpoint) as client:
            edge = Edge(client)

            def recovered() -> str:
                honest.push(head_message(head))
                return edge.base

            until(recovered, lambda base: base == "2.1")
            # T7: what the thief signs from now on counts no more, whatever it says.
            refused = edge.refused
            stolen = [
                made(keys, bundle, 2, epoch=2),
                made(keys, bundle, 3, epoch=1),
                made(keys, bundle, 3, epoch=3),
            ]
            honest.push(*map(sent, stolen))
            until(lambda: edge.refused, lambda count: count == refused + len(stolen))
            assert edge.base == "2.1"


# --- T6, T8, T9, T16: the service as a process ------------------------------------------------------


@pytest.fixture(scope="module")
def student() -> Path:
    return exported.built("mlp", ("source", "distill")).path


class Cloud(Daemon):
    """`tta-cloud serve` in a process of its own, with one edge that is let in.

    Attributes:
        edge: the enrolment of the edge.
    """

    def __init__(self, process: subprocess.Popen[str], store: Path, state: Path) -> None:
        super().__init__(process)
        self.door = next(line for line in self.log if line.startswith("ready ")).split()[2]
        self.store = store
        secret = "a secret of some length"
        control.leave(store, LetEnrol(edges.hash_of(secret), "camera", "yard", 2**52))
        key = identity.load(store).curve_public
        self.edge = enrol(
            encode_ticket(Ticket(door=self.door, server_key=key, secret=secret, name="camera")), state
        )

    @property
    def address(self) -> tuple[str, int]:
        found = urlsplit(self.endpoint)
        assert found.hostname is not None
        assert found.port is not None
        return found.hostname, found.port

    def rss_mib(self) -> float:
        """Resident memory, as the system counts it."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def says(self, words: str) -> str:
        """The first line of its log with these words, when there is one."""
        return until(lambda: next((line for line in self.log if words in line), ""))

    def peer(self, **changes: Any) -> Peer:
        """Somebody with the edge's key, or what is changed of it."""
        fields = {"secret": self.edge.secret, "server": self.edge.link.server_key.encode(), **changes}
        return Peer(self.endpoint, **fields)


class Peer:
    """A DEALER that says what it likes; a context."""

    def __init__(self, endpoint: str, *, secret: bytes | None, server: bytes, plain: bool = False) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        if plain:
            self.socket.setsockopt(zmq.PLAIN_USERNAME, b"camera")
            self.socket.setsockopt(zmq.PLAIN_PASSWORD, b"camera")
        elif secret is not None:
            self.socket.setsockopt(zmq.CURVE_SERVERKEY, server)
            self.socket.setsockopt(zmq.CURVE_PUBLICKEY, zmq.curve_public(secret))
            self.socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_ALL)
        self.socket.connect(endpoint)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.destroy(linger=0)

    def until_refused(self, within_s: float) -> None:
        """Wait for the end of a handshake that must not succeed."""
        end_s, failed = time.monotonic() + within_s, False
        while not failed:
            left_s = end_s - time.monotonic()
            assert left_s > 0, f"not refused within {within_s:g} s"
            assert self.monitor.poll(int(left_s * 1000) + 1), f"not refused within {within_s:g} s"
            event = zmq.utils.monitor.recv_monitor_message(self.monitor)["event"]
            assert event != zmq.EVENT_HANDSHAKE_SUCCEEDED
            failed = event in (
                zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
                zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED,
            )  # fmt: skip

    def hello(self, digest: str) -> Any:
        """Say hello; the answer."""
        message = Hello(
            id=1, version="0", bundle_digest=digest, mode="cloud", epoch=0, seq=0, theta_digest="ab" * 32
        )
        self.socket.send_multipart(encode_message(message))
        return self.answer(1)

    def ping(self, number: int) -> float:
        """Seconds until a ping is answered."""
        began_s = time.monotonic()
        self.socket.send_multipart(encode_message(Ping(id=number)))
        assert isinstance(self.answer(number), Noted)
        return time.monotonic() - began_s

    def answer(self, number: int | None) -> Any:
        """The message with an id; heads and others are passed over."""
        while True:
            assert self.socket.poll(int(PATIENCE_S * 1000)), "no answer"
            message = decode_from_cloud(self.socket.recv_multipart()).message
            if getattr(message, "id", None) == number and not isinstance(message, HeadMessage):
                return message


@contextmanager
def cloud(student: Path, tmp_path: Path) -> Iterator[Cloud]:
    """The service, ready; killed at the end."""
    identity.create(tmp_path / "store")
    command = [
        sys.executable, "-m", "tta_cloud", "serve", "--student", str(student), "--teacher", str(student), "--store",
        str(tmp_path / "store"), "--bind", "tcp://127.0.0.1:0", "--enroll-bind", "tcp://127.0.0.1:0",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=process_environment())
    try:
        yield Cloud(process, tmp_path / "store", tmp_path / "state")
    finally:
        process.kill()
        process.wait(PATIENCE_S)


def test_t6_endless_data_bombs_and_claims_take_no_memory(student: Path, tmp_path: Path) -> None:
    digest = Bundle.open(student).digest
    frames: dict[str, list[bytes]] = {
        "17 MiB in a header": [b"TTC1", b"\xc6" + struct.pack(">I", 17 << 20) + bytes((17 << 20) - 64)],
        "17 MiB in a frame": [b"TTC1", b"\x80", bytes((17 << 20) - 64)],
        "nested arrays": [b"TTC1", b"\x91" * 10_000],
        "nested maps": [b"TTC1", b"\x81\xa1a" * 10_000],
        "a header that claims 4 GiB": [b"TTC1", b"\xc6\xff\xff\xff\xff"],
        "an array that claims 4 G elements": [b"TTC1", b"\xdd\xff\xff\xff\xff"],
        "a map that claims 4 G elements": [b"TTC1", b"\xdf\xff\xff\xff\xff"],
        "a text that claims 4 GiB": [b"TTC1", b"\x81\xa4type\xdb\xff\xff\xff\xff"],
        "many frames": [b"TTC1", b"\x80", *[b""] * 1000],
        "no frame but the first": [b"TTC1"],
    }
    x = np.zeros((1, 1), np.float32)
    small = SampleMessage(
        id=7, key="ab" * 16, stream="s", taken_ms=0, epoch=0, seq=0, entropy=0.5, encoding="raw", x=declare(x)
    )
    header = msgspec.msgpack.decode(bytes(encode_message(small, {"x": x})[1]))
    header["x"]["shape"] = [1 << 15, 1 << 15]
    frames["a sample that claims 4 GiB"] = [b"TTC1", msgspec.msgpack.encode(header), bytes(64)]
    with cloud(student, tmp_path) as service:
        with service.peer() as peer:
            assert isinstance(peer.hello(digest), Welcome)
            before = service.rss_mib()
            for name, bomb in frames.items():
                for _ in range(5):
                    with service.peer() as hostile:
                        hostile.hello(digest)
                        hostile.socket.send_multipart(bomb)
                        # It answers with a refusal, or has cut the line: either way the next one is heard.
                        if hostile.socket.poll(200):
                            hostile.socket.recv_multipart()
                grown = service.rss_mib() - before
                assert grown <= 32, f"{name}: {grown:.0f} MiB more"
        # Before any key was shown: a frame of 4 GiB, announced after the greeting.
        greeting = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
        for flags in (b"\x06", b"\x02"):
            with socket.create_connection(service.address) as raw:
                raw.sendall(greeting + flags + struct.pack(">Q", 4 << 30) + bytes(4096))
                raw.settimeout(6)
                while raw.recv(4096):
                    pass
        assert service.rss_mib() - before <= 32
        with service.peer() as honest:
            assert isinstance(honest.hello(digest), Welcome)
            honest.ping(2)


@pytest.mark.parametrize(
    ("who", "reason"),
    [
        ("null", "ask for CURVE"),
        ("plain", "ask for CURVE"),
        ("another server's key", "is refused"),
        ("unregistered", "the key is not enrolled"),
        ("revoked", "the key is revoked"),
    ],
)
def test_t8_who_is_not_let_in_is_refused_within_five_seconds_and_the_log_says_why(
    served: tuple[Cloud, str], who: str, reason: str
) -> None:
    service, digest = served
    with service.peer() as honest:
        assert isinstance(honest.hello(digest), Welcome)
    changes: dict[str, dict[str, Any]] = {
        "null": {"secret": None},
        "plain": {"plain": True},
        "another server's key": {"server": zmq.curve_keypair()[0]},
        "unregistered": {"secret": zmq.curve_keypair()[1]},
        "revoked": {},
    }
    if who == "revoked":
        control.leave(service.store, ShutOut(service.edge.public.decode()))
        until(lambda: not list((service.store / "control").glob("*.note")))
    with service.peer(**changes[who]) as peer:
        peer.until_refused(5.0)
        with suppress(zmq.Again):  # where there is no connection any more nothing can be said at all
            peer.socket.send_multipart(encode_message(Ping(id=1)), flags=zmq.DONTWAIT)
        assert not peer.socket.poll(100)
    assert "is refused" in service.says(reason)


@pytest.fixture(scope="module")
def served(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cloud, str]]:
    """One service for several strangers; the last one has its edge revoked."""
    with cloud(student, tmp_path_factory.mktemp("served")) as service:
        yield service, Bundle.open(student).digest


def test_t9_two_hundred_silent_or_senseless_connections_do_not_keep_an_edge_waiting(
    student: Path, tmp_path: Path
) -> None:
    digest, number = Bundle.open(student).digest, 200
    draw = np.random.default_rng(9)
    with cloud(student, tmp_path) as service, service.peer() as honest:
        assert isinstance(honest.hello(digest), Welcome)
        crowd: dict[int, tuple[socket.socket, float]] = {}
        poller, slowest_s = select.poll(), 0.0
        try:
            for i in range(number):
                raw = socket.create_connection(service.address)
                if i % 2:
                    raw.sendall(draw.bytes(200))
                raw.setblocking(False)
                crowd[raw.fileno()] = raw, time.monotonic()
                poller.register(raw, select.POLLIN)
            assert max(honest.ping(n) for n in range(2, 12)) <= 2
            with service.peer() as late:
                assert isinstance(late.hello(digest), Welcome)
                assert late.ping(2) <= 2
            end_s = time.monotonic() + PATIENCE_S
            while crowd:
                assert time.monotonic() < end_s, f"{len(crowd)} of {number} are not closed"
                for descriptor, _ in poller.poll(1000):
                    raw, began_s = crowd[descriptor]
                    try:
                        closed = not raw.recv(65536)
                    except OSError:
                        closed = True
                    if closed:
                        slowest_s = max(slowest_s, time.monotonic() - began_s)
                        poller.unregister(descriptor)
                        crowd.pop(descriptor)[0].close()
            assert slowest_s <= 6
        finally:
            for raw, _ in crowd.values():
                raw.close()
        with service.peer() as after:
            assert isinstance(after.hello(digest), Welcome)


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://*:0", "tcp://127.0.0.1:0"])
def test_t16_without_keys_the_cloud_does_not_start_on_any_address(
    student: Path, tmp_path: Path, address: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tta_cloud", "serve", "--student", str(student), "--teacher", str(student), "--store",
         str(tmp_path / "store"), "--bind", address],
        env=process_environment(), capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "tta-cloud keys init" in done.stderr
    assert "ready" not in done.stderr


def test_t16_an_edges_daemon_listens_on_loopback_only_unless_it_is_told_otherwise(bundle: Bundle) -> None:
    with daemon(bundle.path, bind="tcp://0.0.0.0:0") as found:
        assert found.wait() != 0
        assert not found.endpoint
        assert "allow" in "\n".join(found.log)
