"""The command `doctor`. It only reads its options; what it needs is imported when it runs."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

from tta_edge.options import BundleDirectory, ConfigFile, HyperSettings, given, with_settings
from tta_runtime.exit_codes import ExitCode

KEYS = (
    "bundle", "bundles", "method", "state_dir", "bind", "allow_remote", "http", "engine", "gpu", "plan_cache",
    "threads", "policy", "step_batch", "inline_min_batch", "max_streams",
)  # fmt: skip
"""The settings that its checks depend on and that are often changed; the others come from --config."""


@with_settings(KEYS, bundle=BundleDirectory)
def doctor(
    config: ConfigFile = None,
    settings: HyperSettings = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Samples of a request, as your clients will send them.")
    ] = 64,
    measure: Annotated[
        bool,
        typer.Option("--measure/--no-measure", help="Start a daemon for some seconds to measure its memory."),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    **flags: object,
) -> None:
    """Check that `tta-edge serve` with the same settings will work here, and say how to put right what will not.

    Python and packages, the GPU with its driver and libraries, what really runs the graphs, the bundle with a forward
    and a step, threads, state directory, ports, limits, clock, and how much memory the daemon will take. Changes
    nothing. Ends with 0 if all is well or there are only warnings, with 1 if a check failed.

    Example: tta-edge doctor my-bundle --config edge.toml --batch 32
    """
    from rich.console import Console

    from tta_edge.config import resolve
    from tta_edge.doctor import checks, line, summary
    from tta_runtime.checks import form, passed

    console, found = Console(highlight=False, markup=False, emoji=False), []
    for check in checks(
        lambda: resolve(flags=given(flags), settings=settings or (), environment=os.environ, file=config),
        batch,
        measure=measure,
    ):
        found.append(check)
        if not as_json:
            console.print(line(len(found), check))
    if as_json:
        typer.echo(json.dumps(form(found), indent=2))
    else:
        console.print(summary(found))
    if not passed(found):
        raise typer.Exit(ExitCode.NEGATIVE)
