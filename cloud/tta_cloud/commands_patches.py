"""The commands `patches ...`. They only read their options; what they need is imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tta_cloud.options import STORE, AsJson, StoreDirectory, print_json
from tta_runtime.exit_codes import HELP

if TYPE_CHECKING:
    from tta_cloud.control import Answer
    from tta_runtime.bundle import Bundle

patches = typer.Typer(
    help="The ledger of patches: look, compare, stay at one, go back.\n\nExample: tta-cloud patches log yard",
    no_args_is_help=True,
    epilog=HELP,
)

Group = Annotated[str, typer.Argument(help="Name of the group.")]
Seq = Annotated[int, typer.Argument(min=1, help="Number of the patch.")]
SeqOrSource = Annotated[int, typer.Argument(min=0, help="Number of the patch; 0: the bundle's own theta.")]
Epoch = Annotated[
    int | None, typer.Option(min=1, help="Of the root under which it was signed; the newest unless given.")
]
Student = Annotated[
    Path | None, typer.Option(help="Bundle of the edges; the one of the service unless given.")
]
Why = Annotated[str, typer.Option("--why", help="Stands in the ledger as the reason.")]
WaitS = Annotated[float, typer.Option(min=0.1, max=3600, help="How long a running service may take.")]


@patches.command("log", epilog=HELP)
def patches_log(
    group: Group = "default",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many, the newest first.")] = 20,
    store: StoreDirectory = STORE,
    as_json: AsJson = False,
) -> None:
    """The patches of a group, the newest first, with their states and why.

    Example: tta-cloud patches log yard --store /var/lib/tta-cloud
    """
    from tta_cloud import ledger
    from tta_cloud.reading import read

    found = read(store, lambda db: ledger.entries(db, group, limit))
    if as_json:
        print_json(
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


@patches.command("origin", epilog=HELP)
def patches_origin(group: Group = "default", store: StoreDirectory = STORE, as_json: AsJson = False) -> None:
    """From where a group started: which group's patch, how near its samples were, and why.

    Example: tta-cloud patches origin yard --store /var/lib/tta-cloud
    """
    import msgspec

    from tta_cloud import origins
    from tta_cloud.reading import read

    found = read(store, lambda db: origins.get(db, group))
    if as_json:
        print_json(None if found is None else msgspec.to_builtins(found))
    elif found is None:
        typer.echo(f"group {group}: the source; nothing was decided, or not yet")
    elif not found.parent:
        typer.echo(f"group {group}: the source, at {_time(found.decided_ms)}: {found.reason}")
    else:
        where = f"{found.parent}'s {found.epoch}.{found.seq}, distance {found.distance:.2f}"
        text = f"by {found.samples} samples; {found.reason}"
        typer.echo(f"group {group}: {where}, at {_time(found.decided_ms)}, {text}")


@patches.command("show", epilog=HELP)
def patches_show(
    group: Group,
    seq: Seq,
    epoch: Epoch = None,
    student: Student = None,
    store: StoreDirectory = STORE,
    as_json: AsJson = False,
) -> None:
    """One patch: what was signed, by whom, its state and why, and how far it is from its parent and the source.

    Example: tta-cloud patches show yard 12 --store /var/lib/tta-cloud
    """
    from tta_cloud.patch_view import describe, find

    patch, before = find(store, group, seq, epoch)
    found = describe(store, patch, before, _bundle(store, student))
    if as_json:
        print_json(found)
        return
    body = found["body"]
    why = f" ({found['reason']})" if found["reason"] else ""
    typer.echo(f"patch {found['epoch']}.{found['seq']} of {group}: {found['state']}{why}")
    typer.echo(f"made at {_time(found['created_ms'])} from {body['samples']} new samples")
    for key, value in body.items():
        typer.echo(f"  {key:16} {value}")
    for signed in found["signatures"]:
        verdict = "good" if signed["good"] else "does not fit" if signed["trusted"] else "not of a publisher"
        typer.echo(f"signed by {signed['key']}: {verdict}")
    for what, where in (("from_parent", "its parent"), ("from_source", "the source")):
        if found[what] is None:
            typer.echo(f"its distance from {where} cannot be told: {_missing(what)}")
        else:
            _table(found[what])


@patches.command("diff", epilog=HELP)
def patches_diff(
    group: Group,
    old: SeqOrSource,
    new: SeqOrSource,
    epoch: Epoch = None,
    student: Student = None,
    store: StoreDirectory = STORE,
    as_json: AsJson = False,
) -> None:
    """What changed between two patches of a group, tensor by tensor; 0 is the bundle's own theta.

    Example: tta-cloud patches diff yard 11 12 --store /var/lib/tta-cloud
    """
    from tta_cloud.errors import UnknownPatch
    from tta_cloud.patch_view import difference, find, opened, source

    bundle, sides = _bundle(store, student), []
    for seq in (old, new):
        if seq:
            sides.append(opened(find(store, group, seq, epoch)[0]))
        elif bundle is not None:
            sides.append(source(bundle))
        else:
            raise UnknownPatch("0 is the bundle's own theta, and no bundle is at hand", "Give --student")
    fits = bundle is not None and all(side.bundle_digest == bundle.digest for side in sides)
    if sides[0].bundle_digest != sides[1].bundle_digest:
        raise UnknownPatch(
            f"{sides[0].name} is for the bundle {sides[0].bundle_digest[:12]}, {sides[1].name} for "
            f"{sides[1].bundle_digest[:12]}",
            "Compare patches of one bundle",
        )
    found = difference(sides[1], sides[0], bundle if fits else None)
    if as_json:
        print_json(found)
    else:
        _table(found)


@patches.command("pin", epilog=HELP)
def patches_pin(
    group: Group,
    seq: Annotated[
        int | None, typer.Argument(min=1, help="Number of the patch; what the group has now unless given.")
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="Let the group go on.")] = False,
    epoch: Epoch = None,
    why: Why = "",
    wait_s: WaitS = 60.0,
    store: StoreDirectory = STORE,
    as_json: AsJson = False,
) -> None:
    """Let a group stay at the patch it has: nothing newer is published until `--off`. Learning goes on.

    A running service does it within its heartbeat, and this command waits for that; otherwise it is done when one
    starts. A patch that is not the newest needs `rollback`: edges refuse lower numbers.

    Example: tta-cloud patches pin yard --why "audit until Friday" --store /var/lib/tta-cloud
    """
    from tta_cloud import control, ledger
    from tta_cloud.errors import UnknownPatch
    from tta_cloud.patch_view import find, known_group
    from tta_cloud.reading import read

    read(store, lambda db: known_group(db, group))
    if off:
        _report(control.ask(store, control.Unpin(group, _why(why)), wait_s), f"{group} goes on", as_json)
        return
    if seq is None:
        newest = read(store, lambda db: ledger.newest(db, group))
        if newest is None:
            raise UnknownPatch(
                f"{group} has no patch yet", f"`tta-cloud patches log {group}` shows when it has"
            )
        entry = newest.entry
    else:
        entry = find(store, group, seq, epoch)[0].entry
    note = control.Pin(group, entry.epoch, entry.seq, _why(why))
    _report(control.ask(store, note, wait_s), f"{group} stays at {entry.epoch}.{entry.seq}", as_json)


@patches.command("rollback", epilog=HELP)
def patches_rollback(
    group: Group,
    seq: SeqOrSource,
    pin: Annotated[
        bool, typer.Option("--pin", help="Stay there; else the next patch comes as soon as it is learned.")
    ] = False,
    epoch: Epoch = None,
    why: Why = "",
    wait_s: WaitS = 60.0,
    store: StoreDirectory = STORE,
    as_json: AsJson = False,
) -> None:
    """Publish an earlier patch again, under a new number, to the whole group; the learner goes on from there.

    A running service does it after the round that it is at, and this command waits for that; otherwise it is done
    when one starts. Edges put it on probation as any other.

    Example: tta-cloud patches rollback yard 11 --pin --why "fog taught it nonsense" --store /var/lib/tta-cloud
    """
    from tta_cloud import control, ledger
    from tta_cloud.patch_view import find, known_group
    from tta_cloud.reading import read

    read(store, lambda db: known_group(db, group))
    newest = read(store, lambda db: ledger.last_epoch(db, group))
    last = read(store, lambda db: ledger.last_seq(db, group, newest))
    at = (find(store, group, seq, epoch)[0].entry.epoch if seq else epoch or newest) or 1
    note = control.RollBack(group, at, seq, last, pin, _why(why))
    what = f"{group} goes back to {f'{at}.{seq}' if seq else 'the source'}"
    _report(control.ask(store, note, wait_s), what, as_json)


def _report(answer: Answer | None, what: str, as_json: bool) -> None:
    done = answer is not None
    if as_json:
        found: dict[str, Any] = {"done": done, "epoch": None, "seq": None, "state": None}
        if answer is not None:
            found |= {"epoch": answer.epoch, "seq": answer.seq, "state": answer.state}
        print_json(found)
    elif answer is None:
        typer.echo(f"no service runs: {what} when one starts")
    else:
        typer.echo(f"{what}: patch {answer.epoch}.{answer.seq} is {answer.state}")


def _why(text: str) -> str:
    from tta_cloud.control import MAX_WHY

    if len(text) > MAX_WHY:
        raise typer.BadParameter(f"--why has {len(text)} characters, at most {MAX_WHY}")
    return text


def _bundle(store: Path, student: Path | None) -> Bundle | None:
    """The edges' bundle, where it is at hand; one that was named must be."""
    from tta_cloud.reading import remembered
    from tta_runtime.bundle import Bundle
    from tta_runtime.errors import BundleError

    if student is not None:
        return Bundle.open(student)
    known = remembered(store).student
    try:
        return Bundle.open(known) if known else None
    except BundleError:
        return None


def _missing(what: str) -> str:
    if what == "from_parent":
        return "the parent is no longer in the ledger, or is the source and the bundle is not at hand"
    return "the bundle that it is for is not at hand; give --student"


def _table(found: dict[str, Any]) -> None:
    typer.echo(
        f"{found['from']} -> {found['to']}: relative {found['relative']:.4g}, norm {found['norm']:.4g}, "
        f"largest {found['max_abs']:.4g}"
    )
    for row in found["tensors"]:
        typer.echo(
            f"  {row['name']:48} {'trained' if row['trained'] else '':7} {row['size']:>8} "
            f"relative {row['relative']:<10.4g} norm {row['norm']:<10.4g} largest {row['max_abs']:.4g}"
        )


def _time(created_ms: int) -> str:
    from datetime import datetime

    return f"{datetime.fromtimestamp(created_ms / 1000).astimezone():%Y-%m-%d %H:%M:%S %z}"
