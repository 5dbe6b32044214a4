"""The cloud service: sockets, and who does what. One thread owns all sockets; storing and learning have their own.

The network thread does not wait for either, except for the commit of what a command has asked for: what they have to
say comes through a queue, and a byte on an in-process pair wakes the poller.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq
import zmq.utils.monitor

from tta_cloud import control, edges, ledger, samples, steering, zap
from tta_cloud.config import Config
from tta_cloud.crowd import Crowd, shut
from tta_cloud.errors import (
    BadRecord,
    Busy,
    CannotServe,
    CloudError,
    DamagedRecord,
    StoreBusy,
    StoreError,
)
from tta_cloud.handshakes import CROWDED, EVENTS, Refusals, cause_of
from tta_cloud.identity import Identity
from tta_cloud.intake import Intake
from tta_cloud.operations import Operation, Outcome
from tta_cloud.promises import FILE as PROMISES
from tta_cloud.promises import Promises
from tta_cloud.publishing import sealed_of, theta_of
from tta_cloud.records import Edge, Entry, Patch
from tta_cloud.records import Sample as StoredSample
from tta_cloud.rollout import Rollout, Stage, begin, progress, tick
from tta_cloud.school import Published, School
from tta_cloud.session import Arrived, CloudSession, Frames, Gone, SessionOptions
from tta_cloud.stats import Stats
from tta_cloud.store import Store, StoreEvent
from tta_cloud.watching import Watching
from tta_runtime import __version__
from tta_runtime import sealed as seals
from tta_runtime.errors import ImagesExtraMissing, TtaError
from tta_runtime.health import OFF, HealthServer
from tta_runtime.link import (
    Accepted,
    Enroll,
    Enrolled,
    Fetch,
    GetRoot,
    HeadMessage,
    Hello,
    Noted,
    PatchMessage,
    Progress,
    RootMessage,
    Sample,
    Welcome,
)
from tta_runtime.model import Engines
from tta_runtime.patch import HEAD_LIFE_S, body_sha256, make_head
from tta_runtime.wire import declare

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
NO_VERDICT = ("newer", "stale", "disk-error")
"""Reasons of a refusal that say nothing about the patch."""
STORE_RETRY_S = 2.0
"""After which an edge asks again where the store could not take its sample."""


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
        self._student = student
        self._clock_s = clock_s
        self._intake = Intake(student, config.intake)
        options = SessionOptions(silence_s=SILENCE_S)
        self._session = CloudSession(options)
        self._door = CloudSession(options, door=True)
        self._edges: dict[str, Edge] = {}
        self._rollouts: dict[str, Rollout] = {}
        self._newest: dict[str, Patch] = {}
        self._heads_due_s = self._expire_due_s = 0.0
        self._served: dict[str, Patch] = {}
        self._going_back: set[Path] = set()
        self._told_of: dict[str, Patch] = {}
        self._lost: dict[str, tuple[int, str]] = {}
        self._behind = False
        self._promises = Promises(Path(config.store) / PROMISES, identity.root.epoch)
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
        try:
            self._load()
            self._school = School(
                config,
                student,
                teacher,
                self._store,
                identity,
                self._learned,
                stats=self._stats,
                promised=self._promises.number,
                clock_s=clock_s,
                labelled=labelled,
            )
        except BaseException:
            self._store.close()
            raise

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
            self._resume()
            self._school.start({edge.group for edge in self._edges.values()})
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
                    self._answer(socket, session, event)
                elif isinstance(event, Gone):
                    log.info("edge %s has gone: %s", self._name(event.user), event.reason)
                else:
                    self._stats.refused(event.error.code)
                    log.warning("refused a message of %s: %s", self._name(event.user), event.error)

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
            log.info("edge %s has gone: %s", self._name(gone.user), gone.reason)
        online = self._online()
        self._stats.now(
            {group: len(keys) for group, keys in online.items()},
            {group: rollout.stage.value for group, rollout in self._rollouts.items()},
        )
        for group, rollout in list(self._rollouts.items()):
            after = tick(rollout, online.get(group, ()), now_s, self._config.rollout)
            if after is not rollout:
                self._advance(group, after)
        if now_s >= self._expire_due_s:
            self._expire_due_s = now_s + EXPIRE_EVERY_S
            before_ms = self._now_ms() - int(self._config.retention_days * 86_400_000)
            self._note(samples.expire(before_ms))
        if now_s >= self._heads_due_s:
            self._heads_due_s = now_s + self._config.head_every_s
            self._guarded(self._take_notes)
            for group in online:
                self._push_head(group)

    # ------------------------------------------------------------------------------------------ requests

    def _answer(self, socket: zmq.Socket[bytes], session: CloudSession, arrived: Arrived) -> None:
        message = arrived.message
        try:
            if isinstance(message, Hello):
                self._hello(socket, session, arrived, message)
            elif isinstance(message, Sample):
                self._sample(socket, session, arrived, message)
            elif isinstance(message, Fetch):
                self._fetch(socket, session, arrived)
            elif isinstance(message, Progress):
                self._progress(socket, session, arrived, message)
            elif isinstance(message, GetRoot):
                self._get_root(socket, session, arrived, message)
            elif isinstance(message, Enroll):
                self._enroll(socket, session, arrived, message)
        except TtaError as error:
            self._refuse(socket, session, arrived, error)
        except Exception as error:
            log.exception("a defect while answering an edge")
            internal = CloudError(f"the cloud failed with {type(error).__name__}", "See its log")
            self._refuse(socket, session, arrived, internal)

    def _refuse(
        self, socket: zmq.Socket[bytes], session: CloudSession, arrived: Arrived, error: TtaError
    ) -> None:
        if session.waits(arrived):  # else it failed in what comes after the answer
            self._send(socket, session, session.refuse(arrived, _for_later(error)))
        else:
            log.warning("after an answer: %s", error)

    def _hello(
        self, socket: zmq.Socket[bytes], session: CloudSession, arrived: Arrived, message: Hello
    ) -> None:
        edge = self._edge(arrived.user)
        if message.bundle_digest != self._student.bundle.digest:
            raise CannotServe(
                f"the edge serves the bundle {message.bundle_digest[:12]}, the student is "
                f"{self._student.bundle.digest[:12]}",
                "Serve the very bundle that the cloud was started with",
            )
        welcome = Welcome(
            id=message.id,
            group=edge.group,
            version=__version__,
            root_version=self._identity.root.version,
            max_open=session.options.max_open,
            silence_s=session.options.silence_s,
        )
        self._send(socket, session, session.answer(arrived, welcome))
        self._seen(edge, message.epoch, message.seq, message.theta_digest, "")
        self._compare(edge, message)
        self._push_head(edge.group, only=arrived.user)

    def _sample(
        self, socket: zmq.Socket[bytes], session: CloudSession, arrived: Arrived, message: Sample
    ) -> None:
        edge, x = self._edge(arrived.user), np.array(arrived.tensors["x"])
        reason = self._intake.refused(edge.group, edge.key, x, message.encoding)
        if reason:
            self._stats.came(edge.group, reason)
            self._note(samples.refuse(edge.group, reason))
            reply = Accepted(id=message.id, key=message.key, stored=False, reason=reason)
            self._send(socket, session, session.answer(arrived, reply))
            return
        pixels = self._intake.form if message.encoding == "jpeg" else None
        stored = StoredSample(
            key=message.key, edge=edge.key, group=edge.group, stream=message.stream, taken_ms=message.taken_ms,
            seq=message.seq, entropy=message.entropy, encoding=message.encoding, x=x.tobytes(),
            dtype=message.x.dtype,  # type: ignore[arg-type]
            shape=tuple(message.x.shape) if pixels is None else pixels.shape,
        )  # fmt: skip
        most = self._config.intake.quota_per_minute
        insert = samples.insert(
            stored,
            received_ms=self._now_ms(),
            caps=samples.Caps(self._config.max_samples, self._config.max_sample_bytes),
            quota=samples.Quota(most, 60_000) if most else None,
        )

        def done(outcome: Outcome[Any]) -> None:
            """On the store's thread: it is durable, or has failed."""
            self._later(lambda: self._stored(socket, session, arrived, message, edge.group, outcome))

        self._store.submit(insert, done)

    def _stored(
        self,
        socket: zmq.Socket[bytes],
        session: CloudSession,
        arrived: Arrived,
        message: Sample,
        group: str,
        outcome: Outcome[Any],
    ) -> None:
        try:
            found = outcome.get()
        except TtaError as error:
            self._stats.came(group, error.code)
            log.warning("a sample is not stored: %s", error)
            self._refuse(socket, session, arrived, error)
            return
        self._stats.came(group, found, arrived.nbytes if found == "stored" else 0)
        stored = found in ("stored", "duplicate")
        reply = Accepted(
            id=message.id, key=message.key, stored=stored, reason="" if found == "stored" else str(found)
        )
        self._send(socket, session, session.answer(arrived, reply))
        if found == "stored":
            self._school.wake(group)

    def _fetch(self, socket: zmq.Socket[bytes], session: CloudSession, arrived: Arrived) -> None:
        edge = self._edge(arrived.user)
        patch = self._for(edge)
        if patch is None or _order(patch) <= (edge.epoch, edge.seq):
            self._send(socket, session, session.answer(arrived, Noted(id=arrived.message.id)))
            return
        self._stats.handed_out()
        message, tensors = _patch_message(patch, arrived.message.id)
        self._send(socket, session, session.answer(arrived, message, tensors))

    def _progress(
        self, socket: zmq.Socket[bytes], session: CloudSession, arrived: Arrived, message: Progress
    ) -> None:
        edge = self._edge(arrived.user)
        self._send(socket, session, session.answer(arrived, Noted(id=message.id)))
        committed = message.state == "committed"
        epoch, seq = (message.epoch, message.seq) if committed else (edge.epoch, edge.seq)
        self._seen(
            edge, epoch, seq, message.theta_digest, f"{message.state} {message.seq} {message.reason}".strip()
        )
        self._follow(edge, message.epoch, message.seq, message.state, message.reason)

    def _follow(self, edge: Edge, epoch: int, seq: int, state: str, reason: str) -> None:
        """What an edge says of a patch moves its rollout on."""
        rollout = self._rollouts.get(edge.group)
        if rollout is None or _order(self._newest[edge.group]) != (epoch, seq) or reason in NO_VERDICT:
            return
        online = self._online().get(edge.group, [])
        after = progress(
            rollout, edge.key, state, reason, time.monotonic(), self._config.rollout, offered=len(online),
            online=online,
        )  # fmt: skip
        if after != rollout:
            self._advance(edge.group, after)

    def _compare(self, edge: Edge, hello: Hello) -> None:
        """An edge that comes back may have committed what it could not report, or know more than the ledger."""
        self._follow(edge, hello.epoch, hello.seq, "committed", "")
        if hello.epoch == self._identity.root.epoch and hello.seq > self._promises.number(edge.group):
            log.warning(
                "edge %s serves patch %d.%d, group %s has come to %d: the store is an older copy. It gets no patch "
                "until then; `tta-cloud keys rotate` lets numbers begin anew",
                self._name(edge.key), hello.epoch, hello.seq, edge.group, self._promises.number(edge.group),
            )  # fmt: skip

    def _get_root(
        self, socket: zmq.Socket[bytes], session: CloudSession, arrived: Arrived, message: GetRoot
    ) -> None:
        self._edge(arrived.user)
        found = next((s for root, s in self._identity.roots if root.version == message.version), None)
        if found is None:
            self._send(socket, session, session.answer(arrived, Noted(id=message.id)))
            return
        sealed = _bytes(seals.encode(found))
        reply = RootMessage(id=message.id, sealed=declare(sealed))
        self._send(socket, session, session.answer(arrived, reply, {"sealed": sealed}))

    def _enroll(
        self, socket: zmq.Socket[bytes], session: CloudSession, arrived: Arrived, message: Enroll
    ) -> None:
        def done(outcome: Outcome[Edge]) -> None:
            self._later(lambda: self._enrolled(socket, session, arrived, message, outcome))

        self._store.submit(edges.enrol(message.token, arrived.user, now_ms=self._now_ms()), done)

    def _enrolled(
        self,
        socket: zmq.Socket[bytes],
        session: CloudSession,
        arrived: Arrived,
        message: Enroll,
        outcome: Outcome[Edge],
    ) -> None:
        try:
            edge = outcome.get()
        except TtaError as error:
            log.warning("an enrolment as `%s` is refused: %s", message.name, error)
            self._send(socket, session, session.refuse(arrived, error))
            return
        self._edges[edge.key] = edge
        self._promises.keep(self._edges.values())
        log.info("edge `%s` is enrolled in group `%s`", edge.name, edge.group)
        sealed = _bytes(seals.encode(self._identity.roots[-1][1]))
        reply = Enrolled(id=message.id, group=edge.group, endpoint=self.endpoint, sealed=declare(sealed))
        self._send(socket, session, session.answer(arrived, reply, {"sealed": sealed}))

    # ------------------------------------------------------------------------------------------ patches

    def _learned(self, published: Published) -> None:
        """On the school's thread."""
        self._later(lambda: self._begin(published))

    def _begin(self, published: Published) -> None:
        group, patch = published.group, published.patch
        if self._was_taken_back(patch.entry):
            return  # before anybody was told
        online = self._online().get(group, ())
        self._promises.give(group, *_named(patch))
        known = sum(edge.group == group and edge.state == "active" for edge in self._edges.values())
        rollout = begin(patch.entry.seq, online, time.monotonic(), self._config.rollout, known=known)
        before = self._rollouts.get(group)
        self._newest_before(group, before)
        self._newest[group] = patch
        self._filter_with(group, patch)
        log.info("group %s: patch %d, %s", group, patch.entry.seq, rollout.stage.value)
        self._advance(group, rollout)

    def _was_taken_back(self, entry: Entry) -> bool:
        try:
            now = self._store.read(lambda db: ledger.entry_of(db, entry.group, entry.epoch, entry.seq))
        except CloudError as error:
            log.warning("the ledger cannot be read: %s", error)
            return False
        return now.state == "rolled-back"

    def _filter_with(self, group: str, patch: Patch) -> None:
        """What the group sends is filtered with what it is given to serve."""
        try:
            self._intake.teach(group, theta_of(patch, self._identity, self._student.bundle))
        except TtaError as error:
            log.warning("group %s: its samples are filtered as before: %s", group, error)

    def _newest_before(self, group: str, before: Rollout | None) -> None:
        """What the group has while the new one is with canaries."""
        if before is not None and before.stage is Stage.GROUP and group in self._newest:
            self._served[group] = self._newest[group]

    def _advance(self, group: str, rollout: Rollout) -> None:
        before = self._rollouts.get(group)
        self._rollouts[group] = rollout
        patch = self._newest[group]
        entry = patch.entry
        state = {Stage.CANARY: "canary", Stage.GROUP: "published", Stage.STOPPED: "stopped"}[rollout.stage]
        fresh = before is None or before.seq != rollout.seq
        moved = fresh and entry.state != state  # one that goes on after a restart may stand where it stood
        if moved or (before is not None and before.stage is not rollout.stage):
            self._stats.moved(group, state)
            why = "; ".join(f"{self._name(edge)}: {reason}" for edge, reason in rollout.bad.items())[:200]
            # Why a group's first patch is what it is stands in the ledger from the beginning, and stays.
            self._note(ledger.move(group, entry.epoch, entry.seq, state, why or entry.reason))  # type: ignore[arg-type]
            if rollout.stage is Stage.STOPPED:
                log.warning("group %s: patch %d is stopped: %s", group, entry.seq, why)
            self._push_head(group)

    def _resume(self) -> None:
        """Take up the rollouts that the end of the last service has broken off."""
        for group in sorted({edge.group for edge in self._edges.values()}):
            try:
                patch = self._store.read(lambda db, group=group: ledger.last(db, group))  # type: ignore[misc]
            except CloudError as error:
                log.warning("group %s: a rollout is not taken up: %s", group, error)
                continue
            if patch is None or patch.entry.epoch != self._identity.root.epoch:
                continue
            known = [e for e in self._edges.values() if e.group == group and e.state == "active"]
            said = {edge.key: state for edge in known if (state := _said(edge, patch))}
            self._told_of.update(dict.fromkeys(said, patch))
            if patch.entry.state not in ("built", "canary"):
                continue
            now_s, seq = time.monotonic(), patch.entry.seq
            rollout = begin(seq, [edge.key for edge in known], now_s, self._config.rollout)
            if rollout.stage is Stage.CANARY:
                rollout = replace(rollout, canaries=rollout.canaries | said.keys())
            for key, state in sorted(said.items()):
                rollout = progress(rollout, key, state, "", now_s, self._config.rollout)
            self._newest[group] = patch
            log.info("group %s: patch %d goes on, %s", group, seq, rollout.stage.value)
            self._advance(group, rollout)

    def _note(self, operation: Operation[Any]) -> None:
        """Hand in a change that nobody waits for."""
        try:
            self._store.submit(operation, self._moved)
        except CloudError as error:
            log.warning("the store does not follow: %s", error)

    def _moved(self, outcome: Outcome[Any]) -> None:
        try:
            outcome.get()
        except TtaError as error:
            log.warning("the ledger does not follow: %s", error)

    def _for(self, edge: Edge) -> Patch | None:
        """The patch that an edge may have now."""
        rollout = self._rollouts.get(edge.group)
        if rollout is not None and rollout.may_have(edge.key):
            return self._newest[edge.group]
        return self._served.get(edge.group)

    def _push_head(self, group: str, *, only: str = "") -> None:
        """Tell edges what is the newest patch for them; canaries may have a newer one than the others."""
        by_patch: dict[tuple[int, str], list[str]] = {}
        for user in [only] if only else self._online().get(group, []):
            by_patch.setdefault(self._newest_for(self._edges[user]), []).append(user)
        epoch = self._identity.root.epoch
        issued_s = self._date()
        for (seq, newest), users in by_patch.items():
            head = make_head(
                [self._identity.publisher],
                channel=group,
                epoch=epoch,
                seq=seq,
                newest=newest,
                issued_s=issued_s,
            )
            sealed = _bytes(seals.encode(head))
            message = HeadMessage(sealed=declare(sealed))
            self._stats.told(len(users))
            self._send(self._router, self._session, self._session.push(users, message, {"sealed": sealed}))

    def _newest_for(self, edge: Edge) -> tuple[int, str]:
        """Number and body that a head names for an edge. It never goes back: that would be refused as a replay."""
        patch, before = self._for(edge), self._told_of.get(edge.key)
        if before is not None and (patch is None or _order(patch) < _order(before)):
            patch = before  # its rollout was stopped
        elif patch is not None:
            self._told_of[edge.key] = patch
        current = patch is not None and patch.entry.epoch == self._identity.root.epoch
        return max(
            _named(patch) if patch is not None and current else (0, ""), self._lost.get(edge.group, (0, ""))
        )

    def _date(self) -> int:
        """The date of a head: it never goes back, whatever the clock does."""
        now_s = self._clock_s()
        issued_s = self._promises.date(now_s)
        behind = issued_s - now_s > HEAD_LIFE_S
        if behind and not self._behind:
            log.warning(
                "the clock says %d, heads were signed up to %d: they keep that date, and edges whose clocks are ahead "
                "of it refuse them. Set the clock; if it was ahead, `tta-cloud keys rotate` lets dates begin anew",
                now_s, issued_s,
            )  # fmt: skip
        self._behind = behind
        return issued_s

    # ------------------------------------------------------------------------------------------ edges

    def _take_notes(self) -> None:
        """Do what commands have asked for since."""
        for path, note in control.notes(Path(self._config.store)):
            if path in self._going_back:
                continue
            answer = control.Answer()
            try:
                if note is None:
                    raise BadRecord(f"the note {path.name} cannot be read", "Use the service's version")
                if isinstance(note, control.LetEnrol):
                    self._store.call(
                        edges.admit(note.hash, note.name, note.group, expires_ms=note.expires_ms)
                    )
                elif isinstance(note, control.ShutOut):
                    self._shut_out(note.key)
                    self._store.call(edges.revoke(note.key))
                elif isinstance(note, control.Pin):
                    answer = self._pin(note)
                elif isinstance(note, control.Unpin):
                    answer = _answer_of(self._store.call(steering.unpin(note.group, note.why)))
                    self._school.wake(note.group)
                elif isinstance(note, control.RollBack):
                    self._going_back.add(path)
                    self._school.roll_back(note, partial(self._rolled_back, path))
                    continue
            except StoreError as error:
                log.warning("a command waits: %s", error)
                return
            except TtaError as error:
                log.warning("a command is not carried out: %s", error)
                answer = control.refusal(error)
            self._done(path, answer)
            self._refresh()

    def _shut_out(self, key: str) -> None:
        """At once, also where the disk does not take it."""
        edge = self._edges.get(key)
        if edge is not None:
            self._edges[key] = msgspec.structs.replace(edge, state="revoked")
            self._promises.keep(self._edges.values())
        for gone in self._session.revoke(key):
            log.warning("edge %s is shut out", self._name(gone.user))

    def _done(self, path: Path, answer: control.Answer) -> None:
        path.unlink(missing_ok=True)
        control.tell(path, answer)

    def _pin(self, note: control.Pin) -> control.Answer:
        entry = self._store.call(steering.pin(note.group, note.epoch, note.seq, note.why))
        self._hold(self._store.read(lambda db: ledger.get(db, note.group, entry.epoch, entry.seq)))
        log.info("group %s is pinned at patch %d", note.group, entry.seq)
        return _answer_of(entry)

    def _rolled_back(self, path: Path, made: Patch | TtaError) -> None:
        """On the school's thread."""

        def take() -> None:
            self._going_back.discard(path)
            if isinstance(made, TtaError):
                log.warning("a command is not carried out: %s", made)
                self._done(path, control.refusal(made))
                return
            self._hold(made)
            self._done(path, _answer_of(made.entry))

        self._later(take)

    def _hold(self, patch: Patch) -> None:
        """The whole group has this patch, by an operator's word: nobody is asked first, and no report stops it."""
        group = patch.entry.group
        self._stats.moved(group, patch.entry.state)
        self._rollouts.pop(group, None)
        self._newest[group] = self._served[group] = patch
        self._filter_with(group, patch)
        self._push_head(group)

    def _allow(self, domain: str, key: str) -> str:
        if domain == DOOR:
            self._guarded(self._take_notes)
            return ""  # a token decides
        found = self._edges.get(key)
        if found is not None and found.state == "active":
            return ""
        cause = "the key is not enrolled" if found is None else f"the key is {found.state}"
        self._refused(self.endpoint, cause, f" of {self._name(key)}")
        return cause

    def _edge(self, key: str) -> Edge:
        found = self._edges.get(key)
        if found is None or found.state != "active":
            raise CannotServe("the key is not enrolled, or no longer", "Enrol with a new token")
        return found

    def _name(self, key: str) -> str:
        found = self._edges.get(key)
        return f"`{found.name}`" if found is not None else f"with key {key[:8]}.."

    def _online(self) -> dict[str, list[str]]:
        """Keys of the edges at hand, by group."""
        found: dict[str, list[str]] = {}
        for key in self._session.online:
            if key in self._edges:
                found.setdefault(self._edges[key].group, []).append(key)
        return found

    def _seen(self, edge: Edge, epoch: int, seq: int, digest: str, what: str) -> None:
        self._edges[edge.key] = msgspec.structs.replace(
            edge, epoch=epoch, seq=seq, progress=what or edge.progress
        )
        self._note(
            edges.report(
                edge.key,
                epoch=epoch,
                seq=seq,
                theta_digest=digest,
                progress=what or edge.progress,
                now_ms=self._now_ms(),
            )
        )

    def _refresh(self) -> None:
        self._edges = {edge.key: edge for edge in self._store.read(edges.listed)}
        self._promises.keep(self._edges.values())

    # ------------------------------------------------------------------------------------------ inside

    def _load(self) -> None:
        """What was durable when the service ended."""
        if self._promises.damaged:
            log.error("%s; what the store says counts", self._promises.damaged)
        self._readmit()
        self._refresh()
        for group in {edge.group for edge in self._edges.values()}:
            self._recall(group)

    def _recall(self, group: str) -> None:
        try:
            patch = self._store.read(lambda db: ledger.newest(db, group))
            last = self._store.read(lambda db: ledger.last(db, group))
        except DamagedRecord as error:
            log.error("group %s: its next patch takes the place of a damaged one: %s", group, error)
            patch = last = None
        if patch is not None:
            self._served[group] = patch
            self._filter_with(group, patch)
        if last is not None and last.entry.epoch == self._identity.root.epoch:
            self._promises.give(group, *_named(last))
        named = self._promises.newest(group)
        if last is None or _named(last) < named:
            self._lost[group] = named

    def _readmit(self) -> None:
        """Edges that a damaged store has lost need not enrol again."""
        try:
            count = self._store.call(edges.readmit(self._promises.edges))
        except StoreError as error:  # a full disk: it is tried again at the next start
            log.warning("edges are not registered anew: %s", error)
            return
        if count:
            log.warning("%d edges that the store has lost are registered anew", count)

    def _told(self, event: StoreEvent) -> None:
        log.error("store: %s (%s): %s", event.action, event.reason, event.detail)
        self._later(self._readmit)

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


