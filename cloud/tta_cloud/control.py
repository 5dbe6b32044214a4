"""Notes from commands to a service that runs: files in a directory of the store, taken in one by one.

A running service holds its store alone. What a command wants done (let somebody enrol, shut a key out, go back to an
earlier patch) it leaves as a file; the service makes it durable and deletes the file. Without a service the notes wait
for its start. A command that wants to know what became of its note leaves a named pipe beside it.
"""

from __future__ import annotations

import os
import secrets
import select
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec

from tta_cloud.errors import CannotServe, NoAnswer, Refused
from tta_cloud.records import Count, Name
from tta_runtime.atomic import make_durable, write_atomic
from tta_runtime.errors import TtaError
from tta_runtime.files import read_at_most, reason
from tta_runtime.lock import take

DIRECTORY = "control"
MAX_BYTES = 4096
MAX_ANSWER_BYTES = 16 << 10
MAX_WHY = 256

Why = Annotated[str, msgspec.Meta(max_length=MAX_WHY)]


class LetEnrol(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="let-enrol"):
    """Somebody who has a token may enrol; the token itself is not written down."""

    hash: bytes
    name: str
    group: str
    expires_ms: int


class ShutOut(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="shut-out"):
    """A key is no longer let in."""

    key: str


class Pin(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="pin"):
    """A group is to stay at a patch."""

    group: Name
    epoch: Count
    seq: Count
    why: Why = ""


class Unpin(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="unpin"):
    """A group may go on."""

    group: Name
    why: Why = ""


class RollBack(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="roll-back"):
    """An earlier patch of a group is to be published again, under a new number."""

    group: Name
    epoch: Count
    seq: Count
    """0: the source."""
    last: Count
    """Number of the newest patch when it was asked for: a note that was carried out is not carried out again."""
    hold: bool = False
    """Whether the group is to stay there."""
    why: Why = ""


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What became of a note.

    Attributes:
        epoch: of the patch that it made or changed.
        seq: of that patch.
        state: of that patch.
        code: of the error where it was refused; empty where it was carried out.
        cause: of that error.
        fix: of that error.
    """

    epoch: int = 0
    seq: int = 0
    state: str = ""
    code: str = ""
    cause: str = ""
    fix: str = ""


Note = LetEnrol | ShutOut | Pin | Unpin | RollBack


def refusal(error: TtaError) -> Answer:
    """The answer to a note that is not carried out."""
    return Answer(code=error.code, cause=error.cause[:1000], fix=error.fix[:500])


def leave(store: Path, note: Note) -> None:
    """Leave a note.

    Raises:
        CannotServe: it cannot be written.
    """
    _leave(store, note, f"{secrets.token_hex(8)}.note")


def ask(store: Path, note: Note, wait_s: float) -> Answer | None:
    """Leave a note and wait for what becomes of it.

    Args:
        store: directory of the service.
        note: what is asked for.
        wait_s: how long a running service may take.

    Returns:
        The answer; None where no service runs: the note waits for its start.

    Raises:
        CannotServe: the note cannot be written.
        Refused: the service does not carry it out.
        NoAnswer: it has not answered in time; the note stays.
    """
    name = secrets.token_hex(8)
    if not is_served(store):
        _leave(store, note, f"{name}.note")
        return None
    pipe = store / DIRECTORY / f"{name}.answer"
    try:
        _make(pipe.parent, store)
        os.mkfifo(pipe, 0o600)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise _unwritable(pipe.parent, error) from error
    try:
        _leave(store, note, f"{name}.note")
        data = _read(reader, wait_s)
    finally:
        os.close(reader)
        pipe.unlink(missing_ok=True)
    if not data:
        raise NoAnswer(
            f"the service has not answered within {wait_s:g} s",
            "It does it when it is through with what it is at; `tta-cloud patches log` shows when",
        )
    answer = msgspec.json.decode(data, type=Answer)
    if answer.code:
        raise Refused(answer.code, answer.cause, answer.fix)
    return answer


def tell(path: Path, answer: Answer) -> None:
    """Say what became of a note to whoever left it, if somebody waits for that.

    Args:
        path: of the note.
        answer: what became of it.
    """
    pipe = path.with_suffix(".answer")
    try:
        # Without a reader this fails at once; a file of another kind is nobody who waits.
        writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        pipe.unlink(missing_ok=True)
        return
    try:
        if stat.S_ISFIFO(os.fstat(writer).st_mode):
            with suppress(OSError):
                os.write(writer, msgspec.json.encode(answer))
    finally:
        os.close(writer)


def is_served(store: Path) -> bool:
    """Whether a service holds the store now."""
    try:
        lock = take(store / "data" / "lock")
    except OSError:
        return False
    if lock is None:
        return True
    lock.close()
    return False


def notes(store: Path) -> Iterator[tuple[Path, Note | None]]:
    """The notes that wait, each with its file; None for one that cannot be read."""
    directory = store / DIRECTORY
    if not directory.is_dir():
        return
    for path in sorted(directory.glob("*.note")):
        try:
            yield path, msgspec.json.decode(read_at_most(path, MAX_BYTES), type=Note)
        except (OSError, msgspec.DecodeError, ValueError):
            yield path, None


def _leave(store: Path, note: Note, name: str) -> None:
    directory = store / DIRECTORY
    try:
        _make(directory, store)
        write_atomic(directory / name, msgspec.json.encode(note), mode=0o600)
    except OSError as error:
        raise _unwritable(directory, error) from error


def _make(directory: Path, store: Path) -> None:
    make_durable(directory, store)
    directory.chmod(0o700)


def _read(reader: int, wait_s: float) -> bytes:
    """What comes through a pipe until its other end is closed; empty if nothing comes in time."""
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    if not poller.poll(wait_s * 1000):
        return b""
    return os.read(reader, MAX_ANSWER_BYTES)


def _unwritable(directory: Path, error: OSError) -> CannotServe:
    return CannotServe(f"{directory} cannot be written: {reason(error)}", "Name the --store of the service")
