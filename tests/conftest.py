"""What tests of a real cloud share: the program that starts services, and the bundle that they teach."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from clouds import Program
    from tta_runtime.bundle import Bundle

# Imported where they are used: most tests need none of it, and torch takes seconds.


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
