"""How often the teacher says what an edge has said: the accuracy that can be told without labels.

An edge sends a sample and the number of the base that answered it, not its answer. So the student answers again with
that base, and the teacher as it stands after the round in which the sample was learned from. What an edge changes by
itself (running statistics, a stream's own learning) is not in it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tta_cloud.errors import DamagedRecord
from tta_cloud.learner import Learner
from tta_cloud.operations import Operation
from tta_cloud.records import Stored, seal, stacked
from tta_runtime.theta import Vector

RECENT = 256
"""Samples of an edge that count, the newest ones."""


@dataclass(frozen=True)
class Agreement:
    """What is known of one edge.

    Attributes:
        share: of the samples on which base and teacher name the same class.
        samples: that were compared, at most `RECENT`.
        updated_ms: when the last one was; milliseconds since 1970.
    """

    share: float
    samples: int
    updated_ms: int


def compare(
    learner: Learner, base: Callable[[int], Vector | None], rows: Sequence[Stored]
) -> dict[str, list[bool]]:
    """Whether the base that answered each sample names the teacher's class.

    Args:
        learner: whose teacher, and whose student's graphs.
        base: theta [P] of a number; None where it is not known any more, and its samples are left out.
        rows: samples, in the order of their arrival.

    Returns:
        By the edge's key, in the same order.

    Raises:
        InputError, EngineError: they cannot be answered.
    """
    places: dict[int, list[int]] = {}
    for place, each in enumerate(rows):
        places.setdefault(each.sample.seq, []).append(place)
    thetas = {seq: theta for seq in places if (theta := base(seq)) is not None}
    if not thetas:
        return {}
    x = stacked(rows, learner.form)
    wanted, same = learner.teach(x).argmax(axis=1), np.zeros(len(rows), dtype=bool)
    for seq, theta in thetas.items():
        at = places[seq]
        same[at] = learner.predict(theta, x[at]).argmax(axis=1) == wanted[at]
    found: dict[str, list[bool]] = {}
    for place, each in enumerate(rows):
        if each.sample.seq in thetas:
            found.setdefault(each.sample.edge, []).append(bool(same[place]))
    return found


def note(answers: Mapping[str, Sequence[bool]], now_ms: int) -> Operation[None]:
    """Keep what `compare` has found, beside what was kept; only the newest count."""
    each = {edge: "".join("01"[same] for same in found) for edge, found in answers.items()}

    def run(db: sqlite3.Connection) -> None:
        for edge, text in each.items():
            row = db.execute("SELECT edge, answers, updated_ms, seal FROM agreement WHERE edge = ?", (edge,))
            try:
                before = _decoded(row.fetchone())[1]
            except DamagedRecord:
                before = ""
            values = (edge, (before + text)[-RECENT:], now_ms)
            db.execute("INSERT OR REPLACE INTO agreement VALUES (?, ?, ?, ?)", (*values, seal(*values)))

    return Operation("agreement.note", run)


def known(db: sqlite3.Connection) -> dict[str, Agreement]:
    """What is known of each edge, by its key; damaged rows are left out."""
    found = {}
    for row in db.execute("SELECT edge, answers, updated_ms, seal FROM agreement").fetchall():
        try:
            edge, answers, updated_ms = _decoded(row)
        except DamagedRecord:
            continue
        if answers:
            found[edge] = Agreement(answers.count("1") / len(answers), len(answers), updated_ms)
    return found


def _decoded(row: Sequence[object] | None) -> tuple[str, str, int]:
    if row is None:
        return "", "", 0
    edge, answers, updated_ms, found = row
    if (
        not isinstance(answers, str)
        or not isinstance(updated_ms, int)
        or found != seal(edge, answers, updated_ms)
    ):
        raise DamagedRecord("a stored agreement does not carry the seal that it was stored with")
    return str(edge), answers, updated_ms
