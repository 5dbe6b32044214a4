"""The protocol between clients and the daemon without any I/O: frames in, requests and replies out.

A `ServerSession` turns frames into requests worth computing, refuses the others with a typed reply and knows
which requests are open. A `ClientSession` numbers requests and recognises the reply that belongs to one. Time
comes in as an argument; sockets, threads and queues are in service.py and client.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import msgspec

from tta_edge.errors import Busy, Draining, DuplicateRequest, ServiceError
from tta_edge.wire import (
    PARTS,
    REPLY_LIMITS,
    Buffer,
    Cancel,
    CancelDone,
    ErrorReply,
    Limits,
    Received,
    Reply,
    Request,
    Tensors,
    decode_reply,
    decode_request,
    encode,
    tag,
)
from tta_runtime.errors import TtaError, WireError

Frames = list[Buffer]
REMEMBER = 0.98  # of the time that requests took, with each further one


class Phase(Enum):
    """What a daemon does with new requests."""

    SERVING = auto()
    DRAINING = auto()
    CLOSED = auto()


class Signal(Enum):
    """What moves a daemon from one phase to the next."""

    DRAIN = auto()
    EMPTY = auto()


# The whole life of a session. A signal that a phase does not list leaves the phase as it is: a second DRAIN,
# or the last open request being answered while serving.
TRANSITIONS: Mapping[Phase, Mapping[Signal, Phase]] = {
    Phase.SERVING: {Signal.DRAIN: Phase.DRAINING},
    Phase.DRAINING: {Signal.EMPTY: Phase.CLOSED},
    Phase.CLOSED: {},
}


@dataclass(frozen=True)
class Arrived:
    """Event: a well-formed request that has to be answered.

    Attributes:
        peer: routing prefix of whoever sent it; opaque.
        message: the typed request.
        tensors: read-only views by field name.
        at_s: when it arrived, on the clock of `now_s`.
    """

    peer: bytes
    message: Request
    tensors: Tensors
    at_s: float

    @property
    def key(self) -> tuple[bytes, int]:
        """What tells this request from every other open one."""
        return self.peer, self.message.id

    @property
    def nbytes(self) -> int:
        """What its tensors hold of memory."""
        return sum(array.nbytes for array in self.tensors.values())


Emit = Callable[[Arrived, Reply, Tensors], None]
"""Takes a reply to an open request, or a part of one, and its tensors."""
Refuse = Callable[[Arrived, TtaError], None]
"""Takes the error that an open request is answered with."""


@dataclass(frozen=True)
class Refused:
    """Event: a request that was answered with an error at once."""

    peer: bytes
    error: TtaError


@dataclass(frozen=True)
class Settled:
    """Event: a request that was answered at once with what it asked for."""

    peer: bytes
    kind: str
    """The message's name."""


Happened = Arrived | Refused | Settled


def error_reply(error: TtaError, request_id: int | None) -> ErrorReply:
    """The reply that carries an error to whoever caused it."""
    return ErrorReply(
        id=request_id,
        code=error.code,
        cause=error.cause,
        fix=error.fix,
        retry_after_s=getattr(error, "retry_after_s", None),
    )


