"""Reading arrays from a stranger's npz file: nothing is unpickled, nothing is allocated from a declared
length alone.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from tta_edge.streams.errors import SourceMalformed, SourceMissing, SourceTooLarge
from tta_edge.streams.source import Source, image_shape, rows

MAX_BYTES = 4 << 30
"""Most bytes an array may have (CIFAR-10 has 0.18 GB)."""

_REBUILD = "Write it again with np.savez(file, x=..., y=...)"


def array_names(path: Path) -> list[str]:
    """The names of the arrays in an npz file.

    Raises:
        SourceMissing: there is no such file.
        SourceMalformed: it is not an npz file.
    """
    with _open(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def read_array(path: Path, name: str, *, max_bytes: int = MAX_BYTES) -> NDArray[Any]:
    """One array of an npz file.

    Args:
        path: the file.
        name: the array's name.
        max_bytes: largest array to accept.

    Raises:
        SourceMissing: there is no such file.
        SourceMalformed: it is not an npz file, lacks the array, or the array is damaged or holds Python
        objects. SourceTooLarge: the array's header declares more than `max_bytes`.
    """
    with _open(path) as archive:
        try:
            info = archive.getinfo(f"{name}.npy")
        except KeyError:
            found = ", ".join(f"`{each}`" for each in array_names(path)) or "nothing"
            raise SourceMalformed(f"{path} has no array `{name}`, it holds {found}", _REBUILD) from None
        try:
            with archive.open(info) as member:
                _check_header(path, name, member, info.file_size, max_bytes)
            with archive.open(info) as member:
                array: NDArray[Any] = npy.read_array(member, allow_pickle=False)
        except _DAMAGE as error:
            raise SourceMalformed(f"array `{name}` of {path} cannot be read: {error}", _REBUILD) from error
    return array


_DAMAGE = (ValueError, EOFError, OSError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError)
"""What zipfile and numpy raise for a damaged, encrypted or foreign member; RuntimeError is zipfile's for a
password.
"""


def _open(path: Path) -> zipfile.ZipFile:
    if not path.is_file():
        raise SourceMissing(f"there is no file {path}", "Correct the path")
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise SourceMalformed(f"{path} is not an npz file: {error}", _REBUILD) from error


def _check_header(path: Path, name: str, member: IO[bytes], member_bytes: int, max_bytes: int) -> None:
    """Compare what the array's header declares with the limit and with what the archive holds of it."""
    version = npy.read_magic(member)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"its format version is {version[0]}.{version[1]}, expected 1.0 or 2.0")
    shape, _, dtype = readers[version](member)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never loaded")
    declared = math.prod(shape) * dtype.itemsize
    if declared > max_bytes:
        raise SourceTooLarge(
            f"array `{name}` of {path} declares {dtype} {list(shape)}: "
            f"{declared} bytes, the limit is {max_bytes}",
            "Split the file",
        )
    held = member_bytes - member.tell()
    if declared != held:
        raise ValueError(f"its header declares {declared} bytes, the file holds {held}")


def as_images(array: NDArray[Any], origin: str) -> NDArray[np.uint8]:
    """The array as uint8 [n, height, width, channels].

    A last axis of 1 or 3 is channels (NHWC); else an axis 1 of 1 or 3 is (NCHW); three axes are grey images.

    Args:
        array: anything.
        origin: where it comes from, for the error's first words.

    Raises:
        SourceMalformed: another dtype or shape, or no image at all.
    """
    if array.dtype != np.uint8:
        raise SourceMalformed(
            f"{origin} is {array.dtype}, images are uint8 in 0..255",
            "Convert it, e.g. (x * 255).astype(np.uint8)",
        )
    if array.ndim == 3:
        array = array[..., None]
    elif array.ndim == 4 and array.shape[-1] not in (1, 3) and array.shape[1] in (1, 3):
        array = np.moveaxis(array, 1, -1)
    if array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise SourceMalformed(
            f"{origin} has shape {list(array.shape)}, expected [n, height, width, channels] or "
            "[n, channels, height, width] with 1 or 3 channels",
            "Reshape it",
        )
    if array.size == 0:
        raise SourceMalformed(
            f"{origin} has shape {list(array.shape)}, it holds no image", "Give at least one image"
        )
    return array


def as_labels(array: NDArray[Any], count: int, origin: str) -> NDArray[np.int64]:
    """The array as int64 labels [count].

    Raises:
        SourceMalformed: not whole numbers >= 0, or another length.
    """
    if array.dtype.kind not in "iu":
        raise SourceMalformed(f"{origin} is {array.dtype}, labels are whole numbers", "Convert it to int64")
    if array.shape != (count,):
        raise SourceMalformed(
            f"{origin} has shape {list(array.shape)}, expected [{count}], one label for each image", _REBUILD
        )
    if array.size and int(array.min()) < 0:
        raise SourceMalformed(f"{origin} holds the label {int(array.min())}, labels are >= 0", _REBUILD)
    return array.astype(np.int64)


def open_npz(name: str, path: Path, class_names: tuple[str, ...] | None = None) -> Source:
    """`npz:FILE`.

    Args:
        name: the source as the user wrote it.
        path: the file.
        class_names: what the labels mean, where it is known.

    Raises:
        SourceMissing, SourceMalformed, SourceTooLarge: see `read_array`, `as_images` and `as_labels`.
    """
    images = as_images(read_array(path, "x"), f"`x` of {path}")
    labels = None
    if "y" in array_names(path):
        labels = as_labels(read_array(path, "y"), len(images), f"`y` of {path}")
    return Source(name, len(images), image_shape(images), partial(rows, images), labels, class_names)
