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

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from tta_edge.retry import backoff_s
from tta_edge.uplink_events import (
    Acknowledged,
    Connect,
    Event,
    Garbled,
    GivenUp,
    HeadCame,
    Held,
    Lost,
    Online,
    PatchCame,
    RootCame,
)
from tta_edge.uplink_options import UplinkOptions
from tta_edge.uplink_phase import TRANSITIONS, Phase, Signal
from tta_edge.uplink_pursuit import Pursuit
from tta_edge.uplink_request import Frames, Request
from tta_edge.uplink_samples import Samples, Upload
from tta_runtime.errors import WireError
from tta_runtime.link import (
    BUSY,
    DRAINING,
    LIMITS,
    NOT_GREETED,
    Accepted,
    Fetch,
    FromCloud,
    GetRoot,
    HeadMessage,
    Hello,
    PatchMessage,
    Ping,
    Progress,
    Refusal,
    RootMessage,
    Sample,
    State,
    Welcome,
    decode_from_cloud,
)
from tta_runtime.wire import Buffer, Tensors, tag

FIRST_IDS = 2**52  # a random start below it leaves as many ids again to count up


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
        self._samples = Samples(self.options.window, self.options.window_bytes, now_s)
        self._asks: dict[type[Any], Request] = {}  # of every other kind at most one
        self._reports: deque[Progress] = deque()
        self._welcome: Welcome | None = None
        self._until_s = now_s  # of the phases that end by themselves
        self._failures = 0
        self._heard_s = self._said_s = self._greeted_s = now_s
        self._patches = Pursuit((0, 0), lambda newest, _: newest)
        self._roots = Pursuit(0, lambda _, have: have + 1)
        self._work = True  # something may have to be sent at once

    # --- what the edge tells ----------------------------------------------------------------------

    @property
    def room(self) -> int:
        """How many samples may be offered now; 0 while the link is not up."""
        return self._samples.room if self.phase is Phase.ONLINE else 0

    @property
    def holds(self) -> frozenset[str]:
        """Keys of the samples that were offered and are neither acknowledged nor given up."""
        return self._samples.keys

    def offer(self, upload: Upload) -> bool:
        """Take a sample for sending, which `tick` does.

        Returns:
            Whether it was taken; not while there is no `room`, or where its key is held already.

        Raises:
            BadField: its array cannot be sent.
            MessageTooLarge: nor can one so large.
        """
        if upload.key in self.holds or not self.room:
            return False
        self._samples.offer(self._new_id(), upload)
        self._work = True
        return True

    def withdraw(self, key: str) -> None:
        """Send a sample no more; what is under way may arrive all the same."""
        self._samples.forget(key)

    def present(self, hello: Hello) -> None:
        """What the edge says of itself from the next hello on."""
        self._hello = hello

    def newest(self, epoch: int, seq: int) -> None:
        """A verified head names this patch; it is fetched if it is newer than what the edge has."""
        self._patches.there_is((epoch, seq))
        self._work = True

    def have(self, epoch: int, seq: int) -> None:
        """Nothing up to this patch is to be fetched: the edge holds it, or has refused it for good."""
        self._patches.has((epoch, seq))

    def lack(self, epoch: int, seq: int, *, held: tuple[int, int]) -> None:
        """A patch that came could not be kept: it is fetched again, where it is still the newest."""
        if self._patches.lacks((epoch, seq), held):
            self._work = True

    def newest_root(self, version: int) -> None:
        """There is a root of this version."""
        self._roots.there_is(version)
        self._work = True

    def have_root(self, version: int) -> None:
        """The edge trusts this root; the next ones are asked for in order."""
        self._roots.has(version)
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
            # Only when the edge has said what it makes of it is it known what to fetch next.
            self._work = True
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
            at += self._samples.due_s()
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
        self._asks = {Hello: Request(msgspec.structs.replace(self._hello, id=self._new_id()), due_s=now_s)}
        self._samples.restart(now_s)
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
        return self._samples.bytes_under_way + (self.options.patch_bytes if Fetch in self._asks else 0)

    def _patience_s(self) -> float:
        return self.options.ping_s * self.options.liveness + self._under_way() / self.options.slow_bytes_per_s

    def _ask(self, now_s: float) -> None:
        """Put up the requests that the state of things calls for; `_due` sends them."""
        due_s = self._root_due_s()
        if due_s is not None and now_s >= due_s:
            self._asks[GetRoot] = Request(GetRoot(id=self._new_id(), version=self._roots.ask()), due_s=now_s)
        due_s = self._fetch_due_s()
        if due_s is not None and now_s >= due_s:
            self._patches.ask()
            self._asks[Fetch] = Request(Fetch(id=self._new_id()), due_s=now_s)
        if self._reports and Progress not in self._asks:
            message = msgspec.structs.replace(self._reports.popleft(), id=self._new_id())
            self._asks[Progress] = Request(message, due_s=now_s)
        due_s = self._ping_due_s()
        if due_s is not None and now_s >= due_s:
            self._asks[Ping] = Request(Ping(id=self._new_id()), due_s=now_s)

    def _due(self, now_s: float) -> list[Frames]:
        due = [request for request in self._asks.values() if now_s >= request.due_s]
        if self.phase is Phase.ONLINE:
            due += self._samples.due(now_s)
        return [self._send(request, now_s) for request in due]

    def _send(self, request: Request, now_s: float) -> Frames:
        request.begin()
        if isinstance(request.message, Ping):
            request.due_s = now_s + self.options.ping_s
        else:
            wait_s = self.options.answer_s * 2.0 ** min(request.tries - 1, 100)
            under_way_s = self._under_way() / self.options.slow_bytes_per_s
            request.due_s = now_s + min(wait_s, self.options.max_answer_s) + under_way_s
        self._said_s = now_s
        return request.frames()

    def _ping_due_s(self) -> float | None:
        if Ping in self._asks:
            return None
        silence_s = self._welcome.silence_s if self._welcome else self.options.ping_s
        said_s = max(self.options.ping_s, silence_s / 4)
        return min(self._heard_s + self.options.ping_s, self._said_s + min(said_s, silence_s / 2))

    def _fetch_due_s(self) -> float | None:
        if Fetch in self._asks:
            return None
        return self._patches.due_s(self._greeted_s, self.options.refetch_s)

    def _root_due_s(self) -> float | None:
        if GetRoot in self._asks:
            return None
        return self._roots.due_s(self._greeted_s, self.options.refetch_s)

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
        else:
            request.check(message)
        if isinstance(message, PatchMessage):
            events = [PatchCame(tensors["sealed"].tobytes(), tensors["payload"].data)]
        elif isinstance(message, RootMessage):
            events = [RootCame(tensors["sealed"].tobytes())]
        elif isinstance(message, Welcome):
            events = self._welcomed(message, now_s)
        elif isinstance(message, Accepted) and request is not None:
            events = [Acknowledged(message.key, message.stored, message.reason)]
        if request is not None:
            self._close_request(request, now_s)
        return events

    def _asked(self, request_id: int | None) -> Request | None:
        for request in (*self._asks.values(), *self._samples.all()):
            if request.sent and request.message.id == request_id:
                return request
        return None

    def _close_request(self, request: Request, now_s: float) -> None:
        """A request has its answer, or is given up."""
        message = request.message
        if isinstance(message, Sample):
            self._samples.forget(message.key)
        else:
            self._asks.pop(type(message), None)
        if isinstance(message, Fetch):
            self._patches.answered(now_s)
        if isinstance(message, GetRoot):
            self._roots.answered(now_s)
        self._work = True

    def _welcomed(self, welcome: Welcome, now_s: float) -> list[Event]:
        self._signal(Signal.WELCOME)
        self._welcome = welcome
        self._samples.credit = welcome.max_open
        self._failures = 0
        self._greeted_s = now_s
        self._roots.there_is(welcome.root_version)
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
            self._samples.pause(now_s + wait_s)
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
