"""Two files, A and B, for one thing that must survive: a commit replaces the older one, so a whole one always stays.

A slot is written to a temporary file, fsynced, renamed and its directory fsynced. Whatever a crash, a full disk
or a flipped bit does to one slot, the other still holds what was committed before.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from .atomic import DISK, Disk, write_atomic
from .errors import StateError, StateMissing, StateUnwritable
from .files import reason
from .state_file import read

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
    """

    def __init__(self, directory: Path, disk: Disk = DISK) -> None:
        self.directory = directory
        self._disk = disk
        self._generation = 0
        self._next = SLOTS[0]

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
        for name in SLOTS:
            try:
                value, generation = decode(read(self.directory / name, limit))
            except StateMissing:
                continue
            except StateError as error:
                refused.append(Refused(self.directory / name, error))
            else:
                good.append(Good(name, generation, value))
        good.sort(key=lambda slot: -slot.generation)
        self._generation = good[0].generation if good else 0
        self._next = SLOTS[1] if good and good[0].name == SLOTS[0] else SLOTS[0]
        return good, refused

    def commit(self, encode: Callable[[int], bytes]) -> str:
        """Replace the older slot; returns its name.

        Args:
            encode: bytes from the generation that they must carry.

        Raises:
            StateUnwritable: the operating system refuses; both slots are as they were.
        """
        name = self._next
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomic(self.directory / name, encode(self._generation + 1), mode=0o600, disk=self._disk)
        except OSError as error:
            raise StateUnwritable(
                f"{self.directory / name} cannot be written: {reason(error)}",
                "Free space, or correct the directory's permissions",
            ) from error
        self._generation += 1
        self._next = SLOTS[1] if name == SLOTS[0] else SLOTS[0]
        return name

    def clear(self) -> None:
        """Delete both slots, the older one first, then the directory.

        Raises:
            StateUnwritable: the operating system refuses; then one slot or both are still there.
        """
        newest_last = (self._next, SLOTS[0] if self._next == SLOTS[1] else SLOTS[1])
        try:
            for name in newest_last:
                with suppress(FileNotFoundError):
                    self._disk.remove(self.directory / name)
            with suppress(FileNotFoundError):
                self._disk.sync_directory(self.directory)
            self._generation, self._next = 0, SLOTS[0]
            with suppress(FileNotFoundError):
                for left in self.directory.glob(".*.tmp"):  # of a process that was killed while it wrote
                    self._disk.remove(left)
                os.rmdir(self.directory)
        except OSError as error:
            raise StateUnwritable(
                f"{self.directory} cannot be cleared: {reason(error)}",
                "Correct the directory's permissions, or delete it",
            ) from error


def newest(directory: Path) -> float | None:
    """When the newer of a directory's slots was written, in seconds since the epoch; None if there is none."""
    times: list[float] = []
    for name in SLOTS:
        with suppress(OSError):
            times.append((directory / name).stat().st_mtime)
    return max(times, default=None)
