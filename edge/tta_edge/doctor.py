"""`tta-edge doctor`: every check in its order, and the report. The checks themselves stand in doctor_*.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tta_edge import doctor_gpu as gpu
from tta_edge import doctor_machine as machine
from tta_edge import hosting
from tta_edge.config import Config, Resolved
from tta_edge.doctor_bundle import check_bundle
from tta_edge.doctor_memory import memory, stored_bytes
from tta_runtime import machine as common
from tta_runtime.checks import Check, Verdict, fail, ok, passed
from tta_runtime.errors import TtaError

STYLES = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}


def checks(settings: Callable[[], Resolved], batch: int, *, measure: bool = True) -> Iterator[Check]:
    """Every check, one after the other.

    Args:
        settings: gives the configuration, or raises what is wrong with it; then only the machine is looked at.
        batch: samples of a request, as the user expects them.
        measure: start a daemon to measure its memory.
    """
    yield common.python()
    yield common.packages()
    yield common.onnxruntime()
    try:
        resolved = settings()
    except TtaError as error:
        yield fail("settings", f"{error.code}: {error.cause}", error.fix)
        yield common.open_files()
        yield common.clock()
        return
    changed = sum(origin != "default" for key, origin in resolved.origin.items() if "." not in key)
    yield ok("settings", f"{changed} of them set, the others at their default (tta-edge config show)")
    yield from _with(resolved.config, batch, measure=measure)


def _with(config: Config, batch: int, *, measure: bool) -> Iterator[Check]:
    yield from gpu.checks(config)
    good, slot_bytes, images = True, 0, False
    try:
        bundles = hosting.wanted(config)
    except TtaError as error:
        yield fail("bundles", f"{error.code}: {error.cause}", error.fix)
        good, bundles = False, {}
    for name, wanted in bundles.items():
        found, manifest = check_bundle(name, wanted, config, batch)
        yield from found
        good = good and passed(found)
        if manifest is not None:
            images = images or manifest.text is None
            slot_bytes = max(slot_bytes, stored_bytes(manifest, wanted.method or manifest.default_method))
    cores = hosting.usable_cores()
    yield machine.threads(config, cores, machine.usable_cores(cores))
    running = machine.whoever_answers(config.bind)
    yield machine.disk(config, running, slot_bytes=slot_bytes)
    yield from machine.ports(config, running)
    yield common.open_files()
    yield common.clock()
    if measure and good and images:  # language models have said what they take
        yield memory(config, batch, machine.available_bytes())


def line(number: int, check: Check) -> RenderableType:
    """A check as a line, and a second one for what to do."""
    table = Table.grid(padding=(0, 2))
    table.add_column(width=3, justify="right")
    table.add_column(width=4)
    table.add_column(width=18, no_wrap=True)
    table.add_column()
    verdict = Text(check.verdict.value, style=STYLES[check.verdict])
    table.add_row(f"{number}.", verdict, check.name, check.text)
    if check.fix:
        table.add_row("", "", "", Text(f"-> {check.fix}.", style=STYLES[check.verdict]))
    return table


def summary(found: Sequence[Check]) -> RenderableType:
    """The last line."""
    counts = {verdict: sum(check.verdict is verdict for check in found) for verdict in Verdict}
    text = ", ".join(f"{count} {verdict.value}" for verdict, count in counts.items())
    worst = next(verdict for verdict in (Verdict.FAIL, Verdict.WARN, Verdict.OK) if counts[verdict])
    return Group(Text(text, style=STYLES[worst]))
