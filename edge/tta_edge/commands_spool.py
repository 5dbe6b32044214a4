"""The commands `spool ls` and `spool rm`. What they need is imported when they run."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tta_runtime.exit_codes import HELP

if TYPE_CHECKING:
    from tta_edge.spool_directory import Survey

spool = typer.Typer(
    name="spool",
    help="List or delete the samples that wait for upload.\n\nExample: tta-edge spool ls state",
    epilog=HELP,
    no_args_is_help=True,
)
StateDirectory = Annotated[
    Path | None,
    typer.Argument(metavar="STATE_DIR", help="The daemon's state directory.", show_default=False),
]
StateDirectoryOption = Annotated[
    Path | None,
    typer.Option("--state-dir", envvar="TTA_STATE_DIR", metavar="DIR", help="The same.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@spool.command("ls", epilog=HELP)
def ls(
    directory: StateDirectory = None, state_dir: StateDirectoryOption = None, as_json: AsJson = False
) -> None:
    """Say how many samples wait for upload, since when, and of which streams. A daemon may run meanwhile.

    Example: tta-edge spool ls /var/lib/tta-edge
    """
    from tta_edge.spool import saved_counters
    from tta_edge.spool_directory import survey

    path = _place(directory, state_dir) / "spool"
    found, before = survey(path), saved_counters(path)
    if as_json:
        more = {"dropped_before": before.dropped, "damaged_before": before.damaged}
        typer.echo(json.dumps(_form(path, found) | more, indent=2))
        return
    typer.echo(f"{_told(found)} wait in {path}")
    for name, tally in sorted(found.streams.items()):
        typer.echo(f"  {name}: {_amount(tally.samples, tally.nbytes)}, oldest {_time(tally.oldest_ms)}")
    if before.dropped or before.damaged:
        typer.echo(f"so far {before.dropped} were dropped for want of room, {before.damaged} were damaged")


@spool.command("rm", epilog=HELP)
def rm(
    directory: StateDirectory = None,
    stream: Annotated[
        str, typer.Option("--stream", help="Delete the samples of this stream.", show_default=False)
    ] = "",
    everything: Annotated[bool, typer.Option("--all", help="Delete the samples of all streams.")] = False,
    state_dir: StateDirectoryOption = None,
    as_json: AsJson = False,
) -> None:
    """Delete samples that wait for upload, for good, without asking. A daemon may run meanwhile.

    A sample that the daemon is sending at this moment may still be sent. Ends with 3 while another process is
    rewriting the spool.

    Example: tta-edge spool rm /var/lib/tta-edge --stream camera-1
    """
    from tta_edge.spool_directory import discard, unused
    from tta_runtime.errors import BadValue

    if everything == bool(stream):
        raise BadValue(
            "both --all and --stream were given" if everything else "neither --all nor --stream was given",
            "Say which samples are to go: --stream NAME, or --all",
        )
    root = _place(directory, state_dir)
    path = root / "spool"
    gone = discard(path, lambda name: everything or name == stream, alone=everything and unused(root))
    if as_json:
        typer.echo(json.dumps(_form(path, gone), indent=2))
        return
    typer.echo(f"removed {_told(gone)} from {path}")
    for name, tally in sorted(gone.streams.items()):
        typer.echo(f"  {name}: {_amount(tally.samples, tally.nbytes)}")


def _place(directory: Path | None, state_dir: Path | None) -> Path:
    from tta_runtime.errors import BadValue

    found = directory or state_dir
    if found is None:
        raise BadValue("no state directory was given", "Name it: tta-edge spool ls STATE_DIR")
    if not found.is_dir():
        raise BadValue(f"there is no directory {found}", "Name the state directory of the daemon")
    return found


def _form(path: Path, found: Survey) -> dict[str, Any]:
    total = found.total
    return {
        "directory": str(path),
        "samples": total.samples,
        "bytes": total.nbytes,
        "oldest_ms": total.oldest_ms,
        "files": found.files,
        "file_bytes": found.file_bytes,
        "damaged": found.damaged,
        "streams": {
            name: {"samples": tally.samples, "bytes": tally.nbytes, "oldest_ms": tally.oldest_ms}
            for name, tally in sorted(found.streams.items())
        },
    }


def _told(found: Survey) -> str:
    total = found.total
    parts = [_amount(total.samples, total.nbytes)]
    if total.oldest_ms is not None:
        parts.append(f"oldest {_time(total.oldest_ms)}")
    if found.damaged:
        parts.append(f"{found.damaged} damaged")
    return ", ".join(parts)


def _amount(samples: int, nbytes: int) -> str:
    return f"{samples} sample{'s' * (samples != 1)}, {nbytes} bytes"


def _time(taken_ms: int | None) -> str:
    try:
        moment = datetime.fromtimestamp((taken_ms or 0) / 1000, tz=timezone.utc)
    except (OverflowError, ValueError, OSError):  # a clock that stood in the far future
        return f"{taken_ms} ms after 1970"
    return moment.isoformat(timespec="seconds")
