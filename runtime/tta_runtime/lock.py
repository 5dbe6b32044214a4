"""One process for one directory: a lock that the operating system lets go of however its holder ends."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import IO

_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def take(path: Path) -> IO[bytes] | None:
    """The lock file, locked until it is closed; None where another process holds it.

    Raises:
        OSError: it cannot be opened, or the file system knows no locks.
    """
    lock = os.fdopen(os.open(path, _FLAGS, 0o600), "wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise
    return lock


def existing(path: Path) -> Path:
    """The path, or the nearest directory above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
