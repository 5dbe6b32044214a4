"""What edges have been told and must stay true even where the store is lost: who is let in, numbers, and dates.

One small file beside the store, written before anybody is told: a damaged store is set aside and a new one begun, and
neither must the fleet have to enrol again, nor may a number be given to another patch, nor a date go back: edges refuse
both as a replay.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from tta_cloud.records import Edge
from tta_runtime.atomic import DISK, Disk, write_atomic
from tta_runtime.files import read_at_most, reason

log = logging.getLogger(__name__)

FILE = "promises.json"
MAX_BYTES = 64 << 20
AHEAD_S = 60
"""Dates are promised for so long in advance, so that the file is written once a minute and not with each head."""


class _Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    epoch: int
    edges: tuple[Edge, ...] = ()
    newest: Mapping[str, tuple[int, str]] = {}
    signed_s: int = 0


class _Saved(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    facts: _Facts
    check: str


class Promises:
    """The file. For any thread.

    A disk that refuses is logged: the store, which has the same facts, is what the service relies on.

    Args:
        path: of the file.
        epoch: of the root in force; numbers and dates of another epoch count no more.
        disk: what writes.

    Attributes:
        damaged: why the file that is there could not be used; empty where it could, or there was none.
    """

    def __init__(self, path: Path, epoch: int, *, disk: Disk = DISK) -> None:
        self.damaged = ""
        self._path = path
        self._disk = disk
        self._lock = threading.Lock()
        self._facts = _Facts(epoch)
        self._floor_s = 0
        try:
            saved = msgspec.json.decode(read_at_most(path, MAX_BYTES), type=_Saved)
            if saved.check != _check(saved.facts):
                self.damaged = f"{path} is damaged: its checksum does not fit"
                return
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError, ValueError, RecursionError) as error:
            self.damaged = f"{path} cannot be used: {reason(error)}"
            return
        same = saved.facts.epoch == epoch
        self._facts = saved.facts if same else _Facts(epoch, saved.facts.edges)
        self._floor_s = self._facts.signed_s

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge that was enrolled, also those that are shut out."""
        return self._facts.edges

    def newest(self, group: str) -> tuple[int, str]:
        """Number and sha256 of the body of the last patch of a group in this epoch; 0 and "" for none."""
        return self._facts.newest.get(group, (0, ""))

    def number(self, group: str) -> int:
        """Of the last patch of a group in this epoch; 0 for none."""
        return self.newest(group)[0]

    def keep(self, edges: Iterable[Edge]) -> None:
        """Remember who is let in and who is not."""
        found = tuple(
            Edge(
                key=each.key, name=each.name, group=each.group, state=each.state,
                first_seen_ms=each.first_seen_ms, last_seen_ms=each.first_seen_ms,
            )
            for each in sorted(edges, key=lambda each: each.key)
        )  # fmt: skip
        with self._lock:
            if found != self._facts.edges:
                self._write(msgspec.structs.replace(self._facts, edges=found))

    def give(self, group: str, seq: int, body_sha256: str) -> None:
        """Remember that edges will be told of a patch."""
        with self._lock:
            if seq > self.number(group):
                newest = {**self._facts.newest, group: (seq, body_sha256)}
                self._write(msgspec.structs.replace(self._facts, newest=newest))

    def date(self, now_s: float) -> int:
        """The date to sign with: now, or the last one that was signed where the clock was set back since."""
        with self._lock:
            self._floor_s = max(int(now_s), self._floor_s)
            if self._floor_s > self._facts.signed_s:
                self._write(msgspec.structs.replace(self._facts, signed_s=self._floor_s + AHEAD_S))
            return self._floor_s

    def _write(self, facts: _Facts) -> None:
        self._facts = facts
        try:
            write_atomic(
                self._path, msgspec.json.encode(_Saved(facts, _check(facts))), mode=0o600, disk=self._disk
            )
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, reason(error))


def _check(facts: _Facts) -> str:
    return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()
