"""Choosing modules of a network by type and by name pattern, so that the choice can be printed before it is used."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn


class SelectionError(ValueError):
    """The patterns select nothing, or name nothing that exists."""


@dataclass(frozen=True)
class Selected:
    """One selected module.

    Attributes:
        name: its path in the network, e.g. "layer1.0.bn1".
        module: the module itself.
    """

    name: str
    module: nn.Module

    def describe(self) -> str:
        """One line: path, type, parameter shapes, count."""
        parameters = dict(self.module.named_parameters(recurse=False))
        shapes = " ".join(f"{name}{list(value.shape)}" for name, value in parameters.items())
        count = sum(value.numel() for value in parameters.values())
        return f"{self.name:40s} {type(self.module).__name__:14s} {count:8d}  {shapes}"


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a path matches one of some shell patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def select_modules(
    model: nn.Module,
    types: tuple[type[nn.Module], ...],
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> list[Selected]:
    """Modules of the given types whose path matches a pattern of ``include`` and none of ``exclude``.

    Args:
        model: the network.
        types: module classes; subclasses count.
        include: shell patterns on the path ("layer[12].*", "*.norm1").
        exclude: shell patterns of paths to leave out.

    Returns:
        In the order of ``model.named_modules()``.

    Raises:
        SelectionError: nothing is selected; the message lists the candidates.
    """
    candidates = [(name, module) for name, module in model.named_modules() if isinstance(module, types)]
    chosen = [
        Selected(name, module)
        for name, module in candidates
        if matches(name, include) and not matches(name, exclude)
    ]
    if not chosen:
        kinds = ", ".join(sorted({kind.__name__ for kind in types}))
        found = ", ".join(name for name, _ in candidates[:8]) or "none"
        raise SelectionError(
            f"no module selected: include={list(include)} exclude={list(exclude)} among {len(candidates)} modules "
            f"of type {kinds} (first: {found}). Adapt a network that has such layers or change the patterns"
        )
    return chosen


def describe(selection: Sequence[Selected]) -> str:
    """A printable table of a selection, with the total count of parameters."""
    total = sum(value.numel() for item in selection for value in item.module.parameters(recurse=False))
    lines = [item.describe() for item in selection]
    return "\n".join([*lines, f"{len(selection)} modules, {total} parameters"])
