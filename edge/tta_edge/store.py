"""The state directory: what of a daemon survives a restart. One daemon at a time.

    lock                        held while a daemon uses the directory
    switch.json                 the kill switch
    events.jsonl, events.jsonl.1
    streams/BUNDLE/STREAM/{a,b}.state
    quarantine/NUMBER-...       state files that were set aside, the newest 64

A stream has two slots, see tta_runtime/slots.py. A slot that cannot be used is moved to the quarantine, and the
other one, or the source, is served. Below `streams` no symbolic link is followed. Nothing but the order of streams
saved before this start hangs on the wall clock, and that only as far as the modification times of their files.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import msgspec

from tta_edge.errors import StateDirInUse, StateDirUnusable
from tta_edge.events import Event, EventFile, Reason, Tell
from tta_edge.wire import NAME_PATTERN
from tta_runtime.atomic import DISK, Disk, leftovers, make_durable, write_atomic
from tta_runtime.errors import StateUnwritable
from tta_runtime.files import read_at_most, reason
from tta_runtime.lock import existing, take
from tta_runtime.model import Checkpoint
from tta_runtime.slots import Refused, Slots, newest_ns

log = logging.getLogger(__name__)

MAX_QUARANTINE = 64
MAX_SWITCH_BYTES = 4096
Key = tuple[str, str]
_FIX = "Correct its permissions, free space, or name another directory with --state-dir"
_NAME = re.compile(NAME_PATTERN)
_SET_ASIDE = re.compile(r"(\d{8,18})-.*")


class Switch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The kill switch as it is on disk."""

    adapt: bool


class Learner(Protocol):
    """What turns itself into a state file and back: a model, or a session of a language model."""

    @property
    def checkpoint(self) -> Checkpoint:
        """What is active now."""

    @property
    def max_state_bytes(self) -> int:
        """The largest size that its state file can have."""

    def encode(self, checkpoint: Checkpoint, *, generation: int, notes: str) -> bytes:
        """The bytes of a state file."""

    def decode(self, data: bytes) -> tuple[Checkpoint, int, str]:
        """Checkpoint, generation and notes from the bytes of one; raises a StateError."""


class Kept(Protocol):
    """What has a place in the state directory."""

    @property
    def key(self) -> Key:
        """Its bundle and its name."""

    @property
    def model(self) -> Learner:
        """What is saved of it."""

    def notes(self) -> str:
        """What is saved beside the checkpoint."""


@dataclass(frozen=True)
class Restored:
    """What can be used of a stream.

    Attributes:
        checkpoint: of the newer good slot.
        notes: saved with it.
        before: of the older good slot.
        slot: name of the newer one.
    """

    checkpoint: Checkpoint
    notes: str
    before: Checkpoint | None
    slot: str


@dataclass(frozen=True)
class Found:
    """What was found of a stream.

    Attributes:
        restored: what can be used, if anything.
        set_aside: an event for each slot that cannot; nobody was told yet.
    """

    restored: Restored | None
    set_aside: tuple[Event, ...] = ()


