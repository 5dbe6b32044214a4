"""The command `tta-edge`. Only the command line is here; what a command needs is imported when it runs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from tta_edge import exit_codes
from tta_edge.commands_stream import demo, evaluate, stream
from tta_runtime.errors import BadValue, TtaError

EPILOG = exit_codes.HELP

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
def serve(
    bundle: Annotated[
        str | None,
        typer.Argument(help="Directory of a bundle; without it the built-in one.", show_default=False),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="How theta changes; default: the bundle's own choice.")
    ] = None,
    bind: Annotated[
        str | None,
        typer.Option(help="Where to listen; port 0 takes a free one. Default: tcp://127.0.0.1:5555."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file of settings. Flags and TTA_* variables are stronger.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A hyper-parameter, as lr=0.001 or tent.lr=0.001."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the engine.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random numbers that a method uses.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Most samples in one request.")] = None,
    max_request_bytes: Annotated[int | None, typer.Option(help="Most tensor bytes in one request.")] = None,
    max_queue: Annotated[
        int | None, typer.Option(help="Most requests waiting; one more is answered busy.")
    ] = None,
    max_queue_bytes: Annotated[int | None, typer.Option(help="Most tensor bytes waiting; likewise.")] = None,
    max_streams: Annotated[int | None, typer.Option(help="Most streams held in memory.")] = None,
    max_distance: Annotated[
        float | None, typer.Option(help="Radius of the ball around the source theta, relative.")
    ] = None,
    reset_every_steps: Annotated[
        int | None, typer.Option(help="Back to the source after so many steps; 0 never.")
    ] = None,
    drain_s: Annotated[
        float | None, typer.Option(help="Seconds open requests may take to finish at the end.")
    ] = None,
    allow_remote: Annotated[
        bool | None,
        typer.Option(
            "--allow-remote/--no-allow-remote",
            help="Allow a bind that other machines can reach. Clients are not authenticated.",
            show_default=False,
        ),
    ] = None,
    ready_file: Annotated[
        str | None, typer.Option(help="File to leave the endpoint in when ready; removed at the end.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text, or json for one object per line.")] = None,
) -> None:
    """Serve a bundle and let it adapt to what it sees, until SIGTERM or Ctrl-C.

    Prints `ready tcp://HOST:PORT` on stderr when it answers. Every option can also stand in the file of
    --config, under its name with underscores, or in the environment as TTA_NAME.

    Example: tta-edge serve my-bundle --method tent --set lr=0.001 --bind tcp://127.0.0.1:5555
    """
    given = dict(locals())
    from tta_edge import logs
    from tta_edge.config import KEYS, resolve
    from tta_edge.service import Server

    flags = {key: value for key, value in given.items() if key in KEYS}
    resolved = resolve(flags=flags, settings=settings or (), environment=os.environ, file=config)
    logs.configure(resolved.config.log_level, resolved.config.log_format)
    ready = None if resolved.config.ready_file is None else Path(resolved.config.ready_file)
    server = Server(resolved.config, on_ready=_announce(ready, resolved.config.log_format))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    try:
        server.run()
    finally:
        if ready is not None:
            ready.unlink(missing_ok=True)


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


app.command("stream", epilog=EPILOG)(stream)
app.command("evaluate", epilog=EPILOG)(evaluate)
app.command("demo", epilog=EPILOG)(demo)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: our errors become one line on stderr and an exit status (see exit_codes)."""
    try:
        app(args=arguments, prog_name="tta-edge")
    except TtaError as error:
        typer.echo(f"error ({error.code}): {error}", err=True)
        sys.exit(exit_codes.exit_code(error))
