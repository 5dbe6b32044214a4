"""Two files, A and B, for one thing that must survive: a commit replaces the older one, so a whole one always stays.

A slot is written to a temporary file, fsynced, renamed and its directory fsynced. Whatever a crash, a full disk
or a flipped bit does to one slot, the other still holds what was committed before. Wherever a process is killed or
the power goes, what is found is what was committed last, or what was about to be.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from .atomic import DISK, Disk, leftovers, make_durable, write_atomic
from .errors import StateError, StateMissing, StateUnreadable, StateUnwritable
from .files import reason
from .state_file import MAX_GENERATION, read

T = TypeVar("T")
SLOTS = ("a.state", "b.state")


@dataclass(frozen=True)
class Good(Generic[T]):
    """A slot that was read.

    Attributes:
        name: of the file.
        generation: which commit it holds; the larger one is the newer.
        value: what it holds.
    """

    name: str
    generation: int
    value: T


@dataclass(frozen=True)
class Refused:
    """A slot that does not hold what it should.

    Attributes:
        path: of the file, which was left as it is.
        error: why.
    """

    path: Path
    error: StateError


class Slots:
    """The two slots of one directory. For one thread at a time, and one `Slots` for each directory.

    Args:
        directory: made with the first commit.
        disk: what writes.
        base: a directory above it that exists and whose name is durable; without it the next one.
    """

    def __init__(self, directory: Path, disk: Disk = DISK, *, base: Path | None = None) -> None:
        self.directory = directory
        self._base = base or directory.parent
        self._disk = disk
        self._generation = 0
        self._next = SLOTS[0]
        self._made = False

    def load(
        self, decode: Callable[[bytes], tuple[T, int]], limit: int
    ) -> tuple[list[Good[T]], list[Refused]]:
        """Read both slots; must come before the first commit where the directory may exist already.

        Args:
            decode: value and generation from the bytes of a slot; raises a `StateError`.
            limit: bytes of the largest slot there can be.

        Returns:
            The good slots, the newer one first, and the refused ones. Nothing is changed on disk.
        """
        good: list[Good[T]] = []
        refused: list[Refused] = []
        for name in SLOTS if not self.directory.is_symlink() else ():
            try:
                value, generation = decode(_read(self.directory / name, limit))
            except StateMissing:
                continue
            except StateError as error:
                refused.append(Refused(self.directory / name, error))
            else:
                good.append(Good(name, generation, value))
        good.sort(key=lambda slot: -slot.generation)
        self._generation = good[0].generation if good else 0
        self._next = _other(good[0].name) if good else SLOTS[0]
        return good, refused

    def commit(self, encode: Callable[[int], bytes]) -> str:
        """Replace the older slot; returns its name.

        Args:
            encode: bytes from the generation that they must carry.

        Raises:
            StateUnwritable: the operating system refuses. The newer slot is as it was, and the older one as well
                unless only the directory could not be fsynced: then it may hold what was to be committed.
        """
        if self._generation >= MAX_GENERATION:
            return self._start_over(encode)
        return self._put(encode, self._generation + 1)

    def replace(self, encode: Callable[[int], bytes]) -> str:
        """Commit, then delete what was there before; returns the name of the only slot.

        Where there is no room for a commit beside the old slots they are deleted first: whoever goes back must not
        find again what was gone back from.

        Raises:
            StateUnwritable: the operating system refuses; what was there before may be gone.
        """
        try:
            name = self.commit(encode)
        except StateUnwritable:
            self.clear()
            return self.commit(encode)
        self._drop(_other(name))
        return name

    def clear(self) -> None:
        """Delete both slots, the older one first, then the directory if nothing else is in it.

        Raises:
            StateUnwritable: the operating system refuses; then one slot or both are still there.
        """
        newer = _other(self._next)
        self._drop(self._next)
        self._drop(newer)
        self._generation, self._next, self._made = 0, SLOTS[0], False
        with suppress(OSError):  # an empty directory does no harm, and what others put there is theirs
            for left in leftovers(self.directory):
                self._disk.remove(left)
            self._disk.remove_directory(self.directory)

    # ------------------------------------------------------------------------------------------ inside

    def _put(self, encode: Callable[[int], bytes], generation: int) -> str:
        name = self._next
        try:
            if not self._made:
                make_durable(self.directory, self._base, self._disk)
                self._made = True
            write_atomic(self.directory / name, encode(generation), mode=0o600, disk=self._disk)
        except OSError as error:
            self._made = False  # somebody may have deleted the directory
            raise StateUnwritable(
                f"{self.directory / name} cannot be written: {reason(error)}",
                "Free space, or correct the directory's permissions",
            ) from error
        self._generation = generation
        self._next = _other(name)
        return name

    def _start_over(self, encode: Callable[[int], bytes]) -> str:
        """Commit where no larger generation exists: the newer slot goes, so that 1 is the largest again."""
        before = self._generation, self._next
        name = self._put(encode, 1)
        try:
            self._drop(_other(name))
        except StateUnwritable:
            self._generation, self._next = before  # the old one still counts as the newer
            raise
        return name

    def _drop(self, name: str) -> None:
        """Delete one slot for good."""
        path = self.directory / name
        try:
            if self.directory.is_symlink():
                raise NotADirectoryError(errno.ENOTDIR, "it is a symbolic link")
            with suppress(FileNotFoundError):
                self._disk.remove(path)
            with suppress(FileNotFoundError):
                self._disk.sync_directory(self.directory)
        except OSError as error:
            raise StateUnwritable(
                f"{path} cannot be deleted: {reason(error)}",
                "Correct the directory's permissions, or delete it",
            ) from error


def newest_ns(directory: Path) -> int | None:
    """When the newer of a directory's slots was written, in nanoseconds since the epoch; None if there is none."""
    times: list[int] = []
    for name in SLOTS:
        with suppress(OSError):
            times.append((directory / name).stat(follow_symlinks=False).st_mtime_ns)
    return max(times, default=None)


def _other(name: str) -> str:
    return SLOTS[1] if name == SLOTS[0] else SLOTS[0]


def _read(path: Path, limit: int) -> bytes:
    if path.is_symlink():  # it could lead anywhere, and a commit would replace only the link
        raise StateUnreadable(f"{path} is a symbolic link", "Put the file itself there")
    return read(path, limit)
