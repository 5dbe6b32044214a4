"""Keys of samples that were acknowledged while others of their file still wait: 16 bytes each, appended, not fsynced.

What a kill leaves is whole. A power cut may take the last ones back; their samples are sent once more then, which the
cloud answers as duplicates.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tta_edge.spool_directory import ack_files
from tta_runtime.atomic import Disk

COMPACT_BYTES = 64 * 1024


class Acknowledgements:
    """The file of one running daemon.

    Args:
        directory: of the spool.
        disk: what writes.
    """

    def __init__(self, directory: Path, disk: Disk) -> None:
        self._directory = directory
        self._disk = disk
        self._fd: int | None = None
        self._size = 0

    def add(self, keys: Iterable[str], live: Iterable[str]) -> None:
        """Remember keys; the file begins anew where it has grown, so that it has a bound.

        Args:
            keys: newly acknowledged.
            live: all acknowledged ones whose files are still there, these included.

        Raises:
            OSError: from the operating system; a restart may not know these keys.
        """
        if self._fd is None or self._size >= COMPACT_BYTES:
            self.restart(live)
        else:
            self._append(keys)

    def restart(self, live: Iterable[str]) -> None:
        """Begin a new file with these keys and delete all others.

        Raises:
            OSError: from the operating system; the others are still there if the new one is not whole.
        """
        live = list(live)
        old = ack_files(self._directory)
        self.close()
        if live:
            self._fd = self._disk.create(self._directory / f"acks-{secrets.token_hex(6)}", 0o600)
            self._append(live)
        for path in old:
            with suppress(FileNotFoundError):
                self._disk.remove(path)

    def close(self) -> None:
        """Close the file; it stays."""
        if self._fd is not None:
            os.close(self._fd)
        self._fd, self._size = None, 0

    def _append(self, keys: Iterable[str]) -> None:
        view = memoryview(bytes.fromhex("".join(keys)))
        self._size += len(view)
        try:
            while view and self._fd is not None:
                view = view[self._disk.write(self._fd, view) :]
        except OSError:
            self.close()  # half a key may be there: whatever followed it would be read out of step
            raise
