"""Where the large test data lies, if it is there: weights, CIFAR-10 subsets, corruption constants."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared_data() -> Path | None:
    """The data directory: $TTA_SHARED_DATA, else `../shared/data` beside the repository; None if absent."""
    given = os.environ.get("TTA_SHARED_DATA")
    path = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    return path if path.is_dir() else None


def require_shared_data(*parts: str) -> Path:
    """A path inside the data directory; skips the test, with the reason, where it is absent."""
    root = shared_data()
    if root is None:
        pytest.skip("no shared data: set TTA_SHARED_DATA or provide ../shared/data")
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"the shared data lacks {'/'.join(parts)}")
    return path
