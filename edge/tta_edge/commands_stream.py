"""The commands `stream`, `evaluate` and `demo`. Each only reads its options; what it needs is imported when
it runs.
"""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tta_edge.commands_operate import ENDPOINT, To
from tta_edge.exit_codes import ExitCode
from tta_runtime.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from tta_edge.live import Phase
    from tta_edge.streams.source import Source

Seed = Annotated[int, typer.Option(min=0, help="Of the shifts, of --shuffle and of the method.")]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON.", show_default=False)
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Only the first so many images of each part.", show_default=False)
]
Batch = Annotated[int, typer.Option(min=1, help="Images that arrive together.")]
Shuffle = Annotated[bool, typer.Option("--shuffle", help="Draw the order of the images from the seed.")]

SHIFT_HELP = (
    "Common corruptions as NAME:SEVERITY, separated by commas, e.g. gaussian_noise:5,fog:3; "
    "all:5 stands for the fifteen."
)
SOURCE_HELP = "digits, npz:FILE, images:DIR or cifar10c:DIR."


class OutputUnwritable(ConfigError):
    """A result cannot be written where the user asked for it."""

    code = "output-unwritable"


def stream(
    source: Annotated[str, typer.Argument(help=SOURCE_HELP)],
    shift: Annotated[str | None, typer.Option(help=SHIFT_HELP, show_default=False)] = None,
    to: To = ENDPOINT,
    batch: Batch = 64,
    limit: Limit = None,
    shuffle: Shuffle = False,
    repeat: Annotated[
        bool, typer.Option("--repeat", help="Begin again at the end, without a reset, until Ctrl-C.")
    ] = False,
    stream_name: Annotated[
        str, typer.Option("--stream", help="The daemon's stream to use; it is reset first.")
    ] = "tta-edge-stream",
    seed: Seed = 0,
    timeout_s: Annotated[
        float, typer.Option(min=0.001, help="Longest wait for an answer, in seconds.")
    ] = 30.0,
    live: Annotated[bool, typer.Option(help="Show the live view (on a terminal).")] = True,
    json_file: Json = None,
) -> None:
    """Stream images to a running daemon and watch accuracy fall and recover.

    The images come clean first, then once more under each shift, unannounced: the daemon is reset only at the
    start. Beside each answer stands that of the frozen source model. At the end: clean, source and adapted
    accuracy, gap recovered, recovery time. Where there are no labels: agreement with the frozen source,
    entropy, drift.

    Example: tta-edge stream digits --shift gaussian_noise:5 --to tcp://127.0.0.1:5555
    """
    from rich.console import Console

    from tta_edge.client import Client
    from tta_edge.live import PATIENT, Streamer, StreamPlan, results, to_json
    from tta_edge.streams.measures import Recovery
    from tta_edge.streams.sources import open_source
    from tta_edge.view import LiveView, stream_table

    check_output(json_file)
    opened = open_source(source)
    shifts = opened.parse(shift)
    _warn_of_sorted(opened, shuffle)
    if shift is not None and not opened.given:
        shifts = (None, *shifts)
    plan = StreamPlan(
        opened, shifts, batch=batch, seed=seed, limit=limit, shuffle=shuffle, stream=stream_name
    )
    console, recovery = Console(), Recovery()
    whole: list[Phase] = []
    interrupted = False
    with Client(to, timeout_s=timeout_s, retry=PATIENT) as client:
        streamer = Streamer(client, plan)
        title = f"{opened.name} to {to}: {streamer.info.model_id}, method {streamer.info.method}"
        try:
            with LiveView(_screen(console, live), recovery, title) as view:
                streamer.on_batch = view.update
                whole = streamer.run()
                while repeat:
                    whole = streamer.run(reset=False)
        except KeyboardInterrupt:
            interrupted = True
    # Ctrl-C in a later round: the last complete round counts; in the first: what there is of it.
    clean, shifted = results(whole or streamer.phases, recovery)
    if shifted:
        console.print(title, highlight=False, markup=False)
        console.print(stream_table(clean, shifted, recovery))
    _write_json(
        json_file,
        to_json(
            clean, shifted, recovery,
            model=streamer.info.model_id, method=streamer.info.method, stream=opened.name,
            batch=batch, seed=seed, shuffle=shuffle, limit=limit, interrupted=interrupted,
        ),
    )  # fmt: skip
    if interrupted:
        raise typer.Exit(ExitCode.INTERRUPTED)


