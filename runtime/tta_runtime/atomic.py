"""Writing a file so that a reader, or a power cut, leaves the old or the new content, never a mix."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def write_atomic(path: Path | str, data: bytes | Sequence[bytes], *, mode: int = 0o666) -> None:
    """Replace the file at `path` by `data`: temporary file beside it, fsync, rename, fsync of the directory.

    Args:
        path: the file; its directory must exist. A symbolic link at this path is replaced, not followed.
        data: the content, whole or in parts.
        mode: permissions of a new file, before the umask.

    Raises:
        OSError: from the operating system (no space, read-only, ...). The file at `path` is then as it was
            and the temporary one is removed; only if the last fsync of the directory fails may the new
            content be there.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), mode)
    try:
        with open(fd, "wb", buffering=0) as file:
            for part in (data,) if isinstance(data, bytes) else data:
                view = memoryview(part)
                while view:  # a raw write may be short
                    view = view[file.write(view) or 0 :]
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # KeyboardInterrupt as well: no temporary file stays behind
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the directory's entries durable; else a power cut can undo a rename that was reported done."""
    if os.name != "posix":  # Windows cannot open directories and journals renames itself
        return
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