class StateStore:
    """The streams and the switch in a state directory. For any thread; calls wait for each other.

    Args:
        root: the directory; made if need be.
        tell: told of a damaged switch and of streams that were forgotten.
        max_streams: most streams on disk.
        max_event_bytes: see `EventFile`.
        disk: what writes.

    Raises:
        StateDirUnusable: it cannot be made, read or written.
        StateDirInUse: another daemon holds it.
    """

    def __init__(
        self,
        root: Path,
        tell: Tell,
        *,
        max_streams: int = 4096,
        max_event_bytes: int = 1024 * 1024,
        disk: Disk = DISK,
    ) -> None:
        self.root = root
        self.tell = tell
        self._max_streams = max_streams
        self._disk = disk
        self._mutex = threading.RLock()
        self._slots: dict[Key, Slots] = {}
        self._lock = _locked(root, disk)
        self._events = EventFile(root / "events.jsonl", max_event_bytes)
        _tidy(root, disk)
        self._index = threading.Lock()
        self._saved, self._newest_ns = _survey(root)

    def close(self) -> None:
        """Let another daemon have the directory."""
        self._lock.close()

    # ------------------------------------------------------------------------------------------ streams

    def keys(self) -> list[Key]:
        """Bundle and name of every stream on disk, the most recently saved or used first; waits for no write."""
        with self._index:
            return list(reversed(self._saved))

    def has(self, key: Key) -> bool:
        """Whether a stream is on disk; waits for no write."""
        with self._index:
            return key in self._saved

    def used(self, key: Key) -> None:
        """A stream on disk is about to be used: others are forgotten before it."""
        with self._index:
            if key in self._saved:
                self._saved.move_to_end(key)

    def load(self, stream: Kept) -> Found:
        """What is saved of a stream; what cannot be used goes to the quarantine."""

        def decode(data: bytes) -> tuple[tuple[Checkpoint, str], int]:
            checkpoint, generation, notes = stream.model.decode(data)
            return (checkpoint, notes), generation

        with self._mutex:
            good, refused = self._of(stream.key).load(decode, stream.model.max_state_bytes)
            set_aside = tuple(self._set_aside(stream.key, slot) for slot in refused)
            if not good:
                self._unlisted(stream.key)
                return Found(None, set_aside)
        checkpoint, notes = good[0].value
        before = good[1].value[0] if len(good) > 1 else None
        return Found(Restored(checkpoint, notes, before, good[0].name), set_aside)

    def save(self, stream: Kept, checkpoint: Checkpoint, notes: str, *, alone: bool = False) -> None:
        """Commit a checkpoint of a stream to the older of its slots.

        Args:
            stream: whose it is.
            checkpoint: what to save.
            notes: to be saved with it.
            alone: whether what was saved before must go: the stream went back from it.

        Raises:
            StateUnwritable: the operating system refuses. What was saved before is as it was; with `alone` it may
                be gone.
        """
        with self._mutex:
            slots = self._of(stream.key)
            put = slots.replace if alone else slots.commit
            name = put(lambda generation: stream.model.encode(checkpoint, generation=generation, notes=notes))
            self._listed(stream.key, slots.directory / name)
            self._forget_oldest(stream.key)

    def clear(self, stream: Kept) -> None:
        """Delete what is saved of a stream.

        Raises:
            StateUnwritable: the operating system refuses; some of it may have been deleted.
        """
        with self._mutex:
            self._of(stream.key).clear()
            self._unlisted(stream.key)

    def discard(self, stream: Kept) -> None:
        """Forget the slots' order; for a stream that is no longer in memory."""
        with self._mutex:
            self._slots.pop(stream.key, None)

    # ------------------------------------------------------------------------------------------ switch, events

    def switch(self) -> bool:
        """Whether adaptation was on when it was last saved; a damaged file counts as off, and is told."""
        path = self.root / "switch.json"
        try:
            if path.is_symlink():
                raise OSError(errno.ELOOP, "it is a symbolic link")
            data = read_at_most(path, MAX_SWITCH_BYTES)
            return msgspec.json.decode(data, type=Switch).adapt
        except FileNotFoundError:
            return True
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            # Whoever switched it off must not find it on because of a flipped bit.
            detail = f"{path} cannot be used ({reason(error)}): adaptation stays off until it is switched on"
            self.tell(Event("", "", "switch", Reason.START.value, detail))
            return False

    def save_switch(self, adapt: bool) -> None:
        """Make the switch survive.

        Raises:
            StateUnwritable: the operating system refuses.
        """
        path = self.root / "switch.json"
        try:
            write_atomic(path, msgspec.json.encode(Switch(adapt)), mode=0o600, disk=self._disk)
        except OSError as error:
            raise StateUnwritable(f"{path} cannot be written: {reason(error)}", _FIX) from error

    def append_event(self, line: bytes) -> None:
        """Add a line to the event log; raises OSError."""
        self._events.append(line)

    # ------------------------------------------------------------------------------------------ inside

    def _of(self, key: Key) -> Slots:
        if key not in self._slots:
            self._slots[key] = Slots(self._directory(key), self._disk, base=self.root)
        return self._slots[key]

    def _directory(self, key: Key) -> Path:
        return self.root / "streams" / key[0] / key[1]

    def _listed(self, key: Key, slot: Path) -> None:
        """The stream was saved last of all, and a restart shall see that even if the wall clock went back."""
        with suppress(OSError):
            saved_ns = slot.stat().st_mtime_ns
            if saved_ns <= self._newest_ns:
                saved_ns = self._newest_ns + 1000
                os.utime(slot, ns=(saved_ns, saved_ns))
            self._newest_ns = saved_ns
        with self._index:
            self._saved[key] = None
            self._saved.move_to_end(key)

    def _unlisted(self, key: Key) -> None:
        with self._index:
            self._saved.pop(key, None)

    def _set_aside(self, key: Key, slot: Refused) -> Event:
        quarantine = self.root / "quarantine"
        try:
            make_durable(quarantine, self.root, self._disk)
            before = _set_aside_before(quarantine)
            number = before[-1][0] + 1 if before else 1
            target = quarantine / f"{number:08d}-{key[0]}-{key[1]}-{slot.path.name}"
            self._disk.replace(slot.path, target)
            where = f"moved to {target}"
            with suppress(OSError):  # the next one tries again
                for _, path in before[: max(0, len(before) + 1 - MAX_QUARANTINE)]:
                    self._disk.remove(path)
        except OSError as error:  # no space for the directory, or another device: the next commit replaces it
            where = f"it stays where it is ({reason(error)})"
        return Event(*key, "quarantine", slot.error.code, f"{slot.path.name}: {slot.error.cause}; {where}")

    def _forget_oldest(self, keep: Key) -> None:
        for key in [each for each in self.keys()[self._max_streams :] if each != keep]:
            try:
                self._of(key).clear()
            except StateUnwritable as error:  # what was to be saved is saved; the next save tries this again
                log.warning("stream %s/%s is over max_stored_streams and stays: %s", *key, error)
                return
            self._slots.pop(key, None)
            self._unlisted(key)
            detail = f"max_stored_streams is {self._max_streams}"
            self.tell(Event(*key, "forget", Reason.DISK_CAP.value, detail))


