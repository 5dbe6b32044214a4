"""The published directories of CIFAR-10-C (and CIFAR-100-C): corruptions ready made, mapped from disk."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta_edge.streams.errors import SourceMalformed, SourceMissing
from tta_edge.streams.npz import as_images, as_labels
from tta_edge.streams.shifts import COMMON, Shift
from tta_edge.streams.source import SEVERITIES, Source, image_shape, rows


def open_cifar10c(name: str, directory: Path) -> Source:
    """`cifar10c:DIR`: `<corruption>.npy`, five severities one after the other, and `labels.npy`.

    Args:
        name: the source as the user wrote it.
        directory: the unpacked directory.

    Raises:
        SourceMissing: there is no such directory, or no labels.npy in it.
        SourceMalformed: a file is damaged, or the files do not fit together.
    """
    if not directory.is_dir():
        raise SourceMissing(f"there is no directory {directory}", "Correct the path")
    files = {path.stem: path for path in sorted(directory.glob("*.npy")) if path.stem != "labels"}
    if not files:
        raise SourceMalformed(
            f"{directory} holds no <corruption>.npy", "Give the unpacked CIFAR-10-C directory"
        )
    ordered = [*(key for key in COMMON if key in files), *(key for key in files if key not in COMMON)]
    arrays = {key: as_images(_mapped(files[key]), str(files[key])) for key in ordered}
    first = next(iter(arrays.values()))
    for key, array in arrays.items():
        if array.shape != first.shape:
            raise SourceMalformed(
                f"{files[key]} has shape {list(array.shape)}, {files[ordered[0]]} has {list(first.shape)}",
                "Unpack the directory again",
            )
    count, rest = divmod(len(first), SEVERITIES)
    if rest:
        raise SourceMalformed(
            f"{files[ordered[0]]} holds {len(first)} images, not {SEVERITIES} severities of the same number",
            "Unpack the directory again",
        )
    given = {
        Shift(key, severity): partial(rows, arrays[key][(severity - 1) * count : severity * count])
        for key in ordered
        for severity in range(1, SEVERITIES + 1)
    }
    labels = _cifar10c_labels(directory / "labels.npy", count)
    return Source(name, count, image_shape(first), partial(rows, first[:0]), labels, None, given)


def _cifar10c_labels(path: Path, count: int) -> NDArray[np.int64]:
    """Labels of one severity; the published file repeats them for all five."""
    array = _mapped(path)
    labels = as_labels(np.asarray(array), len(array) if array.ndim else 0, str(path))
    if len(labels) == SEVERITIES * count and (labels.reshape(SEVERITIES, count) == labels[:count]).all():
        return labels[:count]
    if len(labels) == count:
        return labels
    raise SourceMalformed(
        f"{path} holds {len(labels)} labels, expected {count}, or {SEVERITIES} times the same {count}",
        "Unpack the directory again",
    )


def _mapped(path: Path) -> NDArray[Any]:
    """An npy file mapped into memory: no allocation, and a file shorter than its header says is refused."""
    if not path.is_file():
        raise SourceMissing(f"there is no file {path}", "Give the unpacked CIFAR-10-C directory")
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise SourceMalformed(
            f"{path} is not a readable npy file: {error}", "Unpack the directory again"
        ) from error
    return array
