"""An evaluation as one HTML file: no network, no script, nothing beside it. It opens by double click and prints.

Everything that comes from a file or a command line (model id, paths, names) is escaped. The numbers stand in `data`
elements: the text is rounded for reading, the attribute `value` is the fraction of the JSON form.
"""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from importlib import metadata
from pathlib import Path

from tta_edge import figure, html
from tta_edge.comparison import CLEAR, Cell, MethodSummary, Sign, compare
from tta_edge.evaluate import NO_SHIFT, Evaluation, Plan
from tta_edge.figure import Curve
from tta_runtime import __version__

ENGINES = ("onnxruntime", "onnxruntime-gpu")
"""Distributions that bring ONNX Runtime."""
MAX_WINDOW = 100
"""Samples of the rolling error; a short stream gets a fifth of its length."""


@dataclass(frozen=True)
class Facts:
    """What a report says beside the evaluation.

    Attributes:
        command: the command line that gives the evaluation again.
        made: when.
        host: what it ran on: name -> value.
        version: of this package.
    """

    command: str
    made: datetime
    host: Mapping[str, str]
    version: str = __version__


def host_facts() -> dict[str, str]:
    """What this process runs on, without anything that names the machine."""
    found = [f"{name} {version}" for name in ENGINES if (version := _installed(name)) is not None]
    return {
        "CPUs": str(os.cpu_count() or "unknown"),
        "Machine": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "ONNX Runtime": ", ".join(found) or "unknown",
    }


def command_line(
    plan: Plan, *, bundle: str | None, threads: int | None, report: Path, json: Path | None = None
) -> str:
    """The command that gives an evaluation again, with everything named that could be left to a default.

    Args:
        plan: what was evaluated.
        bundle: as the user gave it; None: the built-in one.
        threads: as given.
        report: the report's file, as given.
        json: the JSON file, as given.
    """
    words = ["tta-edge", "evaluate", *([] if bundle is None else [bundle]), "--stream", plan.source.name]
    words += ["--shifts", ",".join(NO_SHIFT if shift is None else str(shift) for shift in plan.shifts)]
    words += ["--methods", ",".join(plan.methods), "--batch", str(plan.batch)]
    words += ["--setting", plan.setting, "--seed", str(plan.seed)]
    words += ["--shuffle"] if plan.shuffle else []
    words += [] if plan.limit is None else ["--limit", str(plan.limit)]
    for method, values in (plan.hyper or {}).items():
        for name, value in values.items():
            words += ["--set", f"{method}.{name}={value!r}"]
    for option, given in (("--threads", threads), ("--report", report), ("--json", json)):
        words += [] if given is None else [option, str(given)]
    return shlex.join(words)


def render(evaluation: Evaluation, facts: Facts) -> str:
    """The report.

    Raises:
        PlotsExtraMissing: matplotlib is not installed.
    """
    methods = compare(evaluation)
    title = f"Evaluation of {evaluation.model}"
    sections = (
        _head(evaluation, facts, title),
        html.section("Summary", _verdict(evaluation, methods), _summary_table(evaluation, methods)),
        html.section("Error under each shift", _legend(evaluation), _errors_table(evaluation, methods)),
        html.section("Bars", _bars(evaluation, methods)),
        html.section("Along the stream", _curves(evaluation)),
        html.section("Settings of the methods", _hyper_table(evaluation)),
        _footer(),
    )
    return html.document(title, sections)


def verdict(evaluation: Evaluation, methods: Sequence[MethodSummary]) -> list[str]:
    """In plain words: where adapting helps, where it loses, what was refused. One sentence or two for each method,
    as text (not HTML).
    """
    lines = []
    if evaluation.frozen is None:
        lines.append(
            "The frozen source was not evaluated, so nothing here says whether adapting helps; add a method without "
            "a step (source) to --methods."
        )
    for method in methods:
        if method.difference is not None:
            lines.append(_sentence(method, evaluation.frozen or ""))
    lines += [
        f"{method.name}: {html.count(cell.row.refused, 'step')} under {cell.row.label} thrown away because theta "
        f"or state became NaN or Inf (batch {_ranges(cell.row.refused_batches)}); the batches were answered all the "
        "same."
        for method in methods
        for cell in method.cells
        if cell.row.refused
    ]
    if not any(method.refused for method in methods):
        lines.append("No step was refused.")
    return lines


