"""Threats of docs/security.md from the edge's side, and inside sessions that are encrypted already.

The attacker holds the cloud's CURVE key (`Impostor`: a stolen host), or sits on the line and adds bytes to an encrypted
session. Memory is that of a process of its own. Each test ends with an honest party that gets what it should.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import exported
import tiny_bundle
from cloud_server import METHODS
from clouds import Cloud, Program, point
from impostor import Impostor, enrolled, head_message, patch_message, root_message
from relay import Relay, Way
from running import daemon, running
from serving import until
from snapshots import snapshot
from tta_cloud import identity
from tta_cloud.identity import Identity
from tta_edge.client import Client
from tta_runtime import sealed as seals
from tta_runtime.bundle import Bundle
from tta_runtime.link import MAX_PAYLOAD_BYTES, MAX_SEALED_BYTES
from tta_runtime.patch import make_head, make_patch
from tta_runtime.root import DOMAIN, Root, make_root, named
from tta_runtime.sealed import Sealed, SignatureEntry
from tta_runtime.signing import SecretKey

X, _ = tiny_bundle.samples(64, seed=3)
MAY_GROW_MIB = 32
GIB = 1 << 30


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("bundle") / "tiny"
    tiny_bundle.build(path)
    return Bundle.open(path)


@pytest.fixture
def keys(tmp_path: Path) -> Identity:
    return identity.create(tmp_path / "cloud")


def patch(signer: SecretKey, bundle: Bundle, epoch: int, seq: int) -> tuple[Sealed, bytes]:
    """A patch that passes where the signer counts, and moves theta a little with each number."""
    theta = np.array(bundle.theta0) * np.float32(1 + 0.001 * seq)
    return make_patch(
        theta, bundle.manifest.theta, [signer], bundle_digest=bundle.digest, channel="yard", epoch=epoch, seq=seq,
        parent_digest="cd" * 32, samples=32, issued_s=int(time.time()),
    )  # fmt: skip


def sent(found: tuple[Sealed, bytes]) -> list[bytes]:
    return patch_message(seals.encode(found[0]), found[1])


def rss_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def peak_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


# --- T6 inside an encrypted session -------------------------------------------------------------------------

NOISE = np.random.default_rng(6).bytes(1 << 16)
CLAIMS = {
    "a message of 4 GiB": b"\x02" + struct.pack(">Q", 4 * GIB) + NOISE,
    "a command of 4 GiB": b"\x06" + struct.pack(">Q", 4 * GIB) + NOISE,
    "more than there is": b"\x02" + struct.pack(">Q", 2**63 - 1) + NOISE,
    "below the bound, and noise": b"\x06" + struct.pack(">Q", 16 << 20) + NOISE * 256,
    "noise without a length": NOISE,
}
"""Frames of ZMTP, as they stand between those of a session (ZeroMQ RFC 23): flags, eight bytes of length, content."""


@pytest.fixture(scope="module")
def student() -> Bundle:
    return Bundle.open(exported.built("resnet", METHODS).path)


@pytest.mark.parametrize("way", Way)
def test_t6_a_claim_of_4_gib_inside_an_encrypted_session_takes_no_memory(
    program: Program, student: Bundle, tmp_path: Path, way: Way
) -> None:
    """Towards the cloud (UP) and towards the edge (DOWN): the connection ends, a new one goes on where it was."""
    with _behind(Cloud(program, tmp_path / "cloud", student.path), tmp_path) as (relay, cloud, state):
        words = ("--mode", "cloud", "--method", "source", "--state-dir", state)
        with daemon(student.path, *words, TTA_UPLOAD="all") as found, Client(found.endpoint) as client:
            until(lambda: _phase(client), lambda phase: phase == "online")
            images = np.random.default_rng(0).random((16, 3, 16, 16), dtype=np.float32)
            client.predict(images)
            until(lambda: _sent(client), lambda count: count == 16)
            victim = cloud.pid if way is Way.UP else found.process.pid
            before, connections = rss_mib(victim), relay.accepted
            for turn, (name, claim) in enumerate(CLAIMS.items(), start=1):
                assert relay.insert(way, claim).wait(20), "nothing passes into which it could be put"
                until(lambda: (client.info(), relay.accepted)[1], lambda n, t=turn: n >= connections + t)  # type: ignore[misc]
                until(lambda: _phase(client), lambda phase: phase == "online")
                grown = rss_mib(victim) - before
                assert grown <= MAY_GROW_MIB, f"{name}: {grown:.0f} MiB more"
            client.predict(images + np.float32(0.01))
            until(lambda: _sent(client), lambda count: count == 32)


@contextmanager
def _behind(made: Cloud, tmp_path: Path) -> Iterator[tuple[Relay, Cloud, Path]]:
    """A cloud that runs, and the state directory of an edge that reaches it through a relay."""
    with made as cloud:
        cloud.start()
        cloud.enrol(tmp_path / "edge")
        with Relay(cloud.endpoint) as relay:
            point(tmp_path / "edge", relay.endpoint)
            yield relay, cloud, tmp_path / "edge"


def _phase(client: Client) -> str:
    found = client.status().cloud
    return "" if found is None else found.phase


def _sent(client: Client) -> int:
    found = client.status().cloud
    return 0 if found is None else found.sent


# --- T6 from a host that holds the CURVE key -----------------------------------------------------------------


def test_t6_bombs_of_a_stolen_host_take_no_memory_of_an_edge(
    keys: Identity, bundle: Bundle, tmp_path: Path
) -> None:
    good, payload = patch(keys.publisher, bundle, 1, 1)
    sealed = seals.encode(good)
    header = msgspec.msgpack.decode(sent((good, payload))[1])

    def claimed(**shapes: list[int]) -> list[bytes]:
        """A patch whose header claims other sizes than its frames have."""
        changed = {**header, **{name: {"dtype": "uint8", "shape": shape} for name, shape in shapes.items()}}
        return [b"TTC1", msgspec.msgpack.encode(changed), sealed, payload]

    bombs: dict[str, list[list[bytes]]] = {
        "17 MiB in a header": [[b"TTC1", b"\xc6" + struct.pack(">I", 17 << 20) + bytes((17 << 20) - 64)]],
        "18 MiB in a frame": [[b"TTC1", b"\x80", bytes(18 << 20)]],
        "nested arrays": [[b"TTC1", b"\x91" * 10_000]],
        "nested maps": [[b"TTC1", b"\x81\xa1a" * 10_000]],
        "a text that claims 4 GiB": [[b"TTC1", b"\x81\xa4type\xdb\xff\xff\xff\xff"]],
        "an array that claims 4 G elements": [[b"TTC1", b"\xdd\xff\xff\xff\xff"]],
        "many frames": [[b"TTC1", b"\x80", *[b""] * 1000]],
        "a payload that claims 4 GiB": [claimed(payload=[4 * GIB])],
        "a body that claims 4 GiB": [claimed(sealed=[1 << 16, 1 << 16])],
        "the largest payload there may be": [patch_message(sealed, bytes(MAX_PAYLOAD_BYTES))] * 8,
        "the largest body there may be": [patch_message(b"\x91" * MAX_SEALED_BYTES, payload)] * 8,
        "a head that is no body": [root_message(b"\xc6\xff\xff\xff\xff"), root_message(b"\x91" * 8000)],
        "ten thousand heads": [head_message(_head(keys, 100 + i)) for i in range(100)] * 100,
        "a chain of roots without end": [root_message(seals.encode(keys.roots[0][1]))] * 1000,
    }
    with Impostor(keys, root_version=2**31 - 1) as host:
        state = enrolled(tmp_path / "edge", keys, host.endpoint)
        words = ("--mode", "cloud", "--method", "source", "--state-dir", state, "--probation-samples", "64")
        with daemon(bundle.path, *words) as found, Client(found.endpoint) as client:
            pid = found.process.pid
            until(lambda: _phase(client), lambda phase: phase == "online")
            answer = client.predict(X).logits
            before = rss_mib(pid)
            for turn, (name, messages) in enumerate(bombs.items(), start=1):
                host.push(*messages)

                def told(seq: int = 1000 + turn) -> str:
                    """What it has heard of after it: again, if it has cut the line meanwhile."""
                    host.push(head_message(_head(keys, seq)))
                    client.predict(X)
                    cloud = client.status().cloud
                    return "" if cloud is None else cloud.head

                until(told, lambda head, seq=1000 + turn: head == f"1.{seq}")  # type: ignore[misc]
                grown = rss_mib(pid) - before
                assert grown <= MAY_GROW_MIB, f"{name}: {grown:.0f} MiB more"
            np.testing.assert_array_equal(client.predict(X).logits, answer)
            assert client.status().bundles[0].base == ""
            host.push(sent((good, payload)))
            until(lambda: _base(client), lambda base: base == "1.1")
            assert peak_mib(pid) - before <= 4 * MAY_GROW_MIB


def _head(keys: Identity, seq: int) -> Sealed:
    """A head that is the newer the larger its number."""
    return make_head(
        [keys.publisher], channel="yard", epoch=1, seq=seq, newest="ab" * 32, issued_s=int(time.time()) + seq
    )


# --- T7 -------------------------------------------------------------------------------------------------------


class Fleet:
    """Keys of a cloud that has two root keys, both of which must sign, and two publishers, one of which is stolen."""

    def __init__(self, directory: Path) -> None:
        self.old = [SecretKey.generate() for _ in range(2)]
        self.new = [SecretKey.generate() for _ in range(2)]
        self.stolen, self.fresh, self.stranger = (SecretKey.generate() for _ in range(3))
        self.first = Root(
            version=1, epoch=1, root_keys=named([key.public for key in self.old]), root_threshold=2,
            publisher_keys=named([self.stolen.public]), publisher_threshold=1, not_after_s=int(time.time()) + 3600,
        )  # fmt: skip
        self.second = msgspec.structs.replace(
            self.first, version=2, epoch=2, root_keys=named([key.public for key in self.new]),
            publisher_keys=named([self.fresh.public]),
        )  # fmt: skip
        self.base = identity.create(directory)

    def signed(self, root: Root, *keys: SecretKey) -> Sealed:
        return make_root(root, keys)

    def unsound(self, root: Root, **changes: Any) -> Sealed:
        """A root that contradicts itself, signed by everybody who counts."""
        body = msgspec.msgpack.encode({**msgspec.to_builtins(root, builtin_types=(bytes,)), **changes})
        return Sealed(body, tuple(_signature(key, body) for key in (*self.old, *self.new)))


def _signature(key: SecretKey, body: bytes) -> SignatureEntry:
    found = key.sign(DOMAIN, body)
    return SignatureEntry(found.key_id, found.value)


def bad_roots(fleet: Fleet) -> dict[str, bytes]:
    """What must not become the second root."""
    second, old, new = fleet.second, fleet.old, fleet.new
    good = fleet.signed(second, *old, *new)
    flipped = SignatureEntry(good.signatures[0].key_id, good.signatures[0].value[::-1])
    twice = (good.signatures[0], good.signatures[0], *good.signatures[2:])
    renamed = dict(
        zip(named([key.public for key in new]), [key.public for key in reversed(new)], strict=True)
    )
    replace: Callable[..., Root] = msgspec.structs.replace
    found = {
        "by the new keys only: a takeover": fleet.signed(second, *new),
        "by the old keys only: everybody is locked out": fleet.signed(second, *old),
        "by too few of the old": fleet.signed(second, old[0], *new),
        "by too few of the new": fleet.signed(second, *old, new[0]),
        "by one key twice": Sealed(good.body, twice),
        "by the stolen publisher's key": fleet.signed(replace(second, publisher_keys=fleet.first.publisher_keys),
                                                      fleet.stolen),
        "by the stolen key beside the good ones": fleet.signed(second, *old, *new, fleet.stolen),
        "by a stranger beside the good ones": fleet.signed(second, *old, *new, fleet.stranger),
        "by nobody": Sealed(good.body, ()),
        "with a bad signature beside the good ones": Sealed(good.body, (flipped, *good.signatures[1:])),
        "with a body that was changed": Sealed(
            good.body.replace(b"\xa7version\x02", b"\xa7version\x03"), good.signatures
        ),
        "with the signatures of another root": Sealed(
            good.body, fleet.signed(replace(second, epoch=3), *old, *new).signatures
        ),
        "that leaves one out": fleet.signed(replace(second, version=3), *old, *new),
        "that stays where it is": fleet.signed(replace(second, version=1), *old, *new),
        "past its time": fleet.signed(replace(second, not_after_s=int(time.time()) - 1), *old, *new),
        "with a key under another's name": fleet.unsound(second, root_keys=renamed),
        "that asks for more keys than it names": fleet.unsound(second, root_threshold=3),
        "that asks for no key": fleet.unsound(second, root_threshold=0),
        "that has no publisher": fleet.unsound(second, publisher_keys={}),
        "with a field that nobody knows": fleet.unsound(second, also=1),
        "of another format": fleet.unsound(second, format=2),
    }  # fmt: skip
    return {name: seals.encode(each) for name, each in found.items()}


def test_t7_no_root_but_the_next_one_by_old_and_new_keys_is_followed_over_the_wire(
    bundle: Bundle, tmp_path: Path
) -> None:
    fleet = Fleet(tmp_path / "cloud")
    assert fleet.signed(fleet.first, *fleet.old)
    with Impostor(fleet.base) as host:
        state = _enrolled(fleet, tmp_path / "edge", host.endpoint)
        known = tmp_path / "edge" / "cloud"
        before = snapshot(known)
        with running(bundle.path, **_options(state)) as found, Client(found.endpoint) as client:
            until(lambda: _phase(client), lambda phase: phase == "online")
            bad = bad_roots(fleet)
            for turn, (name, root) in enumerate(bad.items(), start=1):
                host.push(root_message(root))
                until(lambda: _refused(client), lambda count, t=turn: count >= t)  # type: ignore[misc]
                assert snapshot(known) == before, name
            assert _refused(client) == len(bad)
            # The keys of the first root count as before, and no others.
            host.push(sent(patch(fleet.fresh, bundle, 1, 1)), sent(patch(fleet.stolen, bundle, 1, 1)))
            until(lambda: _base(client), lambda base: base == "1.1")
            assert _refused(client) == len(bad) + 1


def test_t7_after_a_rotation_the_stolen_key_and_the_old_roots_count_no_more_over_the_wire(
    bundle: Bundle, tmp_path: Path
) -> None:
    fleet = Fleet(tmp_path / "cloud")
    second = fleet.signed(fleet.second, *fleet.old, *fleet.new)
    third = msgspec.structs.replace(fleet.second, version=3)
    with Impostor(fleet.base, root_version=2) as host:
        host.roots = {2: seals.encode(second)}
        state = _enrolled(fleet, tmp_path / "edge", host.endpoint)
        with running(bundle.path, **_options(state)) as found, Client(found.endpoint) as client:
            until(lambda: (tmp_path / "edge" / "cloud" / "2.root").is_file() and client.info())
        for _ in range(2):  # and after a restart
            greeted = host.greeted
            with running(bundle.path, **_options(state)) as found, Client(found.endpoint) as client:
                until(lambda: (client.info(), host.greeted)[1], lambda n, g=greeted: n > g)  # type: ignore[misc]
                until(lambda c=client: _phase(c), lambda phase: phase == "online")  # type: ignore[misc]
                before = snapshot(tmp_path / "edge" / "cloud")
                refused = [
                    *(sent(patch(fleet.stolen, bundle, epoch, 2)) for epoch in (1, 2, 3)),
                    *(
                        root_message(seals.encode(each))
                        for each in (
                            fleet.signed(fleet.first, *fleet.old),
                            fleet.signed(third, *fleet.old),
                            fleet.signed(third, *fleet.old, *fleet.new),
                            fleet.signed(msgspec.structs.replace(third, epoch=1), *fleet.new),
                            fleet.signed(third, fleet.new[0]),
                        )
                    ),
                ]  # fmt: skip
                for turn, each in enumerate(refused, start=1):
                    host.push(each)
                    until(lambda c=client: _refused(c), lambda count, t=turn: count == t)  # type: ignore[misc]
                assert snapshot(tmp_path / "edge" / "cloud") == before
        with running(bundle.path, **_options(state)) as found, Client(found.endpoint) as client:
            until(lambda: _phase(client), lambda phase: phase == "online")
            host.push(sent(patch(fleet.fresh, bundle, 2, 1)))
            until(lambda: _base(client), lambda base: base == "2.1")
            host.push(root_message(seals.encode(fleet.signed(third, *fleet.new))))
            until(lambda: (tmp_path / "edge" / "cloud" / "3.root").is_file() and client.info())


def _enrolled(fleet: Fleet, state_dir: Path, endpoint: str) -> str:
    """An edge that begins with the fleet's first root."""
    state = enrolled(state_dir, fleet.base, endpoint)
    (state_dir / "cloud" / "1.root").write_bytes(seals.encode(fleet.signed(fleet.first, *fleet.old)))
    return state


def _options(state: str) -> dict[str, Any]:
    return {"mode": "cloud", "method": "source", "state_dir": state, "probation_samples": 64}


def _refused(client: Client) -> int:
    found = client.status().cloud
    return 0 if found is None else found.patches_refused


def _base(client: Client) -> str:
    """The committed base, after a batch that decides on what is on probation."""
    client.predict(X)
    return client.status().bundles[0].base
