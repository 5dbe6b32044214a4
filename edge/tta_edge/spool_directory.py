"""The directory of a spool: what its files are called, how they are read, and removing samples beside a running daemon.

    NUMBER.batch      some samples (spool_file.py); NUMBER is that of the first, 16 digits
    acks-HEX          16 bytes for each sample that was acknowledged while others of its file still wait
    counters.json     what must survive a restart: see spool.py
    lock              held by whoever writes a batch file a second time, and only while it does

A batch file appears whole, by a rename. The daemon never changes one afterwards, with one exception at a time when it
finds it damaged; it only deletes it. So others may read at any time, and may delete files or leave samples out of them
while a daemon runs: the daemon finds out when it next reads the file. Two that rewrite exclude each other by the lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tta_edge.errors import SpoolInUse, SpoolUnreadable, SpoolUnwritable
from tta_edge.spool_file import (
    HEAD_BYTES,
    MAX_HEADER_BYTES,
    MAX_SAMPLE_BYTES,
    Record,
    decode_file,
    encode_file,
)
from tta_runtime.atomic import DISK, Disk, leftovers, write_atomic
from tta_runtime.files import read_at_most, reason

BATCH_RECORDS = 64
"""Most records of one file."""
BATCH_BYTES = 1024 * 1024
"""A file that has reached it takes no further record."""
MAX_FILE_BYTES = HEAD_BYTES + BATCH_BYTES + MAX_SAMPLE_BYTES + 2 * MAX_HEADER_BYTES
MAX_ACK_BYTES = 16 * 1024 * 1024
_BATCH = re.compile(r"(\d{16})\.batch")
_ACKS = re.compile(r"acks-[0-9a-f]{12}")
_FIX = "Correct the permissions, or free space"


@dataclass
class Tally:
    """Samples and their bytes.

    Attributes:
        samples: how many.
        nbytes: of their payloads.
        oldest_ms: when the oldest one was taken; None without any.
    """

    samples: int = 0
    nbytes: int = 0
    oldest_ms: int | None = None

    def add(self, record: Record) -> None:
        """Count one in."""
        self.samples += 1
        self.nbytes += len(record.sample.data)
        taken_ms = record.sample.taken_ms
        self.oldest_ms = taken_ms if self.oldest_ms is None else min(self.oldest_ms, taken_ms)


@dataclass
class Survey:
    """What waits in a spool.

    Attributes:
        streams: stream -> its samples.
        damaged: records that are not what was written.
        files: how many batch files there are.
        file_bytes: of them.
    """

    streams: dict[str, Tally] = field(default_factory=dict)
    damaged: int = 0
    files: int = 0
    file_bytes: int = 0

    @property
    def total(self) -> Tally:
        """Of all streams."""
        oldest = [each.oldest_ms for each in self.streams.values() if each.oldest_ms is not None]
        parts = self.streams.values()
        return Tally(
            sum(each.samples for each in parts), sum(each.nbytes for each in parts), min(oldest, default=None)
        )


def batch_path(directory: Path, number: int) -> Path:
    """The file of a batch whose first record has that number."""
    return directory / f"{number:016d}.batch"


def batches(directory: Path) -> list[tuple[int, Path, int]]:
    """Number, path and size of each batch file, the oldest first; what else is there is not ours.

    Raises:
        OSError: from the operating system.
    """
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            match = _BATCH.fullmatch(entry.name)
            with suppress(FileNotFoundError):  # deleted meanwhile
                if match is not None and entry.is_file(follow_symlinks=False):
                    size = entry.stat(follow_symlinks=False).st_size
                    found.append((int(match[1]), Path(entry.path), size))
    return sorted(found)


def read_batch(path: Path) -> tuple[list[Record], int]:
    """Good records and the number of damaged ones; a file that is too large to be ours is one damaged record.

    Raises:
        OSError: from the operating system.
    """
    data = read_at_most(path, MAX_FILE_BYTES)
    return ([], 1) if len(data) > MAX_FILE_BYTES else decode_file(data)


def ack_files(directory: Path) -> list[Path]:
    """The files of acknowledged keys; raises OSError."""
    return sorted(path for path in directory.iterdir() if _ACKS.fullmatch(path.name))


def acknowledged(directory: Path) -> set[str]:
    """The keys in these files. A key that is damaged or was not written whole matches no sample.

    Raises:
        OSError: from the operating system.
    """
    keys: set[str] = set()
    for path in ack_files(directory):
        with suppress(FileNotFoundError):
            data = read_at_most(path, MAX_ACK_BYTES)
            keys |= {data[i : i + 16].hex() for i in range(0, len(data) - 15, 16)}
    return keys


@contextmanager
def rewriting(directory: Path) -> Iterator[None]:
    """The right to write batch files a second time.

    Raises:
        SpoolInUse: somebody else has it.
        OSError: from the operating system.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    fd = os.open(directory / "lock", flags, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise SpoolInUse(
                f"another process is rewriting files in {directory}", "Try again when it is done"
            ) from error
        yield
    finally:
        os.close(fd)


def rewrite(path: Path, keep: list[Record], disk: Disk) -> None:
    """Leave only some records in a file, durably; without any the file goes. For the holder of `rewriting`.

    Raises:
        OSError: from the operating system; the file is as it was, or done.
    """
    if not keep:
        with suppress(FileNotFoundError):
            disk.remove(path)
        disk.sync_directory(path.parent)
        return
    try:
        data = read_at_most(path, MAX_FILE_BYTES)
    except FileNotFoundError:  # the daemon has sent or dropped all of it meanwhile
        return
    parts = [data[record.offset : record.offset + record.length] for record in keep]
    write_atomic(path, encode_file(parts), mode=0o600, disk=disk)


def unused(state_dir: Path) -> bool:
    """Whether no daemon holds the state directory; False where that cannot be told."""
    try:
        fd = os.open(state_dir / "lock", os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def survey(directory: Path) -> Survey:
    """What waits in a directory, also while a daemon uses it; nothing where there is no directory.

    Raises:
        SpoolUnreadable: the operating system refuses.
    """
    found = Survey()
    try:
        for _, size, records, damaged in _files(directory):
            found.files += 1
            found.file_bytes += size
            found.damaged += damaged
            for record in records:
                found.streams.setdefault(record.sample.stream, Tally()).add(record)
    except OSError as error:
        raise SpoolUnreadable(f"{directory} cannot be read: {reason(error)}", _FIX) from error
    return found


def discard(
    directory: Path, wanted: Callable[[str], bool], *, disk: Disk = DISK, alone: bool = False
) -> Survey:
    """Delete the samples of some streams for good, also while a daemon uses the directory.

    A sample that the daemon is sending at this moment may still be sent. Damaged records in the files that are touched
    go as well.

    Args:
        directory: of the spool.
        wanted: whether the samples of a stream are to go.
        disk: what writes.
        alone: whether no daemon uses the directory: then what killed processes left half written goes as well.

    Returns:
        What was deleted.

    Raises:
        SpoolInUse: another process is rewriting.
        SpoolUnwritable: the operating system refuses; some may have been deleted.
    """
    gone = Survey()
    if not directory.is_dir():
        return gone
    try:
        with rewriting(directory):
            for path, size, records, damaged in _files(directory):
                going = [record for record in records if wanted(record.sample.stream)]
                if not going and records:
                    continue
                keep = [record for record in records if not wanted(record.sample.stream)]
                rewrite(path, keep, disk)
                for record in going:
                    gone.streams.setdefault(record.sample.stream, Tally()).add(record)
                gone.damaged += damaged
                gone.files += not keep
                gone.file_bytes += size if not keep else 0
            for left in leftovers(directory) if alone else ():
                with suppress(FileNotFoundError):
                    disk.remove(left)
    except OSError as error:
        raise SpoolUnwritable(f"{directory} cannot be changed: {reason(error)}", _FIX) from error
    return gone


def _files(directory: Path) -> Iterator[tuple[Path, int, list[Record], int]]:
    """Path, size, waiting and damaged records of each file; one that vanishes meanwhile is passed over."""
    if not directory.is_dir():
        return
    done = acknowledged(directory)
    for _, path, size in batches(directory):
        try:
            records, damaged = read_batch(path)
        except FileNotFoundError:
            continue
        yield path, size, [record for record in records if record.key not in done], damaged
