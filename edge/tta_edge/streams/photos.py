"""The photographs that the shift `frost` lays over an image. None are shipped: the user names a directory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from tta_edge.streams import ops
from tta_edge.streams.constants import ConstantSet
from tta_edge.streams.errors import FrostPhotosMissing, SourceMalformed
from tta_edge.streams.ops import Floats
from tta_runtime.pillow import pillow_image

FROST_DIR_VARIABLE = "TTA_FROST_DIR"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SHRINK: dict[ConstantSet, float] = {"cifar": 0.2, "imagenet": 1.0, "digits": 0.05}
"""How much a frost photograph is shrunk first, so that crystals keep their size relative to the image."""


def frost_directory(given: str | os.PathLike[str] | None = None) -> Path | None:
    """The configured directory of frost photographs: the argument, else TTA_FROST_DIR, else None."""
    chosen = given if given is not None else os.environ.get(FROST_DIR_VARIABLE)
    return Path(chosen) if chosen else None


def load_frost(directory: Path | None, shrink: float, height: int, width: int) -> list[Floats]:
    """The photographs of a directory in order of name, shrunk, as [3, height, width] in [0, 1].

    Args:
        directory: see `frost_directory`.
        shrink: factor applied to both sides.
        height: rows that a crop must have.
        width: columns that a crop must have.

    Raises:
        FrostPhotosMissing: no directory, no photograph in it, or one too small for a crop.
        ImagesExtraMissing: Pillow is not installed.
    """
    own = f"Name a directory of photographs in {FROST_DIR_VARIABLE}, or use the shift frost_procedural"
    if directory is None:
        raise FrostPhotosMissing("the shift frost needs photographs and none are configured", own)
    if not directory.is_dir():
        raise FrostPhotosMissing(f"the directory of frost photographs {directory} does not exist", own)
    files = sorted(path for path in directory.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise FrostPhotosMissing(f"{directory} holds no photograph ({', '.join(SUFFIXES)})", own)
    image = pillow_image("the shift frost")
    photos = []
    for path in files:
        try:
            with image.open(path) as opened:
                hwc = np.asarray(opened.convert("RGB"), dtype=np.float32) / np.float32(255.0)
        except (OSError, ValueError, image.DecompressionBombError) as error:
            raise SourceMalformed(
                f"{path} is not a readable image: {error}", "Remove or replace it"
            ) from error
        photo = np.ascontiguousarray(np.moveaxis(hwc, -1, 0))
        if shrink != 1.0:
            photo = ops.linear_resize(photo, round(photo.shape[1] * shrink), round(photo.shape[2] * shrink))
        if photo.shape[1] < height or photo.shape[2] < width:
            raise FrostPhotosMissing(
                f"{path} gives {photo.shape[1]}x{photo.shape[2]} pixels after shrinking by {shrink}, "
                f"the images need {height}x{width}",
                "Use larger photographs",
            )
        photos.append(photo)
    return photos
