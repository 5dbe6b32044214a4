"""What the results of a suite say: losses, collapses, and the figures that a safe method is judged by. Numbers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tta_edge.comparison import Difference, paired_difference
from tta_edge.streams.measures import Recovery, recovery_samples
from tta_edge.suite.given import FAMILY as MALICIOUS
from tta_edge.suite.order import PLAIN
from tta_edge.suite.play import LAST
from tta_edge.suite.players import GUARDED
from tta_edge.suite.result import Result
from tta_edge.suite.run import Board

RUINED = 0.005
"""A method ruins a stream on which it loses more than so much accuracy against the frozen source."""
CLEARLY_WORSE = 0.05
"""A collapse is at least so much worse than the frozen source in the last quarter, ..."""
CHANCE_LIKE = 0.95
"""... and wrong so nearly as often as a guess, as a share of 1 - 1/C, ..."""
POOR = 0.5
"""... or its predictions are less than so diverse as the true classes."""
LEAST_GAIN = 0.02
"""A share of what batch statistics recover is only told where they recover at least so much."""
RECOVERY = Recovery(window=256, tolerance=0.03)
ONLINE, LONG = "online", "long"
SERIES = "continual"
CORRELATED = ("sorted", "dirichlet", "batch-1")
AUTO, NORM, EVERY_BATCH = "auto", "norm", "tent"


@dataclass(frozen=True)
class Cell:
    """One player on one stream.

    Attributes:
        result: of it.
        difference: of its error to that of the frozen source, paired; None for the source itself.
        collapsed: see `collapsed`.
    """

    result: Result
    difference: Difference | None
    collapsed: bool

    @property
    def ruined(self) -> bool:
        """Whether the player lost more than `RUINED` against the frozen source."""
        return self.difference is not None and self.difference.value > RUINED

    def to_json(self) -> dict[str, Any]:
        """The machine-readable form."""
        return {
            "error": self.result.error,
            "difference": None if self.difference is None else self.difference.value,
            "standard_error": None if self.difference is None else self.difference.standard_error,
            "ruined": self.ruined,
            "collapsed": self.collapsed,
            "forwards_per_sample": self.result.forwards_per_sample,
            "adapted": self.result.adapted,
            "refused": self.result.refused,
            "diversity": self.result.diversity,
            "true_diversity": self.result.true_diversity,
            "seconds": self.result.seconds,
        }


@dataclass(frozen=True)
class Share:
    """What a player recovers on a hard stream, of what batch statistics recover on the shuffled one.

    Attributes:
        stream: the hard one.
        gain: accuracy gained there against the frozen source.
        reference: accuracy that batch statistics gain on the shuffled stream of the same shift.
    """

    stream: str
    gain: float
    reference: float

    @property
    def share(self) -> float:
        """Gain / reference."""
        return self.gain / self.reference


@dataclass(frozen=True)
class Return:
    """How soon a player is settled again after a shift of the long stream.

    Attributes:
        shift: that began.
        samples: see `measures.recovery_samples`; None where it never settles.
        reference: the same of the method that steps on every batch; None likewise, or if it did not play.
    """

    shift: str
    samples: int | None
    reference: int | None


@dataclass(frozen=True)
class Verdict:
    """One player on all streams of one bundle, malicious ones apart.

    Attributes:
        player: name.
        streams: how many honest streams it played.
        worst: the honest stream with the largest difference; None if it played none.
        ruined: honest streams on which it lost more than `RUINED`.
        collapsed: streams on which it collapsed, malicious ones included.
        online: mean error over the online streams; None if it played none.
        continual: error on the continual stream; None likewise.
        best: the fixed method with the lowest mean of both; None where no fixed method played them.
        gap_online: error minus that of the best on the online streams.
        gap_continual: the same on the continual stream.
        shares: of what batch statistics recover.
        malicious: name of each malicious stream -> difference on honest samples.
        forwards: forward-equivalents of a sample over all streams; None where unknown.
        forwards_long: the same over the long stream.
        returns: after each shift of the long stream.
    """

    player: str
    streams: int
    worst: tuple[str, Difference] | None
    ruined: tuple[str, ...]
    collapsed: tuple[str, ...]
    online: float | None
    continual: float | None
    best: str | None
    gap_online: float | None
    gap_continual: float | None
    shares: tuple[Share, ...]
    malicious: Mapping[str, Difference]
    forwards: float | None
    forwards_long: float | None
    returns: tuple[Return, ...]

    def to_json(self) -> dict[str, Any]:
        """The machine-readable form."""
        return {
            "player": self.player,
            "streams": self.streams,
            "worst": None if self.worst is None else {"stream": self.worst[0], **_difference(self.worst[1])},
            "ruined": list(self.ruined),
            "collapsed": list(self.collapsed),
            "online_error": self.online,
            "continual_error": self.continual,
            "best_fixed": self.best,
            "gap_online": self.gap_online,
            "gap_continual": self.gap_continual,
            "recovered": [
                {
                    "stream": each.stream,
                    "gain": each.gain,
                    "norm_shuffled": each.reference,
                    "share": each.share,
                }
                for each in self.shares
            ],
            "malicious": [{"stream": name, **_difference(each)} for name, each in self.malicious.items()],
            "forwards_per_sample": self.forwards,
            "forwards_per_sample_long": self.forwards_long,
            "recovery": [
                {"shift": each.shift, "samples": each.samples, "every_batch": each.reference}
                for each in self.returns
            ],
        }


@dataclass(frozen=True)
class Summary:
    """A board, judged.

    Attributes:
        board: the results.
        cells: stream -> player -> cell.
        verdicts: of the players, in order, without the frozen source.
    """

    board: Board
    cells: Mapping[str, Mapping[str, Cell]]
    verdicts: tuple[Verdict, ...]

    def verdict(self, player: str) -> Verdict | None:
        """Of that player; None if it is the source or did not play."""
        return next((each for each in self.verdicts if each.player == player), None)

    def to_json(self) -> dict[str, Any]:
        """The machine-readable form: everything but the single predictions."""
        board = self.board
        streams = []
        for name, cells in self.cells.items():
            result = cells[board.frozen].result
            streams.append(
                {
                    "name": name,
                    "family": family(name),
                    "samples": result.samples,
                    "counted": result.counted,
                    "batches": result.batches,
                    "phases": [{"name": phase.name, "start": phase.start} for phase in result.phases],
                    "players": {player: cell.to_json() for player, cell in cells.items()},
                }
            )
        return {
            "model": board.model,
            "bundle": board.bundle,
            "source": board.source,
            "frozen": board.frozen,
            "players": list(board.players),
            "streams": streams,
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
        }


def summarise(board: Board) -> Summary:
    """Every player against the frozen source on every stream."""
    cells = {
        name: {player: _cell(result, results[board.frozen], board) for player, result in results.items()}
        for name, results in board.streams.items()
    }
    best = best_fixed(cells, board)
    players = [player for player in board.players if player != board.frozen]
    return Summary(board, cells, tuple(_verdict(player, best, cells, board) for player in players))


def family(stream: str) -> str:
    """The part of a stream's name before the stroke."""
    return stream.partition("/")[0]


