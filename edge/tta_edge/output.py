"""Files that a command writes for its user: refused early where they cannot be written, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from tta_runtime.errors import ConfigError


class OutputUnwritable(ConfigError):
    """A result cannot be written where the user asked for it."""

    code = "output-unwritable"


def check_output(path: Path | None) -> None:
    """Refuse a place that cannot be written before the work begins.

    Raises:
        OutputUnwritable: the directory does not exist, or the path is one, or this user may not write there.
    """
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        cause = "is a directory" if path.is_dir() else f"has no directory {path.absolute().parent}"
        raise OutputUnwritable(f"{path} {cause}", "Name a file in an existing directory")
    # A file is replaced, which its directory must allow; a pipe or a device is written to.
    place = path if path.exists() and not path.is_file() else path.absolute().parent
    if not os.access(place, os.W_OK):
        raise OutputUnwritable(f"{place} is not writable", "Name a file in a directory of yours")


def write_output(path: Path, content: str | bytes) -> None:
    """The whole file or nothing of it.

    Raises:
        OutputUnwritable: the system refuses.
    """
    from tta_runtime.atomic import write_atomic

    data = content.encode() if isinstance(content, str) else content
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)  # a pipe or a device: there is nothing to replace
        else:
            write_atomic(path, data)
    except OSError as error:
        raise OutputUnwritable(f"cannot write {path}: {error.strerror}", "Name another file") from error
