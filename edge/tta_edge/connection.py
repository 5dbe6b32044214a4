"""The socket of a client and the calls that are under way on it; belongs to one thread at a time.

A call waits until the daemon is connected, is sent once, and ends with a reply, at its deadline, or when the
connection breaks; one whose request cannot be encoded ends with that.
"""

from __future__ import annotations

import itertools
import math
import random
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import zmq

from tta_edge.errors import BadEndpoint, ClientClosed, ConnectionLost, DeadlineExceeded, Unreachable
from tta_edge.session import ClientSession
from tta_edge.wire import PARTS, REPLY_LIMITS, Cancel, Received, Request, Tensors, tag
from tta_runtime.endpoint import parse
from tta_runtime.errors import BadField, TtaError, WireError

RECONNECT_MS, RECONNECT_MAX_MS = 50, 2_000  # the wait doubles from the one to the other
HANDSHAKE_MS = 5_000  # a peer that accepts and says nothing is tried again after this
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 2_000, 6_000  # a daemon that vanished without a word is noticed in these
BURST = 64  # replies taken from the socket before deadlines are looked at

Outcome = Received[Any] | TtaError
_monitors = itertools.count()


@dataclass(eq=False)
class Call:
    """A request under way.

    Attributes:
        message: the request.
        tensors: its tensors; they are copied when it is sent.
        timeout_s: from `began_s` to the deadline.
        began_s: on the clock of `time.monotonic`.
        ended_s: likewise; meaningless before the end.
        outcome: how it ended; `None` before.
        part: told of each part of a reply that comes in parts.
        heard_s: when the last part came; the deadline counts from there.
    """

    message: Request
    tensors: Tensors
    timeout_s: float
    began_s: float
    ended_s: float = 0.0
    outcome: Outcome | None = None
    part: Callable[[Received[Any]], None] | None = None
    heard_s: float = -math.inf

    @property
    def deadline_s(self) -> float:
        """When it ends at the latest, if nothing more comes."""
        return max(self.began_s, self.heard_s) + self.timeout_s

    def received(self) -> tuple[Received[Any], float]:
        """The answer and how long it took, in milliseconds; raises what the call ended with instead."""
        if isinstance(self.outcome, Received):
            return self.outcome, (self.ended_s - self.began_s) * 1e3
        raise self.outcome or RuntimeError("the call has not ended")


