"""The commands `stream`, `evaluate` and `demo`. Each only reads its options; what it needs is imported when
it runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tta_edge.commands_operate import ENDPOINT, To
from tta_edge.commands_text import PREFIX, stream_text
from tta_edge.output import check_output, write_output
from tta_runtime.errors import BadValue
from tta_runtime.exit_codes import ExitCode

if TYPE_CHECKING:
    from rich.console import Console

    from tta_edge.live import Phase
    from tta_edge.streams.source import Source

Seed = Annotated[int, typer.Option(min=0, help="Of the shifts, of --shuffle and of the method.")]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON.", show_default=False)
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Only the first so many images of each part, or pieces.", show_default=False),
]
Batch = Annotated[int, typer.Option(min=1, help="Images that arrive together.")]
Shuffle = Annotated[bool, typer.Option("--shuffle", help="Draw the order of the images from the seed.")]

SHIFT_HELP = (
    "Common corruptions as NAME:SEVERITY, separated by commas, e.g. gaussian_noise:5,fog:3; "
    "all:5 stands for the fifteen."
)
SUITE_PANEL = "Suite"
SOURCE_HELP = "digits, npz:FILE, images:DIR or cifar10c:DIR."


def stream(
    command: typer.Context,
    source: Annotated[str, typer.Argument(help=f"{SOURCE_HELP[:-1]}; or text:FILE for a language model.")],
    shift: Annotated[str | None, typer.Option(help=SHIFT_HELP, show_default=False)] = None,
    to: To = ENDPOINT,
    batch: Batch = 64,
    limit: Limit = None,
    shuffle: Shuffle = False,
    repeat: Annotated[
        bool, typer.Option("--repeat", help="Begin again at the end, without a reset, until Ctrl-C.")
    ] = False,
    stream_name: Annotated[
        str, typer.Option("--stream", help="The daemon's stream, or session, to use; it is reset first.")
    ] = "tta-edge-stream",
    seed: Seed = 0,
    timeout_s: Annotated[
        float, typer.Option(min=0.001, help="Longest wait for an answer, in seconds.")
    ] = 30.0,
    live: Annotated[bool, typer.Option(help="Show the live view (on a terminal).")] = True,
    piece_bytes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of a text: bytes that are scored, then absorbed, at once; without it a third of what the model sees.",
            show_default=False,
        ),
    ] = None,
    json_file: Json = None,
) -> None:
    """Stream images to a running daemon and watch accuracy fall and recover.

    The images come clean first, then once more under each shift, unannounced: the daemon is reset only at the
    start. Beside each answer stands that of the frozen source model. At the end: clean, source and adapted
    accuracy, gap recovered, recovery time. Where there are no labels: agreement with the frozen source,
    entropy, drift.

    A text goes to a language model in pieces: each is scored alone, after all before it was absorbed, and with as
    much of it in front as the model sees; the bits per byte fall as context is absorbed.

    Example: tta-edge stream digits --shift gaussian_noise:5 --to tcp://127.0.0.1:5555

    Example: tta-edge stream text:manual.txt --piece-bytes 256
    """
    if source.startswith(PREFIX):
        _only_for_images(command)
        stream_text(
            source, to=to, piece_bytes=piece_bytes, limit=limit, session=stream_name, timeout_s=timeout_s,
            json_file=json_file,
        )  # fmt: skip
        return
    if piece_bytes is not None:
        raise BadValue(f"--piece-bytes is for text, and {source} are images", "Use --batch")
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
    context: typer.Context,
    bundles: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[BUNDLE]...",
            help="Directory of a bundle; without it the built-in one. A suite takes several.",
            show_default=False,
        ),
    ] = None,
    stream: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{SOURCE_HELP} With several bundles also MODEL=SOURCE, repeatable.", show_default="digits"
        ),
    ] = None,
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
    suite: Annotated[
        str | None,
        typer.Option(
            help="Play a suite of streams, friendly and hostile: quick or safety.",
            rich_help_panel=SUITE_PANEL,
            show_default=False,
        ),
    ] = None,
    streams: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Only these streams, by name or family, separated by commas, with * and ?.",
            rich_help_panel=SUITE_PANEL,
            show_default=False,
        ),
    ] = None,
    natural: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Images of another domain, of the same size and classes; also MODEL=SOURCE. Repeatable.",
            rich_help_panel=SUITE_PANEL,
            show_default=False,
        ),
    ] = None,
    malicious: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="A stream made by tta-export attack; also MODEL=FILE. Repeatable.",
            rich_help_panel=SUITE_PANEL,
            show_default=False,
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep results and shifted images here; what is there is not played again.",
            rich_help_panel=SUITE_PANEL,
            show_default=False,
        ),
    ] = None,
    again: Annotated[
        str | None,
        typer.Option(
            metavar="METHODS",
            help="Play these again, whatever --store holds.",
            rich_help_panel=SUITE_PANEL,
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Worker processes; default: the cores.",
            rich_help_panel=SUITE_PANEL,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Measure the error of each method under each shift, or on a suite of streams, without a daemon.

    Needs labels. Images arrive in the order of the file unless --shuffle. The last batch may be smaller and
    counts like the others. No guard acts: what is measured is the method itself.

    With --suite each method plays every stream of the suite and is compared with the frozen source; shifts, batches and
    order are the suite's own. docs/suite.md says what each stream is.

    Example: tta-edge evaluate my-bundle --stream npz:test.npz --shifts all:5 --methods source,norm,tent
    --batch 64

    Example: tta-edge evaluate my-bundle --stream npz:test.npz --suite quick --store results
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

    given = [
        name for name, value in context.params.items() if _was_given(context, name) and value is not None
    ]
    if suite is not None:
        from tta_edge.commands_suite import Options, check_options, play_suite

        check_options(given)
        play_suite(
            Options(
                suite, bundles or [str(builtin_bundle())], stream or ["digits"],
                natural=natural or (), malicious=malicious or (), streams=_words(streams) or (),
                methods=_words(methods), again=_words(again) or (), store=store, jobs=jobs, seed=seed,
                limit=limit, threads=threads, report=report, json_file=json_file, command=_command(context),
            )
        )  # fmt: skip
        return
    _check_no_suite(given, bundles or (), stream or ())
    bundle = bundles[0] if bundles else None
    check_output(json_file)
    check_output(report)
    if report is not None:
        from tta_edge.figure import check_plots

        check_plots()
    source = open_source(stream[0] if stream else "digits")
    parsed = parse_shifts(source, shifts)
    _warn_of_sorted(source, shuffle)
    opened = Bundle.open(bundle if bundle is not None else builtin_bundle())
    names = (
        [name for name in opened.manifest.methods if not opened.manifest.needs_teacher(name)]
        if methods is None
        else [name.strip() for name in methods.split(",")]
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
        write_output(report, render(result, Facts(again, datetime.now(timezone.utc), host_facts())))


def _only_for_images(command: typer.Context) -> None:
    """Refuse what means nothing for a text.

    Raises:
        BadValue: one of these options was given.
    """
    for name in ("shift", "batch", "shuffle", "repeat", "seed"):
        if _was_given(command, name):
            raise BadValue(f"--{name} is for images, and a text is streamed", "Leave it out")


def _was_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, whatever its value."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _words(text: str | None) -> list[str] | None:
    """A list of a command line."""
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _command(context: typer.Context) -> list[str]:
    """The words of this command line, as a report repeats them."""
    words = ["tta-edge", "evaluate"]
    for parameter in context.command.params:
        name = parameter.name or ""
        value = context.params.get(name)
        if not _was_given(context, name) or value is None:
            continue
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if parameter.param_type_name == "argument":
                words.append(str(each))
            elif each is not False:
                words += [parameter.opts[0], *([] if each is True else [str(each)])]
    return words


def _check_no_suite(given: Sequence[str], bundles: Sequence[str], streams: Sequence[str]) -> None:
    """Refuse what only a suite can use.

    Raises:
        BadValue: one of its options, or several bundles or streams.
    """
    for name in ("streams", "natural", "malicious", "store", "again", "jobs"):
        if name in given:
            raise BadValue(f"--{name} is an option of a suite and no --suite is named", "Add --suite quick")
    if len(bundles) > 1 or len(streams) > 1:
        raise BadValue(
            f"{len(bundles)} bundles and {len(streams)} streams are named, only a suite takes several",
            "Add --suite quick, or name one",
        )


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


def _write_json(path: Path | None, form: dict[str, Any]) -> None:
    if path is not None:
        write_output(path, json.dumps(form, indent=2, allow_nan=False) + "\n")