def evaluate(
    bundle: Annotated[
        str | None,
        typer.Argument(help="Directory of a bundle; without it the built-in one.", show_default=False),
    ] = None,
    stream: Annotated[str, typer.Option(help=SOURCE_HELP)] = "digits",
    shifts: Annotated[
        str | None,
        typer.Option(
            help=SHIFT_HELP + " Without it, and at the word none, the stream is taken as it is.",
            show_default=False,
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Separated by commas; default: every method of the bundle.", show_default=False),
    ] = None,
    batch: Batch = 64,
    setting: Annotated[
        str, typer.Option(help="online: reset before each shift. continual: never reset.")
    ] = "online",
    seed: Seed = 0,
    shuffle: Shuffle = False,
    limit: Limit = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A hyper-parameter, as lr=0.001 or tent.lr=0.001."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the engine.", show_default=False)
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write tables and plots as one HTML file (needs the extra `plots`).",
            show_default=False,
        ),
    ] = None,
    json_file: Json = None,
) -> None:
    """Measure the error of each method under each shift, without a daemon.

    Needs labels. Images arrive in the order of the file unless --shuffle. The last batch may be smaller and
    counts like the others. No guard acts: what is measured is the method itself.

    Example: tta-edge evaluate my-bundle --stream npz:test.npz --shifts all:5 --methods source,norm,tent
    --batch 64
    """
    from rich.console import Console
    from rich.progress import Progress

    from tta_edge.builtin import builtin_bundle
    from tta_edge.config import parse_settings
    from tta_edge.evaluate import Plan, check_setting, parse_shifts, spread
    from tta_edge.evaluate import evaluate as run
    from tta_edge.streams.order import order
    from tta_edge.streams.sources import open_source
    from tta_edge.view import evaluation_table
    from tta_runtime.bundle import Bundle
    from tta_runtime.engine import EngineOptions

    check_output(json_file)
    check_output(report)
    if report is not None:
        from tta_edge.figure import check_plots

        check_plots()
    source = open_source(stream)
    parsed = parse_shifts(source, shifts)
    _warn_of_sorted(source, shuffle)
    opened = Bundle.open(bundle if bundle is not None else builtin_bundle())
    names = (
        list(opened.manifest.methods) if methods is None else [name.strip() for name in methods.split(",")]
    )
    plan = Plan(
        source, parsed, names,
        batch=batch, setting=check_setting(setting), seed=seed, shuffle=shuffle, limit=limit,
        hyper=spread(parse_settings(settings or (), "flag --set"), opened.manifest, names),
    )  # fmt: skip
    console, errors = Console(), Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        total = len(order(source.count, limit=limit)) * len(parsed) * len(names)
        task = bar.add_task("", total=total)
        result = run(
            opened,
            plan,
            options=EngineOptions(threads=threads),
            progress=lambda what, samples: bar.update(task, description=what, advance=samples),
        )
    console.print(evaluation_table(result))
    _write_json(json_file, result.to_json())
    if report is not None:
        from tta_edge.report import Facts, command_line, host_facts, render

        again = command_line(plan, bundle=bundle, threads=threads, report=report, json=json_file)
        _write(report, render(result, Facts(again, datetime.now(timezone.utc), host_facts())))


def demo(
    method: Annotated[str, typer.Option(help="Of the built-in bundle: tent, norm or source.")] = "tent",
    seed: Seed = 0,
    figure: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw accuracy falling and recovering (svg, png or pdf; needs the extra `plots`).",
            show_default=False,
        ),
    ] = None,
    live: Annotated[bool, typer.Option(help="Show the live view (on a terminal).")] = True,
    json_file: Json = None,
) -> None:
    """Start a daemon on the built-in bundle, stream digits to it, clean and under seven shifts, and say what
    adapting gained.

    Ends with 0 if the mean gap recovered is at least 0.5 and adapting on clean digits costs at most 0.01 of
    accuracy, with 1 otherwise. Needs no network, no PyTorch and less than a minute.

    Example: tta-edge demo --json demo.json
    """
    from rich.console import Console

    from tta_edge import demo as demonstration
    from tta_edge.figure import check_figure, draw
    from tta_edge.streams.measures import Recovery
    from tta_edge.view import LiveView, stream_table

    check_output(json_file)
    if figure is not None:
        check_output(figure)
        check_figure(figure)
    console, recovery = Console(), Recovery()
    title = (
        f"built-in digits, method {method}, batch {demonstration.BATCH}, severity {demonstration.SEVERITY}"
    )
    with LiveView(_screen(console, live), recovery, title) as view:
        result = demonstration.run(method=method, seed=seed, recovery=recovery, on_batch=view.update)
    console.print(title, highlight=False, markup=False)
    console.print(stream_table(result.clean, result.shifted, recovery))
    _write_json(json_file, result.to_json())
    if figure is not None:
        draw(figure, result.phases, title)
    if not result.passed:
        typer.echo(
            f"not enough: mean gap recovered below {demonstration.MIN_GAP_RECOVERED} "
            f"or clean loss above {demonstration.MAX_CLEAN_LOSS}",
            err=True,
        )
        raise typer.Exit(ExitCode.NEGATIVE)


def _screen(console: Console, live: bool) -> Console:
    """The console for the live view: a mute one where nobody could see it move."""
    from rich.console import Console

    return console if live and console.is_terminal else Console(quiet=True)


def _warn_of_sorted(source: Source, shuffle: bool) -> None:
    """Say that images sorted by class are a hard case of its own, before the figures surprise somebody."""
    if not shuffle and source.sorted_by_class:
        typer.echo(
            f"note: {source.name} is sorted by class, so a batch holds one class or two; methods that look "
            "at the batch suffer from that. Use --shuffle to mix the classes.",
            err=True,
        )


def check_output(path: Path | None) -> None:
    """Refuse a place that cannot be written before the work begins.

    Raises:
        OutputUnwritable: the directory does not exist, or the path is one, or this user may not write there.
    """
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        cause = "is a directory" if path.is_dir() else f"has no directory {path.absolute().parent}"
        raise OutputUnwritable(f"{path} {cause}", "Name a file in an existing directory")
    # A file is replaced, which its directory must allow; a pipe or a device is written to.
    place = path if path.exists() and not path.is_file() else path.absolute().parent
    if not os.access(place, os.W_OK):
        raise OutputUnwritable(f"{place} is not writable", "Name a file in a directory of yours")


def _write_json(path: Path | None, form: dict[str, Any]) -> None:
    if path is not None:
        _write(path, json.dumps(form, indent=2, allow_nan=False) + "\n")


def _write(path: Path, text: str) -> None:
    """The whole file or nothing of it.

    Raises:
        OutputUnwritable: the system refuses.
    """
    from tta_runtime.atomic import write_atomic

    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")  # a pipe or a device: there is nothing to replace
        else:
            write_atomic(path, text.encode())
    except OSError as error:
        raise OutputUnwritable(f"cannot write {path}: {error.strerror}", "Name another file") from error
