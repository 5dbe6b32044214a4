"""The common corruptions as shifts of a stream: named, of severity 1 to 5, repeatable from a seed.

Recipes and the constants `cifar` and `imagenet`: Hendrycks & Dietterich, Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations, ICLR 2019, https://arxiv.org/abs/1903.12261. They are
written from their description, so that figures come near those of the published files without matching them
bit for bit; the published ImageNet-C has one more JPEG pass (quality 85) on top, which `corrupt` does not
add.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta_edge.streams import blur, digital, noise, ops, photos, weather
from tta_edge.streams.constants import CONSTANTS, ConstantSet, constants_for
from tta_edge.streams.draws import Draws
from tta_edge.streams.errors import (
    BadImages,
    BadSeverity,
    ShiftNeedsColour,
    UnknownShift,
)
from tta_edge.streams.ops import Floats
from tta_runtime.errors import did_you_mean
from tta_runtime.pillow import pillow_image

Recipe = Callable[[Floats, Any, Draws], Floats]

RECIPES: dict[str, Recipe] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost_procedural": weather.frost_procedural,
    "fog": weather.fog,
    "brightness": weather.brightness,
    "contrast": digital.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
    "speckle_noise": noise.speckle_noise,
    "gaussian_blur": blur.gaussian_blur,
    "saturate": digital.saturate,
}
"""Every shift that needs nothing but the image; `frost` needs photographs as well."""

EXTRA = ("speckle_noise", "gaussian_blur", "saturate")
"""Kinds outside the fifteen, named one by one (the published sets keep them for validation)."""

COMMON = (
    "gaussian_noise", "shot_noise", "impulse_noise",
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "frost", "fog", "brightness",
    "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
"""The fifteen common corruptions in the published order."""

NAMES = (*COMMON, "frost_procedural", *EXTRA)
DEFAULT_SEVERITY = 5
SMALLEST_SIDE = 4
BLOCK_VALUES = 1 << 22
"""Values handled at once (16 MiB as float32): large enough to vectorise, small enough for a small machine."""


@dataclass(frozen=True)
class Shift:
    """One corruption at one severity, written `name:severity`."""

    name: str
    severity: int

    def __str__(self) -> str:
        return f"{self.name}:{self.severity}"


def _known_name(name: str, names: Sequence[str] = NAMES) -> str:
    """The name itself when it is one of the shifts.

    Raises:
        UnknownShift: it is none; the nearest name is suggested.
    """
    if name in names:
        return name
    near = did_you_mean(name, names)
    raise UnknownShift(f"unknown shift `{name}`{near}", "" if near else f"Choose one of {', '.join(names)}")


def _known_severity(text: str) -> int:
    """The severity written as `text`.

    Raises:
        BadSeverity: not a whole number from 1 to 5.
    """
    # isdecimal accepts other scripts' digits; a severity is one ASCII character.
    if len(text) == 1 and text in "12345":
        return int(text)
    raise BadSeverity(f"severity `{text}` is not one of 1, 2, 3, 4, 5", "Write e.g. gaussian_noise:5")


def parse_shift(text: str, *, names: Sequence[str] = NAMES) -> Shift:
    """`name:severity`; without a severity, 5.

    Args:
        text: e.g. "gaussian_noise:5"; blanks around the parts are ignored.
        names: what may be named.

    Raises:
        UnknownShift: no such corruption; the nearest name is suggested.
        BadSeverity: not one of 1 to 5.
    """
    name, colon, severity = text.partition(":")
    known = _known_name(name.strip(), names)
    return Shift(known, _known_severity(severity.strip()) if colon else DEFAULT_SEVERITY)


def parse_shifts(
    text: str, *, names: Sequence[str] = NAMES, common: Sequence[str] | None = None
) -> tuple[Shift, ...]:
    """A comma list of shifts, each once; `all:5` stands for the fifteen common corruptions.

    Args:
        text: e.g. "all:5" or "gaussian_noise:5,fog:3".
        names: what may be named.
        common: what `all` stands for; default: `common_names()`.

    Raises:
        UnknownShift: an item names no corruption, or the list is empty.
        BadSeverity: an item's severity is not one of 1 to 5.
    """
    shifts: list[Shift] = []
    for item in text.split(","):
        name, colon, severity = item.partition(":")
        if name.strip() != "all":
            shifts.append(parse_shift(item, names=names))
            continue
        level = _known_severity(severity.strip()) if colon else DEFAULT_SEVERITY
        shifts += [Shift(each, level) for each in (common_names() if common is None else common)]
    return tuple(dict.fromkeys(shifts))


def common_names(frost_dir: str | os.PathLike[str] | None = None) -> tuple[str, ...]:
    """The fifteen; frost is `frost` when photographs are configured, else `frost_procedural` under that
    name.
    """
    frost = "frost" if photos.frost_directory(frost_dir) is not None else "frost_procedural"
    return tuple(frost if name == "frost" else name for name in COMMON)


@dataclass(frozen=True)
class Corruption:
    """One shift, ready for images of one size: `corruption(images, first_index)`. Made by `prepare`.

    Attributes:
        shift: what it does.
        seed: the run's seed.
        constants: which ladder of strengths it takes.
    """

    shift: Shift
    seed: int
    constants: ConstantSet
    _recipe: Recipe
    _strength: Any

    def __call__(self, images: NDArray[np.uint8], first_index: int = 0) -> NDArray[np.uint8]:
        """The images under the shift.

        Args:
            images: uint8 [batch, height, width, channels] of the size prepared for; not changed.
            first_index: place in the stream of the first image.

        Returns:
            uint8 [batch, height, width, channels], a new array; rounded down to whole grey levels.
        """
        batch, height, width, channels = images.shape
        result = np.empty(images.shape, dtype=np.uint8)
        block = max(1, BLOCK_VALUES // (height * width * channels))
        for start in range(0, batch, block):
            part = images[start : start + block]
            planes = ops.from_uint8(np.ascontiguousarray(np.moveaxis(part, -1, 1)))
            draws = Draws(self.seed, self.shift.name, self.shift.severity, first_index + start, len(part))
            shifted = ops.to_uint8(self._recipe(planes, self._strength, draws))
            result[start : start + block] = np.moveaxis(shifted, 1, -1)
        return result


def prepare(
    shift: Shift,
    shape: tuple[int, int, int],
    seed: int,
    *,
    constants: ConstantSet | None = None,
    frost_dir: str | os.PathLike[str] | None = None,
) -> Corruption:
    """Check a shift once and load what it needs, for images of one size.

    Args:
        shift: name and severity.
        shape: (height, width, channels) of the images; channels 1 or 3.
        seed: the run's seed.
        constants: the ladder of strengths; default by size, see `constants_for`.
        frost_dir: directory of photographs for `frost`; default: the environment variable TTA_FROST_DIR.

    Raises:
        UnknownShift: no such corruption.
        BadSeverity: not one of 1 to 5.
        BadImages: images of this size cannot be shifted.
        ShiftNeedsColour: saturate on grey images.
        FrostPhotosMissing: frost without photographs.
        ImagesExtraMissing: jpeg_compression or frost without Pillow.
    """
    name = _known_name(shift.name)
    severity = _known_severity(str(shift.severity))
    height, width, channels = shape
    if min(height, width) < SMALLEST_SIDE or channels not in (1, 3):
        raise BadImages(
            f"the images are {height}x{width}x{channels}, a shift needs at least "
            f"{SMALLEST_SIDE}x{SMALLEST_SIDE} pixels and 1 or 3 channels",
            "Use other images, or stream these without a shift",
        )
    if name == "saturate" and channels == 1:
        raise ShiftNeedsColour("the shift saturate needs three channels, the images have one", "Leave it out")
    chosen = constants if constants is not None else constants_for(height, width)
    strength: Any = CONSTANTS[name][chosen][severity - 1]
    if name == "elastic_transform":
        # Fractions of a side: 244 for ImageNet (the published value), else the image's own.
        side = digital.PUBLISHED_ELASTIC_SIDE.get(chosen, min(height, width))
        strength = tuple(side * value for value in strength)
    if name == "jpeg_compression":
        pillow_image("the shift jpeg_compression")  # say at once that it is missing, not at the first batch
    if name == "frost":
        pictures = photos.load_frost(photos.frost_directory(frost_dir), photos.SHRINK[chosen], height, width)
        return Corruption(shift, seed, chosen, partial(weather.frost, photos=pictures), strength)
    return Corruption(shift, seed, chosen, RECIPES[name], strength)


def corrupt(
    images: NDArray[np.uint8],
    name: str,
    severity: int,
    seed: int,
    *,
    constants: ConstantSet | None = None,
    first_index: int = 0,
    frost_dir: str | os.PathLike[str] | None = None,
) -> NDArray[np.uint8]:
    """The images under one corruption: `prepare` and apply.

    Repeatable: image i of the stream gets the randomness of (seed, name, severity, first_index + i), so a
    stream corrupted in chunks equals the stream corrupted whole.

    Args:
        images: uint8 [batch, height, width, channels], channels 1 or 3; not changed.
        name: one of `NAMES`.
        severity: 1 to 5.
        seed: the run's seed.
        constants: the ladder of strengths; default by size, see `constants_for`.
        first_index: place in the stream of the first image.
        frost_dir: directory of photographs for `frost`; default: the environment variable TTA_FROST_DIR.

    Returns:
        uint8 [batch, height, width, channels], a new array; rounded down to whole grey levels.

    Raises:
        BadImages: wrong dtype or shape.
        StreamError: what `prepare` raises.
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        raise BadImages(
            f"a shift takes uint8 [batch, height, width, channels], got {images.dtype} {list(images.shape)}",
            "Convert the images first",
        )
    height, width, channels = images.shape[1:]
    corruption = prepare(
        Shift(name, severity), (height, width, channels), seed, constants=constants, frost_dir=frost_dir
    )
    return corruption(images, first_index)
