"""Pictures of streams, drawn with matplotlib (the extra `plots`): accuracy falling and recovering as a file, and
the plots of a report as SVG text.
"""

from __future__ import annotations

import importlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta_edge.live import Phase
from tta_edge.streams.errors import PlotsExtraMissing
from tta_edge.streams.measures import rolling_mean
from tta_runtime.errors import BadValue

FORMATS = (".svg", ".png", ".pdf")
SIZE_INCHES = (11.0, 3.6)
WINDOW = 100
"""Samples of the rolling mean; at the start of a part it still holds some of the part before."""
THIN = 5
"""Every so many samples one point is drawn: it looks the same and makes a small file."""
ADAPTED, SOURCE = "#0b6e4f", "#b23a48"

# The plots of a report. A colour is drawn as a hex value and becomes a CSS variable of the page with that value to
# fall back on, so that the page decides how its plots look in the dark and on paper.
INK, GRID, PAPER = "#1b1f24", "#d6dae0", "#fffffe"
FROZEN = "#6b7380"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Okabe and Ito's palette, which readers with any colour vision can tell apart; yellow and black left out."""
VARIABLES = {INK: "--ink", GRID: "--line", PAPER: "--paper", FROZEN: "--frozen"} | {
    colour: f"--series-{k}" for k, colour in enumerate(SERIES)
}
STYLE = dict.fromkeys(
    ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
) | {
    "grid.color": GRID,
    "axes.prop_cycle": f"cycler('color', ['{INK}'])",
}
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "oooo")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
BARS_A_ROW = 32
PANELS_A_ROW = (4, 3)
POINTS = 200
"""Most points of one curve."""


@dataclass(frozen=True)
class Curve:
    """The predictions of one method under one shift.

    Attributes:
        method: its name.
        wrong: [samples] bool, in order of arrival.
    """

    method: str
    wrong: NDArray[np.bool_]


