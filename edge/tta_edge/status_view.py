"""A daemon's status in words and tables for people, and as plain JSON values for machines. Pure functions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from tta_edge.events import Reason
from tta_edge.wire import BundleStatus, CloudInfo, EventEntry, Requests, StatusReply, StreamStatus
from tta_runtime import errors
from tta_runtime.link import BUSY

STATE_STYLES = {"adapting": "green", "frozen": "bold red", "source": "dim", "off": "yellow"}
ACTION_STYLES = {
    "refuse": "yellow", "reset": "yellow", "rollback": "yellow", "switch": "cyan", "reload": "cyan",
    "suspend": "red", "quarantine": "red", "disk": "red",
}  # fmt: skip
STATE_ERRORS = frozenset(
    kind.code
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.StateError)
) - {reason.value for reason in Reason}
"""Why the daemon sets a state file aside instead of using it."""
MAX_FINDINGS = 8
"""That are shown; a daemon whose streams are all suspended would fill the screen."""
ADDRESS = frozenset({"id", "type"})
"""Fields that belong to the exchange of messages and not to what they say."""


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    Attributes:
        what: a sentence without its full stop.
        fix: what to do about it, likewise.
        bad: whether it is more than a choice somebody made.
    """

    what: str
    fix: str
    bad: bool = True


def findings(status: StatusReply) -> list[Finding]:
    """What is wrong with a daemon, the worst first."""
    found = []
    if status.disk_error:
        found.append(
            Finding(
                f"the state directory {status.state_dir} cannot be written: {status.disk_error}",
                "Free space or correct its permissions; until then a restart forgets what streams learn",
            )
        )
    if status.cloud is not None:
        found += _findings_of_cloud(status.cloud)
    for stream in status.streams:
        found += _findings_of(stream, _selector(status, stream), switch=status.adapt)
    if not status.adapt:
        found.append(
            Finding(
                "adaptation is switched off for the whole daemon; streams serve what they have",
                "tta-edge adapt on",
                bad=False,
            )
        )
    return sorted(found, key=lambda finding: not finding.bad)


def _findings_of(stream: StreamStatus, selector: str, *, switch: bool) -> Iterable[Finding]:
    if stream.state == "frozen":
        why = f", last {stream.last_event}" if stream.last_event else ""
        yield Finding(
            f"stream {stream.id} is suspended by its guards{why}; it serves the source",
            f"Look at its images and at tta-edge events, then tta-edge reset {selector}",
        )
    quarantined = _quarantined(stream)
    if quarantined:
        yield Finding(
            f"stream {stream.id}: its state on disk was not usable and is quarantined ({quarantined}); "
            f"it began at {stream.restored}",
            "Look at tta-edge events; the damaged file is kept beside the others for you to look at",
        )
    if stream.state == "off" and switch:
        yield Finding(f"stream {stream.id} is switched off", f"tta-edge adapt on {selector}", bad=False)


def _findings_of_cloud(cloud: CloudInfo) -> Iterable[Finding]:
    if cloud.phase == "online" and cloud.problem.startswith(f"{BUSY}: "):
        yield Finding(
            f"the cloud takes no samples now ({cloud.problem}); they wait here",
            "Look at the cloud's log and at the room on its disk",
        )
    elif cloud.problem:
        yield Finding(
            f"no link to the cloud ({cloud.problem}); what was taught goes on serving",
            "Look whether tta-cloud serve runs and is reachable, and tta-cloud keys list shows this edge as active",
        )
    elif cloud.stale:
        yield Finding(
            "the cloud has told of no patch for ten minutes, though the link is up",
            "Somebody may hold its messages back, or a clock is ahead: look at the log, at what stands between and at "
            "the time on both machines",
        )


def _quarantined(stream: StreamStatus) -> str:
    return next((code for code in stream.events if code in STATE_ERRORS), "")


def _selector(status: StatusReply, stream: StreamStatus) -> str:
    bundle = f" --bundle {stream.bundle}" if len(status.bundles) > 1 else ""
    return f"--stream {stream.id}{bundle}"


