"""The machine-readable form of a played suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tta_edge.suite import summary as judged
from tta_edge.suite.catalogue import Scale
from tta_edge.suite.summary import Summary
from tta_runtime import __version__

FORMAT = "tta-suite"
FORMAT_VERSION = 1


def to_json(summaries: Sequence[Summary], *, suite: str, seed: int, scale: Scale) -> dict[str, Any]:
    """Everything but the single predictions; keys may be added within a format version.

    Args:
        summaries: of the bundles.
        suite: its name.
        seed: of the run.
        scale: how long the streams are.
    """
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "version": __version__,
        "suite": suite,
        "seed": seed,
        "scale": {name: value for name, value in asdict(scale).items() if name != "methods"},
        "definitions": {
            "ruined": judged.RUINED,
            "clearly_worse": judged.CLEARLY_WORSE,
            "chance_like": judged.CHANCE_LIKE,
            "poor_diversity": judged.POOR,
            "recovery_window": judged.RECOVERY.window,
            "recovery_tolerance": judged.RECOVERY.tolerance,
        },
        "models": [summary.to_json() for summary in summaries],
    }
