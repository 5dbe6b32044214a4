"""`tta-edge top`: a daemon's figures as they change. Asking, working out the rates and drawing are separate."""

from __future__ import annotations

import io
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tta_edge.client import Client
from tta_edge.output import OutputUnwritable
from tta_edge.status_view import (
    ACTION_STYLES,
    duration,
    failure_codes,
    finding_lines,
    findings,
    form_of,
    number,
    plain_table,
    state,
    status_form,
)
from tta_edge.view import sparkline
from tta_edge.wire import EventEntry, StatusReply, StreamStatus
from tta_runtime.atomic import write_atomic
from tta_runtime.errors import TtaError

HISTORY, TREND = 60, 12
"""Rates and entropies that the view looks back on."""
EVENTS = 6
ROWS = 20
FURNITURE = 15 + EVENTS
"""Lines of a frame that are not rows of its table."""
SVG_WIDTH = 132

StreamKey = tuple[str, str]
"""Bundle and stream."""


@dataclass(frozen=True)
class Rates:
    """What happened between two statuses, for each second.

    Attributes:
        requests: answered, with or without success.
        samples: predicted, over all streams.
        streams: samples by bundle and stream.
    """

    requests: float
    samples: float
    streams: Mapping[StreamKey, float]


@dataclass(frozen=True)
class View:
    """What there is to show.

    Attributes:
        to: the daemon's endpoint.
        status: the newest one; None if there was never one.
        events: the newest, oldest first.
        rates: None until there are two statuses of the same daemon.
        history: samples a second, oldest first.
        trends: entropies of each stream, oldest first.
        error: why the daemon does not answer; None if it does.
        silent_s: seconds since its last answer, or since the first question.
    """

    to: str
    status: StatusReply | None = None
    events: Sequence[EventEntry] = ()
    rates: Rates | None = None
    history: Sequence[float] = ()
    trends: Mapping[StreamKey, Sequence[float]] = field(default_factory=dict)
    error: TtaError | None = None
    silent_s: float = 0.0


def rates(before: StatusReply | None, now: StatusReply, seconds: float) -> Rates | None:
    """Rates from two statuses; None if they are not of the same run of a daemon.

    A stream that is new, or came back from disk, counts from its beginning.
    """
    if before is None or now.uptime_s < before.uptime_s or seconds <= 0:
        return None
    old = {key_of(stream): stream.samples for stream in before.streams}
    streams = {}
    for stream in now.streams:
        since = old.get(key_of(stream), 0)
        streams[key_of(stream)] = (stream.samples - (since if since <= stream.samples else 0)) / seconds
    answered = sum(
        (each.ok + each.failed) * sign for each, sign in ((now.requests, 1), (before.requests, -1))
    )
    return Rates(max(0, answered) / seconds, sum(streams.values()), streams)


def key_of(stream: StreamStatus) -> StreamKey:
    """What tells streams apart."""
    return stream.bundle, stream.id


def by_activity(streams: Sequence[StreamStatus], rates: Rates | None) -> list[StreamStatus]:
    """The busiest first, then the most recently used; `streams` has these last."""
    speed = {} if rates is None else rates.streams
    places = {key_of(stream): place for place, stream in enumerate(streams)}
    return sorted(
        streams,
        key=lambda stream: (speed.get(key_of(stream), 0.0), places[key_of(stream)]),
        reverse=True,
    )


