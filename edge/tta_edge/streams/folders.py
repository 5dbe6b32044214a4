"""Images in folders, decoded when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta_edge.streams.errors import SourceMalformed, SourceMissing, SourceTooLarge
from tta_edge.streams.source import Images, Source
from tta_runtime.pillow import pillow_image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_IMAGE_VALUES = 64 << 20
"""Most values (height x width x channels) of one image."""


def open_images(name: str, directory: Path) -> Source:
    """`images:DIR`: a folder for each class, or a flat folder without labels; all images of one size.

    Args:
        name: the source as the user wrote it.
        directory: the folder.

    Raises:
        SourceMissing: there is no such directory.
        SourceMalformed: it holds no image, or images beside folders, or the first image is not readable. What
        is
            wrong with a later image shows when it is read.
        SourceTooLarge: the images are too large.
        ImagesExtraMissing: Pillow is not installed.
    """
    if not directory.is_dir():
        raise SourceMissing(f"there is no directory {directory}", "Correct the path")
    image = pillow_image(f"the source {name}")
    flat = _image_files(directory)
    folders = {folder.name: files for folder in _folders(directory) if (files := _image_files(folder))}
    if flat and folders:
        raise SourceMalformed(
            f"{directory} holds images ({flat[0].name}) beside folders of images ({next(iter(folders))})",
            "Keep a folder for each class, or images only",
        )
    files = flat or [path for each in folders.values() for path in each]
    if not files:
        raise SourceMalformed(f"{directory} holds no image ({', '.join(IMAGE_SUFFIXES)})", "Correct the path")
    labels = None
    if folders:
        sizes = [len(each) for each in folders.values()]
        labels = np.repeat(np.arange(len(folders), dtype=np.int64), sizes)
    shape = _first_shape(image, files[0])
    reader = partial(_decode, image, files, shape)
    return Source(name, len(files), shape, reader, labels, tuple(folders) if folders else None)


def _folders(directory: Path) -> list[Path]:
    return [path for path in _listing(directory) if path.is_dir()]


def _image_files(directory: Path) -> list[Path]:
    return [path for path in _listing(directory) if path.suffix.lower() in IMAGE_SUFFIXES]


def _listing(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError as error:
        raise SourceMalformed(
            f"{directory} cannot be listed: {error.strerror}", "Correct its permissions"
        ) from error


def _first_shape(image: ModuleType, path: Path) -> tuple[int, int, int]:
    with _opened(image, path) as opened:
        width, height = opened.size
        channels = 1 if opened.mode in ("L", "1") else 3
    if height * width * channels > MAX_IMAGE_VALUES:
        raise SourceTooLarge(
            f"{path} is {height}x{width} pixels, over {MAX_IMAGE_VALUES} values", "Shrink it"
        )
    return height, width, channels


def _opened(image: ModuleType, path: Path) -> AbstractContextManager[Any]:
    try:
        opened: AbstractContextManager[Any] = image.open(path)
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
        raise SourceMalformed(f"{path} is not a readable image: {error}", "Remove or replace it") from error
    return opened


def _decode(
    image: ModuleType, files: Sequence[Path], shape: tuple[int, int, int], indices: NDArray[np.intp]
) -> Images:
    height, width, channels = shape
    result = np.empty((len(indices), height, width, channels), dtype=np.uint8)
    for place, index in enumerate(indices):
        path = files[int(index)]
        with _opened(image, path) as opened:
            grey = opened.mode in ("L", "1")
            found = (opened.size[1], opened.size[0], 1 if grey and channels == 1 else 3)
            # The header is checked before anything is decoded; a grey image in a colour folder is fine.
            if found != shape:
                raise SourceMalformed(
                    f"{path} is {_size(found)}, {files[0]} is {_size(shape)}",
                    "Bring all images to one size and colour first",
                )
            try:
                pixels = np.asarray(opened.convert("L" if channels == 1 else "RGB"))
            except (OSError, ValueError, SyntaxError) as error:
                raise SourceMalformed(f"{path} cannot be decoded: {error}", "Remove or replace it") from error
        result[place] = pixels.reshape(shape)
    return result


def _size(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]}x{shape[1]} in {'colour' if shape[2] == 3 else 'grey'}"
