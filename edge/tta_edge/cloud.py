"""The thread that talks to the cloud: samples out, patches in. Serving goes on whatever happens here.

The protocol is `Uplink`'s, which knows no sockets; this is its socket, its clock, and what stands between a patch that
came and a base that is offered: verification against the root that this edge trusts.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import zmq
import zmq.utils.monitor

from tta_edge.base import Base
from tta_edge.enrol import Enrolment
from tta_edge.errors import SpoolError
from tta_edge.events import Reason
from tta_edge.spool import Spool
from tta_edge.spool_file import Sample
from tta_edge.teaching import Mode, Progress
from tta_edge.uplink import Uplink
from tta_edge.uplink_events import (
    Acknowledged,
    Connect,
    Event,
    GivenUp,
    HeadCame,
    Held,
    Lost,
    Online,
    PatchCame,
    RootCame,
)
from tta_edge.uplink_options import UplinkOptions
from tta_edge.uplink_phase import Phase
from tta_edge.uplink_request import Frames
from tta_edge.uplink_samples import Upload
from tta_edge.wire import CloudInfo
from tta_runtime import __version__
from tta_runtime import sealed as seals
from tta_runtime import theta as thetas
from tta_runtime.bundle import Bundle
from tta_runtime.errors import PatchError, PayloadMismatch, TtaError
from tta_runtime.link import Hello
from tta_runtime.patch import Head, Trust, verify_body, verify_head, verify_payload
from tta_runtime.theta import Vector

log = logging.getLogger(__name__)

MAX_WAITING = 256
"""Samples that wait in memory for the spool; beyond it the oldest are dropped: only a disk that hangs comes to that."""
STALE_S = 600.0
"""Without a good head for so long the cloud is called stale, whatever the clock says."""
HWM = 64
LONGEST_WAIT_S = 1.0
HANDSHAKE_MS = 4000
"""Until an encryption that does not come about is tried anew."""
PATCH_OVERHEAD_BYTES = 32 << 10
"""What a patch's message may have beside its theta."""
FRAME_OVERHEAD_BYTES = 64 << 10
"""What the longest frame may have beside that: headers and signed bodies are shorter, and encryption adds a little."""

Offer = Callable[[int, int, Vector, Callable[[Progress], None]], None]