def check_figure(path: Path) -> None:
    """Refuse early what could only fail after the work is done.

    Raises:
        BadValue: the name ends in no known format.
        PlotsExtraMissing: matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise BadValue(
            f"{path} does not end in {', '.join(FORMATS)}", "Name a figure of one of these formats"
        )
    check_plots()


def check_plots() -> None:
    """Refuse early where nothing can be drawn.

    Raises:
        PlotsExtraMissing: matplotlib is not installed.
    """
    _matplotlib("matplotlib")


def draw(path: Path, phases: Sequence[Phase], title: str) -> None:
    """Rolling accuracy of the adapting model and of the frozen source over the whole stream.

    Args:
        path: svg, png or pdf file to write.
        phases: labelled parts, in order.
        title: of the picture.

    Raises:
        BadValue, PlotsExtraMissing: see `check_figure`.
        OSError: the file cannot be written.
    """
    check_figure(path)
    with _figure(SIZE_INCHES) as figure:
        axes = figure.subplots()
        for parts, colour, label in (
            ([phase.source_wrong for phase in phases], SOURCE, "frozen source model"),
            ([phase.wrong for phase in phases], ADAPTED, "adapting"),
        ):
            wrong = np.array([each for part in parts for each in part], dtype=np.float64)
            accuracy = 1.0 - rolling_mean(wrong, WINDOW)
            shown = np.arange(0, len(wrong), THIN)
            axes.plot(shown, accuracy[shown], color=colour, linewidth=1.6, label=label)
        start = 0
        for phase in phases:
            axes.axvline(start, color="0.8", linewidth=0.8, zorder=0)
            name = "clean" if phase.shift is None else str(phase.shift).replace("_", " ")
            axes.text(start + 0.5 * phase.samples, 1.03, name, ha="center", va="bottom", fontsize=8)
            start += phase.samples
        axes.set(xlim=(0, start), ylim=(0, 1.02), xlabel="samples", ylabel=f"accuracy, last {WINDOW}")
        axes.set_title(title, fontsize=10, pad=18)
        axes.legend(loc="lower left", fontsize=8, framealpha=0.9)
        axes.spines[["top", "right"]].set_visible(False)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata)


def error_bars(
    labels: Sequence[str],
    errors: Mapping[str, Sequence[float]],
    *,
    samples: int,
    frozen: str | None,
    title: str,
    description: str,
) -> str:
    """Grouped bars of the error, one group for each shift, with whiskers of one standard error.

    Args:
        labels: of the shifts.
        errors: method -> the error under each shift, as a fraction.
        samples: behind each error; the whiskers are sqrt(error (1 - error) / samples).
        frozen: the method drawn in grey.
        title: short, for readers who cannot see the plot.
        description: what it shows, likewise.

    Returns:
        An `svg` element to stand inside HTML.

    Raises:
        PlotsExtraMissing: matplotlib is not installed.
    """
    rows = math.ceil(len(labels) * len(errors) / BARS_A_ROW)
    groups = math.ceil(len(labels) / rows)
    rows = math.ceil(len(labels) / groups)
    width = 0.84 / len(errors)
    looks = _looks(tuple(errors), frozen)
    with _figure((SIZE_INCHES[0], 0.5 + 2.5 * rows), STYLE) as figure:
        panels = figure.subplots(rows, 1, sharey=True, squeeze=False)[:, 0]
        handles: list[Any] = []
        for row, axes in enumerate(panels):
            part = slice(row * groups, (row + 1) * groups)
            places = np.arange(len(labels[part]))
            handles = []
            for k, (method, all_values) in enumerate(errors.items()):
                values = 100 * np.array(all_values[part])
                whiskers = np.sqrt(values * (100 - values) / samples)
                colour, hatch, _ = looks[method]
                bars = axes.bar(
                    places + (k - (len(errors) - 1) / 2) * width, values, width,
                    yerr=whiskers, color=colour, hatch=hatch, edgecolor=PAPER, linewidth=0.6,
                    error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 1.6},
                )  # fmt: skip
                handles.append(bars)
            axes.set_xticks(places, [_readable(label, lines=groups > 6) for label in labels[part]])
            axes.set_xlim(-0.6, groups - 0.4)
            axes.set_ylabel("error, %")
            _dress(axes)
            axes.tick_params(axis="x", length=0)
        # Only now, when the tallest bar of all rows is known: they share the scale.
        panels[0].set_ylim(0, min(100.0, panels[0].get_ylim()[1]))
        figure.legend(handles, list(errors), loc="outside upper left", ncols=len(errors), frameon=False)
        return _svg(figure, "error-bars", title, description)


def rolling_errors(
    panels: Sequence[tuple[str, Sequence[Curve]]],
    *,
    window: int,
    frozen: str | None,
    title: str,
    description: str,
    name: str = "rolling-errors",
) -> str:
    """The error over the last `window` samples along the stream: one small plot for each shift, all on one scale.

    Args:
        panels: (label of the shift, the curves of the methods), in order.
        window: samples of the rolling mean; a curve begins where half of them are there.
        frozen: the method drawn in grey.
        title: short, for readers who cannot see the plot.
        description: what it shows, likewise.
        name: in front of the ids, for a page with several.

    Returns:
        An `svg` element to stand inside HTML.

    Raises:
        PlotsExtraMissing: matplotlib is not installed.
    """
    methods = tuple(curve.method for curve in panels[0][1])
    looks = _looks(methods, frozen)
    # The fuller last row wins.
    columns = min(len(panels), min(PANELS_A_ROW, key=lambda each: -len(panels) % each))
    rows = math.ceil(len(panels) / columns)
    with _figure((SIZE_INCHES[0], 0.5 + (2.1 if columns > 1 else 3.2) * rows), STYLE) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        lines: list[Any] = []
        for axes, (label, curves) in zip(grid.flat, panels, strict=False):
            lines = []
            for curve in curves:
                rolling = 100 * rolling_mean(curve.wrong.astype(np.float64), window)
                last = len(rolling) - 1
                first = min(window // 2, last)
                shown = np.unique(np.linspace(first, last, POINTS).round().astype(int))
                colour, _, dashes = looks[curve.method]
                lines += axes.plot(shown + 1, rolling[shown], color=colour, linestyle=dashes, linewidth=1.5)
            axes.set_title(_readable(label), fontsize=9, loc="left")
            _dress(axes)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for column in range(columns):  # the lowest plot of each column says what its axis is
            lowest = grid[(len(panels) - 1 - column) // columns, column]
            lowest.set_xlabel("samples")
            lowest.tick_params(axis="x", labelbottom=True)
        for axes in grid[:, 0]:
            axes.set_ylabel("error, %")
        grid[0, 0].set_ylim(bottom=0, top=min(102.0, grid[0, 0].get_ylim()[1]))
        grid[0, 0].set_xlim(left=0, right=max(len(curve.wrong) for _, curves in panels for curve in curves))
        figure.legend(lines, methods, loc="outside upper left", ncols=len(methods), frameon=False)
        return _svg(figure, name, title, description)


def _looks(methods: Sequence[str], frozen: str | None) -> dict[str, tuple[str, str, Any]]:
    """Colour, hatch and dashes of each method: no two share all three, so that colour is never all there is."""
    adapting = [method for method in methods if method != frozen]
    looks: dict[str, tuple[str, str, Any]] = {
        method: (SERIES[k % len(SERIES)], HATCHES[k % len(HATCHES)], DASHES[k % len(DASHES)])
        for k, method in enumerate(adapting)
    }
    if frozen is not None:
        looks[frozen] = (FROZEN, "", (0, (3, 1.5)))
    return looks


def _dress(axes: Any) -> None:
    """What all axes of a report have in common."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)


