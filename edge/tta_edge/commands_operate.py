"""The commands that look after a running daemon: `status`, `streams`, `top`, `adapt`, `reset`, `rollback`,
`reload`, `events`. Each only reads its options; what it needs is imported when it runs.
"""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from tta_edge.client import Client

To = Annotated[
    str, typer.Option(metavar="tcp://HOST:PORT", envvar="TTA_TO", help="Where the daemon listens.")
]
TimeoutS = Annotated[float, typer.Option(min=0.001, help="Longest wait for an answer, in seconds.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
StreamName = Annotated[str, typer.Option("--stream", help="The stream's name.")]
BundleName = Annotated[
    str,
    typer.Option(
        "--bundle", help="The bundle's name; without it the daemon's first one.", show_default=False
    ),
]
ENDPOINT = "tcp://127.0.0.1:5555"


class Switch(str, Enum):
    """The two places of a switch."""

    ON = "on"
    OFF = "off"


def status(to: To = ENDPOINT, timeout_s: TimeoutS = 10.0, as_json: AsJson = False) -> None:
    """Say how a daemon is doing: bundles, streams, requests, latency, memory, and what is wrong.

    Example: tta-edge status --to tcp://127.0.0.1:5555
    """
    from tta_edge.status_view import status_form, status_view

    with _client(to, timeout_s) as client:
        reply = client.status()
    if as_json:
        _print_json(status_form(reply))
    else:
        console().print(status_view(reply, to))


def streams(to: To = ENDPOINT, timeout_s: TimeoutS = 10.0, as_json: AsJson = False) -> None:
    """List a daemon's streams with everything that is known of each.

    Example: tta-edge streams --json
    """
    from tta_edge.status_view import status_form, streams_view

    with _client(to, timeout_s) as client:
        reply = client.status()
    if as_json:
        form = status_form(reply)
        _print_json({key: form[key] for key in ("streams", "stored_streams")})
    else:
        console().print(streams_view(reply))


def adapt(
    switch: Annotated[
        Switch,
        typer.Argument(metavar="on|off", help="on: streams may adapt. off: they serve what they have."),
    ],
    stream: Annotated[
        str,
        typer.Option("--stream", help="Only this stream; without it the whole daemon.", show_default=False),
    ] = "",
    bundle: BundleName = "",
    to: To = ENDPOINT,
    timeout_s: TimeoutS = 10.0,
    as_json: AsJson = False,
) -> None:
    """Switch adaptation on or off, for the whole daemon or for one stream. Nothing that was learnt is lost.

    Example: tta-edge adapt off --stream cam1
    """
    with _client(to, timeout_s) as client:
        done = client.adapt(switch is Switch.ON, stream, bundle)
        switched_off = done.on and bool(done.stream) and not client.status().adapt
    if as_json:
        _print_reply(done)
        return
    whom = f"stream {done.stream}" if done.stream else "the whole daemon"
    typer.echo(f"adaptation is {'on' if done.on else 'off'} for {whom}")
    if switched_off:
        typer.echo("note: the whole daemon is switched off, which counts more: tta-edge adapt on", err=True)
    note_durable(done.durable)


def reset(
    stream: StreamName = "default",
    bundle: BundleName = "",
    to: To = ENDPOINT,
    timeout_s: TimeoutS = 10.0,
    as_json: AsJson = False,
) -> None:
    """Return one stream to the source model: what it has learnt is gone.

    Example: tta-edge reset --stream cam1
    """
    with _client(to, timeout_s) as client:
        done = client.reset(stream, bundle)
    if as_json:
        _print_reply(done)
    else:
        typer.echo(f"stream {done.stream} is back at the source, theta {done.theta_digest[:12]}")
        note_durable(done.durable)


def rollback(
    stream: StreamName = "default",
    bundle: BundleName = "",
    to: To = ENDPOINT,
    timeout_s: TimeoutS = 10.0,
    as_json: AsJson = False,
) -> None:
    """Return one stream to its last good checkpoint, theta and state together; without one, to the source.

    Example: tta-edge rollback --stream cam1
    """
    with _client(to, timeout_s) as client:
        done = client.rollback(stream, bundle)
    if as_json:
        _print_reply(done)
        return
    where = "the source" if done.to == "source" else f"its checkpoint of {done.steps} steps"
    typer.echo(f"stream {done.stream} is back at {where}, theta {done.theta_digest[:12]}")
    note_durable(done.durable)


def reload(
    bundle: BundleName = "", to: To = ENDPOINT, timeout_s: TimeoutS = 60.0, as_json: AsJson = False
) -> None:
    """Make a daemon read a bundle's directory again and serve what is there now, without a pause.

    A bundle that is refused changes nothing: the old one goes on answering.

    Example: tta-edge reload --bundle default
    """
    with _client(to, timeout_s) as client:
        done = client.reload(bundle)
    if as_json:
        _print_reply(done)
        return
    what = "a new bundle" if done.changed else "the same bundle as before"
    typer.echo(
        f"{done.bundle} holds {what}, {done.bundle_digest[:12]}: "
        f"{done.kept_streams} streams go on, {done.restarted_streams} start from the new source"
    )


def events(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="The newest so many.")] = 20,
    to: To = ENDPOINT,
    timeout_s: TimeoutS = 10.0,
    as_json: AsJson = False,
) -> None:
    """Show what a daemon did by itself or was told to do: refused steps, resets, rollbacks, switches.

    Example: tta-edge events --limit 50
    """
    from tta_edge.status_view import events_view

    with _client(to, timeout_s) as client:
        reply = client.events(limit)
    if as_json:
        _print_reply(reply)
    else:
        console().print(events_view(reply.events))


