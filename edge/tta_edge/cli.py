"""The command `tta-edge`. Only the command line is here; what a command needs is imported when it runs."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from tta_edge import exit_codes
from tta_edge.commands_cloud import enroll
from tta_edge.commands_config import config
from tta_edge.commands_doctor import doctor
from tta_edge.commands_operate import adapt, events, reload, reset, rollback, status, streams, top
from tta_edge.commands_spool import spool
from tta_edge.commands_stream import demo, evaluate, stream
from tta_edge.commands_text import text
from tta_edge.options import BundleDirectory, ConfigFile, HyperSettings, given, with_settings
from tta_runtime.errors import BadValue, TtaError
from tta_runtime.exit_codes import HELP

EPILOG = HELP

app = typer.Typer(
    name="tta-edge",
    help="Serve a bundle that adapts itself to its input, stream data to it, and measure what that gains.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from tta_runtime import __version__

        typer.echo(f"tta-edge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    del version  # acted on by its callback


@app.command(epilog=EPILOG)
@with_settings(bundle=BundleDirectory)
def serve(config: ConfigFile = None, settings: HyperSettings = None, **flags: object) -> None:
    """Serve a bundle, or several, and let it adapt to what it sees, until SIGTERM or Ctrl-C.

    Prints `ready tcp://HOST:PORT` on stderr when it answers. Every option can also stand in the file of
    --config, under its name with underscores, or in the environment as TTA_NAME. SIGHUP reads all bundles again.

    Example: tta-edge serve my-bundle --method tent --set lr=0.001 --bind tcp://127.0.0.1:5555
    """
    from tta_edge import logs
    from tta_edge.config import resolve
    from tta_edge.service import Server

    resolved = resolve(flags=given(flags), settings=settings or (), environment=os.environ, file=config)
    logs.configure(resolved.config.log_level, resolved.config.log_format)
    ready = None if resolved.config.ready_file is None else Path(resolved.config.ready_file)
    server = Server(resolved.config, on_ready=_announce(ready, resolved.config.log_format))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    signal.signal(signal.SIGHUP, lambda *_: server.reload_all())
    # Python runs a handler only between two of its own instructions: a signal that comes just before the main loop
    # begins to wait would be slept through, did it not write to what the loop waits for.
    signal.set_wakeup_fd(server.wake_fd, warn_on_full_buffer=False)
    try:
        server.run()
    finally:
        signal.set_wakeup_fd(-1)
        if ready is not None:
            ready.unlink(missing_ok=True)
    if any(thread.name.startswith("tta-") for thread in threading.enumerate()):
        # One of ours that ran past its deadline: a request, a step or a bundle being read. An engine cannot be
        # interrupted, and a Python that ends around a running one aborts (SIGABRT). All that is to be kept is on disk.
        logging.shutdown()
        sys.stderr.flush()
        os._exit(0)


def _announce(ready: Path | None, form: str) -> Callable[[str], None]:
    """What to do when the daemon is ready: leave the endpoint in the ready file, and say so on stderr."""

    def announce(endpoint: str) -> None:
        import json

        from tta_runtime.atomic import write_atomic

        if ready is not None:
            try:
                write_atomic(ready, f"{endpoint}\n".encode())
            except OSError as error:
                raise BadValue(
                    f"cannot write the ready file {ready}: {error.strerror}", "Correct `ready_file`"
                ) from error
        line = f"ready {endpoint}"
        typer.echo(json.dumps({"message": line, "endpoint": endpoint}) if form == "json" else line, err=True)

    return announce


OPERATE: tuple[Callable[..., None], ...] = (
    status, streams, top, adapt, reset, rollback, reload, events, enroll, doctor,
)  # fmt: skip
MEASURE: tuple[Callable[..., None], ...] = (stream, evaluate, demo)

for command in OPERATE:
    app.command(command.__name__, epilog=EPILOG)(command)
app.add_typer(config)
app.add_typer(spool)
app.add_typer(text)
for command in MEASURE:
    app.command(command.__name__, epilog=EPILOG)(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: our errors become one line on stderr and an exit status (see exit_codes)."""
    try:
        app(args=arguments, prog_name="tta-edge")
    except TtaError as error:
        typer.echo(f"error ({error.code}): {error}", err=True)
        sys.exit(exit_codes.exit_code(error))
