"""The thread that learns: from stored samples to a signed patch in the ledger.

Every round is one transaction: the learner's snapshot, the marks of what it has learned from and its patch are written
together, so a kill neither loses a sample nor teaches it twice. A patch is handed on when it is durable. Rounds of a
single edge are told by the order in which its samples arrived: the same arrivals make the same patches at any pace.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from tta_cloud import agreement, founding, learners, ledger, origins, samples, steering
from tta_cloud.config import Config
from tta_cloud.control import RollBack
from tta_cloud.errors import CloudError, DamagedRecord, Internal, SnapshotUnreadable, StaleLearner
from tta_cloud.gate import Verdict, held_out, judge, judge_labelled, jury
from tta_cloud.identity import Identity
from tta_cloud.intake import RECORD, Looked, Waits, balanced, choose, divergences, fair_share, odd_ones
from tta_cloud.learner import Learner
from tta_cloud.operations import together
from tta_cloud.publishing import build, theta_of
from tta_cloud.records import Patch, Stored, stacked
from tta_cloud.stats import Stats
from tta_cloud.store import Store
from tta_runtime.errors import EngineError, InputError, TtaError
from tta_runtime.model import Engines
from tta_runtime.theta import Vector

log = logging.getLogger(__name__)

JUDGED = 256
"""Held-out samples that judge a patch, the newest ones of each edge."""
BASES = 16
"""Thetas of earlier patches that are kept in memory for a group."""
PATIENCE = 5
"""Refusals by the gate in a row, after which the student goes on from the head."""


@dataclass
class _Group:
    """One group's learner, and what is published of it."""

    learner: Learner
    generation: int
    head: Vector
    fresh: bool
    """Whether it is still to be decided from where the group starts."""
    refused: int = 0
    held: list[Stored] = field(default_factory=list)
    bases: dict[int, Vector] = field(default_factory=dict)
    senders: dict[str, int] = field(default_factory=dict)
    """When each edge has sent last, in ms."""
    records: dict[str, deque[Looked]] = field(default_factory=dict)
    """What the networks have made of the newest samples of each edge."""
    odd: frozenset[str] = frozenset()
    """Edges that nothing is learned from at present."""


@dataclass(frozen=True, eq=False)
class Published:
    """A patch that is durable in the ledger and may be offered.

    Attributes:
        group: whose.
        patch: as it stands in the ledger.
    """

    group: str
    patch: Patch