def top(
    to: To = ENDPOINT,
    interval_s: Annotated[float, typer.Option(min=0.05, max=3600, help="Seconds between two updates.")] = 0.5,
    timeout_s: Annotated[
        float, typer.Option(min=0.001, help="Wait for an answer so long before calling the daemon gone.")
    ] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    svg: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Save the last frame as a picture.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Watch a daemon: rates, latency, memory, streams by activity, the newest events. q or Ctrl-C ends it.

    A daemon that goes away is waited for. With --once a daemon that is not there is an error.

    Example: tta-edge top --to tcp://127.0.0.1:5555 --interval-s 1
    """
    from tta_edge.output import check_output
    from tta_edge.terminal import Keys
    from tta_edge.top import Feed, frame, frame_form, save_svg, watch

    check_output(svg)
    live = not (once or as_json)
    screen = console()
    with Feed(to, timeout_s=timeout_s) as feed, Keys(sys.stdin) as keys:
        if live:
            view = watch(feed, screen, keys, interval_s)
        else:
            feed.poll()
            if feed.view.error is not None:
                raise feed.view.error
            keys.ended(interval_s)  # rates are differences: a frame by itself has none
            view = feed.poll()
    if as_json:
        _print_json(frame_form(view))
    elif not live:
        screen.print(frame(view))
    if svg is not None:
        save_svg(svg, view)


def note_durable(durable: bool) -> None:
    """Say so on stderr where a restart forgets what was done."""
    if not durable:
        typer.echo(
            "note: a restart forgets this: the daemon has no state directory that it can write", err=True
        )


def _client(to: str, timeout_s: float) -> Client:
    from tta_edge.client import Client

    return Client(to, timeout_s=timeout_s)


def console() -> Console:
    """Where results go; outside of a terminal as wide as they need, so that nothing is cut off in a pipe."""
    from rich.console import Console

    width = None if Console().is_terminal else max(Console().width, 160)
    # Names and details come from clients and files: they are never markup.
    return Console(width=width, highlight=False, markup=False, emoji=False)


def _print_reply(reply: Any) -> None:
    from tta_edge.status_view import form_of

    _print_json(form_of(reply))


def _print_json(form: dict[str, Any]) -> None:
    typer.echo(json.dumps(form, indent=2, allow_nan=False))
