"""The command `tta-cloud`. Only the command line is here; what a command needs is imported when it runs."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from tta_cloud.commands_doctor import doctor
from tta_cloud.commands_patches import patches
from tta_cloud.exit_codes import exit_code
from tta_cloud.options import STORE, AsJson, StoreDirectory, print_json
from tta_runtime.errors import TtaError
from tta_runtime.exit_codes import HELP as EPILOG

app = typer.Typer(
    name="tta-cloud",
    help="Teach a fleet of edges: take the samples they send, distil from a larger model, publish signed patches.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
keys = typer.Typer(
    help="The cloud's keys, and the edges that are let in.\n\nExample: tta-cloud keys list --store /var/lib/tta-cloud",
    no_args_is_help=True,
    epilog=EPILOG,
)
app.add_typer(keys, name="keys")
app.add_typer(patches, name="patches")
app.command(epilog=EPILOG)(doctor)


@keys.command("init", epilog=EPILOG)
def keys_init(store: StoreDirectory = STORE, as_json: AsJson = False) -> None:
    """Make the service's keys.

    `root.key` signs only the next root: move it to a safe place once edges are enrolled.

    Example: tta-cloud keys init --store /var/lib/tta-cloud
    """
    from tta_cloud.identity import create

    made = create(store)
    if as_json:
        print_json({"curve": made.curve_public, "publisher": made.publisher.key_id, "root_version": 1})
    else:
        typer.echo(f"keys are in {store / 'keys'}; next: tta-cloud enroll NAME --group GROUP --store {store}")


@keys.command("rotate", epilog=EPILOG)
def keys_rotate(
    store: StoreDirectory = STORE,
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
        print_json(facts)
    else:
        typer.echo(f"root {made.root.version}, epoch {made.root.epoch}; restart `tta-cloud serve`")


@keys.command("list", epilog=EPILOG)
def keys_list(store: StoreDirectory = STORE, as_json: AsJson = False) -> None:
    """The edges that were enrolled, with their keys.

    Example: tta-cloud keys list --store /var/lib/tta-cloud --json
    """
    from tta_cloud import edges
    from tta_cloud.reading import read

    found = read(store, edges.listed)
    if as_json:
        print_json([{"name": e.name, "group": e.group, "state": e.state, "key": e.key} for e in found])
        return
    for edge in found:
        typer.echo(f"{edge.name:20} {edge.group:16} {edge.state:8} {edge.key}")


@keys.command("revoke", epilog=EPILOG)
def keys_revoke(
    name: Annotated[str, typer.Argument(help="Name of the edge.")], store: StoreDirectory = STORE
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
    store: StoreDirectory = STORE,
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
        print_json({"name": name, "group": group, "token": token, "expires_ms": expires_ms})
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
    http: Annotated[
        str | None, typer.Option(help="HOST:PORT of metrics and health, or off (the default).")
    ] = None,
    allow_remote: Annotated[
        bool | None, typer.Option("--allow-remote", help="Let other machines reach --http.")
    ] = None,
) -> None:
    """Run the service until SIGTERM or Ctrl-C. Prints `ready ENDPOINT` on stderr when it answers.

    Every option can also stand in the file of --config, or in the environment as TTA_CLOUD_NAME.

    Example: tta-cloud serve --student small --teacher big --store /var/lib/tta-cloud
    """
    import logging

    from tta_cloud.config import resolve
    from tta_cloud.start import start

    flags = {
        "student": student, "teacher": teacher, "store": store, "bind": bind, "enroll_bind": enroll_bind,
        "http": http, "allow_remote": allow_remote,
    }  # fmt: skip
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
def fleet(store: StoreDirectory = STORE, as_json: AsJson = False) -> None:
    """Every edge: its group, the patch it serves, how far behind it is, when it was heard of.

    `agrees` is the share of its last samples on which the base that answered them and the teacher name the same class;
    an estimate of its accuracy on what it sends, not on all that it sees.

    Example: tta-cloud fleet --store /var/lib/tta-cloud --json
    """
    from tta_cloud.reading import fleet as look

    rows = look(store)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        agreed = "-" if row["agreement"] is None else f"{row['agreement']:.0%} of {row['agreement_samples']}"
        typer.echo(
            f"{row['name']:20} {row['group']:16} {row['state']:8} serves {row['epoch']}.{row['seq']} "
            f"lag {row['lag']} ({row['lag_s']:.0f} s) agrees {agreed} seen {row['last_seen_s']:.0f} s ago "
            f"{row['progress']}".rstrip()
        )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: our errors become one line on stderr and an exit status."""
    try:
        app(args=arguments, prog_name="tta-cloud")
    except TtaError as error:
        typer.echo(f"error ({error.code}): {error}", err=True)
        sys.exit(exit_code(error))
