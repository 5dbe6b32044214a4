"""A fleet at work: each stream to its edge, in lockstep with the cloud or in real time, and what came of it."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np
from processes import PATIENCE_S, Cloud, FleetFailed, cloud, toml
from streams import Feed

from tta_cloud import edges, ledger
from tta_cloud.gate import held_out
from tta_cloud.learner import LearnerOptions
from tta_cloud.reading import read
from tta_edge.client import Client
from tta_edge.demo import daemon
from tta_edge.live import PATIENT
from tta_edge.wire import CloudInfo, StatusReply

STREAM = "camera"
POLL_S = 0.002
"""Between two looks at what is waited for."""
EVENTS = 1000
"""The newest events that a daemon tells."""
Advance = Callable[[int], None]
"""Told how many samples were answered."""


@dataclass(frozen=True)
class Plan:
    """How a fleet is played.

    Attributes:
        mode: `lockstep`: each edge in turn, and before the next all has come of a batch what comes of it. `realtime`:
            all at once, at a given rate, and nobody waits.
        batch: samples of a request.
        upload: the edges' filter.
        share: of each stream that it may send.
        rate: samples a second of each edge in real time.
        seed: of the edges.
    """

    mode: Literal["lockstep", "realtime"]
    batch: int
    upload: str
    share: float
    rate: float
    seed: int


@dataclass(frozen=True)
class Taught:
    """What an edge has had of the cloud.

    Attributes:
        right: for each sample, whether its answer was right.
        answers: digest of all logits: two runs that have the same one have answered alike to the last bit.
        lessons: the same of all patches.
        upload_ratio: share of its samples that it sent.
        bytes_up: of these samples.
        bytes_down: of the patches that came: theta, what was signed, and signatures.
        patches: that the cloud published.
        committed: of those, the number of the one that served at the end; 0: none.
        patch_bytes: of each.
        staged_ms: of each patch that came, from when it was made to when it was on probation.
    """

    right: list[bool]
    answers: str
    lessons: str
    upload_ratio: float
    bytes_up: int
    bytes_down: int
    patches: int
    committed: int
    patch_bytes: list[int]
    staged_ms: list[float]


@dataclass(eq=False)
class _Edge:
    """One edge that runs, and what was seen of it."""

    feed: Feed
    client: Client
    right: list[bool] = field(default_factory=list)
    said: hashlib._Hash = field(default_factory=hashlib.sha256)
    staged_s: dict[tuple[int, int], float] = field(default_factory=dict)
    chosen: int = 0
    handled: tuple[int, int] = (0, 0)

    def answer(self, begin: int, size: int) -> None:
        """One batch."""
        x, y = self.feed.batch(begin, size)
        reply = self.client.predict(x, STREAM)
        self.right += (reply.logits.argmax(axis=1) == y).tolist()
        self.said.update(reply.logits.tobytes())

    def note_stages(self, limit: int = EVENTS) -> None:
        """Remember when patches were staged."""
        for event in self.client.events(limit).events:
            if event.action == "stage":
                epoch, seq = event.detail.split(",")[0].split(".")
                self.staged_s.setdefault(
                    (int(epoch), int(seq)), datetime.fromisoformat(event.time).timestamp()
                )


@dataclass(frozen=True)
class _Group:
    """What the cloud holds of an edge's group: its store, as one moment shows it."""

    fresh: int
    newest: tuple[int, int]
    progress: str


def _group(db: sqlite3.Connection, name: str) -> _Group:
    numbers = [n for (n,) in db.execute("SELECT number FROM samples WHERE grp = ? AND used = 0", (name,))]
    newest = ledger.entries(db, name, 1)
    (edge,) = (each for each in edges.listed(db) if each.group == name)
    order = (newest[0].epoch, newest[0].seq) if newest else (0, 0)
    return _Group(sum(not held_out(number) for number in numbers), order, edge.progress)


def taught(
    feeds: Sequence[Feed], student: Path, teacher: Path, plan: Plan, folder: Path, advance: Advance
) -> list[Taught]:
    """Play all streams on edges that a cloud teaches; every process is new.

    Args:
        feeds: one for each edge.
        student: bundle of the edges.
        teacher: bundle of the cloud.
        plan: see :class:`Plan`.
        folder: empty; of the processes.
        advance: told of progress.

    Raises:
        FleetFailed: a process failed, or did not do its part in time.
        TtaError: what a daemon refuses.
    """
    with ExitStack() as stack:
        service = stack.enter_context(cloud(student, teacher, folder / "cloud"))
        fleet = [stack.enter_context(_edge(feed, student, plan, folder, service)) for feed in feeds]
        if plan.mode == "lockstep":
            _lockstep(fleet, service, plan, advance)
        else:
            _realtime(fleet, service, plan, advance)
        for edge in fleet:
            edge.note_stages()
        return [_result(edge, service) for edge in fleet]


