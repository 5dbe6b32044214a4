"""Bundles of the small networks, built once per test session."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from networks import CLASSES, NETWORKS, SIZE
from tta_exporters.build import BuildOptions, Built, InputOptions, build


def options(name: str, methods: tuple[str, ...], **settings: dict[str, str]) -> BuildOptions:
    return BuildOptions(name, InputOptions((3, SIZE, SIZE)), CLASSES, methods, settings=settings)


@functools.cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tta-test-bundles-")


@functools.cache
def built(name: str, methods: tuple[str, ...] = ("source", "tent")) -> Built:
    """The bundle of a network of `networks.NETWORKS`; do not change its files."""
    path = Path(_directory().name) / f"{name}-{'-'.join(methods)}"
    return build(NETWORKS[name](), options(name, methods), path)
