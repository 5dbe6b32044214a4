"""The cloud service: sockets, and who does what. One thread owns all sockets; storing and learning have their own.

The network thread does not wait for either, except for the commit of what a command has asked for: what they have to
say comes through a queue, and a byte on an in-process pair wakes the poller. Who is let in (`members`), what edges are
answered (`answers`), which patch each may have (`rollouts`) and what commands want (`notes`) have files of their own.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zmq
import zmq.utils.monitor

from tta_cloud import samples, zap
from tta_cloud.answers import Answers, Asked
from tta_cloud.config import Config
from tta_cloud.crowd import Crowd, shut
from tta_cloud.errors import CannotServe
from tta_cloud.handshakes import CROWDED, EVENTS, Refusals, cause_of
from tta_cloud.identity import Identity
from tta_cloud.intake import Intake
from tta_cloud.members import Members
from tta_cloud.notes import Notes
from tta_cloud.promises import FILE as PROMISES
from tta_cloud.promises import Promises
from tta_cloud.rollouts import Rollouts
from tta_cloud.school import Published, School
from tta_cloud.session import Arrived, CloudSession, Frames, Gone, SessionOptions
from tta_cloud.stats import Stats
from tta_cloud.store import Store, StoreEvent
from tta_cloud.watching import Watching
from tta_runtime.errors import TtaError
from tta_runtime.health import OFF, HealthServer
from tta_runtime.link import HeadMessage
from tta_runtime.model import Engines

log = logging.getLogger(__name__)

EDGES, DOOR = "edges", "door"
"""Domains of authentication: where enrolled edges talk, and where others enrol."""
HWM = 64
HANDSHAKE_MS = 5000
MAX_SILENT = 512
"""Connections of one address that have not said a word yet, before their handshake or after it."""
LONGEST_WAIT_S = 5.0
MAX_FRAME = 17 << 20
SILENCE_S = 60.0
EXPIRE_EVERY_S = 3600.0


class CloudServer:
    """`tta-cloud serve`.

    Args:
        config: of the service.
        identity: its keys.
        student: graphs of the edges' bundle.
        teacher: graphs of the teacher.
        clock_s: seconds since 1970, for what is signed and stored.
        labelled: x and y of an operator's hold-out.

    Attributes:
        endpoint: where edges connect; known once it runs.
        http_endpoint: where metrics and health are, as http://HOST:PORT; empty where they are off.
        door: where edges enrol; empty for none.
        ready: set when it answers.
        on_ready: called then.
    """

    def __init__(
        self,
        config: Config,
        identity: Identity,
        student: Engines,
        teacher: Engines,
        *,
        clock_s: Callable[[], float] = time.time,
        labelled: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        self.endpoint = self.door = self.http_endpoint = ""
        self.ready = threading.Event()
        self.on_ready: Callable[[], None] = self.ready.set
        self._config = config
        self._identity = identity
        self._clock_s = clock_s
        self._intake = Intake(student, config.intake)
        options = SessionOptions(silence_s=SILENCE_S)
        self._session = CloudSession(options)
        self._door = CloudSession(options, door=True)
        self._heads_due_s = self._expire_due_s = 0.0
        promises = Promises(Path(config.store) / PROMISES, identity.root.epoch)
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._refusals = Refusals()
        self._monitors: dict[zmq.Socket[bytes], tuple[str, Crowd]] = {}
        self._crowds: dict[zmq.Socket[bytes], Crowd] = {}
        self._context = zmq.Context()
        self._wakes = self._context.socket(zmq.PAIR)
        self._wakes.bind("inproc://wake")
        self._waker = self._context.socket(zmq.PAIR)
        self._waker.connect("inproc://wake")
        self._wake_lock = threading.Lock()
        self._stats = Stats()
        self._turned_s = time.monotonic()
        self._store = Store(Path(config.store) / "data", self._told, timed=self._stats.committed)
        self._members = Members(self._store, promises, self._now_ms)
        self._rollouts = Rollouts(
            config, identity, student.bundle, self._store, promises, self._members, self._intake, self._stats,
            online=self._online, push=self._push, clock_s=clock_s,
        )  # fmt: skip
        try:
            self._load(promises)
            self._school = School(
                config,
                student,
                teacher,
                self._store,
                identity,
                self._learned,
                stats=self._stats,
                promised=promises.number,
                clock_s=clock_s,
                labelled=labelled,
            )
        except BaseException:
            self._store.close()
            raise
        self._answers = Answers(
            config, identity, student.bundle.digest, self._store, self._members, self._rollouts, self._intake,
            self._school, self._stats, endpoint=lambda: self.endpoint, later=self._later, now_ms=self._now_ms,
        )  # fmt: skip
        self._notes = Notes(
            Path(config.store), self._store, self._school, self._members, self._rollouts,
            shut_out=self._shut_out, later=self._later,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------ for others

    def run(self) -> None:
        """Serve until `stop`.

        Raises:
            CannotServe, StartError: an address cannot be bound.
        """
        health: HealthServer | None = None
        try:
            if self._config.http != OFF:
                watching = Watching(self._stats, self._store, lambda: self._turned_s, self.ready.is_set)
                health = HealthServer(
                    self._config.http, watching, self._config.allow_remote, name="tta-cloud"
                )
                self.http_endpoint = health.endpoint
                health.start()
            authority = self._context.socket(zmq.REP)
            authority.bind(zap.ENDPOINT)
            self._router, self.endpoint = self._bound(self._config.bind, EDGES)
            sockets = {self._router: self._session}
            if self._config.enroll_bind:
                other, self.door = self._bound(self._config.enroll_bind, DOOR)
                sockets[other] = self._door
            self._rollouts.resume()
            self._school.start(self._members.groups())
            self.ready.set()
            self.on_ready()
            self._loop(authority, sockets)
        finally:
            if health is not None:
                health.close()
            self._school.close()
            self._store.close()
            self._context.destroy(linger=0)

    def stop(self) -> None:
        """End soon; for any thread and for signal handlers."""
        self._stopping.set()
        self._wake()

    # ------------------------------------------------------------------------------------------ the loop

    def _loop(self, authority: zmq.Socket[bytes], sockets: dict[Any, CloudSession]) -> None:
        poller = zmq.Poller()
        for socket in (authority, self._wakes, *self._monitors, *sockets):
            poller.register(socket, zmq.POLLIN)
        while not self._stopping.is_set():
            now_s = self._turned_s = time.monotonic()
            waits = [LONGEST_WAIT_S, self._heads_due_s - now_s]
            waits += [each for each in (s.next_s(now_s) for s in sockets.values()) if each is not None]
            ready = dict(poller.poll(int(max(0.0, min(waits)) * 1000) + 1))
            if authority in ready:
                self._let_in(authority)
            for monitor in self._monitors:
                if monitor in ready:
                    self._watch(monitor)
            if self._wakes in ready:
                while self._wakes.poll(0):
                    self._wakes.recv()
            for socket, session in sockets.items():
                if socket in ready:
                    self._receive(socket, session)
            self._run_calls()
            self._guarded(lambda: self._tick(time.monotonic()))

    def _let_in(self, authority: zmq.Socket[bytes]) -> None:
        asked = authority.recv_multipart()
        answer = zap.answer(asked, self._allow)
        authority.send_multipart(answer)
        if answer[2] != zap.OK:
            domain = EDGES if asked[2:3] == [EDGES.encode()] else DOOR
            self._stats.shut_out(domain, answer[3].decode())

    def _receive(self, socket: zmq.Socket[bytes], session: CloudSession) -> None:
        for _ in range(HWM):
            if not socket.poll(0):
                return
            peer, *frames = socket.recv_multipart(copy=False)
            try:
                user = str(frames[0].get("User-Id")) if frames else ""
            except zmq.ZMQError:  # nobody whom the authority has let in
                continue
            if frames:
                self._crowds[socket].heard(int(frames[0].get(zmq.SRCFD)))
            buffers = [frame.buffer for frame in frames]
            events, sends = session.receive(peer.bytes, user, buffers, time.monotonic())
            self._send(socket, session, sends)
            for event in events:
                if isinstance(event, Arrived):
                    self._answers.answer(Asked(event, session, socket, self._send))
                elif isinstance(event, Gone):
                    log.info("edge %s has gone: %s", self._members.name(event.user), event.reason)
                else:
                    self._stats.refused(event.error.code)
                    log.warning("refused a message of %s: %s", self._members.name(event.user), event.error)

    def _watch(self, monitor: zmq.Socket[bytes]) -> None:
        endpoint, crowd = self._monitors[monitor]
        for _ in range(MAX_SILENT):
            if not monitor.poll(0):
                return
            event = zmq.utils.monitor.recv_monitor_message(monitor)
            kind, value = int(event["event"]), int(event["value"])
            if kind == zmq.EVENT_ACCEPTED:
                for descriptor in crowd.accepted(value):
                    if shut(descriptor, int(endpoint.rpartition(":")[2])):
                        self._stats.shut_out(DOOR if endpoint == self.door else EDGES, "crowded")
                        self._refused(endpoint, CROWDED)
            elif kind in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
                crowd.closed(value)
            cause = cause_of(kind, value)
            if cause:
                self._refused(endpoint, cause)

    def _refused(self, where: str, cause: str, who: str = "") -> None:
        line = self._refusals.line(where, cause, who, time.monotonic())
        if line:
            log.warning("%s", line)

    def _send(self, socket: zmq.Socket[bytes], session: CloudSession, sends: list[Frames]) -> None:
        for frames in sends:
            try:
                socket.send_multipart(frames, flags=zmq.DONTWAIT)
            except zmq.ZMQError as error:  # gone, or does not read: it asks again when it is back
                log.debug("cannot send: %s", error)
                session.gone(bytes(frames[0]))

    def _run_calls(self) -> None:
        while True:
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                return
            self._guarded(call)

    def _guarded(self, call: Callable[[], None]) -> None:
        """What fails for one of them must not end the service for all edges."""
        try:
            call()
        except TtaError as error:
            log.warning("not carried out: %s", error)
        except Exception:
            log.exception("a defect in the network thread")

    def _tick(self, now_s: float) -> None:
        for gone in (*self._session.tick(now_s), *self._door.tick(now_s)):
            log.info("edge %s has gone: %s", self._members.name(gone.user), gone.reason)
        online = self._online()
        self._stats.now({group: len(keys) for group, keys in online.items()}, self._rollouts.stages)
        self._rollouts.tick(online, now_s)
        if now_s >= self._expire_due_s:
            self._expire_due_s = now_s + EXPIRE_EVERY_S
            before_ms = self._now_ms() - int(self._config.retention_days * 86_400_000)
            self._store.leave(samples.expire(before_ms))
        if now_s >= self._heads_due_s:
            self._heads_due_s = now_s + self._config.head_every_s
            if self._members.unregistered:
                self._guarded(self._members.readmit)
            self._guarded(self._notes.take)
            for group in online:
                self._rollouts.push_head(group)

    # ------------------------------------------------------------------------------------------ what the parts ask for

    def _learned(self, published: Published) -> None:
        """On the school's thread."""
        self._later(lambda: self._begin(published))

    def _begin(self, published: Published) -> None:
        self._rollouts.begin(published.group, published.patch)

    def _push(self, users: Iterable[str], message: HeadMessage, tensors: Mapping[str, np.ndarray]) -> None:
        self._send(self._router, self._session, self._session.push(users, message, tensors))

    def _online(self) -> dict[str, list[str]]:
        """Keys of the edges at hand, by group."""
        return self._members.by_group(self._session.online)

    def _shut_out(self, key: str) -> None:
        for gone in self._session.revoke(key):
            log.warning("edge %s is shut out", self._members.name(gone.user))

    def _allow(self, domain: str, key: str) -> str:
        if domain == DOOR:
            self._guarded(self._notes.take)
            return ""  # a token decides
        cause = self._members.refused(key)
        if cause:
            self._refused(self.endpoint, cause, f" of {self._members.name(key)}")
        return cause

    # ------------------------------------------------------------------------------------------ inside

    def _load(self, promises: Promises) -> None:
        """What was durable when the service ended."""
        if promises.damaged:
            log.error("%s; what the store says counts", promises.damaged)
        self._members.readmit()
        self._members.refresh()
        for group in self._members.groups():
            self._rollouts.recall(group)

    def _told(self, event: StoreEvent) -> None:
        log.error("store: %s (%s): %s", event.action, event.reason, event.detail)
        self._later(lambda: self._members.readmit())  # the store may be opening still

    def _later(self, call: Callable[[], None]) -> None:
        """Have the network thread do something; for any thread."""
        self._calls.put(call)
        self._wake()

    def _wake(self) -> None:
        with self._wake_lock:
            try:
                self._waker.send(b"", flags=zmq.DONTWAIT)
            except zmq.ZMQError:  # it has been woken often enough, or has ended
                return

    def _bound(self, endpoint: str, domain: str) -> tuple[zmq.Socket[bytes], str]:
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, HWM)
        socket.setsockopt(zmq.RCVHWM, HWM)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME if domain == EDGES else 64 << 10)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15000)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 0)
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._identity.curve_secret.encode())
        socket.setsockopt_string(zmq.ZAP_DOMAIN, domain)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise CannotServe(
                f"cannot bind {endpoint}: {error.strerror}", "Choose an address of this machine that is free"
            ) from error
        found = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        crowd = self._crowds[socket] = Crowd(MAX_SILENT, forgives=domain == EDGES)
        self._monitors[socket.get_monitor_socket(EVENTS)] = found, crowd
        return socket, found

    def _now_ms(self) -> int:
        return int(self._clock_s() * 1000)
