"""Results on disk: one file each, whole or not there, so that a long suite can go on another day."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import msgspec

from tta_edge.suite.errors import StoreMalformed, StoreUnwritable
from tta_edge.suite.result import Key, Result, decode, encode
from tta_runtime.atomic import write_atomic

MAX_BYTES = 16 << 20
"""Of one result; a million samples take some 170 kB."""


class Store:
    """A directory of results.

    Args:
        directory: made when something is put; None: results are kept in memory only.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._results: dict[Key, Result] = {}

    def path(self, key: Key) -> Path | None:
        """The file of a result; None where nothing is written."""
        if self._directory is None:
            return None
        digest = hashlib.blake2b(msgspec.json.encode(key), digest_size=8).hexdigest()
        readable = re.sub(r"[^A-Za-z0-9._+-]+", "_", f"{key.stream}-{key.player}")[:80]
        return self._directory / "results" / key.bundle[:12] / f"{readable}-{digest}.json"

    def find(self, key: Key) -> Result | None:
        """The stored result; None where there is none.

        Raises:
            StoreMalformed: the file is there and cannot be used.
        """
        if key in self._results:
            return self._results[key]
        path = self.path(key)
        if path is None or not path.is_file():
            return None
        try:
            size = path.stat().st_size
            if size > MAX_BYTES:
                raise StoreMalformed(f"{path} has {size} bytes, the limit is {MAX_BYTES}", "Remove it")
            data = path.read_bytes()
        except OSError as error:
            raise StoreMalformed(
                f"{path} cannot be read: {error.strerror}", "Correct its permissions"
            ) from error
        result = decode(data, path)
        if result.key != key:
            raise StoreMalformed(
                f"{path} is the result of {_words(result.key)}, expected {_words(key)}",
                "Remove the file; the suite plays the stream again",
            )
        self._results[key] = result
        return result

    def put(self, result: Result) -> None:
        """Keep a result, over an older one.

        Raises:
            StoreUnwritable: the file cannot be written; an older one is as it was.
        """
        path = self.path(result.key)
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, encode(result))
            except OSError as error:
                raise StoreUnwritable(
                    f"cannot write {path}: {error.strerror}", "Name another --store"
                ) from error
        self._results[result.key] = result


def _words(key: Key) -> str:
    return f"{key.player} on {key.stream}, seed {key.seed}, bundle {key.bundle[:12]}"
