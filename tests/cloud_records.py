"""What the tests of the cloud's store put into it, and what they read back."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from tta_cloud import edges, learners, ledger, samples
from tta_cloud.errors import CloudError
from tta_cloud.records import Entry, Patch, Sample
from tta_cloud.store import Store, StoreOptions
from tta_cloud.writer import GroupCommit

EDGE = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ0123"
OTHER = EDGE[::-1]
AT_ONCE = StoreOptions(commit=GroupCommit(linger_s=0.0))
"""Commit what is there: a single thread that waits for each commit gains nothing by lingering."""


def key(number: int) -> str:
    return hashlib.sha256(f"sample {number}".encode()).hexdigest()[:32]


def sample(number: int, group: str = "g", size: int = 48, **more: object) -> Sample:
    """A sample whose content follows from its number."""
    x = np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8)
    made = Sample(
        key=key(number), edge=EDGE, group=group, stream="cam", taken_ms=1000 + number, seq=number, entropy=0.5,
        encoding="raw", dtype="uint8", shape=(size,), x=x.tobytes(),
    )  # fmt: skip
    return msgspec.structs.replace(made, **more)


def patch(seq: int, group: str = "g", epoch: int = 1, state: str = "published", size: int = 200) -> Patch:
    """A patch whose content follows from its number."""
    entry = Entry(group=group, epoch=epoch, seq=seq, state=state, reason="", created_ms=seq)  # type: ignore[arg-type]
    payload = np.random.default_rng(abs(seq)).bytes(size)
    return Patch(
        entry=entry, body=f"body {group} {epoch} {seq}".encode(), signatures=b"signed", payload=payload
    )


def unused(db: sqlite3.Connection, group: str, limit: int) -> samples.Drawn:
    """The oldest samples of a group that nobody learnt from."""
    return samples.numbered(db, [number for number, *_ in samples.waiting(db, group)][:limit])


class Kept:
    """A store that is closed at the end, with what it told."""

    def __init__(self, root: Path, options: StoreOptions = AT_ONCE, **more: object) -> None:
        self.told: list[tuple[str, str]] = []
        self.store = Store(root, lambda e: self.told.append((e.action, e.reason)), options=options, **more)  # type: ignore[arg-type]
        self.call, self.read, self.submit = self.store.call, self.store.read, self.store.submit

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()

    def insert(self, *numbers: int, group: str = "g", received_ms: int = 1, **more: object) -> list[object]:
        caps = more.pop("caps", samples.Caps())
        quota = more.pop("quota", None)
        return [
            self.call(
                samples.insert(sample(n, group, **more), received_ms=received_ms, caps=caps, quota=quota)
            )
            for n in numbers
        ]

    def unused(self, limit: int = 1000, group: str = "g") -> list[str]:
        return [s.sample.key for s in self.read(lambda db: unused(db, group, limit)).samples]


class Acknowledged:
    """Collects outcomes, and waits for them."""

    def __init__(self) -> None:
        self.outcomes: list[object] = []
        self._changed = threading.Condition()

    def __call__(self, outcome: object) -> None:
        with self._changed:
            self.outcomes.append(outcome)
            self._changed.notify_all()

    def wait(self, count: int, patience_s: float = 60.0) -> list[object]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.outcomes) >= count, patience_s)
            return list(self.outcomes)


def contents(store: Store, groups: tuple[str, ...] = ("g", "h")) -> dict[tuple[object, ...], object]:
    """Everything in a store that can be believed, by what it is; read through the interface."""

    def everything(db: object) -> dict[tuple[object, ...], object]:
        found: dict[tuple[object, ...], object] = {}
        for group in groups:
            for drawn in (
                unused(db, group, 10**6),  # type: ignore[arg-type]
                samples.replay(db, group, 10**6, newest=10**6, seed=0),  # type: ignore[arg-type]
            ):
                found |= {
                    ("sample", s.sample.key): msgspec.structs.replace(s, number=1) for s in drawn.samples
                }
            for entry in ledger.entries(db, group, 10**6):  # type: ignore[arg-type]
                try:
                    found["patch", group, entry.epoch, entry.seq] = ledger.get(
                        db, group, entry.epoch, entry.seq
                    )  # type: ignore[arg-type]
                except CloudError:
                    continue
            try:
                learner = learners.load(db, group)  # type: ignore[arg-type]
            except CloudError:
                continue
            if learner is not None:
                found["learner", group] = learner
        found |= {("edge", e.key): e for e in edges.listed(db)}  # type: ignore[arg-type]
        found |= {("token", t.hash): t for t in edges.tokens(db)}  # type: ignore[arg-type]
        return found

    return store.read(everything)


def options(**more: object) -> StoreOptions:
    return replace(AT_ONCE, **more)  # type: ignore[arg-type]
