"""The command `tta-cloud`. Only the command line is here; what a command needs is imported when it runs."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tta_runtime.errors import BundleError, ConfigError, KeyFileRefused, StateError, TtaError

EPILOG = (
    "Exit codes: 0 ok, 1 the result is negative, 2 usage or configuration error, 3 cannot bind or serve, "
    "4 bad bundle or data, 130 interrupted."
)
app = typer.Typer(
    name="tta-cloud",
    help="Teach a fleet of edges: take the samples they send, distil from a larger model, publish signed patches.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
keys = typer.Typer(
    help="The cloud's keys, and the edges that are let in.", no_args_is_help=True, epilog=EPILOG
)
patches = typer.Typer(help="The ledger of patches.", no_args_is_help=True, epilog=EPILOG)
app.add_typer(keys, name="keys")
app.add_typer(patches, name="patches")

StoreDirectory = Annotated[Path, typer.Option("--store", help="Directory of the service.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _print(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=2))


@keys.command("init", epilog=EPILOG)
def keys_init(store: StoreDirectory = Path("tta-cloud"), as_json: AsJson = False) -> None:
    """Make the service's keys.

    `root.key` signs only the next root: move it to a safe place once edges are enrolled.

    Example: tta-cloud keys init --store /var/lib/tta-cloud
    """
    from tta_cloud.identity import create

    made = create(store)
    if as_json:
        _print({"curve": made.curve_public, "publisher": made.publisher.key_id, "root_version": 1})
    else:
        typer.echo(f"keys are in {store / 'keys'}; next: tta-cloud enroll NAME --group GROUP --store {store}")


@keys.command("rotate", epilog=EPILOG)
def keys_rotate(
    store: StoreDirectory = Path("tta-cloud"),
    root_key: Annotated[
        list[Path] | None, typer.Option("--root-key", help="File of a root key. Repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replace the publisher's key; what the old one has signed counts no more. Restart the service afterwards.

    Example: tta-cloud keys rotate --store /var/lib/tta-cloud --root-key /media/stick/root.key
    """
    from tta_cloud.identity import rotate

    made = rotate(store, root_key or [])
    facts = {"publisher": made.publisher.key_id, "root_version": made.root.version, "epoch": made.root.epoch}
    if as_json:
        _print(facts)
    else:
        typer.echo(f"root {made.root.version}, epoch {made.root.epoch}; restart `tta-cloud serve`")


@keys.command("list", epilog=EPILOG)
def keys_list(store: StoreDirectory = Path("tta-cloud"), as_json: AsJson = False) -> None:
    """The edges that were enrolled, with their keys.

    Example: tta-cloud keys list --store /var/lib/tta-cloud --json
    """
    from tta_cloud import edges
    from tta_cloud.reading import read

    found = read(store, edges.listed)
    if as_json:
        _print([{"name": e.name, "group": e.group, "state": e.state, "key": e.key} for e in found])
        return
    for edge in found:
        typer.echo(f"{edge.name:20} {edge.group:16} {edge.state:8} {edge.key}")


@keys.command("revoke", epilog=EPILOG)
def keys_revoke(
    name: Annotated[str, typer.Argument(help="Name of the edge.")], store: StoreDirectory = Path("tta-cloud")
) -> None:
    """Shut an edge out. A running service does so within its heartbeat.

    Example: tta-cloud keys revoke camera-3 --store /var/lib/tta-cloud
    """
    from tta_cloud import control, edges
    from tta_cloud.errors import UnknownEdge
    from tta_cloud.reading import read
    from tta_runtime.errors import did_you_mean

    found = read(store, edges.listed)
    named = [edge for edge in found if edge.name == name]
    if not named:
        raise UnknownEdge(
            f"no edge is named `{name}`{did_you_mean(name, [edge.name for edge in found])}",
            "`tta-cloud keys list` shows them",
        )
    for edge in named:
        control.leave(store, control.ShutOut(edge.key))
    typer.echo(f"{name} is shut out")


