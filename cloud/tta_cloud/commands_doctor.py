"""The command `doctor`. It only reads its options; what it needs is imported when it runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from tta_runtime.exit_codes import ExitCode


def doctor(
    config: Annotated[Path | None, typer.Option("--config", help="TOML file of the service.")] = None,
    student: Annotated[str | None, typer.Option(help="Bundle of the edges.")] = None,
    teacher: Annotated[str | None, typer.Option(help="As of `serve`.")] = None,
    store: Annotated[str | None, typer.Option(help="Directory of the service.")] = None,
    silent_hours: Annotated[
        float, typer.Option(min=0, help="Name edges that have not been heard of for so long.")
    ] = 24.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check that `tta-cloud serve` with the same settings works here, and say how to put right what does not.

    Python and packages, keys, the root, the store and its disk, dates, learning, edges, both bundles, addresses.
    Changes nothing, and may be used beside a service that runs. Student and teacher are those of the last service
    unless given. Ends with 0 if all is well or there are only warnings, with 1 if a check failed, with 2 if a setting
    is wrong.

    Example: tta-cloud doctor --config /etc/tta-cloud/cloud.toml
    """
    from tta_cloud.config import Config, resolve
    from tta_cloud.doctor import checks
    from tta_cloud.reading import remembered
    from tta_runtime.checks import Check, form, passed

    def settings() -> Config:
        flags = {"student": student, "teacher": teacher, "store": store}
        found = resolve(flags=flags, environment=os.environ, file=config)
        last = remembered(Path(found.store))
        return resolve(
            flags={**flags, "student": found.student or last.student or None,
                   "teacher": found.teacher or last.teacher or None},
            environment=os.environ, file=config,
        )  # fmt: skip

    found: list[Check] = []
    for check in checks(settings, silent_s=silent_hours * 3600):
        found.append(check)
        if not as_json:
            typer.echo(f"{len(found):3}. {check.verdict.value:4}  {check.name:12} {check.text}")
            if check.fix:
                typer.echo(f"{'':24}-> {check.fix}.")
    if as_json:
        typer.echo(json.dumps(form(found), indent=2))
    if not passed(found):
        wrong = any(check.name == "settings" and check.fix for check in found)
        raise typer.Exit(ExitCode.USAGE if wrong else ExitCode.NEGATIVE)