@dataclass
class ServerSession:
    """The daemon's end.

    Attributes:
        limits: of one request.
        capacity: most requests open at once, over all peers; one more is refused as `busy`, unless it is a `cancel`.
        max_open_bytes: most tensor bytes held by open requests; likewise, unless nothing else is open.
        per_client: most requests of one peer open at once; likewise.
        phase: see `TRANSITIONS`.
    """

    limits: Limits
    capacity: int
    max_open_bytes: int = 256 * 1024 * 1024
    per_client: int = 65_536
    phase: Phase = Phase.SERVING
    _open: dict[tuple[bytes, int], Arrived] = field(default_factory=dict)
    _abandoned: set[tuple[bytes, int]] = field(default_factory=set)
    # Request -> the open `cancel` of it. A cancel has to pass where no other request does, so it takes no place of its
    # own: it stands in that of the request that it names, which is kept until both are answered. Only an open request
    # can be named, and by one cancel at a time; all others are answered at once and held nowhere. However many a client
    # sends, no more are held than there are places, its own for `per_client` and all for `capacity`.
    _cancels: dict[tuple[bytes, int], Arrived] = field(default_factory=dict)
    # What requests took and how many they were, of late: for `retry_after_s`. Of those that share a run of the engine
    # the first one takes all the time, so the mean has to look back on more than one run.
    _served_s: float = 0.0
    _served: float = 0.0
    _last_answer_s: float = 0.0

    @property
    def open(self) -> int:
        """How many requests are being worked on, those of peers that have gone included."""
        return len(self._open)

    def receive(
        self, peer: bytes, frames: Sequence[Buffer], now_s: float
    ) -> tuple[list[Happened], list[Frames]]:
        """Take one message of one peer.

        Returns:
            What happened, and the multipart messages to send, each with its routing prefix. Whatever comes
            in, nothing is raised: a refusal is an event and a reply.
        """
        try:
            received = decode_request(frames, self.limits)
        except WireError as error:
            return self._refuse(peer, error, error.request_id)
        arrived = Arrived(peer, received.message, received.tensors, now_s)
        refusal = self._refusal(arrived)
        if refusal is not None:
            return self._refuse(peer, refusal, received.message.id)
        if isinstance(arrived.message, Cancel):
            if not self._may_be_cancelled(arrived.message, peer):
                reply = CancelDone(id=arrived.message.id, found=False)
                return [Settled(peer, tag(arrived.message))], [[peer, *encode(reply)]]
            self._cancels[peer, arrived.message.request] = arrived
        self._open[arrived.key] = arrived
        return [arrived], []

    def answer(self, arrived: Arrived, reply: Reply, tensors: Tensors, now_s: float) -> list[Frames]:
        """Close an open request with its reply; a part of a reply leaves it open.

        Returns:
            The multipart messages to send; none where the peer has gone.

        Raises:
            WireError: the reply cannot be encoded. The request is still open, for another one.
        """
        frames: Frames = [arrived.peer, *encode(reply, tensors)]
        if isinstance(reply, PARTS):
            self._last_answer_s = now_s
            return [frames] if self.waited_for(arrived) else []
        del self._open[arrived.key]
        if isinstance(arrived.message, Cancel):
            del self._cancels[arrived.peer, arrived.message.request]
        self._account(arrived, now_s)
        if not self._open:
            self._signal(Signal.EMPTY)
        if arrived.key in self._abandoned:
            self._abandoned.remove(arrived.key)
            return []
        return [frames]

    def gone(self, peer: bytes) -> int:
        """Note that a peer cannot be reached; returns how many of its requests nobody waits for any more.

        They stay open until they are answered: they still have their places in the queue.
        """
        keys = {key for key in self._open if key[0] == peer} - self._abandoned
        self._abandoned |= keys
        return len(keys)

    def waited_for(self, arrived: Arrived) -> bool:
        """Whether somebody waits for the answer to an open request, as far as is known; for any thread."""
        return arrived.key not in self._abandoned

    def drain(self) -> None:
        """Take no new requests but to cancel open ones; the session closes when the last open one is answered."""
        self._signal(Signal.DRAIN)
        if not self._open:
            self._signal(Signal.EMPTY)

    def _signal(self, signal: Signal) -> None:
        self.phase = TRANSITIONS[self.phase].get(signal, self.phase)

    def _refusal(self, arrived: Arrived) -> ServiceError | None:
        ends_one = isinstance(arrived.message, Cancel) and self.phase is Phase.DRAINING
        if self.phase is not Phase.SERVING and not ends_one:
            return Draining(
                "the daemon is shutting down", "Connect to the daemon that replaces it, then repeat"
            )
        if arrived.key in self._open:
            return DuplicateRequest(
                f"request {arrived.message.id} of this client is still open", "Give every request its own id"
            )
        if isinstance(arrived.message, Cancel):
            return self._refusal_of_cancel(arrived.message, arrived.peer)
        places = self._places()
        held = sum(waiting.nbytes for waiting in self._open.values())
        if len(places) >= self.capacity or (places and held + arrived.nbytes > self.max_open_bytes):
            return self._busy(
                f"{len(places)} requests of {held} bytes are waiting, the queue holds {self.capacity} of "
                f"{self.max_open_bytes}",
                "raise `max_queue` and `max_queue_bytes`",
                len(places),
            )
        own = sum(peer == arrived.peer for peer, _ in places)
        if own >= self.per_client:
            return self._busy(
                f"{own} requests of this client are waiting, it may have {self.per_client}",
                "raise `max_client_requests`",
                own,
            )
        return None

    def _refusal_of_cancel(self, message: Cancel, peer: bytes) -> ServiceError | None:
        earlier = self._cancels.get((peer, message.request))
        if earlier is None or not self._may_be_cancelled(message, peer):
            return None
        return DuplicateRequest(
            f"request {message.request} is being cancelled by request {earlier.message.id}",
            "Wait for the answer to that one",
        )

    def _may_be_cancelled(self, message: Cancel, peer: bytes) -> bool:
        """Whether the request that is named is open, as far as can be said here, and none that only names another."""
        named = self._open.get((peer, message.request))
        return named is not None and not isinstance(named.message, Cancel)

    def _places(self) -> set[tuple[bytes, int]]:
        """The requests that take a place in the queue."""
        requests = {key for key, held in self._open.items() if not isinstance(held.message, Cancel)}
        return requests | self._cancels.keys()

    def _busy(self, cause: str, setting: str, ahead: int) -> Busy:
        busy = Busy(cause, f"Repeat after `retry_after_s`, send less at once, or {setting}")
        busy.retry_after_s = round(max(0.01, ahead * self._served_s / max(1.0, self._served)), 3)
        return busy

    def _refuse(
        self, peer: bytes, error: TtaError, request_id: int | None
    ) -> tuple[list[Happened], list[Frames]]:
        return [Refused(peer, error)], [[peer, *encode(error_reply(error, request_id))]]

    def _account(self, arrived: Arrived, now_s: float) -> None:
        # A request is being served from its arrival or from the answer before it, whichever is later.
        took_s = max(0.0, now_s - max(arrived.at_s, self._last_answer_s))
        self._served_s = REMEMBER * self._served_s + took_s
        self._served = REMEMBER * self._served + 1.0
        self._last_answer_s = now_s


