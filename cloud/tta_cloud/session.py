"""The cloud's end of the link to its edges without any I/O: frames in, requests and answers out. See docs/spec/link.md.

A `CloudSession` knows which edges are there, turns their frames into requests that somebody has to answer, refuses
the others with a named error and repeats answers that were lost. Time comes in as an argument.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

from tta_cloud.errors import Busy, Draining, DuplicateRequest, LinkRefusal, NotGreeted
from tta_runtime.errors import BadValue, TtaError, WireError
from tta_runtime.link import (
    LIMITS,
    MAX_RETRY_S,
    Enroll,
    FromCloud,
    FromEdge,
    Hello,
    Noted,
    Ping,
    Refusal,
    decode_from_edge,
    encode_message,
)
from tta_runtime.wire import Buffer, Limits, Tensors, tag

Frames = list[Buffer]
Reason = Literal["silent", "replaced", "refused", "unreachable", "revoked", "crowded-out"]


class Phase(Enum):
    """How far an edge's connection is."""

    STRANGER = auto()
    ASKED = auto()
    READY = auto()


class Signal(Enum):
    """What moves a connection from one phase to the next."""

    OPEN = auto()
    ELSEWHERE = auto()  # what opens a connection at the other endpoint, and nothing here
    REQUEST = auto()
    WELCOME = auto()
    REFUSE = auto()


Table = Mapping[Phase, Mapping[Signal, Phase]]

# The whole life of a connection (L5, L13). A message whose signal its phase does not list is refused.
TRANSITIONS: Table = {
    Phase.STRANGER: {Signal.OPEN: Phase.ASKED},
    Phase.ASKED: {Signal.OPEN: Phase.ASKED, Signal.WELCOME: Phase.READY, Signal.REFUSE: Phase.STRANGER},
    Phase.READY: {Signal.OPEN: Phase.ASKED, Signal.REQUEST: Phase.READY},
}
# At the door an answer is the end of it: who was enrolled connects elsewhere, with the key that is now known.
DOOR: Table = {
    Phase.STRANGER: {Signal.OPEN: Phase.ASKED},
    Phase.ASKED: {Signal.OPEN: Phase.ASKED, Signal.WELCOME: Phase.STRANGER, Signal.REFUSE: Phase.STRANGER},
    Phase.READY: {},
}


@dataclass(frozen=True)
class SessionOptions:
    """Bounds of a session.

    Attributes:
        max_open: samples that one edge may have unanswered; what `Welcome` should tell it.
        spare: other requests of one edge beside them.
        capacity: requests unanswered over all edges.
        max_open_bytes: that unanswered requests of all edges hold.
        max_peers: connections that are remembered; beyond it the longest silent one is forgotten.
        silence_s: a connection that says nothing for so long is forgotten; what `Welcome` should tell it.
        retry_after_s: what `busy` asks for.
        limits: of one message.

    Raises:
        BadValue: a bound is not positive.
    """

    max_open: int = 32
    spare: int = 8
    capacity: int = 4096
    max_open_bytes: int = 256 << 20
    max_peers: int = 4096
    silence_s: float = 60.0
    retry_after_s: float = 1.0
    limits: Limits = LIMITS

    def __post_init__(self) -> None:
        for name in ("max_open", "spare", "capacity", "max_open_bytes", "max_peers", "silence_s"):
            value = getattr(self, name)
            if not value > 0:
                raise BadValue(f"{name} is {value}", "Use a positive number")
        if not 0 <= self.retry_after_s <= MAX_RETRY_S:
            raise BadValue(f"retry_after_s is {self.retry_after_s}", f"Use 0 to {MAX_RETRY_S:g} seconds")


@dataclass(frozen=True, eq=False)
class Arrived:
    """Event: a request that has to be answered, with `answer` or `refuse`, exactly once.

    Attributes:
        peer: routing name of the connection; opaque.
        user: key that the connection proved: who the edge is.
        message: the typed request.
        tensors: read-only views by field name.
        at_s: when it arrived, on the clock of `now_s`.
    """

    peer: bytes
    user: str
    message: FromEdge
    tensors: Tensors
    at_s: float

    @property
    def nbytes(self) -> int:
        """What its tensors hold of memory."""
        return sum(array.nbytes for array in self.tensors.values())


@dataclass(frozen=True)
class Refused:
    """Event: a message that was answered with an error at once."""

    peer: bytes
    user: str
    error: TtaError


@dataclass(frozen=True)
class Gone:
    """Event: an edge that had been welcomed is no longer there."""

    user: str
    reason: Reason


Event = Arrived | Refused | Gone


@dataclass
class _Peer:
    user: str
    heard_s: float
    phase: Phase = Phase.STRANGER
    open: dict[int, Arrived] = field(default_factory=dict)
    answered: OrderedDict[int, tuple[FromEdge, Frames]] = field(default_factory=OrderedDict)


