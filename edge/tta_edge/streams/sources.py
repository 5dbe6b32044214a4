"""Where a stream's images come from.

| text | what |
|---|---|
| `digits` | the built-in test set: 899 handwritten digits, 8x8 grey |
| `npz:FILE` | arrays `x` (uint8, NHWC or NCHW, or [n, height, width]) and, optionally, `y` (whole numbers) |
| `images:DIR` | a folder for each class, or a flat folder without labels; all images of one size |
| `cifar10c:DIR` | the published layout: `<corruption>.npy` of 5 severities one after the other, `labels.npy`
|
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from tta_edge.streams.cifar10c import open_cifar10c
from tta_edge.streams.errors import UnknownSource
from tta_edge.streams.folders import open_images
from tta_edge.streams.npz import open_npz
from tta_edge.streams.source import Source
from tta_runtime.errors import did_you_mean

OPENERS: Mapping[str, Callable[[str, Path], Source]] = {
    "npz": open_npz,
    "images": open_images,
    "cifar10c": open_cifar10c,
}


def open_source(text: str) -> Source:
    """The source that a command line names; see the table above.

    Raises:
        UnknownSource: not one of the four forms.
        SourceMissing: the file or directory does not exist.
        SourceMalformed: it exists and cannot be used.
        SourceTooLarge: it declares more than the limit.
        ImagesExtraMissing: images:DIR without Pillow.
        BuiltinMissing: this installation lacks the built-in digits.
    """
    kind, colon, place = text.partition(":")
    if text == "digits":
        from tta_edge.builtin import builtin_digits

        return open_npz(text, builtin_digits(), tuple("0123456789"))
    if kind not in OPENERS or not colon or not place:
        raise UnknownSource(
            f"unknown source `{text}`{did_you_mean(kind, ('digits', *OPENERS))}",
            "Write digits, npz:FILE, images:DIR or cifar10c:DIR",
        )
    return OPENERS[kind](text, Path(place))