@contextmanager
def _edge(feed: Feed, student: Path, plan: Plan, folder: Path, service: Cloud) -> Iterator[_Edge]:
    """An enrolled edge, online."""
    state = folder / feed.edge
    service.enrol(feed.edge, state)
    words = [
        str(student), "--mode", "cloud", "--method", "auto", "--upload", plan.upload, "--upload-share", str(plan.share),
        "--state-dir", str(state), "--threads", "1", "--seed", str(plan.seed),
    ]  # fmt: skip
    with daemon(*words) as endpoint, Client(endpoint, timeout_s=PATIENCE_S, retry=PATIENT) as client:
        edge = _Edge(feed, client)
        _until(
            lambda: "" if _link(edge.client.status()).phase == "online" else "is not online", edge, service
        )
        yield edge


def _lockstep(fleet: Sequence[_Edge], service: Cloud, plan: Plan, advance: Advance) -> None:
    """Edges take turns, so that samples reach the cloud in one order, however fast each process is."""
    for begin in range(0, max(len(edge.feed.labels) for edge in fleet), plan.batch):
        for edge in fleet:
            if begin < len(edge.feed.labels):
                before = len(edge.right)
                edge.answer(begin, plan.batch)
                _settle(edge, service)
                advance(len(edge.right) - before)


def _realtime(fleet: Sequence[_Edge], service: Cloud, plan: Plan, advance: Advance) -> None:
    """All at once; a batch that is late is sent at once. What was sent is waited for when all have answered."""
    never, began_s = threading.Event(), time.monotonic()

    def play(edge: _Edge) -> None:
        for begin in range(0, len(edge.feed.labels), plan.batch):
            never.wait(max(0.0, began_s + begin / plan.rate - time.monotonic()))
            before = len(edge.right)
            edge.answer(begin, plan.batch)
            advance(len(edge.right) - before)

    with ThreadPoolExecutor(len(fleet)) as pool:
        for done in [pool.submit(play, edge) for edge in fleet]:
            done.result()
    for edge in fleet:
        _settle(edge, service)


def _settle(edge: _Edge, service: Cloud) -> None:
    """Wait until nothing more comes of what the edge has answered: sent, stored, learned, published, staged."""
    chosen = _link(edge.client.status()).chosen
    if chosen == edge.chosen:
        return
    edge.chosen = chosen
    _until(lambda: _missing(edge, service), edge, service)


def _missing(edge: _Edge, service: Cloud) -> str:
    """What is still to come; "" where nothing is."""
    status = edge.client.status()
    link = _link(status)
    if link.dropped:
        raise FleetFailed(f"{edge.feed.edge} has dropped {link.dropped} samples", "Look at the disk")
    if link.sent < link.chosen:
        return f"has {link.chosen - link.sent} samples that are not acknowledged"
    group = read(service.store, lambda db: _group(db, edge.feed.edge))
    if group.fresh >= LearnerOptions().new:
        return f"has {group.fresh} samples that the cloud has not learned from"
    if group.newest > edge.handled:
        epoch, seq = group.newest
        bundle = status.bundles[0]
        there = f"{epoch}.{seq}" in (bundle.staged, bundle.base)
        # A patch that does not pass verification is never staged; the cloud knows it from the edge's report.
        if not there and not group.progress.startswith(f"refused {seq} "):
            return f"has not staged patch {epoch}.{seq}"
        edge.handled = group.newest
        edge.note_stages(limit=20)
    return ""


def _until(missing: Callable[[], str], edge: _Edge, service: Cloud) -> None:
    """Look until nothing is missing; give up where nothing has changed for too long."""
    pause, before, end_s = threading.Event(), "", 0.0
    while found := missing():
        if found != before:
            before, end_s = found, time.monotonic() + PATIENCE_S
        if time.monotonic() > end_s or service.process.poll() is not None:
            said = " / ".join(list(service.log)[-3:])
            raise FleetFailed(f"{edge.feed.edge} {found}; the cloud's last words: {said}")
        pause.wait(POLL_S)


