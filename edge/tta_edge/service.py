"""The daemon: a ZeroMQ front end on one thread, answers on another, steps, disk and HTTP on threads of their own.

`Server.run` is the whole life: startup, main loop, shutdown. The network thread never computes and no other
thread touches a ZeroMQ socket. What happens away from the network thread (an answer is ready, somebody wants the
daemon to stop) wakes its poller through a socket pair, which may be written to from any thread and from a signal
handler.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress

import zmq

from tta_edge.batching import Call, Inbox
from tta_edge.config import HTTP_OFF, Config
from tta_edge.errors import AddressInUse, CannotBind, Internal
from tta_edge.metrics import exposition
from tta_edge.notify import Notifier, watchdog_s
from tta_edge.responder import Responder
from tta_edge.session import Arrived, Frames, Phase, Refused, ServerSession, Settled, error_reply
from tta_edge.stats import Stats
from tta_edge.wire import PARTS, Limits, Reply, Tensors, tag
from tta_runtime.atomic import DISK, Disk
from tta_runtime.endpoint import check_bind
from tta_runtime.health import HealthServer

log = logging.getLogger(__name__)

HANDSHAKE_MS = 5_000  # a connection that has not said what it speaks by then is closed
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = (
    2_000,
    6_000,
)  # a peer that vanished without a word is noticed within these
PEER_REQUESTS = 8  # messages of one peer that the socket library reads ahead; each may be of the largest size
PEER_REPLIES = 64  # replies that it holds for a peer which does not read them
BURST = 64  # messages taken from the socket before answers are sent
GOODBYE_MS = 500  # for the last answers to leave the process
MAX_DESCRIPTORS = 65_536
TICK_S = 1.0  # the main loop shows at least this often that it lives
STUCK_S = 60.0  # an answer that takes longer means that the daemon hangs


class Server:
    """One daemon.

    Args:
        config: as resolved.
        on_ready: told of the endpoint when the daemon answers.
        clock: seconds; only differences count, so that a jump of the wall clock changes nothing.
        disk: what writes to the state directory.
        environment: where systemd says how it wants to be told of readiness and life.

    Attributes:
        config: as resolved.
        endpoint: where it listens, with the real port; empty until it is ready.
        http_endpoint: where metrics and health are, as http://HOST:PORT; empty where they are off.
        ready: set when it answers requests.
        stats: counters and latencies, safe to read from any thread.
    """

    def __init__(
        self,
        config: Config,
        *,
        on_ready: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        disk: Disk = DISK,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.config = config
        self.endpoint = ""
        self.http_endpoint = ""
        self.ready = threading.Event()
        self.stats = Stats()
        self._on_ready = on_ready
        self._clock = clock
        self._disk = disk
        environment = environment if environment is not None else os.environ
        self._notifier = Notifier(environment)
        self._watchdog_s = watchdog_s(environment)
        self._stops = 0
        self._reloads = 0
        self._loop_s = clock()
        self._busy_since_s: float | None = None
        self._woken = False
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)

    @property
    def wake_fd(self) -> int:
        """Bytes written here wake the main loop; for `signal.set_wakeup_fd`, so that no signal is slept through."""
        return self._wake_in.fileno()

    def run(self) -> None:
        """Serve until `stop` is called, then answer what is open, save what was learnt and return.

        Raises:
            StartError: an address cannot be bound, or the state directory cannot be used.
            BundleError: a bundle cannot be served.
            MethodError: a bundle has no such method or hyper.
            EngineError: there is no engine for it on this machine.
        """
        with ExitStack() as cleanup:
            self._startup(cleanup)
            self._main_loop()

    def stop(self) -> None:
        """Drain and end; asked twice, end without draining. For any thread and any signal handler."""
        self._stops += 1
        self._wake()

    def reload_all(self) -> None:
        """Read every bundle's directory again. For any thread and any signal handler."""
        self._reloads += 1
        self._wake()

    # --- what health.py asks for, from its own thread -----------------------------------------------

    def exposition(self) -> bytes:
        """Everything of one moment as Prometheus text."""
        figures = self.stats.figures()
        return exposition(self._responder.status(0, figures), figures)

    def alive(self) -> bool:
        """Whether the main loop turns and no answer takes for ever."""
        now_s, busy_since_s = self._clock(), self._busy_since_s
        turning = now_s - self._loop_s < 10 * TICK_S
        return turning and (busy_since_s is None or now_s - busy_since_s < STUCK_S)

    def accepting(self) -> bool:
        """Whether a new request would be answered."""
        return self.ready.is_set() and self._session.phase is Phase.SERVING

    # --- startup ----------------------------------------------------------------------------------

    def _startup(self, cleanup: ExitStack) -> None:
        config = self.config
        _allow_connections()
        cleanup.callback(self._wake_in.close)
        cleanup.callback(self._wake_out.close)
        check_bind(config.bind, allow_remote=config.allow_remote)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        cleanup.callback(context.destroy, linger=GOODBYE_MS)
        self._router = _bound(context, config)
        self._session = ServerSession(
            Limits(max_payload_bytes=config.max_request_bytes),
            capacity=config.max_queue,
            max_open_bytes=config.max_queue_bytes,
            per_client=config.max_client_requests,
        )
        # The session opens at most `max_queue` requests and one `cancel` of each, and each has at most one reply or
        # part of one for each turn of the answering thread, so few answers wait.
        self._outbox: deque[tuple[Arrived, Reply, Tensors]] = deque()
        self._inbox = Inbox(
            lambda arrived: self._responder.merge(arrived),
            most=config.batch_max,
            wait_s=config.batch_wait_ms / 1e3,
            clock=self._clock,
        )
        cleanup.callback(self._notifier.close)
        # Bound before bundles are loaded, so that a wrong address is not found after a minute; it answers when there
        # is something to say.
        health = None
        if config.http != HTTP_OFF:
            health = HealthServer(config.http, self, config.allow_remote, name="tta-edge")
        if health is not None:
            cleanup.callback(health.close)
        self._responder = Responder(
            config,
            self.stats,
            emit=self._emit,
            call=self._inbox.put,
            open_requests=lambda: self._session.open,
            waited_for=lambda arrived: self._session.waited_for(arrived),
            clock=self._clock,
            disk=self._disk,
        )
        cleanup.callback(self._responder.close)
        if health is not None:
            health.start()
            self.http_endpoint = health.endpoint
        # A daemon thread: an engine run that never ends must not keep the process alive after the deadline.
        self._worker = threading.Thread(target=self._work, name="tta-worker", daemon=True)
        self._worker.start()
        cleanup.callback(self._join_worker)
        self.endpoint = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self.ready.set()
        cleanup.callback(self.ready.clear)
        if self._on_ready is not None:
            self._on_ready(self.endpoint)
        self._notifier.ready()

    # --- main loop: the network thread ------------------------------------------------------------

    def _main_loop(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._wake_out, zmq.POLLIN)
        deadline_s: float | None = None
        fed_s = self._clock()
        tick_s = TICK_S if self._watchdog_s is None else min(TICK_S, self._watchdog_s / 2)
        while True:
            wait_s = tick_s if deadline_s is None else min(tick_s, max(0.0, deadline_s - self._clock()))
            ready = dict(poller.poll(round(wait_s * 1e3)))
            self._loop_s = self._clock()
            if self._wake_out.fileno() in ready:
                self._drain_wakes()
            self._send_answers()
            if self._router in ready:
                self._receive()
            if self._watchdog_s is not None and self._loop_s - fed_s >= self._watchdog_s / 2 and self.alive():
                self._notifier.watchdog()
                fed_s = self._loop_s
            if self._reloads:
                self._reloads = 0
                self._inbox.put(self._responder.reload_all)
            if self._stops and deadline_s is None:
                self._notifier.stopping()
                log.info("draining: %d requests are open", self._session.open)
                self._session.drain()
                deadline_s = self._clock() + self.config.drain_s
            if self._session.phase is Phase.CLOSED:
                return
            if deadline_s is not None and (self._stops > 1 or self._clock() >= deadline_s):
                log.warning("stopped with %d requests unanswered", self._session.open)
                return

    def _receive(self) -> None:
        for _ in range(BURST):
            try:
                parts = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            peer, frames = parts[0].bytes, [part.buffer for part in parts[1:]]
            events, replies = self._session.receive(peer, frames, self._clock())
            for event in events:
                if isinstance(event, Refused):
                    self.stats.refused(event.error.code)
                    log.info("refused %s: %s", event.error.code, event.error.cause)
                elif isinstance(event, Settled):
                    self.stats.answered(event.kind)
                else:
                    self._inbox.put(event)
            self._send(replies)

    def _send_answers(self) -> None:
        while True:
            try:
                arrived, reply, tensors = self._outbox.popleft()
            except IndexError:
                return
            try:
                frames = self._session.answer(arrived, reply, tensors, self._clock())
            except Exception:
                log.exception("a defect: the answer `%s` cannot be sent", tag(reply))
                frames = self._give_up(arrived, reply)
            self._send(frames)

    def _give_up(self, arrived: Arrived, reply: Reply) -> list[Frames]:
        """What is sent in place of an answer that cannot be."""
        if isinstance(reply, PARTS):
            return []  # as one that a slow reader misses: the end of the answer has all of it, and closes the request
        error = Internal("the daemon could not send its answer", "Report it with the daemon's log")
        self.stats.refused(error.code)
        return self._session.answer(arrived, error_reply(error, arrived.message.id), {}, self._clock())

    def _send(self, replies: list[Frames]) -> None:
        for frames in replies:
            try:
                self._router.send_multipart(frames, zmq.NOBLOCK, copy=False)
            except zmq.Again:
                self.stats.refused("slow-reader")
                log.info("dropped a reply: the client does not read its replies")
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                self.stats.refused("client-gone")
                abandoned = self._session.gone(bytes(frames[0]))
                log.info("dropped a reply: the client has gone, with %d more requests open", abandoned)

    def _drain_wakes(self) -> None:
        with suppress(BlockingIOError):
            self._wake_out.recv(4096)  # where there are more, the next wait ends at once
        self._woken = False

    def _wake(self) -> None:
        try:
            self._wake_in.send(b"\0")
        except BlockingIOError:
            return  # enough wake-ups wait already
        except OSError as error:
            if error.errno != errno.EBADF:  # the daemon has ended: there is nobody to wake
                raise

    # --- the worker thread ------------------------------------------------------------------------

    def _work(self) -> None:
        while (work := self._inbox.take()) is not None:
            self._busy_since_s = self._clock()
            if isinstance(work, list):
                self._responder.respond(work)
            else:
                self._do(work)
            self._busy_since_s = None

    def _do(self, call: Call) -> None:
        try:
            call()
        except Exception:
            log.exception("a defect between two requests")  # the next ones are answered all the same

    def _emit(self, arrived: Arrived, reply: Reply, tensors: Tensors) -> None:
        self._outbox.append((arrived, reply, tensors))
        if not self._woken:  # else the main loop will look into the outbox after it has cleared this
            self._woken = True
            self._wake()

    # --- shutdown: each part registers its own end at startup; they run in reverse ----------------

    def _join_worker(self) -> None:
        self._inbox.close()
        # With requests still open the drain deadline has passed already: wait no longer.
        self._worker.join(timeout=0.0 if self._session.open else self.config.drain_s)


