"""The picture of a stream: accuracy falling and recovering, drawn with matplotlib (the extra `plots`)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
    # Fixed ids and no date: the same stream gives the same file.
    with _matplotlib("matplotlib").rc_context({"svg.hashsalt": "tta-runtime", "svg.fonttype": "none"}):
        figure = _matplotlib("matplotlib.figure").Figure(figsize=SIZE_INCHES, layout="constrained")
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


def _matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PlotsExtraMissing(
            "a figure needs matplotlib, which is not installed", "Run pip install 'tta-runtime[plots]'"
        ) from error
