"""Keys of the terminal while a live view runs."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from types import TracebackType
from typing import TextIO

if sys.platform != "win32":
    import termios
    import tty


class Keys:
    """Read single keys from a terminal, unechoed; use as a context. What is no terminal has no keys.

    Args:
        source: normally `sys.stdin`.
    """

    def __init__(self, source: TextIO) -> None:
        self._source = source
        self._saved: list[int | list[bytes | int]] | None = None

    def __enter__(self) -> Keys:
        if sys.platform != "win32" and self._source.isatty():
            self._saved = termios.tcgetattr(self._source)
            tty.setcbreak(self._source)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._saved is not None:
            termios.tcsetattr(self._source, termios.TCSADRAIN, self._saved)

    def ended(self, timeout_s: float) -> bool:
        """Wait; true at once when q is pressed."""
        if self._saved is None:
            threading.Event().wait(timeout_s)
            return False
        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            if select.select([self._source], [], [], left_s)[0]:
                # From the descriptor: what the text layer read ahead, `select` would not see.
                keys = os.read(self._source.fileno(), 64)
                if not keys or b"q" in keys.lower():
                    return True
        return False
