"""Writing a file so that a reader, or a power cut, leaves the old or the new content, never a mix."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path


class Disk:
    """The operating system's calls that durability rests on.

    Everything that must survive is written through one of these, so that a test can make the n-th call fail,
    kill the process before it, or record what a power cut would leave.
    """

    def create(self, path: Path, mode: int) -> int:
        """A descriptor of a new file; `FileExistsError` if there is one."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), mode)

    def write(self, fd: int, data: memoryview) -> int:
        """How many of the bytes were written; it may be fewer than given."""
        return os.write(fd, data)

    def sync(self, fd: int) -> None:
        """Make a file's content durable."""
        os.fsync(fd)

    def replace(self, source: Path, target: Path) -> None:
        """Rename, over the target if there is one."""
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        """Delete a file."""
        os.unlink(path)

    def make_directory(self, path: Path) -> None:
        """Make one directory; `FileExistsError` if the name is taken."""
        os.mkdir(path)

    def remove_directory(self, path: Path) -> None:
        """Delete an empty directory."""
        os.rmdir(path)

    def sync_directory(self, path: Path) -> None:
        """Make a directory's entries durable; else a power cut can undo a rename that was reported done."""
        if os.name != "posix":  # Windows cannot open directories and journals renames itself
            return
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


DISK = Disk()
"""The real one; it has no state."""
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")


def write_atomic(
    path: Path | str, data: bytes | Sequence[bytes], *, mode: int = 0o666, disk: Disk = DISK
) -> None:
    """Replace the file at `path` by `data`: temporary file beside it, fsync, rename, fsync of the directory.

    Args:
        path: the file; its directory must exist. A symbolic link at this path is replaced, not followed.
        data: the content, whole or in parts.
        mode: permissions of a new file, before the umask.
        disk: what writes.

    Raises:
        OSError: from the operating system (no space, read-only, ...). The file at `path` is then as it was
            and the temporary one is removed; only if the last fsync of the directory fails may the new
            content be there.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
    fd = disk.create(temporary, mode)
    try:
        try:
            for part in (data,) if isinstance(data, bytes) else data:
                view = memoryview(part)
                while view:  # a write may be short
                    view = view[disk.write(fd, view) :]
            disk.sync(fd)
        finally:
            os.close(fd)
        disk.replace(temporary, path)
    except BaseException:  # KeyboardInterrupt as well: no temporary file stays behind
        with suppress(OSError):
            disk.remove(temporary)
        raise
    disk.sync_directory(path.parent)


def leftovers(directory: Path) -> Iterator[Path]:
    """The temporary files that `write_atomic` left in a directory when its process was killed.

    Raises:
        OSError: from the operating system.
    """
    yield from (path for path in directory.iterdir() if _TEMPORARY.fullmatch(path.name))


def make_durable(directory: Path, base: Path, disk: Disk = DISK) -> None:
    """Make a directory below `base`, and those between, such that a power cut does not take their names away.

    A directory that exists is synced as well: whoever made it may have been killed before that.

    Args:
        directory: `base` itself, or below it.
        base: exists, and its own name is durable.
        disk: what writes.

    Raises:
        OSError: from the operating system, or because a file or a symbolic link is in the way.
    """
    path = base
    for part in directory.relative_to(base).parts:
        parent, path = path, path / part
        try:
            disk.make_directory(path)
        except FileExistsError as error:
            if path.is_symlink() or not path.is_dir():
                what = "a file or a symbolic link is where a directory belongs"
                raise NotADirectoryError(errno.ENOTDIR, what, str(path)) from error
        disk.sync_directory(parent)
