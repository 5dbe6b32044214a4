"""What the daemon tells systemd: ready, reloading, alive, stopping. The protocol of sd_notify(3), no dependency.

One datagram for each notice goes to the socket that NOTIFY_SOCKET names. Without that variable every method
does nothing, and what goes wrong is logged and never raised: a daemon serves whether or not anybody listens.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping

log = logging.getLogger(__name__)

SEND_S = 0.2  # for a service manager that does not read; then the notice is lost


def watchdog_s(environment: Mapping[str, str]) -> float | None:
    """How long systemd waits for a sign of life before it takes the daemon for hung; half of it is a good interval.

    Args:
        environment: of the process; WATCHDOG_USEC and WATCHDOG_PID are looked at.

    Returns:
        Seconds; None where nobody waits for this process.
    """
    try:
        limit_us = int(environment.get("WATCHDOG_USEC", ""))
        pid = int(environment.get("WATCHDOG_PID", os.getpid()))
    except ValueError:
        return None
    return limit_us / 1e6 if limit_us > 0 and pid == os.getpid() else None


class Notifier:
    """The way to the service manager, if there is one. For one thread.

    Args:
        environment: of the process; NOTIFY_SOCKET is a path, or a name that begins with `@`.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        name = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + name[1:] if name.startswith("@") else name
        self._failing = False
        # Opened once: a daemon that has run out of descriptors can still feed its watchdog.
        self._socket = _datagram_socket(name) if name else None

    def ready(self) -> None:
        """Requests are answered; also the end of `reloading`."""
        self._send("READY=1")

    def stopping(self) -> None:
        """The daemon is about to end."""
        self._send("STOPPING=1")

    def watchdog(self) -> None:
        """The serving loop makes progress."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send("STATUS=" + " ".join(text.split()))  # a second line would be read as another notice

    def reloading(self) -> None:
        """A reload begins; `ready` says that it is over."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def close(self) -> None:
        """Give the socket back; later notices go nowhere."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, notice: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto(notice.encode(), self._address)
        except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte inside
            if not self._failing:  # said once, not every few seconds
                log.warning("cannot notify the service manager: %s", error)
            self._failing = True
        else:
            self._failing = False


def _datagram_socket(name: str) -> socket.socket | None:
    if not name.startswith(("/", "@")):
        log.warning("NOTIFY_SOCKET is %r, only a path or @NAME can be notified", name)
        return None
    try:
        opened = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    except OSError as error:
        log.warning("cannot notify the service manager: %s", error)
        return None
    opened.settimeout(SEND_S)
    return opened
