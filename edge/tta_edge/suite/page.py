"""A played suite as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from tta_edge import figure, html
from tta_edge.figure import Curve
from tta_edge.report import Facts
from tta_edge.suite.order import PLAIN
from tta_edge.suite.summary import (
    CHANCE_LIKE,
    CLEARLY_WORSE,
    LONG,
    ONLINE,
    POOR,
    RECOVERY,
    RUINED,
    Cell,
    Summary,
    Verdict,
    family,
)

MAX_WINDOW = 200
"""Samples of the rolling error; short streams get a tenth of their length."""


def render(summaries: Sequence[Summary], facts: Facts, *, suite: str, seed: int) -> str:
    """The page.

    Args:
        summaries: of the bundles.
        facts: what the page says beside them.
        suite: its name.
        seed: of the run.

    Raises:
        PlotsExtraMissing: matplotlib is not installed.
    """
    title = f"Suite {suite}: {', '.join(summary.board.model for summary in summaries)}"
    sections = [_head(summaries, facts, title, seed)]
    for number, summary in enumerate(summaries):
        parts = (
            ("what the streams say", _lines(summary), _verdicts(summary)),
            ("error on each stream", _legend(), _errors(summary)),
            ("label-correlated and single samples", _shares(summary)),
            ("after each shift of the long stream", _returns(summary)),
            ("along the streams", *_curves(summary, f"model-{number}")),
        )
        sections += [
            html.section(f"{summary.board.model}: {heading}", *content, name=f"model-{number}-part-{k}")
            for k, (heading, *content) in enumerate(parts)
        ]
    return html.document(title, [*sections, _words()])


def _head(summaries: Sequence[Summary], facts: Facts, title: str, seed: int) -> str:
    entries = {
        **{f"Bundle {each.board.model}": f"{each.board.bundle} on {each.board.source}" for each in summaries},
        "Seed": str(seed),
        **facts.host,
        "tta-runtime": facts.version,
        "Date": facts.made.strftime("%Y-%m-%d %H:%M %Z").strip(),
    }
    listed = "".join(
        f"<div{' class=wide' if name.startswith('Bundle') else ''}>"
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in entries.items()
    )
    return (
        f"<header>\n<h1>{escape(title)}</h1>\n<dl>{listed}</dl>\n"
        f"<p>The same again:</p>\n<pre><code>{escape(facts.command)}</code></pre>\n</header>"
    )


def _lines(summary: Summary) -> str:
    items = "".join(f"<li>{escape(_sentence(each))}</li>" for each in summary.verdicts)
    return f'<ul class="verdict">{items}</ul>'


def _sentence(verdict: Verdict) -> str:
    text = f"{verdict.player} ruins {len(verdict.ruined)} of {html.count(verdict.streams, 'honest stream')}"
    text += f" and collapses on {len(verdict.collapsed)}"
    if verdict.worst is not None:
        text += f"; at worst {html.points(verdict.worst[1])} points against the source, on {verdict.worst[0]}"
    return text + "."


def _verdicts(summary: Summary) -> str:
    heads = [
        "player", "streams ruined", "collapsed", "online, %", "continual, %", "to the best fixed, points",
        "malicious, points", "cost", "cost, long",
    ]  # fmt: skip
    rows = []
    for each in summary.verdicts:
        gaps = [gap for gap in (each.gap_online, each.gap_continual) if gap is not None]
        rows.append(
            [
                escape(each.player) + (" <small>best fixed</small>" if each.player == each.best else ""),
                f"{len(each.ruined)} of {each.streams}",
                str(len(each.collapsed)),
                html.number(each.online, html.percent(each.online)),
                html.number(each.continual, html.percent(each.continual)),
                " / ".join(html.number(gap, f"{100 * gap:+.1f}".replace("-", "−")) for gap in gaps) or "–",
                " / ".join(html.difference(value) for value in each.malicious.values()) or "–",
                html.number(each.forwards, html.fraction(each.forwards)),
                html.number(each.forwards_long, html.fraction(each.forwards_long)),
            ]
        )
    return html.table("The players over all streams", heads, rows)


def _legend() -> str:
    return (
        f'<p class="note">{html.BEST} lowest error on the stream; {html.WORSE} ruined. Below the error: its difference '
        "to the frozen source in points, ± one paired standard error.</p>"
    )


def _errors(summary: Summary) -> str:
    players = summary.board.players
    rows = [
        [escape(name), *(_cell(cells.get(player), cells) for player in players)]
        for name, cells in summary.cells.items()
    ]
    return html.table("Error in %", ["stream", *map(escape, players)], rows)


def _cell(cell: Cell | None, cells: Mapping[str, Cell]) -> str:
    if cell is None:
        return "–"
    marks, kind = "", []
    if len(cells) > 1 and cell.result.error == min(each.result.error for each in cells.values()):
        marks, kind = f"{html.BEST}<span class=unseen>lowest</span> ", ["best"]
    if cell.ruined:
        marks += f"{html.WORSE}<span class=unseen>ruined</span> "
        kind.append("worse")
    text = f"{marks}{html.number(cell.result.error, html.percent(cell.result.error))}"
    if cell.difference is not None:
        text += f"<small>{html.points(cell.difference)}{', collapsed' * cell.collapsed}</small>"
    return f'<div class="{" ".join(kind)}">{text}</div>' if kind else f"<div>{text}</div>"


def _shares(summary: Summary) -> str:
    names = list(dict.fromkeys(each.stream for verdict in summary.verdicts for each in verdict.shares))
    if not names:
        return "<p>Batch statistics did not play, or recovered nothing on the shuffled streams.</p>"
    rows = []
    for name in names:
        shares = [
            next((each for each in verdict.shares if each.stream == name), None)
            for verdict in summary.verdicts
        ]
        rows.append(
            [escape(name), *(html.number(s.share, html.fraction(s.share)) if s else "–" for s in shares)]
        )
    heads = ["stream", *(escape(verdict.player) for verdict in summary.verdicts)]
    return html.table("Share of what batch statistics recover on the shuffled stream", heads, rows)


def _returns(summary: Summary) -> str:
    rows = [
        [
            escape(verdict.player),
            *("–" if each.samples is None else str(each.samples) for each in verdict.returns),
        ]
        for verdict in summary.verdicts
        if verdict.returns
    ]
    if not rows:
        return "<p>The long stream was not played.</p>"
    shifts = next(verdict.returns for verdict in summary.verdicts if verdict.returns)
    heads = ["player", *(escape(each.shift) for each in shifts)]
    return html.table("Samples until settled", heads, rows)


def _curves(summary: Summary, prefix: str) -> list[str]:
    """Plots of all streams but the single corruptions, those of like length together."""
    shown = {
        name: cells
        for name, cells in summary.cells.items()
        if family(name) != ONLINE and len(cells) > 1 and cells[summary.board.frozen].result.counted
    }
    lengths = {name: cells[summary.board.frozen].result.counted for name, cells in shown.items()}
    groups: dict[tuple[tuple[str, ...], int], list[str]] = {}
    for name, cells in shown.items():
        # A plot has one set of players and one scale of samples: lengths between two powers of two.
        groups.setdefault((tuple(cells), lengths[name].bit_length()), []).append(name)
    return [
        _plot(summary, names, players, f"{prefix}-plot-{k}")
        for k, ((players, _), names) in enumerate(groups.items())
    ] or ["<p>Only single corruptions were played.</p>"]


def _plot(summary: Summary, names: Sequence[str], players: Sequence[str], slug: str) -> str:
    panels = [
        (name, [Curve(player, summary.cells[name][player].result.wrong_flags) for player in players])
        for name in names
    ]
    shortest = min(len(curve.wrong) for _, curves in panels for curve in curves)
    window = max(1, min(MAX_WINDOW, shortest // 10))
    caption = f"Error over the last {html.count(window, 'sample')} of {', '.join(names)}."
    plot = figure.rolling_errors(
        panels,
        window=window,
        frozen=summary.board.frozen,
        title=f"Rolling error of each player, {summary.board.model}",
        description=f"{caption} One curve for each of {', '.join(players)}.",
        name=slug,
    )
    return html.figure(plot, caption)


def _words() -> str:
    words = {
        "stream": f"What each is stands in docs/suite.md. “{PLAIN}” is the images as they are.",
        "honest": "Every stream that no attacker made. The error is counted on honest, real samples only.",
        "ruined": f"More than {100 * RUINED:g} points worse than the frozen source on the same samples.",
        "collapsed": f"In the last quarter at least {100 * CLEARLY_WORSE:g} points worse than the source, and either "
        f"wrong {CHANCE_LIKE:g} times as often as a guess or more, or with predictions less than {POOR:g} times as "
        "diverse as the truth.",
        "best fixed": f"The published method with the lowest mean of the {ONLINE} and the continual error; chosen "
        "once for a bundle.",
        "cost": "Forward-equivalents of a sample: a forward pass is 1, a backward pass 2.",
        f"{LONG} stream": f"Settled: the error over {RECOVERY.window} samples is within "
        f"{100 * RECOVERY.tolerance:g} points of its mean over the last third of the shift.",
    }
    listed = "".join(f"<dt>{name}</dt><dd>{meaning}</dd>" for name, meaning in words.items())
    return f'<footer>\n<h2 id="words">Words</h2>\n<dl>{listed}</dl>\n</footer>'
