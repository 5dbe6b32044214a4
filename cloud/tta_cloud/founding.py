"""Where a new group starts: what stands in the store is read, compared and judged; nothing is written here."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta_cloud import learners, ledger, nearest, samples
from tta_cloud.errors import CloudError, SnapshotUnreadable
from tta_cloud.gate import GateOptions, judge, jury
from tta_cloud.identity import Identity
from tta_cloud.learner import Learner
from tta_cloud.publishing import theta_of
from tta_cloud.records import Origin, Patch, Stored, stacked
from tta_runtime.bundle import Bundle
from tta_runtime.errors import EngineError, InputError, TtaError
from tta_runtime.theta import Vector

log = logging.getLogger(__name__)

NEWEST = 4096
"""Samples of another group among which those to compare with are chosen, in turn by edge."""

Read = Callable[[Callable[[sqlite3.Connection], Any]], Any]
"""Asks the store; see `Store.read`."""


@dataclass(frozen=True, eq=False)
class Start:
    """Where a group starts.

    Attributes:
        origin: for the store.
        theta: [P] of the parent's patch; None: the group begins at the source.
    """

    origin: Origin
    theta: Vector | None


def decide(
    name: str,
    first: Sequence[Stored],
    learner: Learner,
    read: Read,
    *,
    identity: Identity,
    bundle: Bundle,
    gate: GateOptions,
    furthest: float,
    now_ms: int,
) -> Start:
    """Where a group starts. The learner of a group that has a parent has become a copy of the parent's then.

    A group that is too far away is no start: what was taught under another shift may do worse than the source, and
    the gate would not see it, because the teacher that says what is right comes from there too. The gate is asked
    none the less, on the group's own first samples, from which nothing has learned: it sees what is broken.

    Args:
        name: of the group.
        first: its first samples, at least one.
        learner: of the group, as new.
        read: asks the store.
        identity: whose patches count.
        bundle: of the edges.
        gate: how a patch is judged.
        furthest: the largest distance of a start.
        now_ms: milliseconds since 1970.

    Raises:
        CloudError: of the store; the learner is as it was.
    """

    def source(reason: str, distance: float = 0.0) -> Start:
        origin = Origin(
            group=name, parent="", epoch=0, seq=0, distance=distance, samples=len(first), reason=reason,
            decided_ms=now_ms,
        )  # fmt: skip
        return Start(origin, None)

    patches = _patches(name, read, identity, bundle)
    if not patches:
        return source("no other group has a patch")
    before = learner.snapshot()
    try:
        x = stacked(first, learner.form)
        mine = learner.features(x)
        places = nearest.ranked(
            {
                group: nearest.distance(mine, learner.features(other))
                for group in patches
                if (other := _samples(group, len(first), learner, read)) is not None
            }
        )
        if not places:
            return source(f"no other group has a patch and {len(first)} samples")
        parent, distance = places[0]
        told = nearest.described(places)
        if distance > furthest:
            return source(f"no group is within {furthest:g}: {told}", distance)
        entry, theta = patches[parent]
        _copy(learner, parent, read)
        learner.start_from(theta)
        edges = [each.sample.edge for each in first]
        verdict = judge(
            learner.predict(theta, x), learner.predict(bundle.theta0, x), learner.teach(x), edges, gate
        )
    except (InputError, EngineError) as error:
        learner.restore(before)
        return source(f"its samples cannot be compared: {error}"[:1000])
    except CloudError:
        learner.restore(before)
        raise
    if not verdict.passed and verdict.reason != "few-samples":
        learner.restore(before)
        scores = f"{verdict.score:.4f} after {verdict.head:.4f}"
        return source(f"the gate refused {parent}'s: {verdict.reason}, {scores}; {told}", distance)
    origin = Origin(
        group=name, parent=parent, epoch=entry.entry.epoch, seq=entry.entry.seq, distance=distance,
        samples=len(first), reason=told, decided_ms=now_ms,
    )  # fmt: skip
    return Start(origin, theta)


def _patches(name: str, read: Read, identity: Identity, bundle: Bundle) -> dict[str, tuple[Patch, Vector]]:
    """What each other group has, and its theta [P]."""
    found = {}
    for group in read(ledger.groups):
        if group == name:
            continue
        try:
            patch = read(partial(ledger.newest, group=group))
            if patch is not None:
                found[group] = patch, np.array(theta_of(patch, identity, bundle))
        except TtaError as error:
            log.warning("group %s is not compared with group %s: %s", name, group, error)
    return found


def _samples(group: str, count: int, learner: Learner, read: Read) -> NDArray[Any] | None:
    """[count, ...], the newest samples of a group, in turn by edge; None where there are not so many."""
    rows = read(lambda db: samples.newest(db, group, NEWEST))
    numbers = [rows[place][0] for place in jury([edge for _, edge in rows], count)]
    found = read(lambda db: samples.numbered(db, numbers)).samples
    return stacked(found, learner.form) if len(found) == count else None


def _copy(learner: Learner, parent: str, read: Read) -> None:
    """Let a learner be what another group's was when it was saved last."""
    kept = read(lambda db: learners.load(db, parent))
    if kept is None:
        return
    try:
        learner.restore(kept.snapshot)
    except SnapshotUnreadable as error:
        log.warning("the learner of group %s cannot be copied, its patch is: %s", parent, error)
