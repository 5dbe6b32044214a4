"""The state directory: what of a daemon survives a restart. One daemon at a time.

    lock                        held while a daemon uses the directory
    switch.json                 the kill switch
    events.jsonl, events.jsonl.1
    streams/BUNDLE/STREAM/{a,b}.state
    quarantine/                 state files that were set aside, the newest 64

A stream has two slots, see tta_runtime/slots.py. A slot that cannot be used is moved to the quarantine, and the
other one, or the source, is served.
"""

from __future__ import annotations

import fcntl
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

import msgspec

from tta_edge.adapt import Stream
from tta_edge.errors import StateDirInUse, StateDirUnusable
from tta_edge.events import Event, EventFile, Reason, Tell, utc_now
from tta_edge.wire import NAME_PATTERN
from tta_runtime.atomic import DISK, Disk, write_atomic
from tta_runtime.errors import StateUnwritable
from tta_runtime.files import read_at_most, reason
from tta_runtime.model import Checkpoint
from tta_runtime.slots import Refused, Slots, newest

MAX_QUARANTINE = 64
MAX_SWITCH_BYTES = 4096
Key = tuple[str, str]
_FIX = "Correct its permissions, free space, or name another directory with --state-dir"
_NAME = re.compile(NAME_PATTERN)


class Switch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The kill switch as it is on disk."""

    adapt: bool


@dataclass(frozen=True)
class Restored:
    """What was found for a stream.

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


class StateStore:
    """The streams and the switch in a state directory. For any thread; calls wait for each other.

    Args:
        root: the directory; made if need be.
        tell: told of slots that were set aside and streams that were forgotten.
        max_streams: most streams on disk.
        max_event_bytes: see `EventFile`.
        disk: what writes.
        wall_clock: for the names of quarantined files.

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
        wall_clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self.root = root
        self.tell = tell
        self._max_streams = max_streams
        self._disk = disk
        self._wall_clock = wall_clock
        self._mutex = threading.RLock()
        self._slots: dict[Key, Slots] = {}
        self._lock = _locked(root)
        self._events = EventFile(root / "events.jsonl", max_event_bytes)
        for left in root.glob("streams/*/*/.*.tmp"):  # of a process that was killed while it wrote
            with suppress(OSError):
                disk.remove(left)

    def close(self) -> None:
        """Let another daemon have the directory."""
        self._lock.close()

    # ------------------------------------------------------------------------------------------ streams

    def keys(self) -> list[Key]:
        """Bundle and name of every stream on disk, the most recently saved first."""
        found: list[tuple[float, Key]] = []
        for bundle in _directories(self.root / "streams"):
            for stream in _directories(bundle):
                saved_s = newest(stream)
                if saved_s is not None:
                    found.append((saved_s, (bundle.name, stream.name)))
        return [key for _, key in sorted(found, key=lambda item: (-item[0], item[1]))]

    def load(self, stream: Stream) -> Restored | None:
        """What is saved of a stream, if anything can be used; what cannot goes to the quarantine."""

        def decode(data: bytes) -> tuple[tuple[Checkpoint, str], int]:
            checkpoint, generation, notes = stream.model.decode(data)
            return (checkpoint, notes), generation

        with self._mutex:
            slots = self._of(stream.key)
            good, refused = slots.load(decode, stream.model.max_state_bytes)
            for slot in refused:
                self._set_aside(stream.key, slot)
        if not good:
            return None
        checkpoint, notes = good[0].value
        return Restored(checkpoint, notes, good[1].value[0] if len(good) > 1 else None, good[0].name)

    def save(self, stream: Stream, checkpoint: Checkpoint, notes: str) -> None:
        """Commit a checkpoint of a stream to the older of its slots.

        Raises:
            StateUnwritable: the operating system refuses; what was saved before is as it was.
        """
        with self._mutex:
            slots = self._of(stream.key)
            new = not slots.directory.exists()
            slots.commit(
                lambda generation: stream.model.encode(checkpoint, generation=generation, notes=notes)
            )
            if new:
                self._sync_parents(slots.directory)
                self._forget_oldest(stream.key)

    def replace(self, stream: Stream, checkpoint: Checkpoint | None, notes: str) -> None:
        """Drop what is saved of a stream, then save a checkpoint if there is one.

        Raises:
            StateUnwritable: the operating system refuses; some of it may have been dropped.
        """
        with self._mutex:
            self._of(stream.key).clear()
            if checkpoint is not None:
                self.save(stream, checkpoint, notes)

    def discard(self, stream: Stream) -> None:
        """Forget the slots' order; for a stream that is no longer in memory."""
        with self._mutex:
            self._slots.pop(stream.key, None)

    # ------------------------------------------------------------------------------------------ switch, events

    def switch(self) -> bool:
        """Whether adaptation was on when it was last saved; a damaged file counts as off, and is told."""
        path = self.root / "switch.json"
        try:
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
            self._slots[key] = Slots(self.root / "streams" / key[0] / key[1], self._disk)
        return self._slots[key]

    def _sync_parents(self, directory: Path) -> None:
        """Make the directories' own entries durable; without them the slot's name leads nowhere."""
        try:
            for parent in (directory.parent, directory.parent.parent, self.root):
                self._disk.sync_directory(parent)
        except OSError as error:
            raise StateUnwritable(f"{directory} cannot be made durable: {reason(error)}", _FIX) from error

    def _set_aside(self, key: Key, slot: Refused) -> None:
        quarantine = self.root / "quarantine"
        stamp = self._wall_clock().strftime("%Y%m%dT%H%M%S.%f")
        target = quarantine / f"{stamp}-{key[0]}-{key[1]}-{slot.path.name}"
        try:
            quarantine.mkdir(exist_ok=True)
            self._disk.replace(slot.path, target)
            where = f"moved to {target}"
            for old in sorted(quarantine.iterdir())[:-MAX_QUARANTINE]:
                self._disk.remove(old)
        except OSError as error:
            where = f"it stays where it is ({reason(error)})"
        detail = f"{slot.path.name}: {slot.error.cause}; {where}"
        self.tell(Event(*key, "quarantine", slot.error.code, detail))

    def _forget_oldest(self, keep: Key) -> None:
        for key in self.keys()[self._max_streams :]:
            if key == keep:
                continue
            slots = Slots(self.root / "streams" / key[0] / key[1], self._disk)
            slots.clear()
            self._slots.pop(key, None)
            detail = f"max_stored_streams is {self._max_streams}"
            self.tell(Event(*key, "forget", Reason.DISK_CAP.value, detail))


def _locked(root: Path) -> IO[bytes]:
    """The lock file, locked, after the directory was made and tried.

    Raises:
        StateDirUnusable, StateDirInUse: see `StateStore`.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / "streams").mkdir(exist_ok=True)
        lock = open(root / "lock", "ab")  # noqa: SIM115 - held until the daemon ends
    except OSError as error:
        raise StateDirUnusable(f"the state directory {root} cannot be used: {reason(error)}", _FIX) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise StateDirInUse(
            f"another daemon uses the state directory {root}", "Stop it, or name another one with --state-dir"
        ) from error
    return lock


def _directories(path: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from (p for p in path.iterdir() if _NAME.match(p.name) and p.is_dir())
