"""Who may connect, through real sockets: nobody without a key that is known."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import zmq

from tta_cloud import zap

LONG_MS, SHORT_MS = 5000, 300


class Door:
    """A ROUTER that asks `allow`, and answers what it gets."""

    def __init__(self, allow: zap.Allow) -> None:
        self.context = zmq.Context()
        self.public, secret = zmq.curve_keypair()
        self.asked: list[tuple[str, str]] = []
        self._allow = allow
        authority = self.context.socket(zmq.REP)
        authority.bind(zap.ENDPOINT)
        router = self.context.socket(zmq.ROUTER)
        router.setsockopt(zmq.CURVE_SERVER, 1)
        router.setsockopt(zmq.CURVE_SECRETKEY, secret)
        router.setsockopt_string(zmq.ZAP_DOMAIN, "edges")
        router.setsockopt(zmq.LINGER, 0)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self._end, mine = (self.context.socket(zmq.PAIR) for _ in range(2))
        mine.bind("inproc://end")
        self._end.connect("inproc://end")
        self.users: list[str] = []
        self._thread = threading.Thread(target=self._run, args=(authority, router, mine))
        self._thread.start()

    def _run(self, authority: zmq.Socket[bytes], router: zmq.Socket[bytes], end: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        for socket in (authority, router, end):
            poller.register(socket, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if end in ready:
                break
            if authority in ready:
                authority.send_multipart(zap.answer(authority.recv_multipart(), self._asked))
            if router in ready:
                frames = router.recv_multipart(copy=False)
                self.users.append(str(frames[1].get("User-Id")))
                router.send_multipart([frames[0].bytes, frames[1].bytes])
        for socket in (authority, router, end):
            socket.close(linger=0)

    def _asked(self, domain: str, key: str) -> str:
        self.asked.append((domain, key))
        return self._allow(domain, key)

    def knock(self, *, keys: tuple[bytes, bytes] | None, server: bytes | None = None, wait_ms: int) -> bool:
        """Whether somebody with these keys gets an answer."""
        socket = self.context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        if keys is not None:
            socket.setsockopt(zmq.CURVE_SERVERKEY, server or self.public)
            socket.setsockopt(zmq.CURVE_PUBLICKEY, keys[0])
            socket.setsockopt(zmq.CURVE_SECRETKEY, keys[1])
        socket.connect(self.endpoint)
        socket.send(b"hello")
        try:
            return bool(socket.poll(wait_ms)) and socket.recv() == b"hello"
        finally:
            socket.close(linger=0)

    def close(self) -> None:
        self._end.send(b"")
        self._thread.join(10)
        self._end.close(linger=0)
        self.context.term()


KNOWN = zmq.curve_keypair()


@pytest.fixture
def door() -> Iterator[Door]:
    found = Door(lambda domain, key: "" if key == KNOWN[0].decode() else f"{domain}: the key is not enrolled")
    yield found
    found.close()


def test_a_known_key_is_let_in_and_its_messages_carry_it(door: Door) -> None:
    assert door.knock(keys=KNOWN, wait_ms=LONG_MS)
    assert door.users == [KNOWN[0].decode()]
    assert door.asked == [("edges", KNOWN[0].decode())]


def test_an_unknown_key_is_refused(door: Door) -> None:
    assert not door.knock(keys=zmq.curve_keypair(), wait_ms=SHORT_MS)
    assert door.asked, "it was refused before anybody was asked"
    assert not door.users
    assert door.knock(keys=KNOWN, wait_ms=LONG_MS)


def test_a_client_without_encryption_is_refused(door: Door) -> None:
    assert not door.knock(keys=None, wait_ms=SHORT_MS)
    assert not door.users
    assert door.knock(keys=KNOWN, wait_ms=LONG_MS)


def test_a_client_that_takes_another_server_for_this_one_is_refused(door: Door) -> None:
    assert not door.knock(keys=KNOWN, server=zmq.curve_keypair()[0], wait_ms=SHORT_MS)
    assert not door.users


@pytest.mark.parametrize(
    ("frames", "status"),
    [
        ([], b"500"),
        ([b"1.0"], b"500"),
        ([b"2.0", b"7", b"d", b"a", b"i", b"CURVE", b"k" * 32], b"500"),
        ([b"1.0", b"7", b"d", b"a", b"i", b"NULL"], b"400"),
        ([b"1.0", b"7", b"d", b"a", b"i", b"PLAIN", b"name", b"word"], b"400"),
        ([b"1.0", b"7", b"d", b"a", b"i", b"CURVE"], b"400"),
        ([b"1.0", b"7", b"d", b"a", b"i", b"CURVE", b"k" * 31], b"400"),
        ([b"1.0", b"7", b"d", b"a", b"i", b"CURVE", b"k" * 32, b"k" * 32], b"400"),
        ([b"1.0", b"7", b"\xff", b"a", b"i", b"CURVE", b"k" * 32], b"200"),
    ],
)
def test_requests_that_are_no_request_are_refused(frames: list[bytes], status: bytes) -> None:
    reply = zap.answer(frames, lambda domain, key: "")
    assert len(reply) == 6
    assert reply[2] == status
    assert bool(reply[4]) == (status == b"200")