def collapsed(result: Result, source: Result, classes: int) -> bool:
    """Whether a player has collapsed at the end of a stream.

    In the last quarter of the counted samples it is at least `CLEARLY_WORSE` worse than the frozen source, and either
    wrong about as often as a guess (`CHANCE_LIKE`), or its predictions are less than `POOR` as diverse as the truth.
    """
    error, before = (_last_error(each) for each in (result, source))
    guess = error >= CHANCE_LIKE * (1 - 1 / classes)
    poor = result.diversity < POOR * result.true_diversity
    return error - before >= CLEARLY_WORSE and (guess or poor)


def best_fixed(cells: Mapping[str, Mapping[str, Cell]], board: Board) -> str | None:
    """The fixed method with the lowest error over the online streams and the continual one, half of each.

    It is chosen once for a bundle. `auto`, guarded methods and the frozen source are no candidates.
    """
    errors = {}
    for player in board.players:
        if player in (board.frozen, AUTO) or player.endswith(GUARDED):
            continue
        parts = [value for value in (_online(cells, player), _continual(cells, player)) if value is not None]
        if parts:
            errors[player] = sum(parts) / len(parts)
    return min(errors, key=errors.__getitem__) if errors else None


def _cell(result: Result, source: Result, board: Board) -> Cell:
    if result.key.player == board.frozen:
        return Cell(result, None, False)
    difference = paired_difference([result.wrong_flags], [source.wrong_flags])
    return Cell(result, difference, collapsed(result, source, board.classes))


