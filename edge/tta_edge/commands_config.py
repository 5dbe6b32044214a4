"""The commands `config show` and `config check`. What they need is imported when they run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tta_edge.options import ConfigFile, HyperSettings
from tta_runtime.exit_codes import HELP

if TYPE_CHECKING:
    from tta_edge.config import Resolved

config = typer.Typer(
    name="config",
    help="Show the settings and where each comes from, or check a file of settings.\n\nExample: tta-edge config show",
    epilog=HELP,
    no_args_is_help=True,
)


@config.command("show", epilog=HELP)
def show(
    file: ConfigFile = None,
    settings: HyperSettings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show every setting: its value, its meaning, and whether the file, the environment or a flag set it.

    Example: tta-edge config show --config edge.toml
    """
    from rich.console import Console
    from rich.table import Table

    from tta_edge.config import resolve

    rows = table_of(resolve(settings=settings or (), environment=os.environ, file=file))
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("key", "value", "from", "meaning"):
        table.add_column(
            name, no_wrap=name == "key", overflow="fold", ratio={"meaning": 2, "value": 1}.get(name)
        )
    for key, row in rows.items():
        unit = f" {row['unit']}" if row["unit"] and row["value"] is not None else ""
        value = "-" if row["value"] in (None, {}) else json.dumps(row["value"]).strip('"') + unit
        style = "" if row["origin"] == "default" else "bold"
        table.add_row(key, value, row["origin"], row["doc"], style=style)
    Console(highlight=False, markup=False, emoji=False).print(table)


@config.command("check", epilog=HELP)
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="TOML file of settings.", show_default=False)],
) -> None:
    """Say whether a file of settings is right: its keys, their types and ranges, and its addresses.

    Example: tta-edge config check edge.toml
    """
    from tta_edge.config import HTTP_OFF, resolve
    from tta_runtime.endpoint import check_bind

    resolved = resolve(file=file)
    wanted = resolved.config
    for place in (wanted.bind, *([] if wanted.http == HTTP_OFF else [f"tcp://{wanted.http}"])):
        check_bind(place, allow_remote=wanted.allow_remote)
    keys = [key for key, place in resolved.origin.items() if place != "default" and "." not in key]
    typer.echo(f"{file} is right and sets {', '.join(keys) or 'nothing'}")


def table_of(resolved: Resolved) -> dict[str, dict[str, Any]]:
    """Key -> value, unit, origin and meaning, in the order of the file; hyper-parameters one by one below theirs."""
    import msgspec

    from tta_edge.settings import settings

    values = msgspec.to_builtins(resolved.config)
    rows = {}
    for key, setting in settings().items():
        rows[key] = {
            "value": values[key],
            "unit": setting.unit,
            "origin": resolved.origin[key],
            "doc": setting.doc,
        }
        for name in sorted(resolved.origin):
            if key == "hyper" and name.startswith("hyper."):
                rows[name] = {
                    "value": _at(values, name),
                    "unit": "",
                    "origin": resolved.origin[name],
                    "doc": "",
                }
    return rows


def _at(values: dict[str, Any], dotted: str) -> Any:
    value: Any = values
    for part in dotted.split("."):
        value = value[part]
    return value