def _answer_of(entry: Entry) -> control.Answer:
    return control.Answer(entry.epoch, entry.seq, entry.state)


def _for_later(error: TtaError) -> TtaError:
    """What the store or this machine cannot do now is no fault of the request: the edge keeps its sample and asks
    again.
    """
    if not isinstance(error, (StoreError, ImagesExtraMissing)) or isinstance(error, StoreBusy):
        return error
    busy = Busy(f"{error.code}: {error.cause}", error.fix)
    busy.retry_after_s = STORE_RETRY_S
    return busy


def _named(patch: Patch) -> tuple[int, str]:
    """Number and sha256 of the body, as a head has them."""
    return patch.entry.seq, body_sha256(sealed_of(patch))


def _order(patch: Patch) -> tuple[int, int]:
    return patch.entry.epoch, patch.entry.seq


def _said(edge: Edge, patch: Patch) -> str:
    """The state in which an edge last reported a patch; "" for none."""
    if (edge.epoch, edge.seq) == _order(patch):
        return "committed"
    state, _, rest = edge.progress.partition(" ")
    seq, _, why = rest.partition(" ")
    if seq != str(patch.entry.seq):
        return ""
    return "staged" if why in NO_VERDICT else state


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype=np.uint8)


def _patch_message(patch: Patch, request_id: int | None) -> tuple[PatchMessage, dict[str, np.ndarray]]:
    sealed = _bytes(seals.encode(sealed_of(patch)))
    payload = _bytes(patch.payload)
    tensors = {"sealed": sealed, "payload": payload}
    return PatchMessage(id=request_id, sealed=declare(sealed), payload=declare(payload)), tensors