def _readable(label: str, *, lines: bool = False) -> str:
    return label.replace("_", "\n" if lines else " ")


@contextmanager
def _figure(size_inches: tuple[float, float], style: Mapping[str, str] | None = None) -> Iterator[Any]:
    """An empty figure to draw in and save. Fixed ids and no date: the same numbers give the same file.

    Args:
        size_inches: width and height.
        style: settings of matplotlib.

    Raises:
        PlotsExtraMissing: matplotlib is not installed.
    """
    fixed = {"svg.hashsalt": "tta-runtime", "svg.fonttype": "none", "text.parse_math": False}
    with _matplotlib("matplotlib").rc_context({**fixed, **(style or {})}):
        yield _matplotlib("matplotlib.figure").Figure(figsize=size_inches, layout="constrained")


def _svg(figure: Any, name: str, title: str, description: str) -> str:
    """The figure as an element for HTML: named for readers who cannot see it, ids of its own, colours of the page.

    Args:
        figure: of matplotlib.
        name: in front of every id, so that two figures of one page do not share any.
        title: short.
        description: what the figure shows.
    """
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    drawn = stream.getvalue()
    head, drawn = drawn[drawn.index("<svg") :].split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)
    assert view is not None
    # The page has its own rules; the figure's would hold for the whole of it.
    drawn = re.sub(r"<metadata>.*?</metadata>|<style\b.*?</style>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'\bid="', f'id="{name}-', drawn)
    drawn = re.sub(r'(url\(|href=")#', rf"\1#{name}-", drawn)
    drawn = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", drawn)
    for colour, variable in VARIABLES.items():
        drawn = drawn.replace(colour, f"var({variable}, {colour})")
    return (
        f'<svg class="plot" {view[0]} role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(description)}</desc>{drawn}'
    )


def _matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PlotsExtraMissing(
            "a figure needs matplotlib, which is not installed", "Run pip install 'tta-runtime[plots]'"
        ) from error
