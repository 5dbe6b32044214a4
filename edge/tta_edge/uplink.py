"""The edge's end of the link to the cloud without any I/O: what to send now, what has happened, when to look again.

An `Uplink` says hello, sends samples within the cloud's credit and repeats what was not answered, fetches patches and
roots, reports on them, notices a cloud that has gone and waits longer each time before it asks for a new connection.
Time and randomness come in as arguments; docs/spec/link.md has the rules.

    uplink.tick(now_s)               -> events; `Connect` among them asks for a connection
    uplink.connected(now_s)             once it is encrypted
    uplink.receive(frames, now_s)    -> events, frames to send
    uplink.offer(upload)                one more sample, while there is `room`
    uplink.next_s(now_s)                until `tick` has something to do
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import msgspec
from numpy.typing import NDArray

from tta_edge.retry import backoff_s
from tta_runtime.errors import BadValue, MessageTooLarge, UnknownMessage, WireError
from tta_runtime.link import (
    BUSY,
    DRAINING,
    LIMITS,
    MAX_ENTROPY,
    MAX_PAYLOAD_BYTES,
    NOT_GREETED,
    Accepted,
    Encoding,
    Fetch,
    FromCloud,
    FromEdge,
    GetRoot,
    HeadMessage,
    Hello,
    Noted,
    PatchMessage,
    Ping,
    Progress,
    Refusal,
    RootMessage,
    Sample,
    State,
    Welcome,
    decode_from_cloud,
    encode_message,
)
from tta_runtime.wire import Buffer, Tensors, declare, tag

Frames = list[Buffer]
FIRST_IDS = 2**52  # a random start below it leaves as many ids again to count up


class Phase(Enum):
    """How far the link is."""

    WAITING = auto()
    CONNECTING = auto()
    GREETING = auto()
    ONLINE = auto()
    CLOSED = auto()


class Signal(Enum):
    """What moves a link from one phase to the next."""

    DUE = auto()
    CONNECTED = auto()
    WELCOME = auto()
    FORGOTTEN = auto()
    LOST = auto()
    CLOSE = auto()


# The whole life of a link. A signal that a phase does not list leaves the phase as it is.
TRANSITIONS: Mapping[Phase, Mapping[Signal, Phase]] = {
    Phase.WAITING: {Signal.DUE: Phase.CONNECTING, Signal.CLOSE: Phase.CLOSED},
    Phase.CONNECTING: {
        Signal.CONNECTED: Phase.GREETING,
        Signal.LOST: Phase.WAITING,
        Signal.CLOSE: Phase.CLOSED,
    },
    Phase.GREETING: {Signal.WELCOME: Phase.ONLINE, Signal.LOST: Phase.WAITING, Signal.CLOSE: Phase.CLOSED},
    Phase.ONLINE: {
        Signal.FORGOTTEN: Phase.GREETING,
        Signal.LOST: Phase.WAITING,
        Signal.CLOSE: Phase.CLOSED,
    },
    Phase.CLOSED: {},
}


@dataclass(frozen=True)
class UplinkOptions:
    """How patient and how eager a link is.

    Attributes:
        window: most samples held for sending; the cloud may grant less.
        window_bytes: that samples under way may have together; one larger sample goes alone.
        answer_s: after which a request is repeated; doubled each time.
        max_answer_s: the longest such wait.
        attempts: refusals after which a request is given up; `busy` and the like do not count.
        ping_s: silence in either direction before a ping.
        liveness: so many `ping_s` of silence mean that the cloud has gone.
        slow_bytes_per_s: slowest line that is not taken for a dead one: bytes under way add to the patience.
        patch_bytes: what a patch may have, for the same.
        connect_s: for a connection and its encryption to come about.
        wait_s: before the second attempt to connect; doubled for each further one, and shortened at random.
        max_wait_s: the longest such wait; with `connect_s` it bounds how late a line that has healed is noticed.
        refetch_s: before a patch or a root is asked for again that was not to be had, or was not adopted.
        max_reports: reports that wait; beyond it the oldest is dropped.

    Raises:
        BadValue: a value is not positive, or `wait_s` is over `max_wait_s`.
    """

    window: int = 16
    window_bytes: int = 1 << 20
    answer_s: float = 5.0
    max_answer_s: float = 60.0
    attempts: int = 5
    ping_s: float = 2.0
    liveness: int = 3
    slow_bytes_per_s: float = 16 * 1024
    patch_bytes: int = 1 << 20
    connect_s: float = 5.0
    wait_s: float = 1.0
    max_wait_s: float = 4.0
    refetch_s: float = 10.0
    max_reports: int = 32

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise BadValue(f"{name} is {value}", "Use a positive number")
        if self.wait_s > self.max_wait_s:
            raise BadValue(
                f"wait_s is {self.wait_s} and max_wait_s {self.max_wait_s}", "Use wait_s <= max_wait_s"
            )


@dataclass(frozen=True, eq=False)
class Upload:
    """One sample on its way.

    Attributes:
        key: 32 hex digits; the same for this sample however often it is sent.
        stream: it came from.
        taken_ms: milliseconds since 1970.
        epoch: of the base that answered it.
        seq: of that base.
        entropy: of the answer, in nats.
        x: without a batch dimension; a JPEG file as uint8 [n].
        encoding: of `x`.
    """

    key: str
    stream: str
    taken_ms: int
    epoch: int
    seq: int
    entropy: float
    x: NDArray[Any]
    encoding: Encoding = "raw"


# --- events ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Connect:
    """Open a connection, in place of a former one, and say `connected` or `disconnected`."""


@dataclass(frozen=True)
class Online:
    """The cloud has let the edge in."""

    welcome: Welcome


@dataclass(frozen=True)
class Lost:
    """There is no link; close the connection. `Connect` follows after the wait."""

    code: str
    """`silent`, `unreachable`, `disconnected`, `forgotten`, or the code with which the cloud refused the hello."""
    cause: str
    fix: str
    wait_s: float


@dataclass(frozen=True)
class Acknowledged:
    """The cloud has a sample for good, or does not want it: the spool may forget it."""

    key: str
    stored: bool
    reason: str


@dataclass(frozen=True)
class Held:
    """The cloud can take no sample now; all wait for `wait_s`."""

    code: str
    cause: str
    wait_s: float


@dataclass(frozen=True)
class GivenUp:
    """A request was refused too often and is not repeated; `key` where it was a sample."""

    what: str
    key: str
    code: str
    cause: str


@dataclass(frozen=True)
class HeadCame:
    """A signed head, unverified."""

    sealed: bytes


@dataclass(frozen=True, eq=False)
class PatchCame:
    """A signed patch and its payload, unverified."""

    sealed: bytes
    payload: memoryview


@dataclass(frozen=True)
class RootCame:
    """A signed root, unverified."""

    sealed: bytes


@dataclass(frozen=True)
class Garbled:
    """The cloud sent something that is not of this protocol, or not an answer to what was asked; ignored."""

    error: WireError


Event = Connect | Online | Lost | Acknowledged | Held | GivenUp | HeadCame | PatchCame | RootCame | Garbled

_ANSWERS: Mapping[type[Any], tuple[type[Any], ...]] = {
    Hello: (Welcome,),
    Sample: (Accepted,),
    Fetch: (PatchMessage, Noted),
    GetRoot: (RootMessage,),
    Progress: (Noted,),
    Ping: (Noted,),
}


@dataclass
class _Request:
    """Something that wants an answer; `due_s` is when it is sent, for the first time or again."""

    message: FromEdge
    tensors: Tensors = field(default_factory=dict)
    under_way: bool = False
    due_s: float = 0.0
    sent: bool = False
    tries: int = 0
    refusals: int = 0

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.tensors.values())


class Uplink:
    """One edge's link.

    Args:
        hello: what the edge says of itself; its `id` is put in place.
        draw: gives random numbers in [0, 1).
        options: see there.
        now_s: the first `Connect` is due then.

    Attributes:
        phase: see `TRANSITIONS`.
        dropped_reports: reports that newer ones have pushed out.
    """

    def __init__(
        self,
        hello: Hello,
        draw: Callable[[], float],
        options: UplinkOptions | None = None,
        *,
        now_s: float = 0.0,
    ) -> None:
        self.options = options or UplinkOptions()
        self.phase = Phase.WAITING
        self.dropped_reports = 0
        self._hello, self._draw = hello, draw
        self._last_id = int(draw() * FIRST_IDS)
        self._uploads: OrderedDict[str, _Request] = OrderedDict()
        self._asks: dict[type[Any], _Request] = {}  # of every other kind at most one
        self._reports: deque[Progress] = deque()
        self._welcome: Welcome | None = None
        self._until_s = now_s  # of the phases that end by themselves
        self._failures = 0
        self._heard_s = self._said_s = self._greeted_s = now_s
        self._pause_s = now_s  # no sample is sent before
        self._newest = self._have = self._fetching = (0, 0)
        self._newest_root = self._root = 0
        self._fetched: tuple[tuple[int, int], float] | None = None
        self._fetched_root: tuple[int, float] | None = None
        self._work = True  # something may have to be sent at once

    # --- what the edge tells ----------------------------------------------------------------------

    @property
    def room(self) -> int:
        """How many samples may be offered now; 0 while the link is not up."""
        if self.phase is not Phase.ONLINE or self._welcome is None:
            return 0
        return max(0, min(self.options.window, self._welcome.max_open) - len(self._uploads))

    @property
    def holds(self) -> frozenset[str]:
        """Keys of the samples that were offered and are neither acknowledged nor given up."""
        return frozenset(self._uploads)

    def offer(self, upload: Upload) -> bool:
        """Take a sample for sending, which `tick` does.

        Returns:
            Whether it was taken; not while there is no `room`, or where its key is held already.

        Raises:
            BadField: its array cannot be sent.
            MessageTooLarge: nor can one so large.
        """
        if upload.key in self._uploads or not self.room:
            return False
        if upload.x.nbytes > MAX_PAYLOAD_BYTES:
            raise MessageTooLarge(
                f"the sample has {upload.x.nbytes} bytes, the limit is {MAX_PAYLOAD_BYTES}", "Send it as JPEG"
            )
        message = Sample(
            id=self._new_id(),
            key=upload.key,
            stream=upload.stream,
            taken_ms=upload.taken_ms,
            epoch=upload.epoch,
            seq=upload.seq,
            entropy=min(MAX_ENTROPY, max(0.0, upload.entropy)),
            encoding=upload.encoding,
            x=declare(upload.x),
        )
        self._uploads[upload.key] = _Request(message, {"x": upload.x})
        self._work = True
        return True

    def withdraw(self, key: str) -> None:
        """Send a sample no more; what is under way may arrive all the same."""
        self._uploads.pop(key, None)

    def present(self, hello: Hello) -> None:
        """What the edge says of itself from the next hello on."""
        self._hello = hello

    def newest(self, epoch: int, seq: int) -> None:
        """A verified head names this patch; it is fetched if it is newer than what the edge has."""
        self._newest = max(self._newest, (epoch, seq))
        self._work = True

    def have(self, epoch: int, seq: int) -> None:
        """Nothing up to this patch is to be fetched: the edge holds it, or has refused it for good."""
        self._have = max(self._have, (epoch, seq))

    def lack(self, epoch: int, seq: int, *, held: tuple[int, int]) -> None:
        """A patch that came could not be kept: it is fetched again, where it is still the newest."""
        if self._have == (epoch, seq):
            self._have = held
            self._work = True

    def newest_root(self, version: int) -> None:
        """There is a root of this version."""
        self._newest_root = max(self._newest_root, version)
        self._work = True

    def have_root(self, version: int) -> None:
        """The edge trusts this root; the next ones are asked for in order."""
        self._root = max(self._root, version)
        self._work = True

    def report(
        self,
        epoch: int,
        seq: int,
        state: State,
        *,
        theta_digest: str,
        reason: str = "",
        detail: str = "",
    ) -> None:
        """Tell the cloud what became of a patch; reports arrive in order, and again after a break."""
        if len(self._reports) >= self.options.max_reports:
            self._reports.popleft()
            self.dropped_reports += 1
        self._reports.append(
            Progress(
                id=0,
                epoch=epoch,
                seq=seq,
                state=state,
                reason=reason[:64],
                detail=detail[:512],
                theta_digest=theta_digest,
            )
        )
        self._work = True

    def close(self) -> None:
        """End it; nothing is sent any more."""
        self._signal(Signal.CLOSE)
        self._drop_asks()

    # --- what the connection tells ----------------------------------------------------------------

    def connected(self, now_s: float) -> None:
        """The connection that `Connect` asked for is up and encrypted; `tick` says hello."""
        if self.phase is not Phase.CONNECTING:
            return
        self._signal(Signal.CONNECTED)
        self._heard_s = now_s
        self._greet(now_s)

    def disconnected(self, now_s: float, cause: str = "the connection broke") -> list[Event]:
        """The connection is no more, or did not come about."""
        if self.phase in (Phase.WAITING, Phase.CLOSED):
            return []
        return self._lost("disconnected", cause, "It is tried again; look whether the cloud runs", now_s)

    def receive(self, frames: Sequence[Buffer], now_s: float) -> tuple[list[Event], list[Frames]]:
        """Take one message of the cloud.

        Returns:
            What happened, and the messages to send. Whatever comes in, nothing is raised.
        """
        if self.phase not in (Phase.GREETING, Phase.ONLINE):
            return [], []
        self._heard_s = now_s
        try:
            received = decode_from_cloud(frames, LIMITS)
            events = self._take(received.message, received.tensors, now_s)
        except WireError as error:
            events = [Garbled(error)]
        if any(isinstance(event, PatchCame) for event in events):
            self._work = (
                True  # only when the edge has said what it makes of it is it known what to fetch next
            )
            return events, []
        more, sends = self.tick(now_s)
        return events + more, sends

    # --- time -------------------------------------------------------------------------------------

    def tick(self, now_s: float) -> tuple[list[Event], list[Frames]]:
        """Do what is due.

        Returns:
            What happened, and the messages to send.
        """
        self._work = False
        if self.phase is Phase.WAITING and now_s >= self._until_s:
            self._signal(Signal.DUE)
            self._until_s = now_s + self.options.connect_s
            return [Connect()], []
        if self.phase is Phase.CONNECTING and now_s >= self._until_s:
            waited = f"no connection within {self.options.connect_s:g} s"
            return self._lost(
                "unreachable", waited, "Check the address, the keys and that the cloud runs", now_s
            ), []
        if self.phase not in (Phase.GREETING, Phase.ONLINE):
            return [], []
        if now_s - self._heard_s >= self._patience_s():
            silence = f"nothing was heard for {now_s - self._heard_s:.1f} s"
            return self._lost("silent", silence, "Check the line and that the cloud runs", now_s), []
        if self.phase is Phase.ONLINE:
            self._ask(now_s)
        return [], self._due(now_s)

    def next_s(self, now_s: float) -> float | None:
        """Seconds until `tick` has something to do; `None` after `close`."""
        if self.phase is Phase.CLOSED:
            return None
        if self.phase in (Phase.WAITING, Phase.CONNECTING):
            return max(0.0, self._until_s - now_s)
        if self._work:
            return 0.0
        at = [self._heard_s + self._patience_s()]
        at += [request.due_s for request in self._asks.values()]
        if self.phase is Phase.ONLINE:
            at += [request.due_s for request in self._uploads.values() if request.under_way]
            at += [self._startable_s(request) for request in self._startable()]
            at += [s for s in (self._ping_due_s(), self._fetch_due_s(), self._root_due_s()) if s is not None]
        return max(0.0, min(at) - now_s)

    # --- inside -----------------------------------------------------------------------------------

    def _signal(self, signal: Signal) -> None:
        self.phase = TRANSITIONS[self.phase].get(signal, self.phase)

    def _new_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _greet(self, now_s: float) -> None:
        self._greeted_s = now_s
        self._drop_asks()
        self._asks = {Hello: _Request(msgspec.structs.replace(self._hello, id=self._new_id()), due_s=now_s)}
        for request in self._uploads.values():  # nothing of the former connection is answered in this one
            request.under_way, request.due_s, request.tries = False, now_s, 0
        self._work = True

    def _drop_asks(self) -> None:
        """Forget what waits for an answer; a report goes back to its place, the others are made anew."""
        progress = self._asks.pop(Progress, None)
        if progress is not None and isinstance(progress.message, Progress):
            self._reports.appendleft(progress.message)
        self._asks.clear()

    def _lost(
        self, code: str, cause: str, fix: str, now_s: float, told_s: float | None = None
    ) -> list[Event]:
        self._signal(Signal.LOST)
        self._drop_asks()
        self._failures += 1
        draw = self._draw()
        wait_s = backoff_s(self.options.wait_s, self.options.max_wait_s, self._failures, draw)
        if told_s is not None:  # L12; a little later, each edge at its own time
            wait_s = max(wait_s, told_s * (1 + 0.1 * draw))
        self._until_s = now_s + wait_s
        return [Lost(code, cause, fix, wait_s)]

    def _under_way(self) -> int:
        """Bytes that the line has to carry, or may have to, before an answer to what is sent now can be here."""
        own = sum(request.nbytes for request in self._uploads.values() if request.under_way)
        return own + (self.options.patch_bytes if Fetch in self._asks else 0)

    def _patience_s(self) -> float:
        return self.options.ping_s * self.options.liveness + self._under_way() / self.options.slow_bytes_per_s

    def _ask(self, now_s: float) -> None:
        """Put up the requests that the state of things calls for; `_due` sends them."""
        for kind, due_s, make in (
            (GetRoot, self._root_due_s(), lambda: GetRoot(id=self._new_id(), version=self._root + 1)),
            (Fetch, self._fetch_due_s(), lambda: Fetch(id=self._new_id())),
        ):
            if due_s is not None and now_s >= due_s:
                self._asks[kind] = _Request(make(), due_s=now_s)
                self._fetching = self._newest if kind is Fetch else self._fetching
        if self._reports and Progress not in self._asks:
            message = msgspec.structs.replace(self._reports.popleft(), id=self._new_id())
            self._asks[Progress] = _Request(message, due_s=now_s)
        due_s = self._ping_due_s()
        if due_s is not None and now_s >= due_s:
            self._asks[Ping] = _Request(Ping(id=self._new_id()), due_s=now_s)

    def _due(self, now_s: float) -> list[Frames]:
        sends = [self._send(request, now_s) for request in self._asks.values() if now_s >= request.due_s]
        if self.phase is Phase.ONLINE:
            for request in self._uploads.values():
                if request.under_way and now_s >= request.due_s:
                    sends.append(self._send(request, now_s))
            for request in self._startable():
                if now_s >= self._startable_s(request):
                    sends.append(self._send(request, now_s))
        return sends

    def _send(self, request: _Request, now_s: float) -> Frames:
        request.under_way = True
        request.sent = True
        request.tries += 1
        if isinstance(request.message, Ping):
            request.due_s = now_s + self.options.ping_s
        else:
            wait_s = self.options.answer_s * 2.0 ** min(request.tries - 1, 100)
            under_way_s = self._under_way() / self.options.slow_bytes_per_s
            request.due_s = now_s + min(wait_s, self.options.max_answer_s) + under_way_s
        self._said_s = now_s
        return encode_message(request.message, request.tensors)

    def _startable(self) -> list[_Request]:
        """Samples that are not under way and may be, in order, by the cloud's credit and the bytes."""
        if self._welcome is None:
            return []
        under_way = [r for r in self._uploads.values() if r.under_way]
        count, nbytes = len(under_way), sum(r.nbytes for r in under_way)
        startable = []
        for request in self._uploads.values():
            if request.under_way:
                continue
            if count >= self._welcome.max_open or (
                count and nbytes + request.nbytes > self.options.window_bytes
            ):
                break
            startable.append(request)
            count, nbytes = count + 1, nbytes + request.nbytes
        return startable

    def _startable_s(self, request: _Request) -> float:
        return max(self._pause_s, request.due_s)

    def _ping_due_s(self) -> float | None:
        if Ping in self._asks:
            return None
        silence_s = self._welcome.silence_s if self._welcome else self.options.ping_s
        said_s = max(self.options.ping_s, silence_s / 4)
        return min(self._heard_s + self.options.ping_s, self._said_s + min(said_s, silence_s / 2))

    def _fetch_due_s(self) -> float | None:
        if Fetch in self._asks or self._newest <= self._have:
            return None
        if self._fetched is not None and self._fetched[0] == self._newest:
            return self._fetched[1] + self.options.refetch_s
        return self._greeted_s

    def _root_due_s(self) -> float | None:
        if GetRoot in self._asks or self._newest_root <= self._root:
            return None
        if self._fetched_root is not None and self._fetched_root[0] == self._root + 1:
            return self._fetched_root[1] + self.options.refetch_s
        return self._greeted_s

    def _take(self, message: FromCloud, tensors: Tensors, now_s: float) -> list[Event]:
        if isinstance(message, HeadMessage):
            return [HeadCame(tensors["sealed"].tobytes())]
        if isinstance(message, Refusal):
            return self._refused(message, now_s)
        request = self._asked(message.id)
        events: list[Event] = []
        if request is None:
            if message.id is not None:
                return []  # an answer that came twice, or too late
        elif not isinstance(message, _ANSWERS[type(request.message)]):
            raise UnknownMessage(
                f"the cloud answered `{tag(request.message)}` with `{tag(message)}`",
                "Use an edge and a cloud of the same version",
            )
        if isinstance(message, PatchMessage):
            events = [PatchCame(tensors["sealed"].tobytes(), tensors["payload"].data)]
        elif isinstance(message, RootMessage):
            events = [RootCame(tensors["sealed"].tobytes())]
        elif isinstance(message, Welcome):
            events = self._welcomed(message, now_s)
        elif isinstance(message, Accepted) and request is not None:
            if not isinstance(request.message, Sample) or message.key != request.message.key:
                raise UnknownMessage(
                    f"the cloud answered request {message.id} with the key {message.key} of another sample",
                    "Use an edge and a cloud of the same version",
                )
            events = [Acknowledged(message.key, message.stored, message.reason)]
        if request is not None:
            self._close_request(request, now_s)
        return events

    def _asked(self, request_id: int | None) -> _Request | None:
        for request in (*self._asks.values(), *self._uploads.values()):
            if request.sent and request.message.id == request_id:
                return request
        return None

    def _close_request(self, request: _Request, now_s: float) -> None:
        """A request has its answer, or is given up."""
        message = request.message
        if isinstance(message, Sample):
            del self._uploads[message.key]
        else:
            self._asks.pop(type(message), None)
        if isinstance(message, Fetch):
            self._fetched = self._fetching, now_s
        if isinstance(message, GetRoot):
            self._fetched_root = message.version, now_s
        self._work = True

    def _welcomed(self, welcome: Welcome, now_s: float) -> list[Event]:
        self._signal(Signal.WELCOME)
        self._welcome = welcome
        self._failures = 0
        self._greeted_s = now_s
        self._newest_root = max(self._newest_root, welcome.root_version)
        return [Online(welcome)]

    def _refused(self, refusal: Refusal, now_s: float) -> list[Event]:
        told_s = refusal.retry_after_s
        if refusal.code == NOT_GREETED:
            return self._forgotten(refusal, now_s)
        if refusal.code == DRAINING:
            return self._lost(refusal.code, refusal.cause, refusal.fix, now_s, told_s)
        request = self._asked(refusal.id)
        if request is None:
            return []  # somebody else's, or one of which nothing could be read: it is repeated in time
        if isinstance(request.message, Hello):
            return self._lost(refusal.code, refusal.cause, refusal.fix, now_s, told_s)
        wait_s = self.options.answer_s if told_s is None else told_s
        request.due_s = now_s + wait_s
        if isinstance(request.message, Sample):
            request.under_way = False
        if refusal.code == BUSY:
            self._pause_s = max(self._pause_s, now_s + wait_s)
            return [Held(refusal.code, refusal.cause, wait_s)]
        request.refusals += 1
        if request.refusals < self.options.attempts:
            return []
        self._close_request(request, now_s)
        key = request.message.key if isinstance(request.message, Sample) else ""
        return [GivenUp(tag(request.message), key, refusal.code, refusal.cause)]

    def _forgotten(self, refusal: Refusal, now_s: float) -> list[Event]:
        """L12: the cloud does not know this connection any more."""
        if self.phase is not Phase.ONLINE:
            return []  # an answer to what was sent before this hello
        if now_s - self._greeted_s < self.options.wait_s:  # a cloud that forgets at once is not asked at once
            return self._lost("forgotten", refusal.cause, refusal.fix, now_s)
        self._signal(Signal.FORGOTTEN)
        self._greet(now_s)
        return []
