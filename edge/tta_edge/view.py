"""What the terminal shows of a stream: a live view while it runs, tables when it is done."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tta_edge.client import Reply
from tta_edge.comparison import compare
from tta_edge.evaluate import NO_SHIFT, Evaluation
from tta_edge.live import Phase, Result, clean_loss
from tta_edge.streams.measures import Recovery, rolling_mean

BARS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 50
HISTORY = 4096
"""Samples that the live view looks back on, so that drawing costs the same however long the stream is."""
REFRESH_S = 0.125
"""Shortest time between two drawings."""


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """Values in 0..1 as one line of bars, the newest at the right; longer series are thinned out evenly."""
    if not values:
        return ""
    places = np.linspace(0, len(values) - 1, min(width, len(values))).round().astype(int)
    levels = np.clip(np.array(values, dtype=np.float64)[places], 0.0, 1.0) * (len(BARS) - 1)
    return "".join(BARS[round(float(level))] for level in levels)


class LiveView:
    """The live view; use as a context. Without a terminal it shows nothing.

    Args:
        console: where to draw.
        recovery: its window is that of the rolling figures.
        title: first line.
    """

    def __init__(self, console: Console, recovery: Recovery, title: str) -> None:
        self._recovery, self._title = recovery, title
        self._live = Live(Text(title), console=console, transient=True, auto_refresh=False)
        self._drawn_s = -REFRESH_S

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def update(self, phases: Sequence[Phase], reply: Reply) -> None:
        """Draw the newest state, unless the last drawing is too young.

        Args:
            phases: the parts so far; the last one is running.
            reply: the newest.
        """
        now_s = time.monotonic()
        if now_s - self._drawn_s >= REFRESH_S:
            self._drawn_s = now_s
            self._live.update(self.render(phases, reply), refresh=True)

    def render(self, phases: Sequence[Phase], reply: Reply) -> RenderableType:
        """The view as it would be drawn."""
        window = self._recovery.window
        now = phases[-1]
        table = Table.grid(padding=(0, 2))
        rows = [("agreement", rolling_mean(_recent([phase.agree for phase in phases]), window))]
        if now.wrong:
            rows = [
                ("adapted", 1.0 - rolling_mean(_recent([phase.wrong for phase in phases]), window)),
                (
                    "frozen source",
                    1.0 - rolling_mean(_recent([phase.source_wrong for phase in phases]), window),
                ),
                *rows,
            ]
        for name, values in rows:
            table.add_row(name, f"{values[-1]:6.1%}", sparkline(values.tolist()))
        facts = (
            f"entropy {reply.entropy.mean():.3f} nats (source {np.mean(now.source_entropy[-window:]):.3f})   "
            f"distance {reply.distance:.4f}   steps {reply.steps}   latency {reply.latency_ms:.1f} ms"
        )
        where = f"{now.shift or 'clean'}: {now.samples} samples, rolling over {window}"
        note = Text(f"guards: {dict(now.reasons)}", style="yellow") if now.reasons else Text("")
        return Group(Text(self._title, style="bold"), Text(where), table, Text(facts), note)


def _recent(parts: Sequence[Sequence[bool]]) -> NDArray[np.float64]:
    """The newest values of several lists, as one."""
    newest: list[bool] = []
    for part in reversed(parts):
        newest = [*part[max(0, len(part) - HISTORY + len(newest)) :], *newest]
        if len(newest) >= HISTORY:
            break
    return np.array(newest, dtype=np.float64)


def stream_table(clean: Result | None, shifted: Sequence[Result], recovery: Recovery) -> RenderableType:
    """The figures of a finished stream: with labels accuracies, without them agreement, entropy and drift."""
    labelled = any(result.source is not None for result in shifted)
    table = Table()
    table.add_column("shift")
    if labelled:
        for name in ("clean", "source", "adapted", "gap recovered", "recovery"):
            table.add_column(name, justify="right")
    else:
        for name in ("agreement", "entropy", "source entropy", "drift", "distance"):
            table.add_column(name, justify="right")
    for result in shifted:
        label = result.shift if result.severity is None else f"{result.shift}:{result.severity}"
        if labelled:
            table.add_row(
                label, percent(result.clean), percent(result.source), percent(result.adapted),
                fraction(result.gap_recovered), _samples(result.recovery_samples),
            )  # fmt: skip
        else:
            table.add_row(
                label, percent(result.agreement), f"{result.entropy:.3f}", f"{result.source_entropy:.3f}",
                f"{result.drift:.3f}", f"{result.distance:.4f}",
            )  # fmt: skip
    return Group(table, Text("\n".join(_footnotes(clean, shifted, recovery, labelled=labelled)), style="dim"))


def _footnotes(
    clean: Result | None, shifted: Sequence[Result], recovery: Recovery, *, labelled: bool
) -> list[str]:
    lines = []
    gaps = [result.gap_recovered for result in shifted if result.gap_recovered is not None]
    if len(gaps) > 1:
        lines.append(f"mean gap recovered {sum(gaps) / len(gaps):.2f}")
    loss = clean_loss(clean)
    if loss is not None:
        lines.append(f"accuracy lost by adapting on clean images {loss:+.2%} (negative: gained)")
    if labelled and gaps:
        lines.append(
            f"recovery: samples until the error over the last {recovery.window} samples is within "
            f"{recovery.tolerance:.0%} of its mean over the last third"
        )
    if not labelled:
        lines.append(
            "agreement: same class as the frozen source; drift: how far its mean prediction moved, 0..1"
        )
    for result in shifted:
        if result.reasons:
            lines.append(f"guards under {result.shift}: {result.reasons}")
    return lines


def evaluation_table(evaluation: Evaluation) -> RenderableType:
    """Error of each shift and method, and the mean over the shifts (the stream as it is does not count as one)."""
    plan = evaluation.plan
    methods = compare(evaluation)
    several = sum(shift is not None for shift in plan.shifts) > 1
    table = Table(show_footer=several)
    table.add_column("shift", footer="mean of the shifts" if None in plan.shifts else "mean")
    for method in methods:
        table.add_column(method.name, justify="right", footer=percent(method.error))
    for k, shift in enumerate(plan.shifts):
        label = NO_SHIFT if shift is None else str(shift)
        table.add_row(label, *(percent(method.cells[k].row.error) for method in methods))
    lines = [
        f"{evaluation.rows[0].samples} samples of {plan.source.name} for each shift, model {evaluation.model}"
    ]
    refused = sum(row.refused for row in evaluation.rows)
    if refused:
        lines.append(f"{refused} steps were thrown away: theta or state became NaN or Inf")
    title = f"error, {plan.setting}, batch {plan.batch}, seed {plan.seed}"
    return Group(Text(title), table, Text("\n".join(lines), style="dim"))


def percent(value: float | None) -> str:
    """A fraction in percent, or a dash."""
    return "-" if value is None else f"{value:.1%}"


def fraction(value: float | None) -> str:
    """A fraction as it is, or a dash."""
    return "-" if value is None else f"{value:.2f}"


def _samples(value: int | None) -> str:
    return "-" if value is None else f"{value} samples"