def _locked(root: Path, disk: Disk) -> IO[bytes]:
    """The lock file, locked, after the directory was made and tried.

    Raises:
        StateDirUnusable, StateDirInUse: see `StateStore`.
    """
    try:
        make_durable(root, existing(root), disk)
        make_durable(root / "streams", root, disk)
        with suppress(OSError):  # whoever made it may have been killed before that; it need not be readable
            disk.sync_directory(root.parent)
        lock = take(root / "lock")
    except OSError as error:
        raise _unusable(root, error) from error
    if lock is None:
        raise StateDirInUse(
            f"another daemon uses the state directory {root}", "Stop it, or name another one with --state-dir"
        )
    return lock


def _unusable(root: Path, error: OSError) -> StateDirUnusable:
    return StateDirUnusable(f"the state directory {root} cannot be used: {reason(error)}", _FIX)


def _tidy(root: Path, disk: Disk) -> None:
    """Delete the temporary files of a process that was killed while it wrote."""
    for directory in (root, *_stream_directories(root)):
        with suppress(OSError):
            for left in leftovers(directory):
                disk.remove(left)


def _survey(root: Path) -> tuple[OrderedDict[Key, None], int]:
    """The streams on disk, the most recently saved last, and when the last one was saved, in nanoseconds."""
    found = [(newest_ns(path), (path.parent.name, path.name)) for path in _stream_directories(root)]
    saved = sorted((when_ns, key) for when_ns, key in found if when_ns is not None)
    return OrderedDict((key, None) for _, key in saved), max((when_ns for when_ns, _ in saved), default=0)


def _stream_directories(root: Path) -> Iterator[Path]:
    for bundle in _directories(root / "streams"):
        yield from _directories(bundle)


def _directories(path: Path) -> list[Path]:
    """The directories in one whose names can be a bundle's or a stream's; what else is there is not ours."""
    try:
        with os.scandir(path) as entries:
            return [
                Path(entry.path)
                for entry in entries
                if _NAME.match(entry.name) and entry.is_dir(follow_symlinks=False)
            ]
    except OSError:
        return []


def _set_aside_before(quarantine: Path) -> list[tuple[int, Path]]:
    """The files in the quarantine with their numbers, the oldest first; raises OSError."""
    found = [(_SET_ASIDE.fullmatch(path.name), path) for path in quarantine.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match is not None)
