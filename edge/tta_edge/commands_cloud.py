"""The command `enroll`. It only reads its options; what it needs is imported when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def enroll(
    token: Annotated[str, typer.Argument(help="What `tta-cloud enroll` has printed; good once.")],
    state_dir: Annotated[Path, typer.Option(help="State directory of the daemon.")] = Path("tta-edge-state"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Make this edge known to a cloud, so that `tta-edge serve --mode cloud` may take its patches.

    Makes the edge's key, which never leaves the state directory, and stores the cloud's address and root there.

    Example: tta-edge enroll tta1.hKRkb29y... --state-dir /var/lib/tta-edge
    """
    from tta_edge.enrol import enrol

    made = enrol(token, state_dir)
    facts = {
        "name": made.link.name,
        "group": made.link.group,
        "endpoint": made.link.endpoint,
        "key": made.public.decode(),
        "root_version": made.root.version,
    }
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        typer.echo(
            f"enrolled as {made.link.name} in group {made.link.group}; the cloud is at {made.link.endpoint}"
        )
