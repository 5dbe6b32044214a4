"""The client library for asyncio: one daemon, many calls at once on one connection.

async with AsyncClient("tcp://127.0.0.1:5555") as client:
    replies = await asyncio.gather(*(client.predict(x, stream=name) for name, x in batches.items()))

A thread waits on the socket (client_io.py) and hands outcomes to the event loop.
"""

from __future__ import annotations

import asyncio
import random
import time
import weakref
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from numpy.typing import ArrayLike

from tta_edge import calls
from tta_edge.calls import DEFAULT_ENDPOINT, DEFAULT_TIMEOUT_S, Ask, Reply
from tta_edge.client_io import MAX_OPEN, IoThread
from tta_edge.connection import Call
from tta_edge.retry import NEVER, Retry
from tta_edge.wire import (
    AdaptDone,
    EventsReply,
    InfoReply,
    Received,
    ReloadDone,
    ResetDone,
    RollbackDone,
    ServerLimits,
    StatusReply,
)
from tta_runtime.errors import BadValue, TtaError

T = TypeVar("T")


class AsyncClient:
    """A connection to one daemon, for the tasks of one event loop.

    The methods are those of `Client` as coroutines, with the same arguments and errors. A cancelled call
    leaves the connection usable; its request, if it was sent, may still be carried out. An array must not
    change while its call is under way.

    Args:
        endpoint: `tcp://HOST:PORT`.
        timeout_s: of every call, waiting for its turn and connecting included.
        retry: whether a call that was certainly not carried out is made again; without it never.
        max_open: most requests sent and not answered; further calls wait for their turn.

    Raises:
        BadEndpoint: the endpoint is malformed. Whether somebody listens shows with the first call.
        BadValue: timeout_s is not a positive number of seconds, or max_open below 1.
    """

    def __init__(
        self,
        endpoint: str = DEFAULT_ENDPOINT,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry: Retry | None = None,
        max_open: int = MAX_OPEN,
    ) -> None:
        if max_open < 1:
            raise BadValue(f"max_open is {max_open}", "Use 1 or more")
        self.endpoint = endpoint
        self.timeout_s = calls.checked_timeout(timeout_s)
        self._retry = retry or NEVER
        self._io = IoThread(endpoint, max_open=max_open)
        self._limits: tuple[int, ServerLimits] | None = None  # with the number of connections lost before
        weakref.finalize(self, self._io.stop)  # one that is dropped without `close` leaves no thread behind

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls that are under way end with `ClientClosed`. May be repeated."""
        self._io.stop()
        await asyncio.to_thread(self._io.join)

    async def predict(
        self,
        x: ArrayLike,
        stream: str = "default",
        bundle: str = "",
        *,
        adapt: bool = True,
        compare: bool = False,
        timeout_s: float | None = None,
    ) -> Reply:
        """See `Client.predict`."""
        ask = calls.predict(x, stream=stream, bundle=bundle, adapt=adapt, compare=compare)
        return await self._call(ask, timeout_s)

    async def info(self, bundle: str = "", *, timeout_s: float | None = None) -> InfoReply:
        """See `Client.info`."""
        return await self._call(calls.info(bundle), timeout_s)

    async def status(self, *, timeout_s: float | None = None) -> StatusReply:
        """See `Client.status`."""
        return await self._call(calls.status(), timeout_s)

    async def reset(
        self, stream: str = "default", bundle: str = "", *, timeout_s: float | None = None
    ) -> ResetDone:
        """See `Client.reset`."""
        return await self._call(calls.reset(stream, bundle), timeout_s)

    async def rollback(
        self, stream: str = "default", bundle: str = "", *, timeout_s: float | None = None
    ) -> RollbackDone:
        """See `Client.rollback`."""
        return await self._call(calls.rollback(stream, bundle), timeout_s)

    async def adapt(
        self, on: bool, stream: str = "", bundle: str = "", *, timeout_s: float | None = None
    ) -> AdaptDone:
        """See `Client.adapt`."""
        return await self._call(calls.adapt(on, stream, bundle), timeout_s)

    async def reload(self, bundle: str = "", *, timeout_s: float | None = None) -> ReloadDone:
        """See `Client.reload`."""
        return await self._call(calls.reload(bundle), timeout_s)

    async def events(self, limit: int = 100, *, timeout_s: float | None = None) -> EventsReply:
        """See `Client.events`."""
        return await self._call(calls.events(limit), timeout_s)

    async def _call(self, ask: Ask[T], timeout_s: float | None) -> T:
        timeout_s = self.timeout_s if timeout_s is None else calls.checked_timeout(timeout_s)
        attempt = 1
        while True:
            try:
                return await self._attempt(ask, timeout_s)
            except TtaError as error:
                wait_s = self._retry.before_next(error, attempt, random.random())
                if wait_s is None:
                    raise
            await asyncio.sleep(wait_s)
            attempt += 1

    async def _attempt(self, ask: Ask[T], timeout_s: float) -> T:
        began_s = time.monotonic()
        if ask.tensors:
            limits = await self._known_limits(timeout_s, began_s)
            calls.check_size(ask.nbytes, limits, self.endpoint)
        return ask.result(*await self._exchange(ask, timeout_s, began_s))

    async def _known_limits(self, timeout_s: float, began_s: float) -> ServerLimits:
        """What the daemon takes in one request; asked again after a connection was lost.

        Calls that begin together each ask: waiting for one another would tie their deadlines together.
        """
        losses = self._io.losses
        if self._limits is None or self._limits[0] != losses:
            ask = calls.info("")
            info = ask.result(*await self._exchange(ask, timeout_s, began_s))
            self._limits = losses, info.limits
        return self._limits[1]

    async def _exchange(self, ask: Ask[Any], timeout_s: float, began_s: float) -> tuple[Received[Any], float]:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        call = Call(ask.message, ask.tensors, timeout_s, began_s)
        self._io.submit(call, partial(_notify, loop, ended))
        try:
            await ended
        finally:
            if call.outcome is None:
                self._io.cancel(call)
        return call.received()


def _notify(loop: asyncio.AbstractEventLoop, ended: asyncio.Future[None]) -> None:
    """Tell a call's task, from another thread, that it has ended."""
    with suppress(RuntimeError):  # its loop is closed: nobody waits any more
        loop.call_soon_threadsafe(_resolve, ended)


def _resolve(ended: asyncio.Future[None]) -> None:
    if not ended.done():  # cancelled in the meantime
        ended.set_result(None)
