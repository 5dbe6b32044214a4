"""A TCP relay with faults: what lies between an edge and its cloud, under a test's control.

Faults of the line (it stands still, is cut, is slow) concern all connections. Faults of single bytes are armed for one
direction and strike once, when enough bytes have passed. Controls are for any thread; the relay has one of its own.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

T = TypeVar("T")
CHUNK = 4096
PATIENCE_S = 20.0


class Way(Enum):
    """Which bytes are meant."""

    UP = "from the edge to the cloud"
    DOWN = "from the cloud to the edge"


class Line(Enum):
    """What happens to bytes and to who connects."""

    PASS = "everything passes"
    STALL = "bytes wait, and who connects waits: as in a network that loses every packet"
    DROP = "bytes vanish, who connects is accepted and hears nothing: half-open"


@dataclass(eq=False)
class _Connection:
    """A pair of connections, one to each end."""

    edge: asyncio.StreamWriter
    cloud: asyncio.StreamWriter | None = None
    lost: bool = False
    """Whether bytes of it have vanished: it cannot be whole again."""


@dataclass
class _Strike:
    """A fault of single bytes that waits for its moment."""

    way: Way
    after: int
    harm: Callable[[bytes], bytes]
    cut: bool = False
    """Whether the connection ends with these bytes."""
    done: threading.Event = field(default_factory=threading.Event)


class Relay:
    """Listens on a free port of this machine and passes bytes on; a context.

    Args:
        target: `tcp://HOST:PORT` of the cloud; it may start later, and again.

    Attributes:
        endpoint: `tcp://127.0.0.1:PORT` where edges connect.
        accepted: how many connections there were.
        passed: bytes that were passed on, by direction.
    """

    def __init__(self, target: str) -> None:
        host, port = target.removeprefix("tcp://").rsplit(":", 1)
        self._target = host, int(port)
        self.endpoint = ""
        self.accepted = 0
        self.passed = {Way.UP: 0, Way.DOWN: 0}
        self._line = Line.PASS
        self._delay_s = self._jitter_s = 0.0
        self._bytes_per_s = 0.0
        self._draw = random.Random(0)
        self._connections: set[_Connection] = set()
        self._strikes: list[_Strike] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay", daemon=True)

    def __enter__(self) -> Relay:
        self._thread.start()
        self._run(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the relay does not end"
        self._loop.close()

    # --- controls -------------------------------------------------------------------------------------

    def partition(self) -> None:
        """From now on nothing passes, either way; nobody is told."""
        self._run(self._set(Line.STALL))

    def blackhole(self) -> None:
        """From now on everything vanishes; who connects is accepted and never hears anything."""
        self._run(self._set(Line.DROP))

    def heal(self) -> None:
        """Pass bytes again: those that waited too; a connection that has lost some is reset."""
        self._run(self._set(Line.PASS))

    def slow(self, *, delay_s: float = 0.0, jitter_s: float = 0.0, bytes_per_s: float = 0.0) -> None:
        """Delay each piece by `delay_s` and up to `jitter_s` more, in order; 0 bytes per second is no limit."""
        self._delay_s, self._jitter_s, self._bytes_per_s = delay_s, jitter_s, bytes_per_s

    def cut(self) -> None:
        """End every connection in good order."""
        self._run(self._end(reset=False))

    def reset(self) -> None:
        """End every connection with RST."""
        self._run(self._end(reset=True))

    def flip(self, way: Way, after: int) -> threading.Event:
        """Flip one bit of the byte that comes after so many more; the event is set when it is done."""
        return self._strike(_Strike(way, after, lambda data: bytes([data[0] ^ 1]) + data[1:]))

    def double(self, way: Way, after: int) -> threading.Event:
        """Pass the piece that comes after so many more bytes on twice."""
        return self._strike(_Strike(way, after, lambda data: data + data))

    def swap(self, way: Way, after: int) -> threading.Event:
        """Pass the two halves of the piece that comes after so many more bytes on in the wrong order."""
        return self._strike(_Strike(way, after, lambda data: data[len(data) // 2 :] + data[: len(data) // 2]))

    def truncate(self, way: Way, after: int) -> threading.Event:
        """Pass only half of the piece that comes after so many more bytes on, then end the connection."""
        return self._strike(_Strike(way, after, lambda data: data[: len(data) // 2], cut=True))

    def insert(self, way: Way, data: bytes) -> threading.Event:
        """Pass these bytes on before the next piece, as if one end had sent them."""
        return self._strike(_Strike(way, 0, lambda piece: data + piece))

    # --- inside ---------------------------------------------------------------------------------------

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE_S)

    def _strike(self, strike: _Strike) -> threading.Event:
        self._loop.call_soon_threadsafe(self._strikes.append, strike)
        return strike.done

    async def _start(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._listening = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=CHUNK)
        port = self._listening.sockets[0].getsockname()[1]
        self.endpoint = f"tcp://127.0.0.1:{port}"

    async def _stop(self) -> None:
        self._listening.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._end(reset=True)

    async def _set(self, line: Line) -> None:
        self._line = line
        if line is not Line.STALL:
            self._open.set()
        else:
            self._open.clear()
        if line is Line.PASS:
            for connection in [each for each in self._connections if each.lost]:
                _end(connection, reset=True)

    async def _end(self, *, reset: bool) -> None:
        for connection in list(self._connections):
            _end(connection, reset=reset)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(writer)
        self._connections.add(connection)
        self.accepted += 1
        try:
            await self._open.wait()
            if self._line is Line.DROP:
                connection.lost = True
                while await reader.read(CHUNK):
                    pass
                return
            other, connection.cloud = await asyncio.open_connection(*self._target, limit=CHUNK)
            ways = [
                asyncio.ensure_future(self._pump(connection, Way.UP, reader, connection.cloud)),
                asyncio.ensure_future(self._pump(connection, Way.DOWN, other, writer)),
            ]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        except OSError:  # an end has gone; the other one is told below
            pass
        finally:
            _end(connection, reset=False)
            self._connections.discard(connection)

    async def _pump(
        self, connection: _Connection, way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(CHUNK):
            await self._open.wait()
            if self._line is Line.DROP:
                connection.lost = True
                continue
            wait_s = self._delay_s + self._jitter_s * self._draw.random()
            wait_s += len(data) / self._bytes_per_s if self._bytes_per_s else 0.0
            if wait_s:
                await asyncio.sleep(wait_s)
                await self._open.wait()
            strike = next(
                (each for each in self._strikes if each.way is way and each.after < len(data)), None
            )
            for each in self._strikes:
                each.after -= len(data) if each.way is way and each is not strike else 0
            if strike is not None:
                self._strikes.remove(strike)
                data = data[: strike.after] + strike.harm(data[strike.after :])
                strike.done.set()
            writer.write(data)
            self.passed[way] += len(data)
            await writer.drain()
            if strike is not None and strike.cut:
                return


def _end(connection: _Connection, *, reset: bool) -> None:
    for writer in (connection.edge, connection.cloud):
        if writer is None:
            continue
        end: socket.socket | None = writer.get_extra_info("socket")
        if reset and end is not None and end.fileno() >= 0:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        else:
            writer.close()