class Connection:
    """A DEALER to one daemon.

    Args:
        endpoint: `tcp://HOST:PORT`.
        max_open: most requests sent and not answered; further ones wait here.
        wake: something to read from it ends the wait in `advance` as well.

    Attributes:
        losses: how many connections to the daemon have broken.

    Raises:
        BadEndpoint: the endpoint is malformed. Whether somebody listens shows with the first call.
    """

    def __init__(self, endpoint: str, *, max_open: int = 1, wake: socket.socket | None = None) -> None:
        _check(endpoint)
        self.endpoint = endpoint
        self.losses = 0
        self._max_open = max_open
        self._session = ClientSession()
        self._waiting: deque[Call] = deque()
        self._sent: dict[int, Call] = {}
        self._poller = zmq.Poller()
        if wake is not None:
            self._poller.register(wake, zmq.POLLIN)
        self._connect()

    def submit(self, call: Call) -> None:
        """Begin a call; it ends in an `advance`."""
        self._waiting.append(call)

    def cancel(self, call: Call) -> None:
        """Forget a call, whether it waits, is open or has ended. If it was sent, it may be carried out.

        The daemon is asked to stop what answers in parts.
        """
        if call in self._waiting:
            self._waiting.remove(call)
        for number, sent in self._sent.items():
            if sent is call:
                self._session.abandon(number)
                del self._sent[number]
                if call.part is not None:
                    self._stop(number)
                return

    def advance(self) -> list[Call]:
        """Wait until something happens or a deadline passes.

        Returns:
            The calls that have ended, each with its outcome.
        """
        self._poller.modify(self._dealer, zmq.POLLIN | (zmq.POLLOUT if self._may_send() else 0))
        self._poller.poll(self._wait_ms())
        broke = self._read_monitor()
        # The replies that came before the connection broke are still there to be read.
        ended = self._read_replies()
        if broke:
            ended += self._end_lost()
        ended += self._send_waiting()
        return ended + self._end_late()

    def close(self) -> list[Call]:
        """Close the connection; the calls that were under way end with `ClientClosed`."""
        self._session.lost()
        calls = [*self._waiting, *self._sent.values()]
        self._waiting.clear()
        self._sent.clear()
        self._disconnect()
        return [_end(call, closed(self.endpoint)) for call in calls]

    def _connect(self) -> None:
        self._connected = False
        self._dealer = _dealer(self.endpoint)
        self._monitor = self._dealer.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED, f"inproc://tta-client-{next(_monitors)}"
        )
        self._dealer.connect(self.endpoint)
        self._poller.register(self._dealer, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    def _disconnect(self) -> None:
        for readable in (self._dealer, self._monitor):
            self._poller.unregister(readable)
        self._dealer.disable_monitor()
        self._monitor.close(linger=0)
        self._dealer.close(linger=0)

    def _wait_ms(self) -> int | None:
        """Until the earliest deadline, rounded up so that it has passed then."""
        deadlines = [call.deadline_s for call in (*self._waiting, *self._sent.values())]
        if not deadlines:
            return None
        return max(0, math.ceil((min(deadlines) - time.monotonic()) * 1e3))

    def _may_send(self) -> bool:
        # The library would take a request without a connection and send it later, whoever listens then.
        return self._connected and bool(self._waiting) and len(self._sent) < self._max_open

    def _read_monitor(self) -> bool:
        """Note what happened to the connection; whether one broke."""
        broke = False
        while self._monitor.poll(0):
            (event, _) = struct.unpack("=HI", self._monitor.recv_multipart()[0])
            self._connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            broke |= not self._connected
        self.losses += broke
        return broke

    def _read_replies(self) -> list[Call]:
        ended: list[Call] = []
        for _ in range(BURST):
            try:
                frames = self._dealer.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            try:
                outcome: Outcome | None = self._session.receive([frame.buffer for frame in frames])
            except WireError as error:
                outcome = error
            if isinstance(outcome, Received) and isinstance(outcome.message, PARTS):
                self._hear(outcome)
            elif outcome is not None:
                ended += self._end_closed(outcome)
        return ended

    def _hear(self, part: Received[Any]) -> None:
        call = self._sent[part.message.id]
        call.heard_s = time.monotonic()
        if call.part is not None:
            call.part(part)

    def _send_waiting(self) -> list[Call]:
        """Send what may be sent; gives the calls whose requests cannot be encoded, which have ended."""
        unfit: list[Call] = []
        while self._may_send() and self._dealer.poll(0, zmq.POLLOUT):
            call = self._waiting.popleft()
            try:
                frames = self._session.request(call.message, call.tensors)
            except TtaError as error:
                unfit.append(_end(call, error))
                continue
            except Exception as error:  # noqa: BLE001 - the caller waits for it, and others for this thread
                unfit.append(_end(call, _unfit(call, error)))
                continue
            self._sent[self._session.last_id] = call
            # Copied: the caller may change an array as soon as its call has ended, sent completely or not.
            self._dealer.send_multipart(frames, zmq.NOBLOCK)
        return unfit

    def _stop(self, number: int) -> None:
        """Ask the daemon to stop with a request; nobody waits for what it says to that."""
        if self._connected and self._dealer.poll(0, zmq.POLLOUT):
            frames = self._session.request(Cancel(id=0, request=number))
            self._session.abandon(self._session.last_id)
            self._dealer.send_multipart(frames, zmq.NOBLOCK)

    def _end_closed(self, outcome: Outcome) -> list[Call]:
        """End the calls whose requests the session has closed."""
        numbers = [number for number in self._sent if number not in self._session.open]
        return [_end(self._sent.pop(number), outcome) for number in numbers]

    def _end_lost(self) -> list[Call]:
        if not self._session.lost():
            return []
        # The library connects again by itself and then sends what it still holds of these requests, though
        # their calls have ended. A new socket holds nothing.
        self._disconnect()
        self._connect()
        return self._end_closed(
            ConnectionLost(
                f"the connection to {self.endpoint} broke while the request was open; it may have been carried out",
                "See whether the daemon runs; repeat the call only if it may be carried out twice",
            )
        )

    def _end_late(self) -> list[Call]:
        now_s = time.monotonic()
        unsent = [call for call in self._waiting if call.deadline_s <= now_s]
        late = [call for call in self._sent.values() if call.deadline_s <= now_s]
        for call in (*unsent, *late):
            self.cancel(call)
        ended = [_end(call, self._too_late(call)) for call in late]
        return ended + [_end(call, self._not_sent(call)) for call in unsent]

    def _too_late(self, call: Call) -> TtaError:
        return DeadlineExceeded(
            f"{self.endpoint} did not answer within {call.timeout_s:g} s; the request may still be carried out",
            "Raise timeout_s, send smaller batches, or look at the daemon's log",
        )

    def _not_sent(self, call: Call) -> TtaError:
        if self._connected:
            return DeadlineExceeded(
                f"the request could not be sent within {call.timeout_s:g} s: {len(self._sent)} others of this "
                f"client wait for {self.endpoint}",
                "Raise timeout_s, or send less at once",
            )
        return Unreachable(
            f"nothing accepts connections at {self.endpoint} within {call.timeout_s:g} s",
            "Start the daemon (tta-edge serve), or correct the endpoint",
        )


def closed(endpoint: str) -> ClientClosed:
    """The error of a call on a client that is closed."""
    return ClientClosed(f"the client of {endpoint} is closed", "Make a new client")


def _unfit(call: Call, error: Exception) -> BadField:
    return BadField(
        f"message `{tag(call.message)}` cannot be encoded: {type(error).__name__}: {error}",
        "Correct the arguments; see docs/spec/wire.md",
    )


def _end(call: Call, outcome: Outcome) -> Call:
    call.ended_s = time.monotonic()
    # An exception that is raised in several places needs to be several exceptions.
    call.outcome = outcome if isinstance(outcome, Received) else type(outcome)(outcome.cause, outcome.fix)
    return call


def _check(endpoint: str) -> None:
    _, port = parse(endpoint)
    if port == "*" or int(port) == 0:
        raise BadEndpoint(
            f"{endpoint!r} is no endpoint to connect to", "Write the port the daemon listens on"
        )


def _dealer(endpoint: str) -> zmq.Socket[bytes]:
    dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    dealer.linger = 0
    options: Iterable[tuple[int, int]] = [
        # The library backs off without jitter; clients differ by what they draw here.
        (zmq.RECONNECT_IVL, random.randint(RECONNECT_MS, 2 * RECONNECT_MS)),
        (zmq.RECONNECT_IVL_MAX, random.randint(RECONNECT_MAX_MS // 2, RECONNECT_MAX_MS)),
        (zmq.HANDSHAKE_IVL, HANDSHAKE_MS),
        (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
        (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
        (zmq.MAXMSGSIZE, REPLY_LIMITS.max_payload_bytes),
        (zmq.IPV6, int("[" in endpoint)),
    ]
    for option, value in options:
        dealer.setsockopt(option, value)
    return dealer
