"""What each setting of the daemon is: its meaning, its unit, its kind. Read from `config.Config` itself.

The meaning of a key is the string that stands below its field in config.py. It is told nowhere else: the help of
`tta-edge serve`, `tta-edge config show` and the documents take it from here.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import msgspec
from msgspec.inspect import BoolType, FloatType, IntType, LiteralType, StrType, Type, UnionType, type_info

from tta_edge import config
from tta_edge.config import Config

GROUPS = {
    "bind": "Address",
    "bundle": "What is served",
    "engine": "Computing",
    "adapt": "When a step runs",
    "batch_max": "Requests",
    "max_streams": "Streams and what is kept of them",
    "max_sessions": "Language models",
    "max_distance": "Guards",
    "http": "Running",
}
"""First key of each group -> its heading; the keys of a group stand together in config.py."""
UNITS = {"_ms": "milliseconds", "_s": "seconds", "_bytes": "bytes"}
"""Endings of the names and what they say; a name without one has no unit."""


@dataclass(frozen=True)
class Setting:
    """One key of the configuration.

    Attributes:
        key: its name in the file.
        doc: what it means, in one or a few sentences.
        kind: bool, int, float or str; None for a table, which the command line has in a form of its own.
        group: heading of the settings that belong together.
        choices: the only values it may have; empty where there are others.
        default: value where nothing is set.
    """

    key: str
    doc: str
    group: str
    kind: type | None
    choices: tuple[str, ...]
    default: Any

    @property
    def unit(self) -> str:
        """Of its value, in words; empty for what has none."""
        return next((unit for ending, unit in UNITS.items() if self.key.endswith(ending)), "")


@cache
def settings() -> Mapping[str, Setting]:
    """Every key of the configuration, in the order of the file."""
    docs, defaults = field_docs(Config), Config()
    kinds = {field.name: field.type for field in type_info(Config).fields}  # type: ignore[attr-defined]
    found, group = {}, ""
    for key in Config.__struct_fields__:
        group = GROUPS.get(key, group)
        found[key] = Setting(key, docs[key], group, *_kind(kinds[key]), getattr(defaults, key))
    return found


def field_docs(struct: type[msgspec.Struct]) -> dict[str, str]:
    """Field -> the string literal below it, on one line; empty where there is none, or no source code."""
    names = struct.__struct_fields__
    try:
        tree = ast.parse(inspect.getsource(config))
    except OSError:  # an installation of compiled files only: the commands work, their help is bare
        return dict.fromkeys(names, "")
    (body,) = (
        node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == struct.__name__
    )
    found = dict.fromkeys(names, "")
    for field, below in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = (
                below.value.value
                if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                else ""
            )
            found[field.target.id] = " ".join(str(text).split())
    return found


def _kind(told: Type) -> tuple[type | None, tuple[str, ...]]:
    if isinstance(told, UnionType):
        (told,) = (each for each in told.types if not isinstance(each, msgspec.inspect.NoneType))
    if isinstance(told, LiteralType):
        return str, tuple(str(value) for value in told.values)
    for form, kind in ((BoolType, bool), (IntType, int), (FloatType, float), (StrType, str)):
        if isinstance(told, form):
            return kind, ()
    return None, ()
