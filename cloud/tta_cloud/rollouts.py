"""Which patch each edge may have, and the heads that say so: rollouts of all groups, beside the ledger.

How a rollout goes on is `rollout.py`'s; here it meets the edges that are there, what they were told before, and what
must not go back. For the network thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np

from tta_cloud import ledger
from tta_cloud.config import Config
from tta_cloud.errors import CloudError, DamagedRecord
from tta_cloud.identity import Identity
from tta_cloud.intake import Intake
from tta_cloud.members import Members
from tta_cloud.promises import Promises
from tta_cloud.publishing import sealed_of, theta_of
from tta_cloud.records import Edge, Entry, Patch
from tta_cloud.rollout import Rollout, Stage, begin, progress, tick
from tta_cloud.stats import Stats
from tta_cloud.store import Store
from tta_runtime import sealed as seals
from tta_runtime.bundle import Bundle
from tta_runtime.errors import TtaError
from tta_runtime.link import HeadMessage, Hello
from tta_runtime.patch import HEAD_LIFE_S, body_sha256, make_head
from tta_runtime.wire import declare

log = logging.getLogger(__name__)

NO_VERDICT = ("newer", "stale", "disk-error")
"""Reasons of a refusal that say nothing about the patch."""

Push = Callable[[Iterable[str], HeadMessage, Mapping[str, np.ndarray]], None]
"""Sends a message to those of some edges that are there."""


class Rollouts:
    """What each group has, is given, and was told.

    Args:
        config: of the service.
        identity: signs heads.
        bundle: of the edges.
        store: with the ledger.
        promises: numbers and dates that edges know of.
        members: the edges.
        intake: filters with what a group is given to serve.
        stats: of the service.
        online: keys of the edges that are there, by group.
        push: sends heads.
        clock_s: seconds since 1970.
    """

    def __init__(
        self,
        config: Config,
        identity: Identity,
        bundle: Bundle,
        store: Store,
        promises: Promises,
        members: Members,
        intake: Intake,
        stats: Stats,
        *,
        online: Callable[[], dict[str, list[str]]],
        push: Push,
        clock_s: Callable[[], float],
    ) -> None:
        self._config = config
        self._identity = identity
        self._bundle = bundle
        self._store = store
        self._promises = promises
        self._members = members
        self._intake = intake
        self._stats = stats
        self._online = online
        self._push = push
        self._clock_s = clock_s
        self._rollouts: dict[str, Rollout] = {}
        self._newest: dict[str, Patch] = {}
        self._served: dict[str, Patch] = {}
        self._told_of: dict[str, Patch] = {}
        self._lost: dict[str, tuple[int, str]] = {}
        self._behind = False

    @property
    def stages(self) -> dict[str, str]:
        """How far each group's rollout is."""
        return {group: rollout.stage.value for group, rollout in self._rollouts.items()}

    # ------------------------------------------------------------------------------------------ start

    def recall(self, group: str) -> None:
        """What a group had when the last service ended."""
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

    def resume(self) -> None:
        """Take up the rollouts that the end of the last service has broken off."""
        for group in sorted(self._members.groups()):
            try:
                patch = self._store.read(lambda db, group=group: ledger.last(db, group))  # type: ignore[misc]
            except CloudError as error:
                log.warning("group %s: a rollout is not taken up: %s", group, error)
                continue
            if patch is None or patch.entry.epoch != self._identity.root.epoch:
                continue
            known = self._members.active(group)
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

    # ------------------------------------------------------------------------------------------ what happens

    def begin(self, group: str, patch: Patch) -> None:
        """A patch was learned, and is durable."""
        if self._was_taken_back(patch.entry):
            return  # before anybody was told
        online = self._online().get(group, ())
        self._promises.give(group, *_named(patch))
        known = len(self._members.active(group))
        rollout = begin(patch.entry.seq, online, time.monotonic(), self._config.rollout, known=known)
        before = self._rollouts.get(group)
        self._newest_before(group, before)
        self._newest[group] = patch
        self._filter_with(group, patch)
        log.info("group %s: patch %d, %s", group, patch.entry.seq, rollout.stage.value)
        self._advance(group, rollout)

    def hold(self, patch: Patch) -> None:
        """The whole group has this patch, by an operator's word: nobody is asked first, and no report stops it."""
        group = patch.entry.group
        self._stats.moved(group, patch.entry.state)
        self._rollouts.pop(group, None)
        self._newest[group] = self._served[group] = patch
        self._filter_with(group, patch)
        self.push_head(group)

    def follow(self, edge: Edge, epoch: int, seq: int, state: str, reason: str) -> None:
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

    def compare(self, edge: Edge, hello: Hello) -> None:
        """An edge that comes back may have committed what it could not report, or know more than the ledger."""
        self.follow(edge, hello.epoch, hello.seq, "committed", "")
        if hello.epoch == self._identity.root.epoch and hello.seq > self._promises.number(edge.group):
            log.warning(
                "edge %s serves patch %d.%d, group %s has come to %d: the store is an older copy. It gets no patch "
                "until then; `tta-cloud keys rotate` lets numbers begin anew",
                self._members.name(edge.key), hello.epoch, hello.seq, edge.group, self._promises.number(edge.group),
            )  # fmt: skip

    def tick(self, online: Mapping[str, list[str]], now_s: float) -> None:
        """Time has passed."""
        for group, rollout in list(self._rollouts.items()):
            after = tick(rollout, online.get(group, ()), now_s, self._config.rollout)
            if after is not rollout:
                self._advance(group, after)

    def newer_for(self, edge: Edge) -> Patch | None:
        """The patch that an edge may have now and has not got."""
        patch = self._for(edge)
        return None if patch is None or _order(patch) <= (edge.epoch, edge.seq) else patch

    # ------------------------------------------------------------------------------------------ heads

    def push_head(self, group: str, *, only: str = "") -> None:
        """Tell edges what is the newest patch for them; canaries may have a newer one than the others.

        Args:
            group: of the edges.
            only: key of one of them; "" for all that are there.
        """
        by_patch: dict[tuple[int, str], list[str]] = {}
        for user in [only] if only else self._online().get(group, []):
            edge = self._members.find(user)
            if edge is not None:
                by_patch.setdefault(self._newest_for(edge), []).append(user)
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
            sealed = np.frombuffer(seals.encode(head), dtype=np.uint8)
            self._stats.told(len(users))
            self._push(users, HeadMessage(sealed=declare(sealed)), {"sealed": sealed})

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

    # ------------------------------------------------------------------------------------------ inside

    def _for(self, edge: Edge) -> Patch | None:
        """The patch that an edge may have now."""
        rollout = self._rollouts.get(edge.group)
        if rollout is not None and rollout.may_have(edge.key):
            return self._newest[edge.group]
        return self._served.get(edge.group)

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
            self._intake.teach(group, theta_of(patch, self._identity, self._bundle))
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
            name = self._members.name
            why = "; ".join(f"{name(edge)}: {reason}" for edge, reason in rollout.bad.items())[:200]
            # Why a group's first patch is what it is stands in the ledger from the beginning, and stays.
            self._store.leave(ledger.move(group, entry.epoch, entry.seq, state, why or entry.reason))  # type: ignore[arg-type]
            if rollout.stage is Stage.STOPPED:
                log.warning("group %s: patch %d is stopped: %s", group, entry.seq, why)
            self.push_head(group)


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
