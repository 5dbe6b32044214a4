"""What is handed to the writer, and what comes back."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from tta_cloud.errors import CloudError

T = TypeVar("T")


@dataclass(frozen=True)
class Operation(Generic[T]):
    """One change of the store: wholly there after its commit, or not at all.

    Attributes:
        name: for the log.
        run: carries it out on the writer's connection, inside a transaction. It refuses by raising a `CloudError`.
            It may be run again after its transaction was rolled back, and must change nothing but the store.
        size_bytes: of what waits with it in the queue.
    """

    name: str
    run: Callable[[sqlite3.Connection], T]
    size_bytes: int = 0


def together(first: Operation[T], other: Operation[Any]) -> Operation[T]:
    """Both changes, or neither; gives what the first one gives."""

    def run(db: sqlite3.Connection) -> T:
        value = first.run(db)
        other.run(db)
        return value

    return Operation(f"{first.name}+{other.name}", run, first.size_bytes + other.size_bytes)


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What became of an operation.

    Attributes:
        value: what it gave, where it was committed.
        error: why nothing of it is in the store; None where it was committed.
    """

    value: T | None = None
    error: CloudError | None = None

    def get(self) -> T:
        """The value; raises the error if there is one."""
        if self.error is not None:
            raise self.error
        return cast(T, self.value)


Done = Callable[[Outcome[T]], None]
"""Told of an outcome after the commit is durable, on the writer's thread: it must not wait for the store."""
