"""Bits per byte over the bytes of context, as an SVG file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

LINES = (
    ("no_context_bpb", "nothing before it", "#777777", "--"),
    ("window_bpb", "window of equal memory", "#e69f00", "-."),
    ("stream_bpb", "absorbed, attention mapper", "#0072b2", "-"),
    ("delta_rule_bpb", "absorbed, delta rule", "#009e73", "-"),
    ("full_context_bpb", "whole context", "#d55e00", ":"),
)
"""Column, name, colour of Okabe and Ito's palette, style."""


def drawn(rows: Sequence[Mapping[str, Any]]) -> str:
    """An SVG document: a panel for each set of texts.

    Args:
        rows: of run.py.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    sets = list(dict.fromkeys(str(row["texts"]) for row in rows))
    with pyplot.rc_context({"svg.hashsalt": "tta", "font.size": 9, "svg.fonttype": "none"}):
        figure, panels = pyplot.subplots(
            1, len(sets), figsize=(0.6 + 3.9 * len(sets), 3.6), squeeze=False, layout="constrained"
        )
        for panel, name in zip(panels[0], sets, strict=True):
            own = [row for row in rows if row["texts"] == name]
            contexts = [row["context_bytes"] for row in own]
            for column, label, colour, style in LINES:
                # No bands: documents differ from each other far more than one does under two conditions.
                values = [row[column] for row in own]
                panel.plot(contexts, values, style, color=colour, label=label, marker="o", markersize=3)
            panel.set_xscale("log", base=2)
            panel.set_xticks(contexts, [f"{context:,}" for context in contexts])
            panel.set_title(name, loc="left", fontsize=10)
            panel.set_xlabel("bytes before the text")
            panel.spines[["top", "right"]].set_visible(False)
        panels[0][0].set_ylabel("bits per byte")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return file.getvalue()