class CloudSession:
    """All connections of one endpoint.

    What is open is counted for each key, not for each connection: one that connects again and again is bounded all
    the same, because what its former connections asked for stays open until it is answered.

    Args:
        options: bounds.
        door: whether this is the endpoint where edges enrol; then `enroll` opens a connection instead of `hello`.
    """

    def __init__(self, options: SessionOptions | None = None, *, door: bool = False) -> None:
        self.options = options or SessionOptions()
        self._opener: type[Hello] | type[Enroll] = Enroll if door else Hello
        self._table = DOOR if door else TRANSITIONS
        self._peers: OrderedDict[bytes, _Peer] = OrderedDict()  # the longest silent first
        self._online: dict[str, tuple[bytes, Hello]] = {}
        self._work: set[Arrived] = set()
        self._of_user: Counter[str] = Counter()
        self._bytes = 0
        self._draining = False

    @property
    def online(self) -> dict[str, Hello]:
        """The edges that are there, by key, and what they said of themselves."""
        return {user: hello for user, (_, hello) in self._online.items()}

    @property
    def open(self) -> int:
        """Requests that wait for an answer, those of edges that have gone included."""
        return len(self._work)

    @property
    def peers(self) -> int:
        """Connections that are remembered."""
        return len(self._peers)

    def receive(
        self, peer: bytes, user: str, frames: Sequence[Buffer], now_s: float
    ) -> tuple[list[Event], list[Frames]]:
        """Take one message of one connection.

        Args:
            peer: routing name of the connection.
            user: key that it proved.
            frames: without the routing name.
            now_s: on a clock that does not go back.

        Returns:
            What happened, and the multipart messages to send, each with its routing name. Whatever comes in,
            nothing is raised.
        """
        events: list[Event] = []
        known = self._peers.get(peer)
        if known is not None and known.user != user:  # L6
            events += self._forget(peer, "replaced")
            known = None
        if known is not None:
            known.heard_s = now_s
            self._peers.move_to_end(peer)
        try:
            received = decode_from_edge(frames, self.options.limits)
        except WireError as error:
            return self._refused(events, peer, user, error, error.request_id)
        message: FromEdge = received.message
        try:
            again = self._repeated(known, message)
            if again is not None:
                return events, [[peer, *frames] for frames in again]
            phase = self._next_phase(known, message)
            if isinstance(message, Ping):  # nobody else needs to know
                return events, [[peer, *encode_message(Noted(id=message.id))]]
            arrived = Arrived(peer, user, message, received.tensors, now_s)
            self._check_room(arrived)
        except LinkRefusal as refusal:
            return self._refused(events, peer, user, refusal, message.id)
        if isinstance(message, self._opener):
            events += self._begin(peer, user, now_s)
        self._peers[peer].phase = phase
        self._peers[peer].open[message.id] = arrived
        self._work.add(arrived)
        self._of_user[user] += 1
        self._bytes += arrived.nbytes
        return [*events, arrived], []

    def waits(self, arrived: Arrived) -> bool:
        """Whether a request has not been answered yet."""
        return arrived in self._work

    def answer(self, arrived: Arrived, reply: FromCloud, tensors: Tensors | None = None) -> list[Frames]:
        """Close a request with its answer.

        Args:
            arrived: as `receive` gave it; not answered yet.
            reply: its `id` has to be the request's.
            tensors: of the reply.

        Returns:
            The multipart messages to send; none where nobody waits any more.
        """
        frames = encode_message(reply, tensors)
        self._work.remove(arrived)
        self._bytes -= arrived.nbytes
        self._of_user[arrived.user] -= 1
        if not self._of_user[arrived.user]:
            del self._of_user[arrived.user]  # keys come and go
        known = self._peers.get(arrived.peer)
        if known is None or known.open.get(arrived.message.id) is not arrived:
            return []
        del known.open[arrived.message.id]
        refused = isinstance(reply, Refusal)
        if isinstance(arrived.message, self._opener):
            self._opened(arrived, known, Signal.REFUSE if refused else Signal.WELCOME)
        if not refused and not tensors:  # L8; what carries megabytes is made again instead
            known.answered[arrived.message.id] = arrived.message, frames
            while len(known.answered) > self.options.max_open + self.options.spare:
                known.answered.popitem(last=False)
        return [[arrived.peer, *frames]]

    def refuse(self, arrived: Arrived, error: TtaError) -> list[Frames]:
        """Close a request with an error; see `answer`."""
        return self.answer(arrived, refusal(error, arrived.message.id))

    def push(self, users: Iterable[str], message: FromCloud, tensors: Tensors | None = None) -> list[Frames]:
        """The multipart messages that carry one message to those of these edges that are there.

        It is encoded once, whatever their number.
        """
        frames = encode_message(message, tensors)
        return [[self._online[user][0], *frames] for user in users if user in self._online]

    def gone(self, peer: bytes) -> list[Gone]:
        """Note that a connection cannot be reached."""
        return self._forget(peer, "unreachable") if peer in self._peers else []

    def revoke(self, user: str) -> list[Gone]:
        """Forget every connection of a key that is no longer let in."""
        peers = [peer for peer, known in self._peers.items() if known.user == user]
        return [event for peer in peers for event in self._forget(peer, "revoked")]

    def drain(self) -> None:
        """Take nothing new; what is open is still answered."""
        self._draining = True

    def tick(self, now_s: float) -> list[Gone]:
        """Forget connections that have been silent for too long (L11)."""
        events: list[Gone] = []
        while self._peers:
            peer, known = next(iter(self._peers.items()))
            if now_s - known.heard_s < self.options.silence_s:
                break
            events += self._forget(peer, "silent")
        return events

    def next_s(self, now_s: float) -> float | None:
        """Seconds until `tick` has something to do; `None` while no connection is remembered."""
        if not self._peers:
            return None
        oldest = next(iter(self._peers.values()))
        return max(0.0, oldest.heard_s + self.options.silence_s - now_s)

    def _next_phase(self, known: _Peer | None, message: FromEdge) -> Phase:
        phase = known.phase if known else Phase.STRANGER
        signal = Signal.REQUEST
        if isinstance(message, (Hello, Enroll)):
            signal = Signal.OPEN if isinstance(message, self._opener) else Signal.ELSEWHERE
        if signal not in self._table[phase]:
            wanted = self._opener.__struct_config__.tag
            raise NotGreeted(
                f"`{tag(message)}` came, here a connection begins with `{wanted}` and its answer",
                f"Send `{wanted}` and wait for its answer",
            )
        return self._table[phase][signal]

    def _repeated(self, known: _Peer | None, message: FromEdge) -> list[Frames] | None:
        """Messages to send where a request is a repeated one (L8); `None` for a new one."""
        if known is None:
            return None
        if message.id in known.open:
            former, frames = known.open[message.id].message, []
        elif message.id in known.answered:
            former, answer = known.answered[message.id]
            frames = [answer]
        else:
            return None
        if former != message:
            raise DuplicateRequest(
                f"request {message.id} was a `{tag(former)}` and is now another `{tag(message)}`",
                "Give every request its own id",
            )
        return frames

    def _check_room(self, arrived: Arrived) -> None:
        if self._draining:
            raise Draining("the cloud is shutting down", "Connect again later")
        own, own_limit = self._of_user[arrived.user], self.options.max_open + self.options.spare
        full = len(self._work) >= self.options.capacity
        heavy = bool(self._work) and self._bytes + arrived.nbytes > self.options.max_open_bytes
        if own >= own_limit or full or heavy:
            busy = Busy(
                f"{own} requests of this edge wait, it may have {own_limit}; of all edges {len(self._work)} with "
                f"{self._bytes} bytes, the limits are {self.options.capacity} and {self.options.max_open_bytes}",
                "Repeat after `retry_after_s`",
            )
            busy.retry_after_s = self.options.retry_after_s
            raise busy

    def _begin(self, peer: bytes, user: str, now_s: float) -> list[Gone]:
        """A connection begins, or begins anew: nothing of what was before it goes on (L13)."""
        events: list[Gone] = []
        for other in [p for p, known in self._peers.items() if known.user == user and p != peer]:
            events += self._forget(other, "replaced")
        self._peers.pop(peer, None)
        while len(self._peers) >= self.options.max_peers:
            events += self._forget(next(iter(self._peers)), "crowded-out")
        self._peers[peer] = _Peer(user, now_s)
        return events

    def _opened(self, arrived: Arrived, known: _Peer, signal: Signal) -> None:
        known.phase = self._table[known.phase][signal]
        if known.phase is Phase.READY and isinstance(arrived.message, Hello):
            self._online[arrived.user] = arrived.peer, arrived.message
        if known.phase is Phase.STRANGER:
            self._forget(arrived.peer, "refused")

    def _forget(self, peer: bytes, reason: Reason) -> list[Gone]:
        known = self._peers.pop(peer)
        if self._online.get(known.user, (b"",))[0] != peer:
            return []
        del self._online[known.user]
        return [Gone(known.user, reason)]

    def _refused(
        self, events: list[Event], peer: bytes, user: str, error: TtaError, request_id: int | None
    ) -> tuple[list[Event], list[Frames]]:
        return [*events, Refused(peer, user, error)], [[peer, *encode_message(refusal(error, request_id))]]


def refusal(error: TtaError, request_id: int | None) -> Refusal:
    """The message that carries an error to the edge that caused it, cut to what a header may hold."""
    told_s = getattr(error, "retry_after_s", None)
    return Refusal(
        id=request_id,
        code=error.code,
        cause=error.cause,
        fix=error.fix[:512],
        retry_after_s=None if told_s is None else min(MAX_RETRY_S, max(0.0, told_s)),
    )
