"""Reading files that others provide: regular files only, and never more bytes than expected."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path | str) -> BinaryIO:
    """The file, opened for reading without a buffer.

    Raises:
        OSError: from the operating system, or because the path is a directory, a pipe or a device, whose
            reading could wait for ever.
    """
    # O_NONBLOCK: opening a pipe without a writer must not wait; it does nothing for regular files.
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(fd, "rb", buffering=0)


def read_at_most(path: Path | str, limit: int) -> bytes:
    """The content, or its first `limit` + 1 bytes if there is more; the size is asked before memory is taken.

    Raises:
        OSError: as `open_regular`.
    """
    with open_regular(path) as file:
        size = min(os.fstat(file.fileno()).st_size, limit) + 1
        parts = []
        while size > 0 and (part := file.read(size)):  # a raw read may be short
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def reason(error: BaseException) -> str:
    """The operating system's message without number and path, or the cause of one of our own errors."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(getattr(error, "cause", error))
