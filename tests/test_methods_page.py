"""docs/methods.md says of every method what its code says."""

from __future__ import annotations

from pathlib import Path

from tta_adapters import METHODS
from tta_exporters.methods_page import overview, replaced

PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"


def test_the_page_is_the_one_that_the_docstrings_make() -> None:
    page = PAGE.read_text()
    assert replaced(page) == page, "run python -m tta_exporters.methods_page docs/methods.md"


def test_every_method_is_in_the_overview() -> None:
    for name in METHODS:
        assert f"| [{name}](#{name}) |" in overview()