def _sentence(method: MethodSummary, frozen: str) -> str:
    difference = method.difference
    assert difference is not None
    words: dict[Sign, str] = {
        "better": "helps",
        "worse": "loses",
        "unclear": "makes no clear difference",
    }
    shifts = sum(cell.row.shift != NO_SHIFT for cell in method.cells)
    text = (
        f"{method.name} {words[difference.sign]}{' on average' if shifts > 1 else ''}: "
        f"error {html.percent(method.error)} %, {html.points(difference)} points against {frozen}."
    )
    if len(method.cells) == 1:
        return text
    by_sign: dict[Sign, list[str]] = {"better": [], "worse": [], "unclear": []}
    for cell in method.cells:
        if cell.difference is not None:
            label = f"{NO_SHIFT} (no shift)" if cell.row.shift == NO_SHIFT else cell.row.label
            by_sign[cell.difference.sign].append(label)
    parts: tuple[tuple[str, Sign], ...] = (
        ("Clearly better", "better"),
        ("clearly worse", "worse"),
        ("no clear difference", "unclear"),
    )
    found = [f"{words} under {', '.join(by_sign[sign])}" for words, sign in parts if by_sign[sign]]
    joined = "; ".join(found)
    return f"{text} {joined[0].upper()}{joined[1:]}."


# -------------------------------------------------------------------------------------------------- parts


def _head(evaluation: Evaluation, facts: Facts, title: str) -> str:
    plan = evaluation.plan
    entries = {
        "Bundle": evaluation.digest,
        "Model": evaluation.model,
        "Stream": plan.source.name,
        "Samples": f"{evaluation.rows[0].samples} for each shift"
        + (f" (of {plan.source.count})" if plan.limit is not None else ""),
        "Batch": str(plan.batch),
        "Setting": plan.setting,
        "Order": "shuffled" if plan.shuffle else "as in the stream",
        "Seed": str(plan.seed),
        **facts.host,
        "tta-runtime": facts.version,
        "Date": facts.made.strftime("%Y-%m-%d %H:%M %Z").strip(),
    }
    listed = "".join(
        f"<div{' class=wide' if name == 'Bundle' else ''}><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in entries.items()
    )
    return (
        f"<header>\n<h1>{escape(title)}</h1>\n<dl>{listed}</dl>\n"
        f"<p>The same again:</p>\n<pre><code>{escape(facts.command)}</code></pre>\n</header>"
    )


def _verdict(evaluation: Evaluation, methods: Sequence[MethodSummary]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in verdict(evaluation, methods))
    return f'<ul class="verdict">{items}</ul>'


