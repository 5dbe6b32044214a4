"""A damaged store is set aside for whoever wants to look at it, never deleted on the spot, never opened again."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from tta_runtime.atomic import DISK, Disk

BESIDE = ("-wal", "-shm", "-journal")
"""Endings of the files that belong to SQLite's."""
MAX_KEPT = 8


def set_aside(path: Path, disk: Disk = DISK) -> Path:
    """Rename a store and what belongs to it to `NAME.corrupt-N`; gives the new path.

    The file itself goes first: a WAL file that is left without one, by a kill in between, is known for what it is,
    while a file without its WAL would pass for a whole one of an earlier time.

    Raises:
        OSError: from the operating system.
    """
    before = kept(path)
    target = path.with_name(f"{path.name}.corrupt-{before[-1][0] + 1 if before else 1}")
    disk.replace(path, target)
    _follow(path, target, disk)
    with suppress(OSError):  # the next one tries again
        for _, old in before[: max(0, len(before) + 1 - MAX_KEPT)]:
            for ending in ("", *BESIDE):
                with suppress(FileNotFoundError):
                    disk.remove(old.with_name(old.name + ending))
    return target


def finish(path: Path, disk: Disk = DISK) -> Path | None:
    """Set aside what belongs to a store that is gone: a kill came while it was set aside; gives where it went.

    Raises:
        OSError: from the operating system.
    """
    left = [ending for ending in BESIDE if path.with_name(path.name + ending).exists()]
    if path.exists() or not left:
        return None
    before = kept(path)
    number, target = before[-1] if before else (1, path.with_name(f"{path.name}.corrupt-1"))
    if any(target.with_name(target.name + ending).exists() for ending in left):  # they are not of that one
        target = path.with_name(f"{path.name}.corrupt-{number + 1}")
    _follow(path, target, disk)
    return target


def kept(path: Path) -> list[tuple[int, Path]]:
    """The stores that were set aside with their numbers, the oldest first.

    Raises:
        OSError: from the operating system.
    """
    name = re.compile(re.escape(path.name) + r"\.corrupt-(\d{1,9})(?:-wal|-shm|-journal)?")
    numbers = {int(match[1]) for each in path.parent.iterdir() if (match := name.fullmatch(each.name))}
    return [(number, path.with_name(f"{path.name}.corrupt-{number}")) for number in sorted(numbers)]


def _follow(path: Path, target: Path, disk: Disk) -> None:
    for ending in BESIDE:
        with suppress(FileNotFoundError):
            disk.replace(path.with_name(path.name + ending), target.with_name(target.name + ending))
    disk.sync_directory(path.parent)
