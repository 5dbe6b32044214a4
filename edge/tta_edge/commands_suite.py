"""`tta-edge evaluate --suite`: reads the options; what it needs is imported when it runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tta_edge.output import check_output, write_output

if TYPE_CHECKING:
    from tta_edge.suite.run import Progress
    from tta_edge.suite.stage import Seat

PIPE_WIDTH = 160
OWN = {
    "shifts": "--shifts",
    "batch": "--batch",
    "setting": "--setting",
    "shuffle": "--shuffle",
    "settings": "--set",
}
"""Options that a suite decides itself."""


def check_options(given: Sequence[str]) -> None:
    """Refuse options that a suite decides itself.

    Args:
        given: names of the options on the command line.

    Raises:
        SuiteOption: one of them is among these.
    """
    from tta_edge.suite.errors import SuiteOption

    for name in given:
        if name in OWN:
            raise SuiteOption(f"{OWN[name]} does not go with a suite, which has its own", "Leave it out")


@dataclass(frozen=True)
class Options:
    """The options of a suite as the user gave them.

    Attributes:
        suite: its name.
        bundles: directories.
        sources: texts, each alone or behind `MODEL=`.
        natural: likewise, of images of another domain.
        malicious: files, each alone or behind `MODEL=`.
        streams: patterns of names.
        methods: players; None: the suite's.
        again: players whose stored results do not count.
        store: directory; None: nothing is kept.
        jobs: worker processes; None: as many as cores.
        seed: of everything drawn.
        limit: no stream longer than so many samples.
        threads: of each engine.
        report: HTML file.
        json_file: JSON file.
        command: the words of this command line.
    """

    suite: str
    bundles: Sequence[str]
    sources: Sequence[str]
    natural: Sequence[str] = ()
    malicious: Sequence[str] = ()
    streams: Sequence[str] = ()
    methods: Sequence[str] | None = None
    again: Sequence[str] = ()
    store: Path | None = None
    jobs: int | None = None
    seed: int = 0
    limit: int | None = None
    threads: int | None = None
    report: Path | None = None
    json_file: Path | None = None
    command: Sequence[str] = ()


def play_suite(options: Options) -> None:
    """Play a suite, print its tables, write JSON and report.

    Raises:
        TtaError: options, bundles, data or stored results are refused, or a player fails.
    """
    from rich.console import Console

    from tta_edge.suite.catalogue import limited, scale_of
    from tta_edge.suite.run import Plan, Setup, Store, run
    from tta_edge.suite.summary import summarise
    from tta_edge.suite.table import tables

    scale = limited(scale_of(options.suite), options.limit)
    check_output(options.json_file)
    check_output(options.report)
    if options.report is not None:
        from tta_edge.figure import check_plots

        check_plots()
    seats = seats_of(options.bundles, options.sources, options.natural, options.malicious)
    images = "" if options.store is None else str(options.store / "images")
    setup = Setup(scale, options.seed, images, tuple(options.streams), options.threads or 1)
    screen = Console()
    # In a file or a pipe nobody sees a window; the columns keep their width there.
    console = screen if screen.is_terminal else Console(width=PIPE_WIDTH)
    if not options.malicious and not options.streams:
        typer.echo(
            "note: no malicious streams are played; make them with tta-export attack and name them with --malicious",
            err=True,
        )
    with _Bar() as progress:
        boards = run(
            Plan(seats, setup, options.methods, options.again),
            Store(options.store),
            jobs=options.jobs,
            progress=progress,
        )
    summaries = [summarise(board) for board in boards]
    console.print(tables(summaries))
    if options.json_file is not None:
        from tta_edge.suite.form import to_json

        form = to_json(summaries, suite=options.suite, seed=options.seed, scale=scale)
        write_output(options.json_file, json.dumps(form, indent=2, allow_nan=False) + "\n")
    if options.report is not None:
        import shlex

        from tta_edge.report import Facts, host_facts
        from tta_edge.suite.page import render

        facts = Facts(shlex.join(options.command), datetime.now(timezone.utc), host_facts())
        write_output(options.report, render(summaries, facts, suite=options.suite, seed=options.seed))


def seats_of(
    bundles: Sequence[str], sources: Sequence[str], natural: Sequence[str], malicious: Sequence[str]
) -> list[Seat]:
    """Which bundle gets which data. A text behind `MODEL=` is for that model, one alone for the others.

    Args:
        bundles: directories.
        sources: of images.
        natural: of images of another domain.
        malicious: files; several may be for one bundle.

    Raises:
        SuiteOption: a bundle has no source or two, or a text is for no bundle.
        BundleError: a bundle cannot be opened.
    """
    from tta_edge.suite.errors import SuiteOption
    from tta_edge.suite.stage import Seat
    from tta_runtime.bundle import Bundle

    models = {Bundle.open(path).manifest.model_id: path for path in bundles}
    by_option = {
        option: _by_model(option, texts, models)
        for option, texts in (("--stream", sources), ("--natural", natural), ("--malicious", malicious))
    }
    seats = []
    for model, path in models.items():
        source, other, files = (by_option[option][model] for option in by_option)
        for option, texts in (("--stream", source), ("--natural", other)):
            if len(texts) > 1:
                raise SuiteOption(
                    f"{model} has two {option}: {', '.join(texts)}", "Give one, as MODEL=SOURCE"
                )
        if not source:
            raise SuiteOption(f"{model} has no images", f"Give --stream {model}=npz:FILE")
        seats.append(Seat(path, source[0], other[0] if other else None, tuple(files)))
    return seats


def _by_model(option: str, texts: Sequence[str], models: Mapping[str, str]) -> dict[str, list[str]]:
    """Model -> what an option gives it: its own texts, or else those for all."""
    from tta_edge.suite.errors import SuiteOption
    from tta_runtime.errors import did_you_mean

    own: dict[str, list[str]] = {}
    common: list[str] = []
    for text in texts:
        model, equals, rest = text.partition("=")
        # A path may hold an equals sign; then what stands before it is no plain word.
        if not equals or not model or any(sign in model for sign in ":/\\"):
            common.append(text)
        elif model in models:
            own.setdefault(model, []).append(rest)
        else:
            raise SuiteOption(
                f"{option} {text} is for the model `{model}`" + did_you_mean(model, models),
                "Name a bundle's model",
            )
    return {model: own.get(model, common) for model in models}


class _Bar:
    """A progress bar on stderr; as a context it is the function that is told of progress."""

    def __enter__(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        errors = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)
        self._bar.start()
        tasks = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = self._bar.add_task(what, total=total)
            self._bar.update(tasks[what], completed=done)

        return tell

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