def _allow_connections() -> None:
    """Raise the limit of open files that a shell sets (often 1024) as far as this process may.

    At the limit the socket library tries again and again to accept who waits, and takes a core for it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _bound(context: zmq.Context[zmq.Socket[bytes]], config: Config) -> zmq.Socket[bytes]:
    """The front end's socket, hardened and bound.

    Raises:
        AddressInUse: another process listens there.
        CannotBind: the operating system refuses for another reason.
    """
    router = context.socket(zmq.ROUTER)
    router.linger = 0
    router.setsockopt(zmq.MAXMSGSIZE, _largest_frame(config))
    router.setsockopt(zmq.RCVHWM, PEER_REQUESTS)
    router.setsockopt(zmq.SNDHWM, PEER_REPLIES)
    router.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    router.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    router.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    router.setsockopt(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.setsockopt(zmq.IPV6, int("[" in config.bind))
    try:
        router.bind(config.bind)
    except zmq.ZMQError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(
                f"{config.bind} is in use by another process",
                "Stop that process, or choose another port with --bind (port 0 takes a free one)",
            ) from error
        raise CannotBind(
            f"cannot bind {config.bind}: {error.strerror}",
            "Bind to an address of this machine and a port above 1023",
        ) from error
    return router


def _largest_frame(config: Config) -> int:
    """A frame over this closes its connection inside the socket library, before it is allocated (W3)."""
    return max(config.max_request_bytes, Limits().max_header_bytes)
