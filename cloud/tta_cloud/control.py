"""Notes from commands to a service that runs: files in a directory of the store, taken in one by one.

A running service holds its store alone. What a command wants done (let somebody enrol, shut a key out) it leaves as a
file; the service makes it durable and deletes the file. Without a service the notes wait for its start.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec

from tta_cloud.errors import CannotServe
from tta_runtime.atomic import make_durable, write_atomic
from tta_runtime.files import read_at_most, reason

DIRECTORY = "control"
MAX_BYTES = 4096


class LetEnrol(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="let-enrol"):
    """Somebody who has a token may enrol; the token itself is not written down."""

    hash: bytes
    name: str
    group: str
    expires_ms: int


class ShutOut(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="shut-out"):
    """A key is no longer let in."""

    key: str


Note = LetEnrol | ShutOut


def leave(store: Path, note: Note) -> None:
    """Leave a note.

    Raises:
        CannotServe: it cannot be written.
    """
    directory = store / DIRECTORY
    try:
        make_durable(directory, store)
        directory.chmod(0o700)
        write_atomic(directory / f"{secrets.token_hex(8)}.note", msgspec.json.encode(note), mode=0o600)
    except OSError as error:
        raise CannotServe(
            f"{directory} cannot be written: {reason(error)}", "Name the --store of the service"
        ) from error


def notes(store: Path) -> Iterator[tuple[Path, Note | None]]:
    """The notes that wait, each with its file; None for one that cannot be read."""
    directory = store / DIRECTORY
    if not directory.is_dir():
        return
    for path in sorted(directory.glob("*.note")):
        try:
            yield path, msgspec.json.decode(read_at_most(path, MAX_BYTES), type=LetEnrol | ShutOut)
        except (OSError, msgspec.DecodeError, ValueError):
            yield path, None
