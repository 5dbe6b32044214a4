"""Daemons that answer what a test tells them, on real sockets; nothing of ours is replaced by a stand-in."""

from __future__ import annotations

import asyncio
import functools
import socket
import threading
from collections.abc import Callable, Iterable

import zmq

from tta_edge import wire

PATIENCE_MS = 20_000
HANG_UP = object()
"""As a reply: close every connection and stop listening."""


class Fake:
    """A daemon's socket; a context. Each request goes to `answer`, which gives the replies to send.

    Attributes:
        endpoint: where it listens.
        requests: what has come, decoded.
    """

    def __init__(self, answer: Callable[[wire.Request], Iterable[object]], endpoint="tcp://127.0.0.1:0"):
        self.requests = []
        self.arrived = threading.Semaphore(0)
        self._answer = answer
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.bind(endpoint)
        self.endpoint = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._stop_out, self._stop_in = socket.socketpair()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._stop_out, zmq.POLLIN)
        while self._router in dict(poller.poll()):
            peer, *frames = self._router.recv_multipart()
            message = wire.decode_request(frames, wire.Limits()).message
            self.requests.append(message)
            replies = list(self._answer(message))
            for reply in replies:
                if reply is not HANG_UP:
                    self._router.send_multipart([peer, *reply])
            self.arrived.release()
            if HANG_UP in replies:
                break
        self._router.close(linger=1000)
        self._context.term()

    def wait(self, requests=1):
        """Until so many more requests have come and been answered."""
        for _ in range(requests):
            assert self.arrived.acquire(timeout=20), "no request"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop_in.send(b"\0")
        self._thread.join(20)
        assert not self._thread.is_alive()
        self._stop_in.close()
        self._stop_out.close()


def info(message, *, max_request_bytes=2**20):
    """A good answer to `info`."""
    return wire.encode(
        wire.InfoReply(
            id=message.id,
            version="0",
            bundle="default",
            model_id="fake",
            bundle_digest="0" * 64,
            method="tent",
            methods=["tent"],
            hyper={},
            input=wire.InputInfo("float32", ["batch", 8], 0.0, 1.0),
            classes=3,
            limits=wire.ServerLimits(max_batch=1024, max_request_bytes=max_request_bytes),
        )
    )


def prediction(message, logits):
    """An answer to `predict`."""
    reply = wire.Prediction(
        id=message.id,
        adapted=True,
        steps=1,
        distance=0.0,
        theta_digest="0" * 64,
        report={},
        compute_ms=1.0,
        logits=wire.declare(logits),
    )
    return wire.encode(reply, {"logits": logits})


def error(message, code, retry_after_s=None):
    """A refusal."""
    return wire.encode(
        wire.ErrorReply(id=message.id, code=code, cause="a cause", fix="A fix", retry_after_s=retry_after_s)
    )


def done(message, digest="digest"):
    """An answer to `reset`."""
    return wire.encode(wire.ResetDone(id=message.id, stream="s", theta_digest=digest))


def coroutine(test):
    """A test that is a coroutine function, run by an event loop of its own."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 60))

    return run
