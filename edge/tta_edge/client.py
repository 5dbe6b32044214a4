"""The client library: one daemon, one call at a time, a deadline on each, errors by the daemon's own names.

with Client("tcp://127.0.0.1:5555") as client:
    reply = client.predict(x)
    print(reply.logits.argmax(axis=1), reply.adapted, reply.distance)
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import zmq
from numpy.typing import ArrayLike, NDArray

from tta_edge import errors as edge_errors
from tta_edge.endpoint import parse
from tta_edge.errors import Busy, DeadlineExceeded, RemoteError, Unreachable, WireError
from tta_edge.session import ClientSession, Frames
from tta_edge.wire import (
    ErrorReply,
    Info,
    InfoReply,
    Predict,
    Prediction,
    Received,
    Request,
    Reset,
    ResetDone,
    Status,
    StatusReply,
    Tensors,
    declare,
)
from tta_runtime import errors as runtime_errors
from tta_runtime.errors import TooLarge, TtaError
from tta_runtime.numerics import entropy

DEFAULT_ENDPOINT = "tcp://127.0.0.1:5555"
RECONNECT_MS, RECONNECT_MAX_MS = (
    50,
    2_000,
)  # the socket library reconnects by itself, backing off between these
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 2_000, 6_000

R = TypeVar("R")


@dataclass(frozen=True)
class Reply:
    """Answer to one batch.

    Attributes:
        logits: [batch, classes], float32.
        source_logits: the frozen source's, [batch, classes]; `None` unless compared.
        entropy: [batch], in nats, of the predicted distributions.
        source_entropy: the same for the frozen source; `None` unless compared.
        adapted: whether the stream adapted to this batch.
        reason: code of why it did not, or of why the stream was reset; empty where there is nothing to say.
        steps: committed steps of the stream.
        distance: relative L2 distance of theta to the source theta.
        theta_digest: of the theta that the stream has now.
        report: the step's named numbers.
        compute_ms: inside the daemon, without waiting in its queue.
        latency_ms: from the call to the reply.
    """

    logits: NDArray[np.float32]
    source_logits: NDArray[np.float32] | None
    entropy: NDArray[np.float32]
    source_entropy: NDArray[np.float32] | None
    adapted: bool
    reason: str
    steps: int
    distance: float
    theta_digest: str
    report: Mapping[str, float]
    compute_ms: float
    latency_ms: float


class Client:
    """A connection to one daemon. Not for use by several threads at once: give each its own.

    Args:
        endpoint: `tcp://HOST:PORT`.
        timeout_s: of every call, connecting included.

    Raises:
        BadEndpoint: the endpoint is malformed. Whether somebody listens shows with the first call.
    """

    def __init__(self, endpoint: str = DEFAULT_ENDPOINT, *, timeout_s: float = 10.0) -> None:
        parse(endpoint)
        self.endpoint = endpoint
        self.timeout_s = timeout_s
        self._session = ClientSession()
        self._info: InfoReply | None = None
        self._socket = _dealer(endpoint)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; what was not answered is abandoned."""
        self._socket.close(linger=0)

    def predict(
        self, x: ArrayLike, *, stream: str = "default", adapt: bool = True, compare: bool = False
    ) -> Reply:
        """Predictions for one batch, adapting the stream to it in the same pass.

        Args:
            x: [batch, ...] of the dtype and shape that `info().input` says.
            stream: whose theta answers and adapts; streams never share anything.
            adapt: false leaves the stream as it is.
            compare: ask for the frozen source's logits too (one more forward pass).

        Raises:
            InputError: the batch is not what the bundle takes.
            Busy: the daemon's queue is full; `retry_after_s` says when to repeat.
            Unreachable: nobody answers at the endpoint.
            DeadlineExceeded: the daemon took longer than `timeout_s`; it may still adapt to the batch.
        """
        began_s = time.monotonic()
        array = np.asarray(x)
        self._check_size(array)
        message = Predict(id=0, stream=stream, adapt=adapt, compare=compare, x=declare(array))
        received = self._call(message, {"x": array}, Prediction)
        answer: Prediction = received.message
        logits, source = received.tensors["logits"], received.tensors.get("source_logits")
        return Reply(
            logits=logits,
            source_logits=source,
            entropy=entropy(logits),
            source_entropy=None if source is None else entropy(source),
            adapted=answer.adapted,
            reason=answer.reason,
            steps=answer.steps,
            distance=answer.distance,
            theta_digest=answer.theta_digest,
            report=answer.report,
            compute_ms=answer.compute_ms,
            latency_ms=(time.monotonic() - began_s) * 1e3,
        )

    def info(self) -> InfoReply:
        """What is served: model, method, input, classes, limits. Raises what `predict` raises."""
        info: InfoReply = self._call(Info(id=0), None, InfoReply).message
        self._info = info
        return info

    def status(self) -> StatusReply:
        """How the daemon is doing: streams, requests, latency. Raises what `predict` does."""
        status: StatusReply = self._call(Status(id=0), None, StatusReply).message
        return status

    def reset(self, stream: str = "default") -> str:
        """Return a stream to the source; gives the digest of its theta.

        Raises:
            UnknownStream: the daemon has no such stream.
        """
        done: ResetDone = self._call(Reset(id=0, stream=stream), None, ResetDone).message
        return done.theta_digest

    def _check_size(self, array: NDArray[Any]) -> None:
        """Refuse here what would make the daemon close the connection without a word."""
        limits = (self._info or self.info()).limits
        if array.nbytes > limits.max_request_bytes:
            raise TooLarge(
                f"the batch has {array.nbytes} bytes, {self.endpoint} takes {limits.max_request_bytes}",
                "Send smaller batches, or raise `max_request_bytes` of the daemon",
            )

    def _call(self, message: Request, tensors: Tensors | None, expected: type[R]) -> Received[Any]:
        deadline_s = time.monotonic() + self.timeout_s
        frames = self._session.request(message, tensors)
        self._send(frames, deadline_s)
        received = self._receive(deadline_s)
        if isinstance(received.message, ErrorReply):
            raise as_error(received.message)
        if not isinstance(received.message, expected):
            raise WireError(
                f"the daemon answered `{type(message).__name__}` with `{type(received.message).__name__}`",
                "Use a client and a daemon of the same version",
            )
        return received

    def _send(self, frames: Frames, deadline_s: float) -> None:
        # The socket takes a message only when connected, so "nobody is there" and "no answer" differ.
        if not self._socket.poll(_left_ms(deadline_s), zmq.POLLOUT):
            raise Unreachable(
                f"nothing accepts connections at {self.endpoint} within {self.timeout_s:g} s",
                "Start the daemon (tta-edge serve), or correct the endpoint",
            )
        self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)

    def _receive(self, deadline_s: float) -> Received[Any]:
        while self._socket.poll(_left_ms(deadline_s), zmq.POLLIN):
            frames = [frame.buffer for frame in self._socket.recv_multipart(copy=False)]
            received = self._session.receive(frames)
            if received is not None:
                return received
        raise DeadlineExceeded(
            f"{self.endpoint} did not answer within {self.timeout_s:g} s",
            "Raise timeout_s, send smaller batches, or look at the daemon's log",
        )


def _left_ms(deadline_s: float) -> int:
    return max(0, round((deadline_s - time.monotonic()) * 1e3))


def _dealer(endpoint: str) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.linger = 0
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.IPV6, int("[" in endpoint))
    socket.connect(endpoint)
    return socket


@cache
def _errors_by_code() -> Mapping[str, type[TtaError]]:
    """Every named error of the runtime and the edge by its code."""
    modules = (runtime_errors, edge_errors)
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return {kind.code: kind for kind in classes if issubclass(kind, TtaError)}


def as_error(reply: ErrorReply) -> TtaError:
    """The error that a reply carries, as the class with its code; a `RemoteError` if there is none here."""
    kind = _errors_by_code().get(reply.code)
    if kind is None:
        return RemoteError(f"{reply.code}: {reply.cause}", reply.fix)
    error = kind(reply.cause, reply.fix)
    if isinstance(error, Busy):
        error.retry_after_s = reply.retry_after_s
    return error
