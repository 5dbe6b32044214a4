"""Play a suite: what is missing in the store, in worker processes, and everything there is as the outcome."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tta_edge.evaluate import is_frozen
from tta_edge.suite.catalogue import StreamSpec
from tta_edge.suite.errors import SuiteOption
from tta_edge.suite.players import can_play
from tta_edge.suite.result import Result
from tta_edge.suite.stage import Seat, Setup, Stage
from tta_edge.suite.store import Store
from tta_edge.suite.workers import Tell, in_order, in_parallel
from tta_runtime.errors import UnknownMethod, did_you_mean

Progress = Callable[[str, int, int], None]
"""Told what is done, how many samples of how many."""


@dataclass(frozen=True)
class Shifting:
    """A task: make the shifted images of one domain."""

    seat: int
    domain: str


@dataclass(frozen=True)
class Playing:
    """A task: one player on one stream."""

    seat: int
    stream: str
    player: str


@dataclass(frozen=True)
class Board:
    """The outcome for one bundle.

    Attributes:
        model: id.
        bundle: digest.
        source: text of its images.
        classes: of the model.
        frozen: the player that is the source left alone.
        players: names, in order.
        streams: name -> player -> result, in the suite's order; a stream that a player does not play lacks it.
    """

    model: str
    bundle: str
    source: str
    classes: int
    frozen: str
    players: tuple[str, ...]
    streams: dict[str, dict[str, Result]]


@dataclass(frozen=True)
class Plan:
    """What is to be played.

    Attributes:
        seats: the bundles.
        setup: what they have in common.
        methods: names of players; None: those of the suite that a bundle has.
        again: players whose stored results do not count.
    """

    seats: Sequence[Seat]
    setup: Setup
    methods: Sequence[str] | None = None
    again: Sequence[str] = ()


class _Actor:
    """Does both kinds of tasks; opens a bundle when the first task of it comes."""

    def __init__(self, seats: Sequence[Seat], setup: Setup) -> None:
        self._seats = seats
        self._setup = setup
        self._stages: dict[int, Stage] = {}

    def do(self, task: Shifting | Playing, progress: Tell) -> Result | None:
        """Make images, or play.

        Raises:
            TtaError: see `Gallery.make` and `Stage.play`.
        """
        if task.seat not in self._stages:
            self._stages[task.seat] = Stage(self._seats[task.seat], self._setup)
        stage = self._stages[task.seat]
        if isinstance(task, Playing):
            return stage.play(task.stream, task.player, progress)
        stage.gallery.make(task.domain)
        progress(len(stage.gallery.plain.labels))
        return None


def run(
    plan: Plan, store: Store, *, jobs: int | None = None, progress: Progress | None = None
) -> tuple[Board, ...]:
    """Play what the store lacks and gather all of it.

    Args:
        plan: what is to be played.
        store: of results; those that it has are not played again.
        jobs: worker processes; None: one for each core this process may use; 1: none, all happens here.
        progress: told of both parts, making images and playing.

    Returns:
        A board for each bundle.

    Raises:
        TtaError: a bundle, its data, a stored result or an option is refused, or a player fails. Results that were
            complete by then are in the store.
    """
    tell = progress or _silent
    jobs = cores() if jobs is None else jobs
    with ExitStack() as stack:
        setup = plan.setup
        if not setup.images:
            setup = replace(setup, images=stack.enter_context(tempfile.TemporaryDirectory()))
        stages = [Stage(seat, setup) for seat in plan.seats]
        _check_models(stages)
        _check_methods((*(plan.methods or ()), *plan.again), stages)
        tables = [players_of(stage, plan.methods, setup) for stage in stages]
        playing = _to_play(stages, tables, store, plan.again)
        make = partial(_Actor, tuple(plan.seats), setup)
        needed = {task.seat for task in playing}
        shifting = list(
            {
                stages[k].gallery.path(domain): Shifting(k, domain)
                for k in sorted(needed)
                for domain in stages[k].gallery.missing(
                    [
                        name
                        for task in playing
                        if task.seat == k
                        for name in stages[k].spec(task.stream).domains
                    ]
                )
            }.values()
        )
        shifted = sum(len(stages[task.seat].gallery.plain.labels) for task in shifting)
        _do(make, shifting, _ignore, _counter(tell, "images", shifted), jobs)
        lengths = {
            task: stages[task.seat].order(stages[task.seat].spec(task.stream)).samples for task in playing
        }
        # Long streams first: at the end no worker is left alone with one.
        ordered = sorted(playing, key=lambda task: -lengths[task])
        _do(make, ordered, store.put, _counter(tell, "streams", sum(lengths.values())), jobs)
        return tuple(_board(stage, table, store) for stage, table in zip(stages, tables, strict=True))


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def players_of(
    stage: Stage, methods: Sequence[str] | None, setup: Setup
) -> dict[StreamSpec, tuple[str, ...]]:
    """Who plays which stream of a bundle; the frozen source always does.

    Args:
        stage: of the bundle.
        methods: as the user named them; None: the suite's.
        setup: of the suite.

    Raises:
        SuiteOption: the bundle has no frozen source.
    """
    manifest = stage.bundle.manifest
    frozen = frozen_of(stage)
    table = {}
    for spec in stage.specs:
        wanted = methods if methods is not None else (spec.players or setup.scale.methods)
        table[spec] = tuple(dict.fromkeys((frozen, *(name for name in wanted if can_play(name, manifest)))))
    return table


def frozen_of(stage: Stage) -> str:
    """The method of a bundle that is the source model left alone.

    Raises:
        SuiteOption: it has none.
    """
    methods = stage.bundle.manifest.methods
    found = next((name for name, spec in methods.items() if is_frozen(spec)), None)
    if found is None:
        raise SuiteOption(
            f"the bundle of {stage.model} has no frozen source to compare with",
            "Build it with the method source",
        )
    return found


def _check_models(stages: Sequence[Stage]) -> None:
    names = [stage.model for stage in stages]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SuiteOption(f"two bundles are called {twice}", "Build one of them with another --id")


def _check_methods(names: Sequence[str], stages: Sequence[Stage]) -> None:
    """Refuse a name that no bundle has a player for; one that some bundles lack is left out there."""
    manifests = [stage.bundle.manifest for stage in stages]
    known = dict.fromkeys(
        name for manifest in manifests for name in manifest.methods if can_play(name, manifest)
    )
    for name in names:
        if not any(can_play(name, manifest) for manifest in manifests):
            raise UnknownMethod(
                f"no bundle has a method `{name}` that adapts by itself" + did_you_mean(name, known),
                "Name methods that one of them has",
            )


def _to_play(
    stages: Sequence[Stage],
    tables: Sequence[dict[StreamSpec, tuple[str, ...]]],
    store: Store,
    again: Sequence[str],
) -> list[Playing]:
    return [
        Playing(k, spec.name, player)
        for k, (stage, table) in enumerate(zip(stages, tables, strict=True))
        for spec, players in table.items()
        for player in players
        if player in again or store.find(stage.key(spec, player)) is None
    ]


def _do(
    make: Callable[[], _Actor], tasks: Sequence[Any], done: Callable[[Any], None], progress: Tell, jobs: int
) -> None:
    if jobs == 1:
        in_order(make, tasks, done, progress)
    else:
        in_parallel(make, tasks, done, progress, jobs=jobs)


def _board(stage: Stage, table: dict[StreamSpec, tuple[str, ...]], store: Store) -> Board:
    streams: dict[str, dict[str, Result]] = {}
    for spec, players in table.items():
        found = {player: store.find(stage.key(spec, player)) for player in players}
        streams[spec.name] = {player: result for player, result in found.items() if result is not None}
    everybody = dict.fromkeys(player for players in table.values() for player in players)
    return Board(
        stage.model,
        stage.bundle.digest,
        stage.seat.source,
        stage.bundle.manifest.classes,
        frozen_of(stage),
        tuple(everybody),
        streams,
    )


def _counter(tell: Progress, what: str, total: int) -> Tell:
    """Adds up the samples of one part."""
    so_far = 0

    def count(samples: int) -> None:
        nonlocal so_far
        so_far += samples
        tell(what, so_far, total)

    return count


def _ignore(_: object) -> None:
    """Images are on disk; nothing else comes of making them."""


def _silent(_: str, __: int, ___: int) -> None:
    """Nobody watches."""


__all__ = ["Board", "Plan", "Progress", "Seat", "Setup", "Store", "cores", "run"]
