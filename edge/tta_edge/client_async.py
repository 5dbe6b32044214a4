"""The client library for asyncio: one daemon, many calls at once on one connection.

async with AsyncClient("tcp://127.0.0.1:5555") as client:
    replies = await asyncio.gather(*(client.predict(x, stream=name) for name, x in batches.items()))

A thread waits on the socket (client_io.py) and hands outcomes to the event loop.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from numpy.typing import ArrayLike

from tta_edge import calls
from tta_edge.calls import DEFAULT_ENDPOINT, DEFAULT_TIMEOUT_S, Ask, Parts, Reply, TextEnd, TextScore
from tta_edge.client_io import MAX_OPEN, IoThread
from tta_edge.connection import Call
from tta_edge.retry import NEVER, Attempts, Retry
from tta_edge.wire import (
    PARTS,
    AbsorbDone,
    AdaptDone,
    EventsReply,
    ImportDone,
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

    async def score(
        self,
        text: str | bytes,
        session: str = "",
        bundle: str = "",
        *,
        context: str | bytes | None = None,
        timeout_s: float | None = None,
    ) -> TextScore:
        """See `Client.score`."""
        return await self._call(calls.score(text, session=session, bundle=bundle, context=context), timeout_s)

    def generate(
        self,
        prompt: str | bytes,
        session: str = "",
        bundle: str = "",
        *,
        max_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        absorb: bool = False,
        timeout_s: float | None = None,
    ) -> AsyncTextStream:
        """See `Client.generate`; for `async for`."""
        ask = calls.generate(
            prompt, session=session, bundle=bundle, max_tokens=max_tokens, temperature=temperature, top_k=top_k,
            top_p=top_p, seed=seed, absorb=absorb,
        )  # fmt: skip
        return AsyncTextStream(
            self, ask, self.timeout_s if timeout_s is None else calls.checked_timeout(timeout_s)
        )

    async def absorb(
        self, text: str | bytes, session: str, bundle: str = "", *, timeout_s: float | None = None
    ) -> AbsorbDone:
        """See `Client.absorb`."""
        return await self._call(calls.absorb(text, session=session, bundle=bundle), timeout_s)

    async def export_session(
        self, session: str, bundle: str = "", *, timeout_s: float | None = None
    ) -> bytes:
        """See `Client.export_session`."""
        return await self._call(calls.export_session(session, bundle), timeout_s)

    async def import_session(
        self, session: str, data: bytes, bundle: str = "", *, timeout_s: float | None = None
    ) -> ImportDone:
        """See `Client.import_session`."""
        return await self._call(calls.import_session(session, data, bundle), timeout_s)

    async def _call(self, ask: Ask[T], timeout_s: float | None) -> T:
        timeout_s = self.timeout_s if timeout_s is None else calls.checked_timeout(timeout_s)
        attempts = Attempts(self._retry)
        while True:
            try:
                return await self._attempt(ask, timeout_s)
            except TtaError as error:
                wait_s = attempts.failed(error)
            await asyncio.sleep(wait_s)

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

    async def _stream(
        self, ask: Ask[TextEnd], timeout_s: float
    ) -> AsyncGenerator[Received[Any] | TextEnd, None]:
        """The parts of an answer, then what it ends with; made again, as a call is, where no part has come."""
        attempts = Attempts(self._retry)
        while True:
            began_s, came = time.monotonic(), False
            try:
                calls.check_size(ask.nbytes, await self._known_limits(timeout_s, began_s), self.endpoint)
                async with aclosing(self._listen(ask, timeout_s)) as heard:
                    async for received in heard:
                        came = came or isinstance(received.message, PARTS)
                        yield received if isinstance(received.message, PARTS) else ask.result(received, 0.0)
                return
            except TtaError as error:
                wait_s = attempts.failed(error, begun=came)
            await asyncio.sleep(wait_s)

    async def _listen(self, ask: Ask[Any], timeout_s: float) -> AsyncGenerator[Received[Any], None]:
        loop = asyncio.get_running_loop()
        heard: asyncio.Queue[Received[Any] | None] = asyncio.Queue()

        def tell(part: Received[Any] | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(heard.put_nowait, part)

        call = Call(ask.message, ask.tensors, timeout_s, time.monotonic(), part=tell)
        self._io.submit(call, partial(tell, None))
        try:
            while (part := await heard.get()) is not None:
                yield part
        finally:
            if call.outcome is None:
                self._io.cancel(call)
        yield call.received()[0]

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


class AsyncTextStream:
    """A text as it is generated; see `client.TextStream`.

    Ending early (`aclose`, or leaving the `async with` block) asks the daemon to stop. One task may close what another
    one reads: that one finds the text at its end, and `end` None.

    Args:
        client: whose connection is used.
        ask: the request.
        timeout_s: longest wait for a part.

    Attributes:
        end: how it ended; None before the last part.
    """

    def __init__(self, client: AsyncClient, ask: Ask[TextEnd], timeout_s: float) -> None:
        self.end: TextEnd | None = None
        self._parts = self._read(client, ask, timeout_s)
        self._next: asyncio.Future[str] | None = None
        self._closed = False

    def __aiter__(self) -> AsyncTextStream:
        return self

    async def __anext__(self) -> str:
        if self._closed:
            raise StopAsyncIteration
        # A task of its own: `aclose` of a generator fails while it runs, and this one can be cancelled for it.
        reading = self._next = asyncio.ensure_future(anext(self._parts))
        try:
            await asyncio.wait([reading])
        except BaseException:  # the task that reads is cancelled, or its coroutine closed
            reading.cancel()
            raise
        if reading.cancelled():
            raise StopAsyncIteration
        return reading.result()

    async def __aenter__(self) -> AsyncTextStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Read no further. May be repeated, and called from any task of the loop."""
        self._closed = True
        if self._next is not None and self._next.cancel():
            await asyncio.wait([self._next])
        await self._parts.aclose()

    async def _read(
        self, client: AsyncClient, ask: Ask[TextEnd], timeout_s: float
    ) -> AsyncGenerator[str, None]:
        parts = Parts()
        async with aclosing(client._stream(ask, timeout_s)) as heard:
            async for received in heard:
                if isinstance(received, TextEnd):
                    self.end = received
                    text = parts.rest(received)
                else:
                    text = parts.part(received)
                if text:
                    yield text


def _notify(loop: asyncio.AbstractEventLoop, ended: asyncio.Future[None]) -> None:
    """Tell a call's task, from another thread, that it has ended."""
    with suppress(RuntimeError):  # its loop is closed: nobody waits any more
        loop.call_soon_threadsafe(_resolve, ended)


def _resolve(ended: asyncio.Future[None]) -> None:
    if not ended.done():  # cancelled in the meantime
        ended.set_result(None)
