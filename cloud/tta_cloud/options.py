"""Options that several commands share, and how they print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

StoreDirectory = Annotated[Path, typer.Option("--store", help="Directory of the service.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
STORE = Path("tta-cloud")
"""Where the store is unless somebody says otherwise."""


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    import json

    typer.echo(json.dumps(value, indent=2))
