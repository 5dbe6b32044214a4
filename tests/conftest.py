"""What tests share: the program that starts cloud services, the bundle that these teach, a language model's bundle."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from clouds import Program
    from tta_runtime import TextModel
    from tta_runtime.bundle import Bundle

# Imported where they are used: most tests need none of it, and torch takes seconds.

pytest.register_assert_rewrite("agreement")  # so that what differs is shown, as in a test itself

MANY_DESCRIPTORS = 200
"""Some tests allow their process 256, and `select` knows 1024."""


@pytest.fixture(scope="module", autouse=True)
def _let_go() -> None:
    """Collects what earlier modules left: in a process this large the collector comes round too seldom for sockets."""
    descriptors = Path("/proc/self/fd")
    if descriptors.is_dir() and len(os.listdir(descriptors)) > MANY_DESCRIPTORS:
        gc.collect()


@pytest.fixture(scope="session")
def program() -> Iterator[Program]:
    """One for all of them: its imports are paid for once."""
    from clouds import Program

    with Program() as made:
        yield made


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    """Student and teacher, images in, with `distill`; a module that wants another one has its own fixture."""
    import exported
    from cloud_server import METHODS
    from tta_runtime.bundle import Bundle

    return Bundle.open(exported.built("resnet", METHODS).path)


@pytest.fixture(scope="session")
def text_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small language model's bundle; do not change its files."""
    import tiny_text

    path = tmp_path_factory.mktemp("text") / "bundle"
    tiny_text.build(path)
    return path


@pytest.fixture(scope="session")
def long_text_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `text_bundle`, with a context so long that a text takes a while."""
    import tiny_text

    path = tmp_path_factory.mktemp("text") / "long"
    tiny_text.build(path, context=tiny_text.LONG)
    return path


@pytest.fixture(scope="module")
def text_model(text_bundle: Path) -> TextModel:
    """The language model of `text_bundle`, without a daemon."""
    from tta_runtime import EngineOptions, TextModel

    return TextModel.open(text_bundle, options=EngineOptions(threads=1))