class Feed:
    """Asks a daemon again and again; use as a context.

    Args:
        to: its endpoint.
        timeout_s: of a question; without an answer by then the daemon counts as gone.
        clock: seconds.

    Attributes:
        view: the newest.
    """

    def __init__(self, to: str, *, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._to, self._timeout_s, self._clock = to, timeout_s, clock
        self._client = Client(to, timeout_s=timeout_s)
        self._answered_s = clock()
        self._history: deque[float] = deque(maxlen=HISTORY)
        self._trends: dict[StreamKey, deque[float]] = {}
        self.view = View(to)

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def poll(self) -> View:
        """Ask once. A daemon that does not answer leaves the last figures and the reason in the view."""
        try:
            status = self._client.status()
            events = self._client.events(EVENTS).events
        except TtaError as error:
            # A new connection: the old one may hold questions that nobody will answer.
            self._client.close()
            self._client = Client(self._to, timeout_s=self._timeout_s)
            last = self.view
            self.view = View(
                self._to, last.status, last.events, None, last.history, last.trends,
                error, self._clock() - self._answered_s,
            )  # fmt: skip
            return self.view
        now_s = self._clock()
        before = None if self.view.error is not None else self.view.status
        found = rates(before, status, now_s - self._answered_s)
        self._answered_s = now_s
        if found is not None:
            self._history.append(found.samples)
        self._remember(status)
        trends = {key: tuple(values) for key, values in self._trends.items()}
        self.view = View(self._to, status, events, found, tuple(self._history), trends)
        return self.view

    def _remember(self, status: StatusReply) -> None:
        trends = {
            key_of(stream): self._trends.get(key_of(stream), deque[float](maxlen=TREND))
            for stream in status.streams
        }
        for stream in status.streams:
            if stream.entropy is not None:
                trends[key_of(stream)].append(stream.entropy)
        self._trends = trends


class Ending(Protocol):
    """Says when to end; `terminal.Keys` is one."""

    def ended(self, timeout_s: float) -> bool:
        """Wait so long, or until it is time to end."""


def watch(feed: Feed, console: Console, keys: Ending, interval_s: float) -> View:
    """Draw until a key or Ctrl-C ends it; the last view."""
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        try:
            while True:
                view = feed.poll()
                live.update(frame(view, max(3, console.height - FURNITURE)), refresh=True)
                if keys.ended(interval_s):
                    return view
        except KeyboardInterrupt:  # the usual way out of such a view
            return feed.view


# --- drawing ----------------------------------------------------------------------------------------


def frame(view: View, rows: int = ROWS) -> RenderableType:
    """One frame.

    Args:
        view: what to show.
        rows: most streams; how many are left out is said.
    """
    parts = [_gone(view)] if view.error is not None else []
    if view.status is None:
        return Group(*parts)
    return Group(
        *parts, _title(view, view.status), _figures(view, view.status), Text(), _streams(view, view.status, rows),
        *finding_lines(findings(view.status)), Text(), *_events(view.events), Text("q ends", style="dim"),
    )  # fmt: skip


def _gone(view: View) -> Text:
    assert view.error is not None
    seen = "" if view.status is None else "; the figures below are its last"
    return Text(
        f"no answer for {duration(view.silent_s)}, still trying{seen}. {view.error}", style="bold red"
    )


def _title(view: View, status: StatusReply) -> Text:
    on = ("adaptation on", "green") if status.adapt else ("adaptation OFF", "bold yellow")
    bundles = ", ".join(
        f"{bundle.name}: {bundle.model_id}, {bundle.method}, {bundle.provider}" for bundle in status.bundles
    )
    return Text.assemble(
        (f"tta-edge {status.version}", "bold"), f"  {view.to}  up {duration(status.uptime_s)}  ", on,
        f"  policy {status.policy}  {bundles}",
    )  # fmt: skip


def _figures(view: View, status: StatusReply) -> Table:
    table = Table.grid(padding=(0, 3))
    speed, requests = view.rates, status.requests
    failed = f"{requests.failed} failed{failure_codes(requests)}"
    table.add_row(
        "requests", f"{speed.requests:.1f}/s" if speed else "-",
        Text.assemble(
            f"{requests.ok} ok, ", (failed, "yellow" if requests.failed else "dim"), f", {requests.open} open"
        ),
    )  # fmt: skip
    top = max(view.history, default=0.0) or 1.0
    bars = sparkline([value / top for value in view.history], HISTORY)
    table.add_row("samples", f"{speed.samples:.0f}/s" if speed else "-", Text(bars, style="cyan"))
    median, tail = (status.latency_ms.get(name) for name in ("p50", "p99"))
    table.add_row(
        "latency",
        "-" if median is None else f"{median:.1f} ms",
        f"median; 99 % within {number(tail, 1)} ms",
    )
    where = f"{len(status.streams)} streams in memory, {status.stored_streams} more on disk"
    table.add_row("memory", decimal(status.rss_bytes), where)
    return table


def _streams(view: View, status: StatusReply, rows: int) -> RenderableType:
    several = len(status.bundles) > 1
    table = plain_table(
        "stream", *(["bundle"] if several else []), "state", ">samples/s", ">steps", ">waiting", ">distance",
        ">entropy", "", ">diversity", ">agreement", "last event",
    )  # fmt: skip
    ordered = by_activity(status.streams, view.rates)
    for stream in ordered[:rows]:
        speed = view.rates.streams.get(key_of(stream), 0.0) if view.rates else None
        trend = view.trends.get(key_of(stream), ())
        bars = sparkline([value / (max(trend) or 1.0) for value in trend], TREND)
        table.add_row(
            stream.id, *([stream.bundle] if several else []), state(stream), number(speed, 0), str(stream.steps),
            str(stream.window), f"{stream.distance:.4f}", number(stream.entropy, 3), Text(bars, style="cyan"),
            number(stream.diversity, 2), number(stream.agreement, 2), stream.last_event or "-",
            style="" if speed is None or speed > 0 else "dim",
        )  # fmt: skip
    left = len(ordered) - rows
    return Group(table, Text(f"and {left} less active ones", style="dim")) if left > 0 else table


def _events(events: Sequence[EventEntry]) -> list[Text]:
    return [
        Text.assemble(
            (event.time[11:19], "dim"), f"  {event.stream or '(daemon)'}  ",
            (event.action, ACTION_STYLES.get(event.action, "")), f"  {event.reason}  ", (event.detail, "dim"),
            no_wrap=True, overflow="ellipsis",
        )
        for event in events[-EVENTS:]
    ]  # fmt: skip


# --- files and machines -----------------------------------------------------------------------------


def frame_form(view: View) -> dict[str, Any]:
    """A frame as plain JSON values; the rates are null where the daemon restarted in between."""
    assert view.status is not None
    speed = view.rates
    streams = status_form(view.status)["streams"]
    if speed is not None:
        streams = [{**each, "samples_per_s": speed.streams[each["bundle"], each["id"]]} for each in streams]
    return {
        **status_form(view.status),
        "streams": streams,
        "requests_per_s": None if speed is None else speed.requests,
        "samples_per_s": None if speed is None else speed.samples,
        "events": [form_of(event) for event in view.events],
    }


def save_svg(file: Path, view: View) -> None:
    """Write a frame as a picture.

    Raises:
        OutputUnwritable: the operating system refuses.
    """
    console = Console(
        record=True,
        width=SVG_WIDTH,
        file=io.StringIO(),
        force_terminal=True,
        highlight=False,
        markup=False,
        emoji=False,
    )
    console.print(frame(view))
    try:
        # Without the fonts that rich would fetch from the web: looking at a picture calls nobody.
        picture = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="tta-edge top"), flags=re.DOTALL)
        write_atomic(file, picture.encode())
    except OSError as error:
        raise OutputUnwritable(f"cannot write {file}: {error.strerror}", "Name another file") from error
