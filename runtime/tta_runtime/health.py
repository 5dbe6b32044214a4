"""HTTP for those who watch a service: /metrics for Prometheus, /livez and /readyz for whoever restarts it.

A thread accepts, one more for each of at most 16 connections answers one request and closes. A request is at
most 8 KiB and a connection lasts at most 5 seconds, whatever the other end does. The serving loop takes no part: what
it knows is read through `Watched`.
"""

from __future__ import annotations

import errno
import io
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Protocol

import msgspec

from .endpoint import is_loopback, parse
from .errors import AddressInUse, BadEndpoint, CannotBind, RemoteBindRefused

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 16  # served at once; one more is closed
MAX_REQUEST_BYTES = 8 * 1024
TIMEOUT_S = 5.0  # of a connection, from its acceptance to its end
BACKLOG = 128
MAX_DROPPED_BYTES = 64 * 1024  # of a body that nobody asked for
METHODS = ("GET", "HEAD")
NO_DESCRIPTOR_S = 0.2  # pause when the process cannot open one more descriptor
JSON = "application/json"
METRICS = "text/plain; version=0.0.4; charset=utf-8"
"""Content type of Prometheus' text format."""
OFF = "off"
"""Instead of an address: no HTTP."""
CHOICES = "Choose another with --http (127.0.0.1:0 takes a free port), or turn it off with --http off"


class Watched(Protocol):
    """What is asked of a service. Every method is called from several threads and must not wait for a step."""

    def exposition(self) -> bytes:
        """Its figures as Prometheus text, now."""

    def alive(self) -> bool:
        """Whether the serving loop makes progress."""

    def accepting(self) -> bool:
        """Whether new requests are taken: ready, and not draining."""


