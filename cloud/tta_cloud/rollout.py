"""Who gets a patch when: canary edges first, then the group; and when a patch is stopped. Pure.

A rollout is a value; every event gives the next one. Nothing here sends anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum


class Stage(str, Enum):
    """Where a rollout stands."""

    CANARY = "canary"
    GROUP = "group"
    STOPPED = "stopped"


OPINIONS = 3
"""Edges that are asked where one says that a patch is bad: two of them decide."""
GOOD, BAD = "committed", ("refused", "rolled-back")
_ROUNDING = 1e-9
"""Shares are decimal fractions: 0.29 of 100 must be 29, not 28.999999999999996."""


@dataclass(frozen=True)
class RolloutOptions:
    """How careful a rollout is.

    Attributes:
        canary_share: share of the edges at hand that get a patch first; at least one. 1 does without canaries.
        min_edges: a group of fewer edges has no canaries.
        success_share: of the canaries that must have committed before the group gets it.
        error_share: of the edges that were offered it; when more have refused it or rolled it back it is stopped. The
            word of a single edge stops nothing where `OPINIONS` edges can be asked: edges can be broken, or lie.
        canary_timeout_s: canaries that say nothing for so long count as if they had not been asked: one that has
            committed is enough then, as long as no more than `error_share` are bad.
    """

    canary_share: float = 0.05
    min_edges: int = 2
    success_share: float = 1.0
    error_share: float = 0.02
    canary_timeout_s: float = 60.0


@dataclass(frozen=True)
class Rollout:
    """One patch on its way.

    Attributes:
        seq: of the patch.
        stage: see :class:`Stage`.
        canaries: edges that get it first.
        began_s: when the stage began.
        good: edges that committed it.
        bad: edges that refused it or rolled it back, with their reason.
    """

    seq: int
    stage: Stage
    canaries: frozenset[str]
    began_s: float
    good: frozenset[str] = frozenset()
    bad: dict[str, str] = field(default_factory=dict)

    def may_have(self, edge: str) -> bool:
        """Whether an edge gets this patch now."""
        return self.stage is Stage.GROUP or (self.stage is Stage.CANARY and edge in self.canaries)


def begin(
    seq: int,
    edges: Iterable[str],
    now_s: float,
    options: RolloutOptions,
    *,
    trusted: Iterable[str] = (),
    known: int = 0,
) -> Rollout:
    """A rollout of a new patch.

    Args:
        seq: of the patch.
        edges: at hand now.
        now_s: seconds.
        options: see :class:`RolloutOptions`.
        trusted: edges to begin with, where an operator has named some.
        known: edges of the group, those that are away included: they must not all get it at once when they are back.
    """
    present = sorted(set(edges))
    if max(len(present), known) < max(1, options.min_edges) or options.canary_share >= 1:
        return Rollout(seq, Stage.GROUP, frozenset(), now_s)
    if not present:
        return Rollout(seq, Stage.CANARY, frozenset(), now_s)
    count = _at_least(options.canary_share, len(present))
    first = set(trusted)
    turned = _turned(present, seq)
    chosen = [edge for edge in turned if edge in first] + [edge for edge in turned if edge not in first]
    return Rollout(seq, Stage.CANARY, frozenset(chosen[:count]), now_s)


def progress(
    rollout: Rollout,
    edge: str,
    state: str,
    reason: str,
    now_s: float,
    options: RolloutOptions,
    *,
    offered: int = 0,
    online: Iterable[str] = (),
) -> Rollout:
    """What an edge says of the patch.

    Args:
        rollout: as it is.
        edge: that speaks.
        state: `staged`, `committed`, `refused` or `rolled-back`.
        reason: of a refusal.
        now_s: seconds.
        options: see :class:`RolloutOptions`.
        offered: how many edges of the group have been offered the patch, once it has it; the canaries count anyway.
        online: edges at hand, some of which are asked for another opinion where a canary says that the patch is bad.
    """
    if rollout.stage is Stage.STOPPED or not rollout.may_have(edge):
        return rollout
    if state == GOOD:
        bad = {name: why for name, why in rollout.bad.items() if name != edge}
        rollout = replace(rollout, good=rollout.good | {edge}, bad=bad)
    elif state in BAD:
        rollout = replace(rollout, good=rollout.good - {edge}, bad={**rollout.bad, edge: reason or state})
    asked = len(rollout.canaries)
    if rollout.stage is Stage.GROUP:
        asked = max(asked, offered, len(rollout.good) + len(rollout.bad))
    if rollout.stage is Stage.CANARY and rollout.bad:
        rollout = _ask_others(rollout, online)
        asked = len(rollout.canaries)
    if _too_many(rollout, asked, options):
        return replace(rollout, stage=Stage.STOPPED)
    return _advance(rollout, now_s, options)


def tick(rollout: Rollout, online: Iterable[str], now_s: float, options: RolloutOptions) -> Rollout:
    """Time has passed: canaries that have gone, or say nothing, do not hold up the group for ever.

    Where no canary has committed by then another edge takes its turn; where there was none at hand the first one to
    come is asked at once.

    Args:
        rollout: as it is.
        online: edges at hand.
        now_s: seconds.
        options: see :class:`RolloutOptions`.
    """
    waits = now_s - rollout.began_s < options.canary_timeout_s
    if rollout.stage is not Stage.CANARY or (waits and rollout.canaries):
        return rollout
    if rollout.good:
        return replace(rollout, stage=Stage.GROUP, began_s=now_s)
    others = sorted(set(online) - rollout.canaries)
    if not others:
        return rollout if waits else replace(rollout, began_s=now_s)
    return replace(rollout, canaries=rollout.canaries | {_turned(others, rollout.seq)[0]}, began_s=now_s)


def _ask_others(rollout: Rollout, online: Iterable[str]) -> Rollout:
    """A canary says that the patch is bad: others are asked, unless so many have been already."""
    others = sorted(set(online) - rollout.canaries)
    missing = OPINIONS - len(rollout.canaries)
    if missing <= 0 or not others:
        return rollout
    return replace(rollout, canaries=rollout.canaries | set(_turned(others, rollout.seq)[:missing]))


def _too_many(rollout: Rollout, asked: int, options: RolloutOptions) -> bool:
    """Whether so many have refused it that it is stopped."""
    alone = 1 if asked >= OPINIONS else 0
    return len(rollout.bad) > max(alone, options.error_share * asked + _ROUNDING)


def _advance(rollout: Rollout, now_s: float, options: RolloutOptions) -> Rollout:
    # Who says that it is bad has been outvoted where two others have committed it.
    asked = len(rollout.canaries) - len(rollout.bad)
    wanted = max(_at_least(options.success_share, asked), min(OPINIONS - 1, 2 * len(rollout.bad)))
    if rollout.stage is Stage.CANARY and len(rollout.good & rollout.canaries) >= wanted:
        return replace(rollout, stage=Stage.GROUP, began_s=now_s)
    return rollout


def _turned(edges: list[str], seq: int) -> list[str]:
    """Another edge first each time: one that is always asked first would see every bad patch."""
    start = seq % len(edges)
    return edges[start:] + edges[:start]


def _at_least(share: float, count: int) -> int:
    """How many of so many a share is, rounded up; one at least."""
    return max(1, math.ceil(share * count - _ROUNDING))
