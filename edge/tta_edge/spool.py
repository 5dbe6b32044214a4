"""Samples that wait for upload: a queue on disk with bounds, which outlives kills, power cuts and full disks.

What `append` has returned a key for is fsynced: it is found again after a restart until it is removed or dropped. The
oldest samples are dropped where there is no room; how many, is known over restarts. A damaged record costs itself, not
the queue. A sample may be offered again after it was removed if the power went; its key is the same, so whoever takes
it can tell. Files are readable by their owner only; they are not encrypted.

`counters.json` holds what was dropped, what was damaged, and a floor: samples with smaller numbers are dropped. It is
written before the files of dropped samples are deleted, so nothing is counted twice or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from tta_edge.errors import SampleRefused, SpoolDamaged, SpoolInUse, SpoolUnwritable
from tta_edge.events import Event, Reason, Tell
from tta_edge.spool_acks import Acknowledgements
from tta_edge.spool_directory import (
    BATCH_BYTES,
    BATCH_RECORDS,
    acknowledged,
    batch_path,
    batches,
    read_batch,
    rewrite,
    rewriting,
)
from tta_edge.spool_file import (
    HEAD_BYTES,
    NONCE_BYTES,
    Record,
    Sample,
    decode_record,
    encode_file,
    encode_record,
)
from tta_runtime.atomic import DISK, Disk, leftovers, make_durable, write_atomic
from tta_runtime.files import open_regular, read_at_most, reason

log = logging.getLogger(__name__)

MAX_COUNTERS_BYTES = 4096
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FIX = "Free space, or correct the directory's permissions"


@dataclass(frozen=True, eq=False)
class Waiting:
    """A sample with its key.

    Attributes:
        key: 32 hexadecimal digits; the same however often the sample is sent, and no other sample's.
        number: later samples have larger ones.
        sample: to be uploaded.
    """

    key: str
    number: int
    sample: Sample


class Counters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What survives of the spool's history.

    Attributes:
        dropped: samples that were given up for want of room, over all restarts.
        damaged: samples that were found damaged.
        floor: samples with smaller numbers are dropped.
    """

    dropped: int = 0
    damaged: int = 0
    floor: int = 0


