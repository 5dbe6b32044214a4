"""Requests of edges to answers. For the network thread; what the store has to say comes back through `later`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import zmq

from tta_cloud import edges, samples
from tta_cloud.config import Config
from tta_cloud.errors import Busy, CannotServe, CloudError, StoreBusy, StoreError
from tta_cloud.identity import Identity
from tta_cloud.intake import Intake
from tta_cloud.members import Members
from tta_cloud.operations import Outcome
from tta_cloud.publishing import sealed_of
from tta_cloud.records import Edge, Patch
from tta_cloud.records import Sample as StoredSample
from tta_cloud.rollouts import Rollouts
from tta_cloud.school import School
from tta_cloud.session import Arrived, CloudSession, Frames
from tta_cloud.stats import Stats
from tta_cloud.store import Store
from tta_runtime import __version__
from tta_runtime import sealed as seals
from tta_runtime.errors import ImagesExtraMissing, TtaError
from tta_runtime.link import (
    Accepted,
    Enroll,
    Enrolled,
    Fetch,
    FromCloud,
    GetRoot,
    Hello,
    Noted,
    PatchMessage,
    Progress,
    RootMessage,
    Sample,
    Welcome,
)
from tta_runtime.wire import Tensors, declare

log = logging.getLogger(__name__)

STORE_RETRY_S = 2.0
"""After which an edge asks again where the store could not take its sample."""

Send = Callable[["zmq.Socket[bytes]", CloudSession, list[Frames]], None]


@dataclass(frozen=True, eq=False)
class Asked:
    """A request, and how to answer it.

    Attributes:
        arrived: the request.
        session: that it came by.
        socket: of that session.
        send: sends messages.
    """

    arrived: Arrived
    session: CloudSession
    socket: zmq.Socket[bytes]
    send: Send

    @property
    def user(self) -> str:
        """Key of the edge."""
        return self.arrived.user

    def answer(self, reply: FromCloud, tensors: Tensors | None = None) -> None:
        """Close the request."""
        self.send(self.socket, self.session, self.session.answer(self.arrived, reply, tensors))

    def refuse(self, error: TtaError) -> None:
        """Close the request with an error, unless that was done: then it failed in what comes after the answer."""
        if self.session.waits(self.arrived):
            self.send(self.socket, self.session, self.session.refuse(self.arrived, _for_later(error)))
        else:
            log.warning("after an answer: %s", error)


class Answers:
    """Answers what edges ask.

    Args:
        config: of the service.
        identity: whose roots are handed out.
        digest: of the bundle that edges must serve.
        store: takes samples and enrolments.
        members: the edges.
        rollouts: what each may have.
        intake: filters samples.
        school: is told of new ones.
        stats: of the service.
        endpoint: where enrolled edges connect.
        later: has something done by this thread; for any thread.
        now_ms: milliseconds since 1970.
    """

    def __init__(
        self,
        config: Config,
        identity: Identity,
        digest: str,
        store: Store,
        members: Members,
        rollouts: Rollouts,
        intake: Intake,
        school: School,
        stats: Stats,
        *,
        endpoint: Callable[[], str],
        later: Callable[[Callable[[], None]], None],
        now_ms: Callable[[], int],
    ) -> None:
        self._config = config
        self._identity = identity
        self._digest = digest
        self._store = store
        self._members = members
        self._rollouts = rollouts
        self._intake = intake
        self._school = school
        self._stats = stats
        self._endpoint = endpoint
        self._later = later
        self._now_ms = now_ms

    def answer(self, asked: Asked) -> None:
        """Answer a request, now or when the store has taken it."""
        message = asked.arrived.message
        try:
            if isinstance(message, Hello):
                self._hello(asked, message)
            elif isinstance(message, Sample):
                self._sample(asked, message)
            elif isinstance(message, Fetch):
                self._fetch(asked)
            elif isinstance(message, Progress):
                self._progress(asked, message)
            elif isinstance(message, GetRoot):
                self._get_root(asked, message)
            elif isinstance(message, Enroll):
                self._enroll(asked, message)
        except TtaError as error:
            asked.refuse(error)
        except Exception as error:
            log.exception("a defect while answering an edge")
            asked.refuse(CloudError(f"the cloud failed with {type(error).__name__}", "See its log"))

    def _hello(self, asked: Asked, message: Hello) -> None:
        edge = self._members.get(asked.user)
        if message.bundle_digest != self._digest:
            raise CannotServe(
                f"the edge serves the bundle {message.bundle_digest[:12]}, the student is {self._digest[:12]}",
                "Serve the very bundle that the cloud was started with",
            )
        options = asked.session.options
        welcome = Welcome(
            id=message.id,
            group=edge.group,
            version=__version__,
            root_version=self._identity.root.version,
            max_open=options.max_open,
            silence_s=options.silence_s,
        )
        asked.answer(welcome)
        self._members.seen(edge, message.epoch, message.seq, message.theta_digest, "")
        self._rollouts.compare(edge, message)
        self._rollouts.push_head(edge.group, only=asked.user)

    def _sample(self, asked: Asked, message: Sample) -> None:
        edge, x = self._members.get(asked.user), np.array(asked.arrived.tensors["x"])
        reason = self._intake.refused(edge.group, edge.key, x, message.encoding)
        if reason:
            self._stats.came(edge.group, reason)
            self._store.leave(samples.refuse(edge.group, reason))
            asked.answer(Accepted(id=message.id, key=message.key, stored=False, reason=reason))
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
            self._later(lambda: self._stored(asked, message, edge.group, outcome))

        self._store.submit(insert, done)

    def _stored(self, asked: Asked, message: Sample, group: str, outcome: Outcome[Any]) -> None:
        try:
            found = outcome.get()
        except TtaError as error:
            self._stats.came(group, error.code)
            log.warning("a sample is not stored: %s", error)
            asked.refuse(error)
            return
        self._stats.came(group, found, asked.arrived.nbytes if found == "stored" else 0)
        stored = found in ("stored", "duplicate")
        reason = "" if found == "stored" else str(found)
        asked.answer(Accepted(id=message.id, key=message.key, stored=stored, reason=reason))
        if found == "stored":
            self._school.wake(group)

    def _fetch(self, asked: Asked) -> None:
        patch = self._rollouts.newer_for(self._members.get(asked.user))
        if patch is None:
            asked.answer(Noted(id=asked.arrived.message.id))
            return
        self._stats.handed_out()
        asked.answer(*_patch_message(patch, asked.arrived.message.id))

    def _progress(self, asked: Asked, message: Progress) -> None:
        edge = self._members.get(asked.user)
        asked.answer(Noted(id=message.id))
        committed = message.state == "committed"
        epoch, seq = (message.epoch, message.seq) if committed else (edge.epoch, edge.seq)
        what = f"{message.state} {message.seq} {message.reason}".strip()
        self._members.seen(edge, epoch, seq, message.theta_digest, what)
        self._rollouts.follow(edge, message.epoch, message.seq, message.state, message.reason)

    def _get_root(self, asked: Asked, message: GetRoot) -> None:
        self._members.get(asked.user)
        found = next((s for root, s in self._identity.roots if root.version == message.version), None)
        if found is None:
            asked.answer(Noted(id=message.id))
            return
        sealed = _bytes(seals.encode(found))
        asked.answer(RootMessage(id=message.id, sealed=declare(sealed)), {"sealed": sealed})

    def _enroll(self, asked: Asked, message: Enroll) -> None:
        def done(outcome: Outcome[Edge]) -> None:
            self._later(lambda: self._enrolled(asked, message, outcome))

        self._store.submit(edges.enrol(message.token, asked.user, now_ms=self._now_ms()), done)

    def _enrolled(self, asked: Asked, message: Enroll, outcome: Outcome[Edge]) -> None:
        try:
            edge = outcome.get()
        except TtaError as error:
            log.warning("an enrolment as `%s` is refused: %s", message.name, error)
            asked.send(asked.socket, asked.session, asked.session.refuse(asked.arrived, error))
            return
        self._members.add(edge)
        log.info("edge `%s` is enrolled in group `%s`", edge.name, edge.group)
        sealed = _bytes(seals.encode(self._identity.roots[-1][1]))
        reply = Enrolled(id=message.id, group=edge.group, endpoint=self._endpoint(), sealed=declare(sealed))
        asked.answer(reply, {"sealed": sealed})


def _for_later(error: TtaError) -> TtaError:
    """What the store or this machine cannot do now is no fault of the request: the edge keeps its sample and asks
    again.
    """
    if not isinstance(error, (StoreError, ImagesExtraMissing)) or isinstance(error, StoreBusy):
        return error
    busy = Busy(f"{error.code}: {error.cause}", error.fix)
    busy.retry_after_s = STORE_RETRY_S
    return busy


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype=np.uint8)


def _patch_message(patch: Patch, request_id: int | None) -> tuple[PatchMessage, dict[str, np.ndarray]]:
    sealed = _bytes(seals.encode(sealed_of(patch)))
    payload = _bytes(patch.payload)
    tensors = {"sealed": sealed, "payload": payload}
    return PatchMessage(id=request_id, sealed=declare(sealed), payload=declare(payload)), tensors