class School:
    """Learns for all groups. `wake` is for any thread.

    Args:
        config: of the service.
        student: graphs of the edges' bundle.
        teacher: graphs of the teacher.
        store: of samples and patches.
        identity: signs.
        published: told of each new patch, on this thread.
        stats: of the service.
        promised: number of the last patch of a group that edges know of, also where the ledger has lost it.
        clock_s: seconds since 1970.
        labelled: x and y of an operator's hold-out.
    """

    def __init__(
        self,
        config: Config,
        student: Engines,
        teacher: Engines,
        store: Store,
        identity: Identity,
        published: Callable[[Published], None],
        *,
        stats: Stats | None = None,
        promised: Callable[[str], int] = lambda group: 0,
        clock_s: Callable[[], float] = time.time,
        labelled: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        self._config = config
        self._student = student
        self._teacher = teacher
        self._store = store
        self._identity = identity
        self._published = published
        self._stats = stats or Stats()
        self._promised = promised
        self._clock_s = clock_s
        self._labelled = labelled
        self._groups: dict[str, _Group] = {}
        self._changed = threading.Condition()
        self._wanted: set[str] = set()
        self._back: deque[tuple[RollBack, Callable[[Patch | TtaError], None]]] = deque()
        self._ending = False
        self._thread = threading.Thread(target=self._work, name="tta-school", daemon=True)

    def start(self, groups: Iterable[str]) -> None:
        """Begin, with whatever waits for these groups."""
        with self._changed:
            self._wanted |= set(groups)
        self._thread.start()

    def wake(self, group: str) -> None:
        """There is a new sample of a group."""
        with self._changed:
            self._wanted.add(group)
            self._changed.notify_all()

    def roll_back(self, wish: RollBack, done: Callable[[Patch | TtaError], None]) -> None:
        """Publish an earlier patch again and go on learning from it, after the round under way; for any thread.

        Args:
            wish: which one.
            done: told of the new patch when it is durable, or of why there is none; on this thread.
        """
        with self._changed:
            self._back.append((wish, done))
            self._changed.notify_all()

    def close(self) -> None:
        """End after the round under way."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    # ------------------------------------------------------------------------------------------ inside

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._back or self._ending)
                if self._ending:
                    return
                back = self._back.popleft() if self._back else None
                group = "" if back is not None else self._wanted.pop()
            if back is not None:
                self._go_back(*back)
                continue
            try:
                if self.learn(group):
                    self.wake(group)  # there may be enough for another round
            except TtaError as error:
                log.warning("group %s does not learn: %s", group, error)
            except Exception:
                log.exception("a defect while group %s learned", group)

    def learn(self, name: str) -> bool:
        """One round of a group, if enough waits for it; whether there was one.

        Raises:
            TtaError: of the store or the engines; nothing of the round is kept.
        """
        group, options = self._group(name), self._config.learner
        if group.fresh and not self._start(name, group):
            return False
        if self._store.read(lambda db: samples.totals(db, name)).unused < options.new:
            return False  # every sample that comes asks; most of them need not have all the others read
        waiting = [Waits(*row) for row in self._store.read(lambda db: samples.waiting(db, name))]
        group.senders.update({each.edge: each.received_ms for each in waiting})
        choice = choose(waiting, group.senders, options.new, self._config.intake)
        if choice.surplus:
            self._store.call(samples.discard(choice.surplus))
            self._store.call(samples.refuse(name, "surplus", len(choice.surplus)))
        if not choice.new:
            return False
        found = self._store.read(lambda db: samples.numbered(db, (*choice.new, *choice.held)))
        if found.damaged or len(found.samples) < len(choice.new) + len(choice.held):
            self._store.call(samples.discard(found.damaged))
            return True  # again, without those that are gone
        new, held = list(found.samples[: len(choice.new)]), list(found.samples[len(choice.new) :])
        before = group.learner.snapshot()
        try:
            self._round(name, group, new, held)
        except TtaError as error:
            group.learner.restore(before)
            if isinstance(error, StaleLearner):  # another store has taken the place of one that was damaged
                group.generation = self._store.read(lambda db: learners.generation(db, name))
            raise
        return True

    def _start(self, name: str, group: _Group) -> bool:
        """Let a new group start from the one whose samples are nearest; whether enough of its own are there."""
        options, others = self._config.learner, set(self._store.read(ledger.groups)) - {name}
        wanted = (
            options.nearest if others else options.new
        )  # where nothing can be compared nothing is waited for
        while True:
            numbers = [number for number, *_ in self._store.read(lambda db: samples.waiting(db, name))][
                :wanted
            ]
            if len(numbers) < wanted:
                return False
            first = self._store.read(partial(samples.numbered, numbers=numbers))
            if not first.damaged:
                break
            self._store.call(samples.discard(first.damaged))
        learner, bundle = group.learner, self._student.bundle
        before = learner.snapshot()
        start = founding.decide(
            name, first.samples, learner, self._store.read, identity=self._identity, bundle=bundle,
            gate=self._config.gate, furthest=options.nearest_distance, now_ms=self._now_ms(),
        )  # fmt: skip
        noted, parent = origins.note(start.origin), start.origin
        try:
            if start.theta is None:
                self._store.call(noted)
                patch = None
            else:
                reason = f"starts from {parent.parent}'s {parent.epoch}.{parent.seq}, distance {parent.distance:.2f}"
                patch = build(
                    start.theta, self._identity, bundle, group=name, seq=self._next_seq(name), parent=group.head,
                    samples=0, now_s=self._clock_s(), reason=reason,
                )  # fmt: skip
                saved = learners.save(
                    name, learner.snapshot(), (), after=group.generation, saved_ms=self._now_ms()
                )
                published = together(saved, steering.publish(patch))
                group.generation = self._store.call(together(published, noted))
        except TtaError:
            learner.restore(before)
            raise
        group.fresh = False
        if patch is None or start.theta is None:
            self._note(name, f"starts from the source: {parent.reason}")
            return True
        group.head = start.theta
        self._published(Published(name, patch))
        self._note(name, f"{patch.entry.reason}; {parent.reason}")
        return True

    def _round(self, name: str, group: _Group, new: list[Stored], held: list[Stored]) -> None:
        """Learn, judge, keep it all in one transaction, and hand the patch on."""
        began_s, learned = time.monotonic(), False
        trusted = self._trusted(name, group, new)
        draws = [self._replay(name, group, i) for i in range(self._config.learner.rounds)]
        judges, patch, candidate = _jury([*group.held, *held]), None, group.head
        try:
            x = stacked(trusted, group.learner.form)
            learned = not group.learner.learn(x, draws).refused
            if learned:
                candidate = self._candidate(group)
                patch = self._patch(name, group, candidate, judges, len(new))
            else:
                log.warning("group %s: a round was not finite; it is not published", name)
        except (InputError, EngineError) as error:
            # What cannot be learned from must not stand in the way of what comes after it.
            log.warning("group %s: %d samples are passed over: %s", name, len(new), error)
        keys = [each.sample.key for each in (*new, *held)]
        saved = learners.save(
            name, group.learner.snapshot(), keys, after=group.generation, saved_ms=self._now_ms()
        )
        change = saved if patch is None else together(saved, steering.publish(patch))
        group.generation = self._store.call(change)
        self._stats.learned(name, "learned" if learned else "refused", time.monotonic() - began_s)
        group.held = judges
        if patch is not None:
            group.head = candidate
            self._published(Published(name, patch))  # before all else: edges wait for it
        if learned:
            self._compare(name, group, sorted((*new, *held), key=lambda each: each.number))

    def _compare(self, name: str, group: _Group, rows: Sequence[Stored]) -> None:
        """Note how often edges and teacher agree; nothing else depends on it."""
        try:
            found = agreement.compare(group.learner, lambda seq: self._base(name, group, seq), rows)
            self._store.call(agreement.note(found, self._now_ms()))
        except TtaError as error:
            log.warning(
                "group %s: how often its edges agree with the teacher cannot be told: %s", name, error
            )

    def _base(self, name: str, group: _Group, seq: int) -> Vector | None:
        """The theta of a number, of this epoch; None where it cannot be had."""
        if not seq:
            return self._student.bundle.theta0
        if seq not in group.bases:
            try:
                epoch = self._identity.root.epoch
                patch = self._store.read(lambda db: ledger.get(db, name, epoch, seq))
                theta = theta_of(patch, self._identity, self._student.bundle)
            except TtaError:
                return None
            group.bases = {**dict(list(group.bases.items())[1 - BASES :]), seq: theta}
        return group.bases[seq]

    def _trusted(self, name: str, group: _Group, new: list[Stored]) -> list[Stored]:
        """The samples of a round without those of edges that are unlike the others."""
        if self._config.intake.oddness <= 0:
            return new  # nobody is told from the others, so nobody need be looked at
        try:
            _look(group, new)
        except (InputError, EngineError):
            return new  # the round itself will say so
        odd = odd_ones(group.records, self._config.intake.oddness)
        for edge in odd - group.odd:
            self._note(
                name,
                f"nothing is learned from the edge with key {edge[:8]}.. for now: it is unlike the others",
            )
        group.odd = odd
        kept = [each for each in new if each.sample.edge not in odd]
        if kept and len(kept) < len(new):
            self._store.call(samples.refuse(name, "odd", len(new) - len(kept)))
        return kept or new

    def _replay(self, name: str, group: _Group, draw: int) -> np.ndarray:
        options, spec = self._config.learner, self._student.bundle.manifest.input
        nothing = np.zeros((0, *[length for length in spec.shape[1:] if isinstance(length, int)]), spec.dtype)
        if not options.replay:
            return nothing
        seed = group.generation * options.rounds + draw
        found = self._store.read(
            lambda db: samples.replay(db, name, options.replay * 2, newest=10_000, seed=seed)
        )
        known = [
            each for each in found.samples if not held_out(each.number) and each.sample.edge not in group.odd
        ]
        share = fair_share(group.senders, self._config.intake)
        taken = balanced([each.sample.edge for each in known], options.replay, share)
        return stacked([known[place] for place in taken], group.learner.form) if taken else nothing

    def _candidate(self, group: _Group) -> Vector:
        """What a patch would carry: part of the way from the head to the student.

        A round that misleads is outvoted by those after it, before all of it is published.
        """
        rate = np.float32(self._config.learner.publish_rate)
        return np.asarray(group.head + rate * (group.learner.theta - group.head), dtype=np.float32)

    def _patch(
        self, name: str, group: _Group, candidate: Vector, judges: list[Stored], count: int
    ) -> Patch | None:
        """The patch of what was learned; None where the gate or an operator is against it."""
        learner, verdict = group.learner, self._judge(group, candidate, judges)
        self._stats.judged(name, verdict.reason or "passed")
        if not verdict.passed and verdict.reason != "few-samples":
            group.refused += 1
            scores = f"{verdict.score:.4f} after {verdict.head:.4f}"
            self._note(name, f"the gate refused a patch: {verdict.reason}, {scores}")
            if group.refused >= PATIENCE:
                learner.start_from(group.head)
                group.refused = 0
                self._note(name, "the student goes on from the head")
            return None
        group.refused = 0
        held = self._store.read(lambda db: ledger.pinned(db, name))
        if held is not None:
            self._note(name, f"pinned at patch {held.seq}: what was learned is not published")
            return None
        return build(
            candidate, self._identity, self._student.bundle, group=name, seq=self._next_seq(name),
            parent=group.head, samples=count, now_s=self._clock_s(),
        )  # fmt: skip

    def _next_seq(self, name: str) -> int:
        """The number after every one that edges know of: a ledger may have been lost, or its counter damaged."""
        epoch, promised = self._identity.root.epoch, self._promised(name)
        try:
            last = self._store.read(lambda db: ledger.last_seq(db, name, epoch))
        except DamagedRecord:
            last = -1
        if promised > last:
            self._store.call(ledger.resume(name, epoch, promised))
            last = self._store.read(lambda db: ledger.last_seq(db, name, epoch))
        return last + 1

    def _go_back(self, wish: RollBack, done: Callable[[Patch | TtaError], None]) -> None:
        try:
            outcome: Patch | TtaError = self._rolled_back(wish)
        except TtaError as error:
            outcome = error
        except Exception as error:
            log.exception("a defect while group %s was rolled back", wish.group)
            outcome = Internal(f"a rollback failed with {type(error).__name__}", "Report it with the log")
        done(outcome)

    def _rolled_back(self, wish: RollBack) -> Patch:
        name, reason = wish.group, steering.reason_of(wish.epoch, wish.seq, wish.why)
        epoch = self._identity.root.epoch
        later = self._store.read(lambda db: ledger.after(db, name, epoch, wish.last))
        known = [entry.seq for entry in later if entry.reason == reason]
        if known:  # the service was killed between that patch and the end of the note
            return self._store.read(lambda db: ledger.get(db, name, epoch, known[0]))
        group, theta = self._group(name), np.array(self._student.bundle.theta0)
        if wish.seq:
            earlier = self._store.read(lambda db: ledger.get(db, name, wish.epoch, wish.seq))
            theta = np.array(theta_of(earlier, self._identity, self._student.bundle))
        patch = build(
            theta, self._identity, self._student.bundle, group=name, seq=self._next_seq(name), parent=group.head,
            samples=0, now_s=self._clock_s(), state="published", reason=reason,
        )  # fmt: skip
        before = group.learner.snapshot()
        group.learner.start_from(theta)
        try:
            group.generation = self._store.call(
                steering.roll_back(
                    patch, wish.epoch, wish.seq, hold=wish.hold, snapshot=group.learner.snapshot(),
                    after=group.generation, now_ms=self._now_ms(),
                )
            )  # fmt: skip
        except CloudError:
            group.learner.restore(before)
            raise
        group.head, group.refused = theta, 0
        self._note(name, f"patch {patch.entry.seq}: {reason}; the learner goes on from there")
        return self._store.read(lambda db: ledger.get(db, name, patch.entry.epoch, patch.entry.seq))

    def _judge(self, group: _Group, candidate: Vector, judges: list[Stored]) -> Verdict:
        learner, options = group.learner, self._config.gate
        if self._labelled is not None:
            x, y = self._labelled
            found = judge_labelled(learner.predict(candidate, x), learner.predict(group.head, x), y, options)
            if not found.passed:
                return found
        if not judges:
            return Verdict(False, "few-samples", float("nan"), float("nan"), 0)
        x = stacked(judges, learner.form)
        edges = [each.sample.edge for each in judges]
        return judge(
            learner.predict(candidate, x),
            learner.predict(group.head, x),
            learner.teach(x),
            edges,
            options,
        )

    def _group(self, name: str) -> _Group:
        if name not in self._groups:
            self._groups[name] = self._open(name)
        return self._groups[name]

    def _open(self, name: str) -> _Group:
        learner = Learner(self._student, self._teacher, self._config.learner)
        kept = self._store.read(lambda db: learners.load(db, name))
        generation = self._store.read(lambda db: learners.generation(db, name))
        if kept is not None:
            try:
                learner.restore(kept.snapshot)
            except SnapshotUnreadable as error:
                log.warning("group %s starts anew: %s", name, error)
        head = np.array(self._student.bundle.theta0)
        patch = self._store.read(lambda db: ledger.newest(db, name))
        if patch is not None:
            try:
                head = np.array(theta_of(patch, self._identity, self._student.bundle))
            except TtaError as error:
                log.warning(
                    "the head of group %s is of another bundle, its source stands for it: %s", name, error
                )
        known = self._store.read(lambda db: _newest(db, name))
        held = _jury([each for each in known if held_out(each.number)])
        senders = {each.sample.edge: each.received_ms for each in known}
        fresh = self._config.learner.nearest > 0 and self._is_new(name, generation)
        group = _Group(learner, generation, head, fresh, held=held, senders=senders)
        if self._config.intake.oddness <= 0:
            return group
        used = [each for each in known if not held_out(each.number)]
        recent = [used[i] for i in jury([each.sample.edge for each in used], RECORD * len(senders))]
        for start in range(0, len(recent), JUDGED):
            try:
                _look(group, recent[start : start + JUDGED])
            except (InputError, EngineError) as error:
                log.warning("group %s: what it has sent is not looked at again: %s", name, error)
        return group

    def _is_new(self, name: str, generation: int) -> bool:
        """Whether nothing was learned, published or decided for a group."""
        try:
            decided = self._store.read(lambda db: origins.get(db, name)) is not None
        except DamagedRecord:
            decided = True
        return not decided and not generation and not self._store.read(lambda db: ledger.entries(db, name, 1))

    def _note(self, group: str, text: str) -> None:
        log.info("group %s: %s", group, text)

    def _now_ms(self) -> int:
        return int(self._clock_s() * 1000)


def _newest(db: sqlite3.Connection, group: str) -> list[Stored]:
    """The newest samples of a group that were used, oldest first."""
    found = samples.replay(db, group, 4096, newest=4096, seed=0)
    return sorted(found.samples, key=lambda each: each.number)


def _look(group: _Group, stored: list[Stored]) -> None:
    """Put what the networks make of samples into the records of their edges."""
    x = stacked(stored, group.learner.form)
    target, (logits, features) = group.learner.teach(x), group.learner.looks(x)
    for each, value, row in zip(stored, divergences(target, logits), features, strict=True):
        record = group.records.setdefault(each.sample.edge, deque(maxlen=RECORD))
        record.append(Looked(float(value), row))


def _jury(held: list[Stored]) -> list[Stored]:
    return [held[place] for place in jury([each.sample.edge for each in held], JUDGED)]