def _summary_table(evaluation: Evaluation, methods: Sequence[MethodSummary]) -> str:
    several = len(evaluation.plan.shifts) > 1
    clean = several and any(method.clean is not None for method in methods)
    heads = ["method", *(["clean error,&nbsp;%"] if clean else []), f"{'mean ' * several}error,&nbsp;%"]
    heads += ["against source, points", *(["gap recovered"] if clean else []), "batches adapted", "refused"]
    batches = sum(-(-row.samples // evaluation.plan.batch) for row in evaluation.rows_of(methods[0].name))
    rows = []
    for method in methods:
        cells = [
            *([html.number(method.clean, html.percent(method.clean))] if clean else []),
            html.number(method.error, html.percent(method.error)),
            html.difference(method.difference),
            *([html.number(method.gap_recovered, html.fraction(method.gap_recovered))] if clean else []),
            f"{method.adapted} of {batches}",
            str(method.refused),
        ]
        name = escape(method.name) + (" <small>frozen</small>" if method.name == evaluation.frozen else "")
        rows.append([name, *cells])
    return html.table("The methods over the whole evaluation", heads, rows)


def _legend(evaluation: Evaluation) -> str:
    text = f"{html.BEST} lowest error under the shift"
    if evaluation.frozen is not None:
        text += (
            f"; {html.WORSE} above the frozen source. Below the error: its difference to the source in points, "
            "± one standard error"
        )
    return f'<p class="note">{text}.</p>'


def _errors_table(evaluation: Evaluation, methods: Sequence[MethodSummary]) -> str:
    rows = [
        [
            escape(NO_SHIFT if shift is None else str(shift)),
            *(_cell(method.cells[k], len(methods)) for method in methods),
        ]
        for k, shift in enumerate(evaluation.plan.shifts)
    ]
    mean: list[str] | None = None
    if sum(shift is not None for shift in evaluation.plan.shifts) > 1:
        name = "mean of the shifts" if None in evaluation.plan.shifts else "mean"
        mean = [name, *(html.number(method.error, html.percent(method.error)) for method in methods)]
    order = ", in this order without a reset" if evaluation.plan.setting == "continual" else ""
    heads = ["shift", *(escape(method.name) for method in methods)]
    return html.table(f"Error in %{order}", heads, rows, footer=mean)


def _cell(cell: Cell, methods: int) -> str:
    marks, kind = "", []
    if cell.best and methods > 1:
        marks, kind = f"{html.BEST}<span class=unseen>lowest</span> ", ["best"]
    if cell.difference is not None and cell.difference.value > 0:
        marks += f"{html.WORSE}<span class=unseen>worse than the source</span> "
        kind.append("worse")
    text = f"{marks}{html.number(cell.row.error, html.percent(cell.row.error))}"
    if cell.difference is not None:
        text += f"<small>{html.points(cell.difference)}</small>"
    return f'<div class="{" ".join(kind)}">{text}</div>' if kind else f"<div>{text}</div>"


def _bars(evaluation: Evaluation, methods: Sequence[MethodSummary]) -> str:
    labels = [row.label for row in evaluation.rows_of(methods[0].name)]
    means = "; ".join(f"{method.name} {html.percent(method.error)} %" for method in methods)
    plot = figure.error_bars(
        labels,
        {method.name: [cell.row.error for cell in method.cells] for method in methods},
        samples=evaluation.rows[0].samples,
        frozen=evaluation.frozen,
        title="Error of each method under each shift",
        description=f"Grouped bars; the numbers stand in the table above. Mean error: {means}.",
    )
    return html.figure(plot, "Error of each method under each shift; the whiskers are one standard error.")


def _curves(evaluation: Evaluation) -> str:
    plan = evaluation.plan
    window = max(1, min(MAX_WINDOW, evaluation.rows[0].samples // 5))
    rows = [evaluation.rows_of(method) for method in plan.methods]
    labels = [row.label for row in rows[0]]
    if plan.setting == "continual":
        labels = [f"{k + 1}. {label}" for k, label in enumerate(labels)]
    panels = [
        (label, [Curve(each[k].method, each[k].wrong) for each in rows]) for k, label in enumerate(labels)
    ]
    plot = figure.rolling_errors(
        panels,
        window=window,
        frozen=evaluation.frozen,
        title="Rolling error of each method along the stream",
        description=(
            f"One small plot for each of {html.count(len(labels), 'shift')} ({', '.join(labels)}): the error over the "
            f"last {html.count(window, 'sample')}, one curve for each method ({', '.join(plan.methods)})."
        ),
    )
    reset = (
        "The methods carry on from one shift to the next, in the order of the numbers."
        if plan.setting == "continual"
        else "The methods start from the source model under each shift."
    )
    return html.figure(
        plot, f"Error over the last {html.count(window, 'sample')} along the stream of each shift. {reset}"
    )


def _hyper_table(evaluation: Evaluation) -> str:
    given = evaluation.plan.hyper or {}
    rows = [
        [
            escape(method),
            escape(name),
            f"{value:g}",
            "given" if name in given.get(method, {}) else "the bundle's",
        ]
        for method, values in evaluation.hyper.items()
        for name, value in values.items()
    ]
    if not rows:
        return "<p>None of the methods has any.</p>"
    return html.table("Hyper-parameters used", ["method", "hyper-parameter", "value", "from"], rows)


def _footer() -> str:
    words = {
        "error": "Share of wrong predictions. The mean is over the shifts, each with the same weight; the stream as "
        f"it is (“{NO_SHIFT}”) does not count as a shift.",
        "against source": "The method's error minus that of the frozen source model on the same images. Its standard "
        "error is paired: over the images, each with the mean of its differences under the shifts. It takes images "
        "as independent of each other, though those that an adapting method answers share its theta, and says "
        "nothing about other seeds or orders.",
        "clear": f"A difference of more than {CLEAR:g} standard errors. Among many cells a few are clear by chance.",
        "gap recovered": "(adapted − source) / (clean − source), accuracies: 1 is all that the shift took, 0 none, "
        "below 0 a loss. Clean is the frozen source without a shift. The mean is over the shifts that took "
        "something, and one that took little can sway it.",
        "online": "Back to the source model before each shift.",
        "continual": "Never back: one shift follows the other in the given order.",
        "refused": "The step gave NaN or Inf; it was thrown away and the batch was answered without it. The "
        "daemon's other guards do not act in an evaluation. Batches are counted from 0.",
    }
    listed = "".join(f"<dt>{name}</dt><dd>{meaning}</dd>" for name, meaning in words.items())
    return f'<footer>\n<h2 id="words">Words</h2>\n<dl>{listed}</dl>\n</footer>'


# --------------------------------------------------------------------------------------------- small pieces


def _ranges(numbers: Sequence[int]) -> str:
    """Increasing numbers with runs drawn together: 0-2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