class _Saved(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    counters: Counters
    check: str


@dataclass(frozen=True)
class _Entry:
    """Where a waiting sample is: what `Record` says, without its bytes."""

    key: str
    number: int
    stream: str
    nbytes: int
    offset: int
    length: int


@dataclass(eq=False)
class _Batch:
    """A file.

    Attributes:
        path: of the file.
        size: bytes.
        last: no number in it is larger.
        entries: key -> what waits of it, in order.
        done: keys of it that were removed.
        readable: whether it is known what waits in it; if not, it keeps its place until it is dropped.
    """

    path: Path
    size: int
    last: int
    entries: dict[str, _Entry] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    readable: bool = True


class Spool:
    """The queue in one directory. One `Spool` for each directory; for any thread, calls wait for each other.

    Nothing here is for a thread that serves: an append waits for the disk.

    Args:
        directory: made if need be, with permissions for its owner only.
        max_samples: most samples that wait.
        max_bytes: most bytes of their files.
        tell: told when samples begin to be dropped, and of damaged ones.
        disk: what writes.
        base: a directory above it that exists and whose name is durable; without it the next one.

    Raises:
        SpoolUnwritable: the directory cannot be made or read.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_samples: int = 10_000,
        max_bytes: int = 256 * 1024 * 1024,
        tell: Tell = lambda _: None,
        disk: Disk = DISK,
        base: Path | None = None,
    ) -> None:
        self.directory = directory
        self._max_samples, self._max_bytes = max_samples, max_bytes
        # A file is dropped as a whole, so it must be a small part of what there may be.
        self._batch_records = max(1, min(BATCH_RECORDS, max_samples // 8))
        self._batch_bytes = min(BATCH_BYTES, max_bytes // 8)
        self._tell = tell
        self._disk = disk
        self._lock = threading.RLock()
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._batches: list[_Batch] = []
        self._of: dict[str, _Batch] = {}
        self._size = 0
        self._dropping = False
        self._unsaved = False
        self._acks = Acknowledgements(directory, disk)
        try:
            make_durable(directory, base or directory.parent, disk)
            os.chmod(directory, 0o700)
            self._counters = self._load_counters()
            self._next = self._counters.floor
            self._open()
        except OSError as error:
            raise SpoolUnwritable(f"{directory} cannot be used: {reason(error)}", _FIX) from error

    def close(self) -> None:
        """Let go of the files; a kill does the same."""
        with self._lock:
            self._acks.close()

    # ------------------------------------------------------------------------------------------ what there is

    def __len__(self) -> int:
        with self._lock:
            return len(self._of)

    @property
    def nbytes(self) -> int:
        """Bytes of the files, those of removed samples in them included; at most `max_bytes`."""
        with self._lock:
            return self._size

    @property
    def counters(self) -> Counters:
        """Over all restarts."""
        with self._lock:
            return self._counters

    def streams(self) -> dict[str, int]:
        """Stream -> how many of its samples wait."""
        with self._lock:
            found: dict[str, int] = {}
            for key, batch in self._of.items():
                stream = batch.entries[key].stream
                found[stream] = found.get(stream, 0) + 1
            return found

    # ------------------------------------------------------------------------------------------ in and out

    def append(self, sample: Sample) -> str:
        """`append_many` of one."""
        return self.append_many([sample])[0]

    def append_many(self, samples: Sequence[Sample]) -> list[str]:
        """Keep samples; they are durable when this returns. Up to `BATCH_RECORDS` of them share an fsync.

        The oldest samples are dropped for them where there is no room, also where the disk is full.

        Returns:
            The key of each.

        Raises:
            SampleRefused: one of them is not of the right form or larger than the spool; none was kept.
            SpoolUnwritable: the operating system refuses. Of more than one file of samples the first may have been
                kept; samples without a key may be found after a restart all the same.
        """
        with self._lock:
            records = [encode_record(sample, self._next + i, self._nonce) for i, sample in enumerate(samples)]
            largest = max((len(data) for _, data in records), default=0)
            if HEAD_BYTES + largest > self._max_bytes:
                raise SampleRefused(
                    f"a sample takes {largest} bytes, the spool at most {self._max_bytes}",
                    "Give the spool more room, or send smaller samples",
                )
            first = 0
            for part in self._parts(records):
                self._keep(part, samples[first : first + len(part)])
                first += len(part)
            return [key for key, _ in records]

    def peek(
        self, samples: int, max_bytes: int | None = None, *, skip: Collection[str] = ()
    ) -> list[Waiting]:
        """The oldest samples, in order; they stay until they are removed.

        Args:
            samples: at most so many.
            max_bytes: of all their payloads; the first one may be larger.
            skip: keys to pass over: those under way.
        """
        found: list[Waiting] = []
        with self._lock:
            for batch in list(self._batches):
                for waiting in self._read(batch, skip):
                    if len(found) >= samples:
                        return found
                    if max_bytes is not None:
                        max_bytes -= len(waiting.sample.data)
                        if found and max_bytes < 0:
                            return found
                    found.append(waiting)
        return found

    def remove(self, keys: Iterable[str]) -> int:
        """Forget samples that were acknowledged, or refused for good; unknown keys are passed over.

        A disk that refuses is logged: after a restart the samples are offered again.

        Returns:
            How many there were.
        """
        with self._lock:
            touched: dict[_Batch, list[str]] = {}
            for key in keys:
                batch = self._of.pop(key, None)
                if batch is not None:
                    del batch.entries[key]
                    batch.done.add(key)
                    touched.setdefault(batch, []).append(key)
            self._sweep()
            there = set(self._batches)
            fresh = [key for batch, done in touched.items() if batch in there for key in done]
            if fresh:
                try:
                    self._acks.add(fresh, self._live())
                except OSError as error:
                    log.warning("acknowledged samples may be sent again after a restart: %s", reason(error))
            return sum(map(len, touched.values()))

    # ------------------------------------------------------------------------------------------ start

    def _open(self) -> None:
        done = acknowledged(self.directory)
        for number, path, size in batches(self.directory):
            # Also those that cannot be read have their numbers.
            batch = _Batch(path, size, number + BATCH_RECORDS - 1)
            self._next = max(self._next, batch.last + 1)
            try:
                records, batch.size = self._load(path)
            except FileNotFoundError:  # removed meanwhile, by an operator
                continue
            except OSError as error:
                log.warning("%s cannot be read and is left for the next start: %s", path, reason(error))
                records, batch.readable = [], False
            else:
                batch.last = max((record.number for record in records), default=number)
            for record in records:
                if record.key in done:
                    batch.done.add(record.key)
                elif record.number >= self._counters.floor:
                    batch.entries[record.key] = _entry(record)
                    self._of[record.key] = batch
            if batch.size:
                self._batches.append(batch)
                self._size += batch.size
        self._sweep()
        # Temporary files may be an operator's who is rewriting.
        with suppress(OSError, SpoolInUse), rewriting(self.directory):
            for left in leftovers(self.directory):
                self._disk.remove(left)
        with suppress(OSError):
            self._acks.restart(self._live())
        with suppress(SpoolUnwritable):
            self._make_room(0, 0)

    def _load_counters(self) -> Counters:
        try:
            return _read_counters(self.directory)
        except (OSError, SpoolDamaged) as error:
            self._happened(
                Reason.SPOOL_DAMAGED, f"counters.json: {reason(error)}; the spool counts from nothing"
            )
            return Counters()

    # ------------------------------------------------------------------------------------------ inside

    def _parts(self, records: list[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
        """The records of each file."""
        part: list[tuple[str, bytes]] = []
        size = HEAD_BYTES
        for record in records:
            if part and (len(part) >= self._batch_records or size + len(record[1]) > self._batch_bytes):
                yield part
                part, size = [], HEAD_BYTES
            part.append(record)
            size += len(record[1])
        if part:
            yield part

    def _keep(self, records: list[tuple[str, bytes]], samples: Sequence[Sample]) -> None:
        size = HEAD_BYTES + sum(len(data) for _, data in records)
        path = batch_path(self.directory, self._next)
        parts = encode_file([data for _, data in records])
        self._make_room(len(records), size)
        try:
            try:
                self._write(path, parts)
            except OSError as error:
                if error.errno not in _FULL or not self._free(size):
                    raise
                self._write(path, parts)  # others may have taken the space: then it fails for good
        except OSError as error:
            raise SpoolUnwritable(f"{path} cannot be written: {reason(error)}", _FIX) from error
        batch = _Batch(path, size, self._next + len(records) - 1)
        offset = HEAD_BYTES
        for (key, data), sample in zip(records, samples, strict=True):
            batch.entries[key] = _Entry(key, self._next, sample.stream, len(sample.data), offset, len(data))
            self._of[key] = batch
            self._next += 1
            offset += len(data)
        self._batches.append(batch)
        self._size += size
        if self._unsaved:
            self._save_counters()
        self._dropping = self._dropping and not (
            len(self._of) * 2 < self._max_samples and self._size * 2 < self._max_bytes
        )

    def _write(self, path: Path, parts: list[bytes]) -> None:
        write_atomic(path, parts, mode=0o600, disk=self._disk)

    def _make_room(self, samples: int, size: int) -> None:
        """Drop the oldest files until so much fits; raises `SpoolUnwritable` where they cannot be deleted."""
        self._sweep()
        over_samples = len(self._of) + samples - self._max_samples
        over_size = self._size + size - self._max_bytes
        if over_samples > 0 or over_size > 0:
            self._drop(over_samples, over_size, f"{len(self._of)} samples, {self._size} bytes")
        if self._size + size > self._max_bytes:
            raise SpoolUnwritable(f"{self.directory} is full and its files cannot be deleted", _FIX)

    def _free(self, size: int) -> bool:
        """Give a full disk so much back; whether anything was."""
        before = self._size
        self._drop(0, size, "the disk is full")
        if self._unsaved:  # there was no room for them either, and soon there is none again
            self._save_counters()
        return self._size < before

    def _drop(self, samples: int, size: int, why: str) -> None:
        """Drop the oldest files that hold so many samples and bytes together."""
        going: list[_Batch] = []
        for batch in self._batches:
            if samples <= 0 and size <= 0:
                break
            samples -= len(batch.entries)
            size -= batch.size
            going.append(batch)
        if not going:
            return
        # What an operator has removed meanwhile was not dropped.
        dropped = sum(len(batch.entries) for batch in going if os.path.exists(batch.path))
        floor = max(self._counters.floor, going[-1].last + 1)
        self._counters = msgspec.structs.replace(
            self._counters, dropped=self._counters.dropped + dropped, floor=floor
        )
        self._save_counters()
        for batch in going:
            for key in batch.entries:
                del self._of[key]
            batch.entries.clear()
        self._sweep()
        if dropped and not self._dropping:
            self._dropping = True
            self._happened(
                Reason.SPOOL_FULL, f"{why}; {dropped} samples were dropped, {self._counters.dropped} in all"
            )

    def _sweep(self) -> None:
        """Delete the files of which nothing waits; one that cannot be deleted keeps its place."""
        left = []
        for batch in self._batches:
            if not batch.entries and (batch.readable or batch.last < self._counters.floor):
                try:
                    with suppress(FileNotFoundError):
                        self._disk.remove(batch.path)
                    self._size -= batch.size
                    continue
                except OSError as error:
                    log.warning("%s cannot be deleted: %s", batch.path, reason(error))
            left.append(batch)
        self._batches = left

    def _live(self) -> list[str]:
        return [key for batch in self._batches for key in batch.done]

    def _save_counters(self) -> None:
        """What cannot be written now is written with the next samples."""
        saved = msgspec.json.encode(_Saved(self._counters, _check(self._counters)))
        self._unsaved = True
        try:
            write_atomic(self.directory / "counters.json", saved, mode=0o600, disk=self._disk)
        except OSError as error:
            log.warning("the spool's counters are only in memory: %s", reason(error))
        else:
            self._unsaved = False

    def _read(self, batch: _Batch, skip: Collection[str]) -> Iterator[Waiting]:
        """What waits in a file, read as it is asked for."""
        given: set[str] = set()
        try:
            with open_regular(batch.path) as file:
                for entry in [entry for key, entry in batch.entries.items() if key not in skip]:
                    record = _record(file.fileno(), entry)
                    if record is None:
                        break
                    yield Waiting(record.key, record.number, record.sample)
                    given.add(record.key)
                else:
                    return
            self._look_again(batch)
        except FileNotFoundError:  # an operator has removed it
            self._forget(batch, batch.entries)
            self._sweep()
        except OSError as error:
            log.warning("%s cannot be read: %s", batch.path, reason(error))
        else:
            yield from self._read(batch, {*skip, *given})

    def _look_again(self, batch: _Batch) -> None:
        """Find what is left in a file that an operator has rewritten, or that was damaged; raises OSError."""
        records, size = self._load(batch.path)
        found = {record.key: _entry(record) for record in records if record.key in batch.entries}
        self._forget(batch, batch.entries.keys() - found.keys())
        batch.entries = found
        self._size += size - batch.size
        batch.size = size
        self._sweep()

    def _load(self, path: Path) -> tuple[list[Record], int]:
        """The good records of a file and its size, after what is damaged was counted and left out; raises OSError."""
        records, damaged = read_batch(path)
        if damaged:
            self._counters = msgspec.structs.replace(self._counters, damaged=self._counters.damaged + damaged)
            what = f"{path.name}: {damaged} damaged samples, {len(records)} good ones"
            self._happened(Reason.SPOOL_DAMAGED, what)
            self._save_counters()
            try:
                with rewriting(self.directory):
                    rewrite(path, records, self._disk)
                records = read_batch(path)[0] if records else []
            except (OSError, SpoolInUse) as error:  # the next start finds and counts it again
                log.warning("%s stays damaged: %s", path, reason(error))
        with suppress(FileNotFoundError):
            return records, path.stat().st_size
        return [], 0

    def _forget(self, batch: _Batch, keys: Iterable[str]) -> None:
        for key in list(keys):
            del batch.entries[key]
            del self._of[key]

    def _happened(self, why: Reason, detail: str) -> None:
        self._tell(Event("", "", "spool", why.value, detail))


def saved_counters(directory: Path) -> Counters:
    """The counters on disk, also while a daemon uses them; all 0 where they cannot be read."""
    try:
        return _read_counters(directory)
    except (OSError, SpoolDamaged):
        return Counters()


def _read_counters(directory: Path) -> Counters:
    """Raises `SpoolDamaged` and OSError; where there is no file all are 0."""
    try:
        data = read_at_most(directory / "counters.json", MAX_COUNTERS_BYTES)
        saved = msgspec.json.decode(data, type=_Saved)
    except FileNotFoundError:
        return Counters()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SpoolDamaged(str(error)) from error
    if saved.check != _check(saved.counters):
        raise SpoolDamaged(f"its checksum is {saved.check[:16]}, expected {_check(saved.counters)}")
    return saved.counters


def _entry(record: Record) -> _Entry:
    sample = record.sample
    return _Entry(record.key, record.number, sample.stream, len(sample.data), record.offset, record.length)


def _record(fd: int, entry: _Entry) -> Record | None:
    """The record, if it is where it was; raises OSError."""
    data = os.pread(fd, entry.length, entry.offset)
    try:
        record = decode_record(data)
    except SpoolDamaged:
        return None
    return record if record.key == entry.key else None


def _check(counters: Counters) -> str:
    return hashlib.sha256(msgspec.json.encode(counters)).hexdigest()[:16]
