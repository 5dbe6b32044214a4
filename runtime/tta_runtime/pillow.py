"""The one place that imports Pillow: it decodes image folders, reads and writes JPEG, and nothing else needs it."""

from __future__ import annotations

import importlib
from types import ModuleType

from .errors import ImagesExtraMissing


def pillow_image(need: str) -> ModuleType:
    """The module `PIL.Image`, imported when first needed.

    Args:
        need: what needs it, for the error's first words.

    Raises:
        ImagesExtraMissing: Pillow is not installed.
    """
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        raise ImagesExtraMissing(
            f"{need} needs Pillow, which is not installed", "Run pip install 'tta-runtime[images]'"
        ) from error
