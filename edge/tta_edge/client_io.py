"""The thread of a client that owns its connection.

It always waits on the socket, so that what happens to the connection between two calls is noticed and read: the
library would otherwise queue those events, and stop when the queue is full. (The file descriptor of a ZeroMQ
socket is edge-triggered and shared by both directions; event loops that watch it can miss events. Hence a
thread with a plain poller for asyncio as well.)
"""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from tta_edge.connection import Call, Connection, closed

MAX_OPEN = 16
"""The daemon's own `max_client_requests` by default: what it holds of one client."""


class IoThread:
    """Started with its connection. The public methods are for other threads.

    Everything it is told goes through one queue; a byte in a socket pair ends its wait.

    Args:
        endpoint: `tcp://HOST:PORT`.
        max_open: most requests sent and not answered.

    Raises:
        BadEndpoint: the endpoint is malformed.
    """

    def __init__(self, endpoint: str, *, max_open: int = MAX_OPEN) -> None:
        self._told: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._notify: dict[Call, Callable[[], None]] = {}
        self._stopped = False
        self._lock = threading.RLock()  # nothing is told after the thread was told to stop
        self._endpoint = endpoint
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)
        try:
            self._connection = Connection(endpoint, max_open=max_open, wake=self._wake_out)
        except BaseException:
            self._close_wakes()
            raise
        self._thread = threading.Thread(target=self._run, name="tta-client", daemon=True)
        self._thread.start()

    @property
    def losses(self) -> int:
        """How many connections to the daemon have broken."""
        return self._connection.losses

    def submit(self, call: Call, notify: Callable[[], None]) -> None:
        """Begin a call; `notify` is called, on the thread, when it has an outcome.

        Raises:
            ClientClosed: after `stop`.
        """
        if not self._tell(partial(self._begin, call, notify)):
            raise closed(self._endpoint)

    def cancel(self, call: Call) -> None:
        """Forget a call."""
        self._tell(partial(self._forget, call))

    def stop(self) -> None:
        """End all calls, with `ClientClosed`, and the thread. May be repeated."""
        self._tell(self._stop)

    def join(self) -> None:
        """Wait for the thread to end."""
        self._thread.join()

    def _tell(self, what: Callable[[], None]) -> bool:
        with self._lock:
            if self._stopped or not self._thread.is_alive():  # a process forked off has no such thread
                return False
            self._told.put(what)
            with suppress(BlockingIOError):  # enough wake-ups wait already
                self._wake_in.send(b"\0")
            return True

    # --- on the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._end(self._connection.advance())
                self._listen()
        finally:
            with self._lock:
                self._stopped = True
            self._listen()
            self._end(self._connection.close())
            self._close_wakes()

    def _listen(self) -> None:
        with suppress(BlockingIOError):
            while self._wake_out.recv(4096):
                pass
        with suppress(queue.Empty):
            while True:
                self._told.get_nowait()()

    def _begin(self, call: Call, notify: Callable[[], None]) -> None:
        self._notify[call] = notify
        self._connection.submit(call)

    def _forget(self, call: Call) -> None:
        self._notify.pop(call, None)
        self._connection.cancel(call)

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True

    def _end(self, ended: list[Call]) -> None:
        for call in ended:
            self._notify.pop(call)()

    def _close_wakes(self) -> None:
        self._wake_out.close()
        self._wake_in.close()
