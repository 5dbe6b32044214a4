"""A hostile party between the cloud and an edge: it has the cloud's CURVE key, and not the publisher's.

It speaks the link on real sockets, keeps what it is sent, and sends what a test tells it: what a broken relay, a stolen
host or an old copy of the cloud could do.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import zmq

from serving import PATIENCE_S
from tta_cloud.identity import Identity
from tta_edge.enrol import Link
from tta_runtime import sealed as seals
from tta_runtime.link import (
    Fetch,
    GetRoot,
    HeadMessage,
    Hello,
    Noted,
    PatchMessage,
    Progress,
    RootMessage,
    Welcome,
    decode_from_edge,
    encode_message,
)
from tta_runtime.sealed import Sealed
from tta_runtime.wire import declare

Frames = Sequence[bytes]


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype=np.uint8)


def _whole(frames) -> list[bytes]:
    return [bytes(frame) for frame in frames]


def patch_message(sealed: bytes, payload: bytes, request_id: int | None = None) -> list[bytes]:
    """A patch as it crosses the wire."""
    tensors = {"sealed": _bytes(sealed), "payload": _bytes(payload)}
    message = PatchMessage(
        id=request_id, sealed=declare(tensors["sealed"]), payload=declare(tensors["payload"])
    )
    return _whole(encode_message(message, tensors))


def head_message(sealed: Sealed) -> list[bytes]:
    """A head as it crosses the wire."""
    data = _bytes(seals.encode(sealed))
    return _whole(encode_message(HeadMessage(sealed=declare(data)), {"sealed": data}))


def root_message(sealed: bytes) -> list[bytes]:
    """A root as it crosses the wire, asked for by nobody."""
    data = _bytes(sealed)
    return _whole(encode_message(RootMessage(sealed=declare(data)), {"sealed": data}))


def enrolled(state_dir: Path, identity: Identity, endpoint: str, group: str = "yard") -> str:
    """A state directory whose edge is known to the cloud of an identity, at an address."""
    directory = state_dir / "cloud"
    directory.mkdir(parents=True)
    (directory / "1.root").write_bytes(seals.encode(identity.roots[0][1]))
    (directory / "edge.key").write_bytes(zmq.curve_keypair()[1])
    link = Link(endpoint=endpoint, server_key=identity.curve_public, group=group, name="camera")
    (directory / "link.json").write_bytes(msgspec.json.encode(link))
    for path in directory.iterdir():
        path.chmod(0o600)
    return str(state_dir)


class Impostor:
    """Listens with the cloud's CURVE key; a context.

    Args:
        identity: whose CURVE key it has.
        endpoint: where.
        root_version: what it says is the newest root.

    Attributes:
        endpoint: where it listens.
        patch: what it answers to `fetch`: sealed body and payload; None: nothing.
        roots: what it answers to `get-root`.
        greeted: how many hellos it has answered.
        fetches: how many fetches.
        progress: what edges have reported.
    """

    def __init__(
        self,
        identity: Identity,
        endpoint: str = "tcp://127.0.0.1:0",
        group: str = "yard",
        root_version: int = 1,
    ) -> None:
        self.patch: tuple[bytes, bytes] | None = None
        self.roots: dict[int, bytes] = {}
        self.greeted = self.fetches = 0
        self.progress: list[Progress] = []
        self._group, self._version = group, root_version
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.setsockopt(zmq.CURVE_SERVER, 1)
        self._router.setsockopt(zmq.CURVE_SECRETKEY, identity.curve_secret.encode())
        self._router.bind(endpoint)
        self.endpoint = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._wakes, self._waker = (self._context.socket(zmq.PAIR) for _ in range(2))
        self._wakes.bind("inproc://wake")
        self._waker.connect("inproc://wake")
        self._pushes: queue.SimpleQueue[Frames | None] = queue.SimpleQueue()
        self._peers: list[bytes] = []
        self._there = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def push(self, *messages: Frames) -> None:
        """Send messages to every edge that is there; waits for the first one."""
        assert self._there.wait(PATIENCE_S), "no edge has come"
        for message in messages:
            self._pushes.put(message)
        self._waker.send(b"")

    def __enter__(self) -> Impostor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._pushes.put(None)
        self._waker.send(b"")
        self._thread.join(PATIENCE_S)
        self._context.destroy(linger=0)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._wakes, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._wakes in ready:
                self._wakes.recv()
                while not self._pushes.empty():
                    message = self._pushes.get()
                    if message is None:
                        return
                    for peer in self._peers:
                        self._router.send_multipart([peer, *message])
            if self._router in ready:
                peer, *frames = self._router.recv_multipart()
                self._router.send_multipart([peer, *self._answer(peer, frames)])

    def _answer(self, peer: bytes, frames: list[bytes]) -> list[bytes]:
        message = decode_from_edge(frames).message
        if isinstance(message, Hello):
            self._peers = [peer]
            self.greeted += 1
            self._there.set()
            welcome = Welcome(
                id=message.id, group=self._group, version="0", root_version=self._version, max_open=4
            )
            return _whole(encode_message(welcome))
        if isinstance(message, Progress):
            self.progress.append(message)
        if isinstance(message, Fetch):
            self.fetches += 1
            if self.patch is not None:
                return patch_message(*self.patch, request_id=message.id)
        if isinstance(message, GetRoot) and message.version in self.roots:
            data = _bytes(self.roots[message.version])
            return _whole(encode_message(RootMessage(id=message.id, sealed=declare(data)), {"sealed": data}))
        return _whole(encode_message(Noted(id=message.id)))