def _link(status: StatusReply) -> CloudInfo:
    if status.cloud is None:
        raise FleetFailed("the daemon has no link to a cloud")
    return status.cloud


def _result(edge: _Edge, service: Cloud) -> Taught:
    status, name = edge.client.status(), edge.feed.edge
    link, base = _link(status), status.bundles[0].base
    published = read(service.store, lambda db: ledger.entries(db, name, 10_000))
    made_ms = {(entry.epoch, entry.seq): entry.created_ms for entry in published}
    sizes = read(service.store, lambda db: _sizes(db, name))
    stored = read(
        service.store, lambda db: db.execute("SELECT bytes FROM totals WHERE grp = ?", (name,)).fetchone()
    )
    return Taught(
        right=edge.right,
        answers=edge.said.hexdigest(),
        lessons=read(service.store, lambda db: _lessons(db, name)),
        upload_ratio=link.sent / max(1, link.seen),
        bytes_up=int(stored[0]) if stored else 0,
        bytes_down=sum(sizes[order] for order in edge.staged_s),
        patches=len(published),
        committed=int(base.split(".")[1]) if base else 0,
        patch_bytes=list(sizes.values()),
        staged_ms=[1000 * at_s - made_ms[order] for order, at_s in edge.staged_s.items()],
    )


def _sizes(db: sqlite3.Connection, group: str) -> dict[tuple[int, int], int]:
    rows = db.execute(
        "SELECT epoch, seq, length(body) + length(signatures) + length(payload) FROM patches WHERE grp = ?",
        (group,),
    )
    return {(int(epoch), int(seq)): int(size) for epoch, seq, size in rows}


def _lessons(db: sqlite3.Connection, group: str) -> str:
    rows = db.execute("SELECT payload FROM patches WHERE grp = ? ORDER BY epoch, seq", (group,))
    return hashlib.sha256(b"".join(payload for (payload,) in rows)).hexdigest()


@dataclass(frozen=True)
class Alone:
    """What an edge has without a cloud, as shares of right answers.

    Attributes:
        clean: the source model on the images without the shift; None where there are none.
        source: the source model.
        methods: each method that was played.
    """

    clean: float | None
    source: float
    methods: dict[str, float]


def alone(
    feeds: Sequence[Feed], student: Path, methods: Sequence[str], plan: Plan, folder: Path, advance: Advance
) -> list[Alone]:
    """Play all streams on one daemon that adapts by itself, once with each method.

    Args:
        feeds: one for each edge.
        student: bundle.
        methods: of it; at least one.
        plan: see :class:`Plan`.
        folder: of the daemon's configuration.
        advance: told of progress.

    Raises:
        TtaError: what a daemon refuses.
    """
    served = {method: {"path": str(student.resolve()), "method": method} for method in methods}
    file = folder / "alone.toml"
    file.write_text(
        toml({"threads": 1, "seed": plan.seed, "max_streams": 4096})
        + "\n".join(f"[bundles.{name}]\n{toml(table)}" for name, table in served.items())
    )
    with (
        daemon("--config", str(file)) as endpoint,
        Client(endpoint, timeout_s=PATIENCE_S, retry=PATIENT) as client,
    ):
        return [_alone(feed, client, methods, plan.batch, advance) for feed in feeds]


def _alone(feed: Feed, client: Client, methods: Sequence[str], batch: int, advance: Advance) -> Alone:
    right: dict[str, list[bool]] = {name: [] for name in ("clean", "source", *methods)}
    for begin in range(0, len(feed.labels), batch):
        x, y = feed.batch(begin, batch)
        for method in methods:
            first = method == methods[0]
            reply = client.predict(x, feed.edge, method, compare=first)
            right[method] += (reply.logits.argmax(axis=1) == y).tolist()
            if first and reply.source_logits is not None:
                right["source"] += (reply.source_logits.argmax(axis=1) == y).tolist()
        if feed.clean is not None:
            unshifted = feed.to_input(feed.clean[begin : begin + batch])
            reply = client.predict(unshifted, "clean", methods[0], adapt=False)
            right["clean"] += (reply.logits.argmax(axis=1) == y).tolist()
        advance(len(y))
    clean = float(np.mean(right["clean"])) if feed.clean is not None else None
    found = {method: float(np.mean(right[method])) for method in methods}
    return Alone(clean, float(np.mean(right["source"])), found)
