"""A suite on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tta_edge.comparison import Difference
from tta_edge.suite.summary import RUINED, Cell, Summary, Verdict


def tables(summaries: Sequence[Summary]) -> RenderableType:
    """For each bundle its streams and what they say of each player."""
    parts: list[RenderableType] = []
    for summary in summaries:
        parts += [_streams(summary), _verdicts(summary)]
    return Group(*parts, Text(_NOTE, style="dim"))


def _streams(summary: Summary) -> Table:
    table = Table(
        title=f"{summary.board.model}: error in % and its difference to the frozen source in points"
    )
    table.add_column("stream", no_wrap=True)
    for player in summary.board.players:
        table.add_column(player, justify="right", no_wrap=True)
    for name, cells in summary.cells.items():
        table.add_row(name, *(_cell(cells.get(player)) for player in summary.board.players))
    return table


def _verdicts(summary: Summary) -> Table:
    table = Table(title=f"{summary.board.model}: the players")
    for name in (
        "player", "streams ruined", "collapsed", "worst loss", "online", "continual", "malicious",
        "cost", "cost, long",
    ):  # fmt: skip
        table.add_column(name, justify="left" if name == "player" else "right")
    for verdict in summary.verdicts:
        table.add_row(*_verdict(verdict))
    return table


def _cell(cell: Cell | None) -> Text:
    if cell is None:
        return Text("-", style="dim")
    text = Text(f"{100 * cell.result.error:.1f}")
    if cell.difference is not None:
        style = "red" if cell.ruined else "green" if cell.difference.value < -RUINED else "dim"
        text.append(f" {points(cell.difference)}", style=style)
    if cell.collapsed:
        text.append(" C", style="bold red")
    return text


def _verdict(verdict: Verdict) -> list[str]:
    worst = "-" if verdict.worst is None else f"{points(verdict.worst[1])} {verdict.worst[0]}"
    malicious = [difference for _, difference in sorted(verdict.malicious.items())]
    return [
        verdict.player,
        f"{len(verdict.ruined)} of {verdict.streams}",
        str(len(verdict.collapsed)),
        worst,
        _percent(verdict.online),
        _percent(verdict.continual),
        ", ".join(map(points, malicious)) or "-",
        _cost(verdict.forwards),
        _cost(verdict.forwards_long),
    ]


def points(difference: Difference) -> str:
    """In points, with one standard error."""
    text = f"{100 * difference.value:+.1f}"
    return text if difference.standard_error is None else f"{text}±{100 * difference.standard_error:.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _cost(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


_NOTE = (
    f"ruined: more than {100 * RUINED:g} points worse than the frozen source on an honest stream; cost: "
    "forward-equivalents of a sample (a backward pass counts as two); ±: one standard error, paired. "
    "C: collapsed. docs/suite.md says what each stream is."
)