class HealthServer:
    """The HTTP server. It listens when it is made and answers between `start` and `close`.

    Args:
        address: HOST:PORT; port 0 takes a free one.
        watched: asked for what is answered.
        allow_remote: whether `address` may be one that other machines can reach.
        name: of the service, for the Server header.
        timeout_s: of one connection.

    Attributes:
        endpoint: `http://HOST:PORT` with the real port.

    Raises:
        BadEndpoint: the address has another form.
        RemoteBindRefused: other machines could reach it, and that was not asked for.
        AddressInUse: another process listens there.
        CannotBind: the operating system refuses for another reason.
    """

    def __init__(
        self,
        address: str,
        watched: Watched,
        allow_remote: bool,
        *,
        name: str,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._listener = _listen(address, allow_remote)
        host, port = self._listener.getsockname()[:2]
        self.endpoint = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self.pages = Pages(watched, name, timeout_s)
        self._timeout_s = timeout_s
        self._open: dict[socket.socket, threading.Thread] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._wake_out, self._wake_in = socket.socketpair()
        self._thread = threading.Thread(target=self._accept, name="tta-http", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()
        log.info("metrics and health at %s", self.endpoint)

    def close(self) -> None:
        """Stop listening and end every connection. Returns at once where `start` was never called."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._wake_in.send(b"\0")
        if self._thread.ident is not None:
            self._thread.join()
        with self._lock:
            open_ = dict(self._open)
        for connection in open_:
            _shut(connection)  # whoever reads from it or writes to it goes on at once
        for thread in open_.values():
            thread.join(self._timeout_s)
        for each in (self._listener, self._wake_out, self._wake_in):
            each.close()

    def _accept(self) -> None:
        with selectors.DefaultSelector() as ready:
            ready.register(self._listener, selectors.EVENT_READ)
            ready.register(self._wake_out, selectors.EVENT_READ)
            while not self._closing.is_set():
                ready.select()
                try:
                    connection, _ = self._listener.accept()
                except BlockingIOError:
                    continue  # woken to close, or the client has gone already
                except OSError as error:
                    log.debug("cannot accept an HTTP connection: %s", error)
                    self._closing.wait(NO_DESCRIPTOR_S)  # the connection still waits: do not spin on it
                    continue
                self._take(connection)

    def _take(self, connection: socket.socket) -> None:
        """Serve a connection in a thread of its own, or close it where too many are served."""
        thread = threading.Thread(
            target=self._serve, args=(connection,), name="tta-http-request", daemon=True
        )
        with self._lock:
            if len(self._open) >= MAX_CONNECTIONS:
                connection.close()
                return
            self._open[connection] = thread
        try:
            thread.start()
        except RuntimeError as error:  # no more threads
            log.debug("cannot serve an HTTP connection: %s", error)
            self._end(connection)

    def _serve(self, connection: socket.socket) -> None:
        try:
            _Exchange(connection, self.pages, time.monotonic() + self._timeout_s)
        except OSError:
            pass  # the client has gone, or is too slow; there is nobody to tell
        except Exception:
            log.exception("a defect while answering an HTTP request")
        finally:
            self._end(connection)

    def _end(self, connection: socket.socket) -> None:
        with self._lock:
            del self._open[connection]  # first: a client that sees the end may count on the free place
        _shut(connection)
        connection.close()


class Pages:
    """What is answered, by path.

    Args:
        watched: asked for it.
        name: of the service.
        timeout_s: of a connection; a scrape waits half of it for another one to end.
    """

    def __init__(self, watched: Watched, name: str, timeout_s: float) -> None:
        self.name = name
        self._watched = watched
        self._wait_s = timeout_s / 2  # so that there is time left to say that it was in vain
        self._scraping = threading.Lock()
        self._failing: set[str] = set()
        self.by_path: dict[str, Callable[[], Page]] = {
            "/metrics": self.metrics,
            "/livez": self.livez,
            "/readyz": self.readyz,
        }

    def page(self, method: str, path: str) -> Page:
        """The answer to a request. Whatever is wrong with it becomes a page, too."""
        if method not in METHODS:
            return _error(405, "method-not-allowed", f"{method[:16]} is not allowed", "Use GET or HEAD")
        found = self.by_path.get(path)
        if found is None:
            known = ", ".join(self.by_path)
            return _error(404, "not-found", f"there is no {path[:64]!r} here", f"Ask for one of {known}")
        try:
            answer = found()
        except Exception:
            if path not in self._failing:  # said once, not at every scrape
                log.exception("a defect while answering %s", path)
            self._failing.add(path)
            return _error(500, "internal", f"{self.name} failed", "Report it with its log")
        self._failing.discard(path)
        return answer

    def metrics(self) -> Page:
        """Every figure. One at a time: several scrapers together cost no more than one."""
        if not self._scraping.acquire(timeout=self._wait_s):
            return _error(503, "busy", "another scrape has not ended yet", "Repeat it later")
        try:
            return Page(200, METRICS, self._watched.exposition())
        finally:
            self._scraping.release()

    def livez(self) -> Page:
        """Whether the process is worth keeping."""
        if self._watched.alive():
            return _OK
        cause = "the serving loop makes no progress"
        return _error(503, "stalled", cause, f"Restart {self.name} and report its log")

    def readyz(self) -> Page:
        """Whether requests are answered."""
        if not self._watched.alive():
            return self.livez()
        if self._watched.accepting():
            return _OK
        return _error(503, "not-ready", f"{self.name} is starting or draining", "Repeat it later")


class Page(msgspec.Struct, frozen=True):
    """An HTTP response without its connection."""

    status: int
    content_type: str
    body: bytes


_OK = Page(200, JSON, b'{"status":"ok"}\n')


def _error(status: int, code: str, cause: str, fix: str) -> Page:
    return Page(status, JSON, msgspec.json.encode({"code": code, "cause": cause, "fix": fix}) + b"\n")


class _Exchange(BaseHTTPRequestHandler):
    """One request and its response on one connection, until a deadline on the monotonic clock."""

    protocol_version = "HTTP/1.0"  # one request for each connection; nothing to keep alive

    def __init__(self, connection: socket.socket, pages: Pages, deadline_s: float) -> None:
        self._pages = pages
        self._deadline_s = deadline_s
        # The base class does all the work within its constructor; it has no use for address and server.
        super().__init__(connection, ("", 0), None)  # type: ignore[arg-type]

    def setup(self) -> None:
        """Read the request's head at once: its size and time are bounded as a whole, not line by line."""
        self._head = _request_head(self.request, self._deadline_s)
        self.rfile = io.BytesIO(self._head)
        self._response = io.BytesIO()
        self.wfile = self._response

    def handle(self) -> None:
        """Answer."""
        self.raw_requestline = self.rfile.readline()
        if not self._head:
            return  # closed before it had asked for anything
        if len(self._head) > MAX_REQUEST_BYTES:
            self.send_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        elif self.parse_request():
            self._respond(self._pages.page(self.command, self.path.partition("?")[0]))

    def finish(self) -> None:
        """Send the response, then read what the client still sends.

        Closing with data unread would tell the client that the connection broke, and it might drop the response.
        """
        connection, left = self.request, MAX_DROPPED_BYTES
        response = self._response.getvalue()
        if not response:
            return  # the client must not see an end here: its place is still taken
        connection.settimeout(_left_s(self._deadline_s))
        connection.sendall(response)
        connection.shutdown(socket.SHUT_WR)
        while left > 0 and (dropped := _receive(connection, self._deadline_s)):
            left -= len(dropped)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """How the base class refuses what is not HTTP."""
        del explain
        self.command, self.request_version = "", self.protocol_version
        cause = message or HTTPStatus(code).phrase
        self._respond(_error(code, "bad-request", cause, "Send one small HTTP request with GET or HEAD"))

    def version_string(self) -> str:
        """The Server header, without the versions of what it is made of."""
        return self._pages.name

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """A scrape every few seconds is nothing to log."""

    def _respond(self, page: Page) -> None:
        self.send_response(page.status)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if page.status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", ", ".join(METHODS))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page.body)


def _request_head(connection: socket.socket, deadline_s: float) -> bytes:
    """What the client sends up to the empty line, and what came with it; empty if it closes before.

    Raises:
        OSError: the deadline has passed, or the connection broke.
    """
    head = bytearray()
    while len(head) <= MAX_REQUEST_BYTES and b"\r\n\r\n" not in head and b"\n\n" not in head:
        received = _receive(connection, deadline_s)
        if not received:
            return b""
        head += received
    return bytes(head)


def _receive(connection: socket.socket, deadline_s: float) -> bytes:
    connection.settimeout(_left_s(deadline_s))
    return connection.recv(4096)


def _left_s(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):  # the other end may have been faster
        connection.shutdown(socket.SHUT_RDWR)


def _listen(address: str, allow_remote: bool) -> socket.socket:
    try:
        host, port = parse(f"tcp://{address}")
    except BadEndpoint as error:
        raise BadEndpoint(f"`http` is {address!r}, which is not HOST:PORT", CHOICES) from error
    if not allow_remote and not is_loopback(host):
        raise RemoteBindRefused(
            f"`http` is {address}, which other machines can reach",
            "Use 127.0.0.1, or pass --allow-remote on a network where every machine is trusted",
        )
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind(("" if host == "*" else host, 0 if port == "*" else int(port)))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(f"`http` is {address}, which another process uses", CHOICES) from error
        raise CannotBind(f"cannot bind {address} (`http`): {error.strerror}", CHOICES) from error
    return listener