@app.command(epilog=EPILOG)
def enroll(
    name: Annotated[str, typer.Argument(help="Name of the edge, for people.")],
    group: Annotated[
        str, typer.Option(help="Edges of one group teach each other and get the same patches.")
    ] = ("default"),
    door: Annotated[str, typer.Option(help="Address at which the edge reaches `enroll_bind`.")] = (
        "tcp://127.0.0.1:7611"
    ),
    hours: Annotated[float, typer.Option(min=0.01, max=720, help="How long the token is good.")] = 24.0,
    store: StoreDirectory = Path("tta-cloud"),
    as_json: AsJson = False,
) -> None:
    """Make a one-time token with which one edge can enrol.

    Example: tta-cloud enroll camera-3 --group yard --store /var/lib/tta-cloud
    """
    import time

    from tta_cloud import control, edges
    from tta_cloud.identity import load
    from tta_runtime.enrolment import Ticket, encode_ticket

    identity, secret = load(store), edges.new_token()
    expires_ms = int((time.time() + hours * 3600) * 1000)
    control.leave(store, control.LetEnrol(edges.hash_of(secret), name, group, expires_ms))
    token = encode_ticket(Ticket(door=door, server_key=identity.curve_public, secret=secret, name=name))
    if as_json:
        _print({"name": name, "group": group, "token": token, "expires_ms": expires_ms})
    else:
        typer.echo(token)
        typer.echo(f"on the edge: tta-edge enroll TOKEN --state-dir DIR (good for {hours:g} h)", err=True)


@app.command(epilog=EPILOG)
def serve(
    config: Annotated[Path | None, typer.Option("--config", help="TOML file.")] = None,
    student: Annotated[str | None, typer.Option(help="Bundle that the edges serve, with `distill`.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Bundle with `distill`, FILE.py:factory or timm:NAME.")
    ] = None,
    store: Annotated[str | None, typer.Option(help="Directory of the service.")] = None,
    bind: Annotated[str | None, typer.Option(help="Where edges connect.")] = None,
    enroll_bind: Annotated[str | None, typer.Option(help="Where edges enrol.")] = None,
) -> None:
    """Run the service until SIGTERM or Ctrl-C. Prints `ready ENDPOINT` on stderr when it answers.

    Every option can also stand in the file of --config, or in the environment as TTA_CLOUD_NAME.

    Example: tta-cloud serve --student small --teacher big --store /var/lib/tta-cloud
    """
    import logging

    from tta_cloud.config import resolve
    from tta_cloud.start import start

    flags = {"student": student, "teacher": teacher, "store": store, "bind": bind, "enroll_bind": enroll_bind}
    resolved = resolve(flags=flags, environment=os.environ, file=config)
    logging.basicConfig(
        level=resolved.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    server = start(resolved)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    server.on_ready = lambda: typer.echo(f"ready {server.endpoint} {server.door}".rstrip(), err=True)
    server.run()


@app.command(epilog=EPILOG)
def fleet(store: StoreDirectory = Path("tta-cloud"), as_json: AsJson = False) -> None:
    """Every edge: its group, the patch it serves, how far behind it is, when it was heard of.

    Example: tta-cloud fleet --store /var/lib/tta-cloud --json
    """
    import time

    from tta_cloud.reading import fleet as look

    rows = look(store)
    if as_json:
        _print(rows)
        return
    for row in rows:
        age_s = time.time() - row["last_seen_ms"] / 1000
        typer.echo(
            f"{row['name']:20} {row['group']:16} {row['state']:8} serves {row['epoch']}.{row['seq']} "
            f"lag {row['lag']} seen {age_s:.0f} s ago {row['progress']}"
        )


@patches.command("log", epilog=EPILOG)
def patches_log(
    group: Annotated[str, typer.Argument(help="Name of the group.")] = "default",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many, the newest first.")] = 20,
    store: StoreDirectory = Path("tta-cloud"),
    as_json: AsJson = False,
) -> None:
    """The patches of a group, the newest first, with their states and why.

    Example: tta-cloud patches log yard --store /var/lib/tta-cloud
    """
    from tta_cloud import ledger
    from tta_cloud.reading import read

    found = read(store, lambda db: ledger.entries(db, group, limit))
    if as_json:
        _print(
            [
                {
                    "epoch": e.epoch,
                    "seq": e.seq,
                    "state": e.state,
                    "reason": e.reason,
                    "created_ms": e.created_ms,
                }
                for e in found
            ]
        )
        return
    for entry in found:
        typer.echo(f"{entry.epoch}.{entry.seq:<6} {entry.state:12} {entry.reason}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: our errors become one line on stderr and an exit status."""
    try:
        app(args=arguments, prog_name="tta-cloud")
    except TtaError as error:
        typer.echo(f"error ({error.code}): {error}", err=True)
        usage = isinstance(error, (ConfigError, KeyFileRefused))
        data = isinstance(error, (BundleError, StateError))
        sys.exit(2 if usage else 4 if data else 3)
