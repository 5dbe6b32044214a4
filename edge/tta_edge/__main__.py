"""`python -m tta_edge` is `tta-edge`."""

from __future__ import annotations

from tta_edge.cli import main

main()