@dataclass
class ClientSession:
    """The client's end: numbers requests, knows which are open and drops replies that nobody waits for.

    Attributes:
        limits: of one reply.
        last_id: of the newest request; 0 before the first.
        open: ids of the requests that wait for a reply.
    """

    limits: Limits = REPLY_LIMITS
    last_id: int = 0
    open: set[int] = field(default_factory=set)

    def request(self, message: Request, tensors: Tensors | None = None) -> Frames:
        """Frames of a request, with the next id (`last_id`) put in place of the message's own; opens it."""
        frames = encode(msgspec.structs.replace(message, id=self.last_id + 1), tensors)
        self.last_id += 1
        self.open.add(self.last_id)
        return frames

    def receive(self, frames: Sequence[Buffer]) -> Received[Any] | None:
        """The reply to an open request, which it closes unless it is a part of one; `None` where nobody waits any more.

        An error without an id answers something that the daemon could not read. Which request that was is
        known only where no more than one is open, so it closes them all.

        Raises:
            WireError: the daemon does not keep to the specification. Where the reply's id could be read it
                is the error's `request_id` and that request is closed, otherwise all of them are.
        """
        try:
            received = decode_reply(frames, self.limits)
        except WireError as error:
            self._close(error.request_id)
            raise
        if isinstance(received.message, PARTS):
            return received if received.message.id in self.open else None
        return received if self._close(received.message.id) else None

    def abandon(self, request_id: int) -> None:
        """Wait no longer for the reply to a request; it is dropped if it comes."""
        self.open.discard(request_id)

    def lost(self) -> frozenset[int]:
        """Note that the connection broke: the requests that were open, which nobody will answer now.

        A daemon's reply goes to the connection that the request came from, never to a later one.
        """
        closed = frozenset(self.open)
        self.open.clear()
        return closed

    def _close(self, request_id: int | None) -> bool:
        """Close one request, or all of them for `None`; whether there was something to close."""
        if request_id is None:
            return bool(self.lost())
        waited = request_id in self.open
        self.open.discard(request_id)
        return waited
