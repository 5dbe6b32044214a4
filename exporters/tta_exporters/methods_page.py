"""The reference of the methods as Markdown, made from their docstrings, options and specs: one home for each fact.

Example: python -m tta_exporters.methods_page docs/methods.md
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from tta_adapters.base import Calibrated, Method, MethodSpec
from tta_adapters.methods import ADAPTER_OF, METHODS, make_method, options_of
from tta_adapters.options import OptionValue
from tta_adapters.shelf import make_adapter

BEGIN, END = "<!-- methods: made by python -m tta_exporters.methods_page -->", "<!-- end: methods -->"

OPTION_DOCS = {
    "optimizer": "`sgd` or `adam`",
    "nesterov": "Nesterov's form of SGD momentum",
    "statistics": "`batch`, `ema`, `renorm` or `running`, see above",
    "skip": "tensors that are not trained, as patterns separated by spaces",
    "views": "random views that the teacher is asked about",
    "loss": "`ce`, or `sce` for the symmetric form",
    "memory": "places of the memory, and after how many images it learns",
    "window": "samples of a step that the host keeps, balanced by predicted class",
    "supports": "features kept for each class",
    "neighbours": "which neighbour's distance sets the width of the affinity",
    "iterations": "of the smoothing",
}
"""Options that change the graph; every other one is a setting and documented by the method's spec."""


def reference() -> str:
    """The section between the markers of docs/methods.md."""
    return "\n".join([BEGIN, "", overview(), "", *[section(name) for name in METHODS], END])


def overview() -> str:
    """A table of all methods."""
    lines = ["| method | trains | F / B | source data | returns |", "|---|---|---|---|---|"]
    for name, constructor in METHODS.items():
        facts, spec = _facts(constructor), example(name).spec
        lines.append(
            f"| [{name}](#{name}) | {facts['Trained']} | {spec.forwards:g} / {spec.backwards:g} | "
            f"{facts['Needs source data']} | {facts['Returns']} |"
        )
    return "\n".join(lines)


def section(name: str) -> str:
    """One method: what its docstring says, then its options."""
    constructor = METHODS[name]
    text = inspect.cleandoc(constructor.__doc__ or "").replace("``", "`")
    spec = example(name).spec
    lines = [f"### {name}", "", text, ""]
    options = options_of(name)
    if options:
        lines += ["| option | default | |", "|---|---|---|"]
        lines += [
            f"| `{key}` | {_default(spec, key, value)} | {_doc(spec, key)} |"
            for key, value in options.items()
        ]
        lines.append("")
    more = [entry for entry in spec.hyper if entry.name not in options]
    if more:
        named = ", ".join(f"`{entry.name}` ({entry.default:g})" for entry in more)
        lines += [f"The optimiser brings the settings {named}.", ""]
    if spec.report:
        lines += [f"Report: {', '.join(f'`{entry}`' for entry in spec.report)}.", ""]
    return "\n".join(lines)


def example(name: str) -> Method:
    """The method over a small network with BatchNorm for ten classes."""
    with torch.random.fork_rng():
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
        )
    method = make_method(name, make_adapter(ADAPTER_OF.get(name, "norm"), network, input_shape=(3, 8, 8)))
    if isinstance(method, Calibrated):
        method.calibrate([torch.zeros(2, 3, 8, 8)])
    return method


def _facts(constructor: Callable[..., Method]) -> dict[str, str]:
    """The facts that every method's docstring states in fixed words.

    Raises:
        ValueError: one is missing.
    """
    text = " ".join(inspect.cleandoc(constructor.__doc__ or "").split()).replace("``", "`")
    found = {}
    for key, pattern in (
        ("Trained", r"Trained: (.+?)\. "),
        ("Forwards / backwards per sample", r"Forwards / backwards per sample: (.+?)\. "),
        ("Needs source data", r"Needs source data: (.+?)\. "),
        ("Returns", r"Returns? (.+?)(?:\. |\.?$)"),
    ):
        match = re.search(pattern, text + " ")
        if match is None:
            raise ValueError(f"the docstring of {constructor} does not say {key!r}")
        found[key] = match[1].strip()
    return found


def _default(spec: MethodSpec, key: str, value: OptionValue) -> str:
    setting = {entry.name: entry.default for entry in spec.hyper}.get(key)
    if setting is not None and setting != value:
        return f"by network: {setting:g} for BatchNorm and ten classes"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else value or "none"


def _doc(spec: MethodSpec, key: str) -> str:
    settings = {entry.name: entry.doc for entry in spec.hyper}
    if key in settings:
        return f"setting: {settings[key]}"
    return f"structure: {OPTION_DOCS[key]}"


def replaced(document: str) -> str:
    """The document with the section between the markers made anew.

    Raises:
        ValueError: it has no markers.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no section between {BEGIN} and {END}")
    return before + reference() + after


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(replaced(file.read_text()))