class CloudLink:
    """One edge's link, in a thread of its own. `send`, `info` and `close` are for any thread.

    Args:
        enrolment: keys and roots.
        bundle: that is served.
        mode: of the daemon.
        base: gives the committed base.
        offer: takes a verified theta.
        spool: where samples wait; closed with the link.
        max_distance: radius of the ball around the source.
        options: of the protocol.
        wall_s: seconds since 1970, for what is signed with a date; all else is timed by a clock that nobody sets.
    """

    def __init__(
        self,
        enrolment: Enrolment,
        bundle: Bundle,
        mode: Mode,
        base: Callable[[], Base],
        offer: Offer,
        spool: Spool,
        *,
        max_distance: float,
        options: UplinkOptions | None = None,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._enrolment = enrolment
        self._bundle = bundle
        self._mode: Mode = mode
        self._base = base
        self._offer = offer
        self._spool = spool
        self._done: list[str] = []
        self._max_distance = max_distance
        self._wall_s = wall_s
        self._head: Head | None = None
        self._head_at_s = time.monotonic()
        self._problem = "not connected yet"
        self._waiting: deque[Sample] = deque()
        self._sent = self._refused = self._dropped = self._bad = 0
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._context = zmq.Context()
        self._wakes = self._context.socket(zmq.PAIR)
        self._wakes.bind("inproc://wake")
        self._waker = self._context.socket(zmq.PAIR)
        self._waker.connect("inproc://wake")
        self._lock = threading.Lock()
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        now_s = time.monotonic()
        # As long as is thought possible for a patch of this bundle, and no longer: a dead line is noticed after that.
        options = options or UplinkOptions(patch_bytes=4 * bundle.manifest.theta.size + PATCH_OVERHEAD_BYTES)
        self._uplink = Uplink(self._hello(), random.random, options, now_s=now_s)
        self._uplink.have(*base().seen)
        self._uplink.have_root(enrolment.root.version)
        self._thread = threading.Thread(target=self._work, name="tta-cloud-link", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def send(self, samples: list[Sample]) -> None:
        """Take samples for sending; the disk is not waited for."""
        with self._lock:
            self._waiting.extend(samples)
            while len(self._waiting) > MAX_WAITING:
                self._waiting.popleft()
                self._dropped += 1
        self._wake()

    def close(self) -> None:
        """End it."""
        self._ending.set()
        self._wake()
        if self._thread.is_alive():
            self._thread.join()
        self._context.destroy(linger=0)
        self._spool.close()

    def info(self, *, seen: int, chosen: int) -> CloudInfo:
        """How it is now, in the words of `status`.

        Args:
            seen: samples that the filter has looked at.
            chosen: of them, those that were handed to `send`.
        """
        head, age_s = self._head, time.monotonic() - self._head_at_s
        with self._lock:
            waiting, dropped = len(self._waiting) + len(self._spool), self._dropped
        return CloudInfo(
            phase=self._uplink.phase.name.lower(),
            group=self._enrolment.link.group,
            problem=self._problem,
            stale=age_s > STALE_S,
            head="" if head is None else f"{head.epoch}.{head.seq}",
            seen=seen,
            chosen=chosen,
            sent=self._sent,
            refused=self._refused,
            dropped=dropped + self._spool.counters.dropped,
            waiting=waiting,
            patches_refused=self._bad,
            head_age_s=age_s,
        )

    # ------------------------------------------------------------------------------------------ the loop

    def _work(self) -> None:
        try:
            while not self._ending.is_set():
                try:
                    self._turn()
                except TtaError as error:
                    log.warning("the link to the cloud: %s", error)
                except zmq.ZMQError as error:
                    log.warning("the link to the cloud: %s", error)
                    self._do(self._uplink.disconnected(time.monotonic(), str(error)))
        except Exception:
            log.exception("a defect in the link to the cloud; serving goes on without it")
        finally:
            self._disconnect()

    def _turn(self) -> None:
        now_s = time.monotonic()
        self._hand_over()
        events, sends = self._uplink.tick(now_s)
        self._do(events)
        self._send(sends)
        wait_s = min(LONGEST_WAIT_S, self._uplink.next_s(now_s) or 0.0)
        poller = zmq.Poller()
        for socket in (self._wakes, self._socket, self._monitor):
            if socket is not None:
                poller.register(socket, zmq.POLLIN)
        ready = dict(poller.poll(int(wait_s * 1000) + 1))
        if self._wakes in ready:
            while self._wakes.poll(0):
                self._wakes.recv()
        while not self._calls.empty():
            self._calls.get()()
        if self._monitor is not None and self._monitor in ready:
            self._watch(self._monitor)
        if self._socket is not None and self._socket in ready:
            for _ in range(HWM):
                if not self._socket.poll(0):
                    break
                frames = self._socket.recv_multipart(copy=False)
                events, sends = self._uplink.receive([frame.buffer for frame in frames], time.monotonic())
                self._send(sends)
                self._do(events)
                if self._uplink.phase in (Phase.WAITING, Phase.CLOSED):
                    return  # the socket is closed

    def _hand_over(self) -> None:
        """Let the disk have what was chosen, forget what was acknowledged, and send as much as there is room for."""
        with self._lock:
            fresh = list(self._waiting)
            self._waiting.clear()
        try:
            if fresh:
                self._spool.append_many(fresh)
        except SpoolError as error:
            with self._lock:
                self._dropped += len(fresh)
            log.warning("samples are lost: %s", error)
        if self._done:
            self._spool.remove(self._done)
            self._done = []
        room = self._uplink.room
        if not room:
            return
        for found in self._spool.peek(room, skip=self._uplink.holds):
            sample = found.sample
            upload = Upload(
                found.key, sample.stream, sample.taken_ms, self._enrolment.root.epoch, sample.seq, sample.entropy,
                sample.array(), sample.encoding,
            )  # fmt: skip
            try:
                self._uplink.offer(upload)
            except TtaError as error:
                self._done.append(found.key)
                log.warning("a sample cannot be sent: %s", error)

    def _send(self, sends: list[Frames]) -> None:
        if self._socket is None:
            return
        for frames in sends:
            try:
                self._socket.send_multipart(frames, flags=zmq.DONTWAIT)
            except zmq.Again:  # it is sent again when its answer does not come
                log.debug("the line to the cloud is full")

    # ------------------------------------------------------------------------------------------ events

    def _do(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Connect):
                self._connect()
            elif isinstance(event, Online):
                self._problem = ""
                self._uplink.newest_root(event.welcome.root_version)
                log.info("the cloud is there, group `%s`", event.welcome.group)
            elif isinstance(event, Lost):
                self._problem = f"{event.code}: {event.cause}"
                self._disconnect()
                log.warning("the cloud is not there (%s): %s", event.code, event.cause)
            elif isinstance(event, Acknowledged):
                self._problem = ""
                self._done.append(event.key)
                self._sent += 1
                self._refused += not event.stored
            elif isinstance(event, Held):
                if not self._problem:
                    log.warning("the cloud takes no samples now, they wait: %s", event.cause)
                self._problem = f"{event.code}: {event.cause}"
            elif isinstance(event, HeadCame):
                self._checked(lambda sealed=event.sealed: self._take_head(sealed))  # type: ignore[misc]
            elif isinstance(event, PatchCame):
                self._checked(lambda came=event: self._take_patch(came.sealed, came.payload))  # type: ignore[misc]
            elif isinstance(event, RootCame):
                self._checked(lambda sealed=event.sealed: self._take_root(sealed))  # type: ignore[misc]
            elif isinstance(event, GivenUp):
                if event.key:
                    self._done.append(event.key)
                log.warning("given up: %s (%s): %s", event.what, event.code, event.cause)
            else:
                log.warning("the cloud sent something else: %s", event.error)

    def _checked(self, take: Callable[[], None]) -> None:
        """Whatever is wrong with what came, nothing has changed."""
        try:
            take()
        except PatchError as error:
            self._bad += 1
            log.warning("refused (%s): %s", error.code, error)
        except TtaError as error:
            log.warning("the link to the cloud: %s", error)

    def _take_head(self, sealed: bytes) -> None:
        before = self._head
        self._head = verify_head(seals.decode(sealed), self._trust(), before, now_s=self._wall_s())
        if self._head != before:  # the same one again is no news: whoever holds back newer ones can repeat it
            self._head_at_s = time.monotonic()
        self._uplink.newest(self._head.epoch, self._head.seq)

    def _take_patch(self, data: bytes, payload: memoryview) -> None:
        body = verify_body(seals.decode(data), self._trust())
        if hashlib.sha256(payload).hexdigest() != body.payload_sha256:
            # Who carries it has changed it: the publisher's own may come yet, so it is asked for again.
            raise PayloadMismatch(
                f"the {len(payload)} bytes of the payload are not those that were signed",
                "They were changed on their way; they are fetched again",
            )
        # From here it is the publisher's own word: what is wrong with it would be no better the next time.
        self._uplink.have(body.epoch, body.seq)
        bundle = self._bundle
        try:
            found = verify_payload(
                body, payload, bundle.manifest.theta, bundle.theta0, max_distance=self._max_distance
            )
        except PatchError as error:
            self._report(Progress(body.epoch, body.seq, "refused", error.code, error.cause, self._digest()))
            raise
        self._offer(body.epoch, body.seq, found.theta, self._report_later)

    def _take_root(self, data: bytes) -> None:
        self._enrolment = self._enrolment.follow(seals.decode(data), self._wall_s())
        self._uplink.have_root(self._enrolment.root.version)
        if self._head is not None and self._head.epoch != self._enrolment.root.epoch:
            self._head = None
        log.warning("root %d is trusted from now on", self._enrolment.root.version)

    def _report_later(self, progress: Progress) -> None:
        """On the answering thread."""
        self._calls.put(lambda: self._report(progress))
        self._wake()

    def _report(self, progress: Progress) -> None:
        if (
            progress.reason == Reason.DISK_ERROR.value
        ):  # no fault of the patch: it is taken when there is room
            self._uplink.lack(progress.epoch, progress.seq, held=self._base().seen)
        self._uplink.report(
            progress.epoch, progress.seq, progress.state, theta_digest=progress.theta_digest,
            reason=progress.reason, detail=progress.detail,
        )  # fmt: skip
        self._uplink.present(self._hello())

    # ------------------------------------------------------------------------------------------ sockets

    def _connect(self) -> None:
        self._disconnect()
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, HWM)
        socket.setsockopt(zmq.RCVHWM, HWM)
        # Nothing that this edge could use is longer than its own theta: with the queue's length it bounds the memory.
        socket.setsockopt(zmq.MAXMSGSIZE, 4 * self._bundle.manifest.theta.size + FRAME_OVERHEAD_BYTES)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        socket.setsockopt(zmq.RECONNECT_IVL, -1)  # when to connect again is the protocol's to say
        socket.setsockopt(zmq.CURVE_SERVERKEY, self._enrolment.link.server_key.encode())
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self._enrolment.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._enrolment.secret)
        self._monitor = socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_CLOSED
            | zmq.EVENT_DISCONNECTED
        )
        socket.connect(self._enrolment.link.endpoint)
        self._socket = socket

    def _watch(self, monitor: zmq.Socket[bytes]) -> None:
        event = zmq.utils.monitor.recv_monitor_message(monitor)["event"]
        now_s = time.monotonic()
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._uplink.connected(now_s)
            return
        causes: dict[int, str] = {
            zmq.EVENT_HANDSHAKE_FAILED_AUTH: "the cloud does not let this edge's key in: it is revoked or unknown",
            zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "what answers is no cloud, or has another key",
            zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "the handshake failed: a cloud with another key, or none",
        }
        self._do(self._uplink.disconnected(now_s, causes.get(int(event), "the connection broke")))

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.disable_monitor()
            if self._monitor is not None:
                self._monitor.close(linger=0)
            self._socket.close(linger=0)
        self._socket = self._monitor = None

    # ------------------------------------------------------------------------------------------ inside

    def _trust(self) -> Trust:
        seen = self._base().seen
        trust = Trust(self._enrolment.root, self._bundle.digest, self._enrolment.link.group)
        return replace(trust, epoch=seen[0], seq=seen[1])

    def _hello(self) -> Hello:
        base = self._base()
        return Hello(
            id=0, version=__version__, bundle_digest=self._bundle.digest, mode=self._mode, epoch=base.epoch,
            seq=base.seq, theta_digest=self._digest(),
        )  # fmt: skip

    def _digest(self) -> str:
        return thetas.digest(self._bundle.manifest.theta, np.asarray(self._base().theta))

    def _wake(self) -> None:
        with self._lock:
            try:
                self._waker.send(b"", flags=zmq.DONTWAIT)
            except zmq.ZMQError:  # it has been woken often enough, or has ended
                return