# --- for machines -----------------------------------------------------------------------------------


def form_of(message: msgspec.Struct) -> dict[str, Any]:
    """A reply as plain JSON values: every field stands in it, and what is not a finite number is null."""
    names = (name for name in message.__struct_fields__ if name not in ADDRESS)
    return {name: _plain(getattr(message, name)) for name in names}


def status_form(status: StatusReply) -> dict[str, Any]:
    """A status as plain JSON values, its form the same whether or not anything has been measured."""
    form = form_of(status)
    return {**form, "latency_ms": {"p50": None, "p99": None, **form["latency_ms"]}}


def _plain(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        return {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- for people -------------------------------------------------------------------------------------


def status_view(status: StatusReply, to: str) -> RenderableType:
    """One screen: what is served, how it goes, the streams, and what is wrong."""
    parts: list[RenderableType] = [facts(status, to), Text(), bundle_table(status)]
    if status.streams:
        parts += [Text(), stream_table(status.streams)]
    if status.sessions or status.stored_sessions:
        parts += [Text(), sessions_view(status)]
    return Group(*parts, *finding_lines(findings(status)))


def facts(status: StatusReply, to: str) -> RenderableType:
    """The figures of the whole daemon, one in a line."""
    table = Table.grid(padding=(0, 3))
    requests = status.requests
    table.add_row("daemon", f"tta-edge {status.version} at {to}, up {duration(status.uptime_s)}")
    table.add_row("adaptation", f"{'on' if status.adapt else 'off'}, policy {status.policy}")
    table.add_row(
        "requests",
        f"{requests.ok} ok, {requests.failed} failed{failure_codes(requests)}, {requests.open} open",
    )
    table.add_row("latency", latency(status))
    table.add_row("memory", decimal(status.rss_bytes))
    kept = (
        f"{status.state_dir}, {status.stored_streams} streams only there"
        if status.state_dir
        else NOTHING_KEPT
    )
    table.add_row("state", kept)
    if status.cloud is not None:
        table.add_row("cloud", cloud_line(status.cloud))
    return table


def cloud_line(cloud: CloudInfo) -> str:
    """The link in short."""
    sent = (
        f"{cloud.sent} of {cloud.seen} samples sent, {cloud.waiting} wait"
        if cloud.seen
        else "nothing is sent"
    )
    return f"{cloud.phase}, group {cloud.group}, newest patch {cloud.head or '-'}, {sent}"


NOTHING_KEPT = "in memory only: a restart forgets what streams learn (set state_dir)"


def failure_codes(requests: Requests) -> str:
    """The commonest reasons of failed requests, in brackets; empty where there are none."""
    codes = ", ".join(f"{code} {count}" for code, count in Counter(requests.failures).most_common(3))
    return f" ({codes})" if codes else ""


def latency(status: StatusReply) -> str:
    """Median and tail of the newest predictions."""
    if not status.latency_ms:
        return "nothing measured yet"
    return "  ".join(f"{name} {value:.1f} ms" for name, value in status.latency_ms.items())


def runs_on(bundle: BundleStatus) -> str:
    """What runs its graphs, and whether that is second choice; why stands in the JSON form."""
    return f"{bundle.provider} (fallback)" if bundle.fallbacks else bundle.provider


def bundle_table(status: StatusReply) -> Table:
    """What is served."""
    table = plain_table("bundle", "model", "method", "runs on", "digest", "base", "loads")
    for bundle in status.bundles:
        table.add_row(
            bundle.name, bundle.model_id, bundle.method, runs_on(bundle), bundle.digest[:12], bundle.base or "-",
            str(bundle.loads),
        )  # fmt: skip
    return table


def stream_table(streams: Sequence[StreamStatus]) -> Table:
    """The streams in short."""
    table = plain_table(
        "stream", "bundle", "state", ">steps", ">samples", ">distance", ">entropy", "last event"
    )
    for stream in streams:
        table.add_row(
            stream.id, stream.bundle, state(stream), str(stream.steps), str(stream.samples),
            f"{stream.distance:.4f}", number(stream.entropy, 3), stream.last_event or "-",
        )  # fmt: skip
    return table


def streams_view(status: StatusReply) -> RenderableType:
    """Everything about every stream in memory, the most recently used last."""
    table = plain_table(
        "stream", "bundle", "method", "state", ">steps", ">samples", ">waiting", ">checkpoints", ">distance",
        ">entropy", ">diversity", ">agreement", "theta", "began at", "events",
    )  # fmt: skip
    for stream in status.streams:
        counts = ", ".join(f"{reason} {count}" for reason, count in Counter(stream.events).most_common())
        table.add_row(
            stream.id, stream.bundle, stream.method, state(stream), str(stream.steps), str(stream.samples),
            str(stream.window), str(stream.checkpoints), f"{stream.distance:.4f}", number(stream.entropy, 3),
            number(stream.diversity, 2), number(stream.agreement, 2), stream.theta_digest[:12], stream.restored,
            counts or "-",
        )  # fmt: skip
    where = f", {status.stored_streams} more on disk" if status.stored_streams else ""
    return Group(
        table, Text(f"{len(status.streams)} in memory{where}", style="dim"), *finding_lines(findings(status))
    )


def sessions_view(status: StatusReply) -> RenderableType:
    """The sessions of language models in memory, the most recently used last."""
    table = plain_table(
        "session", "bundle", "method", ">absorbed", ">pending", ">chunks", "theta", "began at", "kept"
    )
    for session in status.sessions:
        table.add_row(
            session.id, session.bundle, session.method, str(session.absorbed), str(session.pending),
            str(session.chunks), session.theta_digest[:12], session.restored,
            "on disk" if session.durable else "in memory",
        )  # fmt: skip
    where = f", {status.stored_sessions} more on disk" if status.stored_sessions else ""
    text = f"{len(status.sessions)} sessions in memory{where}, {decimal(status.text_bytes)} set apart"
    return Group(table, Text(text, style="dim"))


def events_view(events: Sequence[EventEntry]) -> RenderableType:
    """Events, the oldest first."""
    if not events:
        return Text("nothing has happened since the daemon started", style="dim")
    table = plain_table(">#", "time", "bundle", "stream", "action", "reason", "detail")
    for event in events:
        table.add_row(
            str(event.seq), event.time, event.bundle, event.stream or "(daemon)",
            Text(event.action, style=ACTION_STYLES.get(event.action, "")), event.reason, event.detail,
        )  # fmt: skip
    return table


def finding_lines(found: Sequence[Finding]) -> list[Text]:
    """Each finding and its fix, under an empty line; how many are left out is said."""
    if not found:
        return []
    lines = [Text()]
    for finding in found[:MAX_FINDINGS]:
        style = "red" if finding.bad else "yellow"
        lines.append(
            Text.assemble(("! " if finding.bad else "- ", style), (finding.what, style), f". {finding.fix}.")
        )
    left = len(found) - MAX_FINDINGS
    return [*lines, Text(f"and {left} more like these", style="dim")] if left > 0 else lines


def plain_table(*columns: str) -> Table:
    """A table without lines; a column named with a leading `>` holds numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        right = name.startswith(">")
        table.add_column(name.lstrip(">"), justify="right" if right else "left", no_wrap=name != "detail")
    return table


def state(stream: StreamStatus) -> Text:
    """What a stream does, in its colour; of one that auto decides for, what it has decided."""
    words: str = stream.state
    if stream.auto is not None and stream.state == "adapting":
        words = f"auto: {stream.auto.mode}"
    return Text(words, style=STATE_STYLES[stream.state])


def number(value: float | None, digits: int) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def duration(seconds: float) -> str:
    """A time in the two largest units it has."""
    left, parts = int(seconds), list[str]()
    for name, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (name == "s" and not parts):
            parts.append(f"{count} {name}")
        elif parts:
            break
    return " ".join(parts[:2])