def _last_error(result: Result) -> float:
    wrong = result.wrong_flags
    return float(wrong[-max(1, len(wrong) // LAST) :].mean())


def _verdict(player: str, best: str | None, cells: Mapping[str, Mapping[str, Cell]], board: Board) -> Verdict:
    own = {name: each[player] for name, each in cells.items() if player in each}
    honest = {name: cell for name, cell in own.items() if family(name) != MALICIOUS}
    differences = {name: cell.difference for name, cell in own.items() if cell.difference is not None}
    ranked = sorted(
        ((name, differences[name]) for name in honest if name in differences), key=lambda item: -item[1].value
    )
    online, continual = _online(cells, player), _continual(cells, player)
    return Verdict(
        player,
        len(honest),
        ranked[0] if ranked else None,
        tuple(name for name, cell in honest.items() if cell.ruined),
        tuple(name for name, cell in own.items() if cell.collapsed),
        online,
        continual,
        best,
        _minus(online, None if best is None else _online(cells, best)),
        _minus(continual, None if best is None else _continual(cells, best)),
        _shares(cells, player),
        {name: difference for name, difference in differences.items() if family(name) == MALICIOUS},
        _cost([cell.result for cell in own.values()]),
        _cost([own[LONG].result] if LONG in own else []),
        _returns(cells, player),
    )


def _online(cells: Mapping[str, Mapping[str, Cell]], player: str) -> float | None:
    errors = [
        each[player].result.error for name, each in cells.items() if family(name) == ONLINE and player in each
    ]
    return sum(errors) / len(errors) if errors else None


def _continual(cells: Mapping[str, Mapping[str, Cell]], player: str) -> float | None:
    return cells[SERIES][player].result.error if player in cells.get(SERIES, {}) else None


def _shares(cells: Mapping[str, Mapping[str, Cell]], player: str) -> tuple[Share, ...]:
    """For each label-correlated or single-sample stream whose shift also has a shuffled one."""
    shares = []
    for name, each in cells.items():
        shift = name.partition("/")[2]
        shuffled = cells.get(f"{ONLINE}/{shift}", {}).get(NORM)
        if family(name) not in CORRELATED or shift == PLAIN or player not in each or shuffled is None:
            continue
        mine, norms = each[player].difference, shuffled.difference
        if mine is not None and norms is not None and -norms.value >= LEAST_GAIN:
            shares.append(Share(name, -mine.value, -norms.value))
    return tuple(shares)


def _returns(cells: Mapping[str, Mapping[str, Cell]], player: str) -> tuple[Return, ...]:
    long = cells.get(LONG, {})
    if player not in long:
        return ()
    mine = _recoveries(long[player].result)
    reference = _recoveries(long[EVERY_BATCH].result) if EVERY_BATCH in long else [None] * len(mine)
    names = [phase.name for phase in long[player].result.phases[1:]]
    return tuple(Return(*each) for each in zip(names, mine, reference, strict=True))


def _recoveries(result: Result) -> list[int | None]:
    """Of every phase but the first."""
    starts = [phase.start for phase in result.phases[1:]]
    return [recovery_samples(part, RECOVERY) for part in np.split(result.wrong_flags, starts)[1:]]


def _cost(results: Sequence[Result]) -> float | None:
    """Forward-equivalents of a sample over several streams."""
    forwards = [result.forwards for result in results]
    samples = sum(result.samples for result in results)
    if not samples or any(each is None for each in forwards):
        return None
    return sum(each for each in forwards if each is not None) / samples


def _minus(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _difference(difference: Difference) -> dict[str, float | None]:
    return {"difference": difference.value, "standard_error": difference.standard_error}
