"""The samples that a link has to send: as many under way as the cloud's credit and the line's bytes allow."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from tta_edge.uplink_request import Request
from tta_runtime.errors import MessageTooLarge
from tta_runtime.link import MAX_ENTROPY, MAX_PAYLOAD_BYTES, Encoding, Sample
from tta_runtime.wire import declare


@dataclass(frozen=True, eq=False)
class Upload:
    """One sample on its way.

    Attributes:
        key: 32 hex digits; the same for this sample however often it is sent.
        stream: it came from.
        taken_ms: milliseconds since 1970.
        epoch: of the base that answered it.
        seq: of that base.
        entropy: of the answer, in nats.
        x: without a batch dimension; a JPEG file as uint8 [n].
        encoding: of `x`.
    """

    key: str
    stream: str
    taken_ms: int
    epoch: int
    seq: int
    entropy: float
    x: NDArray[Any]
    encoding: Encoding = "raw"


class Samples:
    """Samples that were offered and are neither acknowledged nor given up, in their order.

    Args:
        window: most of them.
        window_bytes: that those under way may have together; one larger sample goes alone.
        now_s: none is sent before.

    Attributes:
        credit: of them, how many the cloud lets be under way.
    """

    def __init__(self, window: int, window_bytes: int, now_s: float) -> None:
        self.credit = 0
        self._window, self._window_bytes = window, window_bytes
        self._requests: OrderedDict[str, Request] = OrderedDict()
        self._pause_s = now_s

    @property
    def room(self) -> int:
        """How many more may be offered."""
        return max(0, min(self._window, self.credit) - len(self._requests))

    @property
    def keys(self) -> frozenset[str]:
        """Of all of them."""
        return frozenset(self._requests)

    @property
    def bytes_under_way(self) -> int:
        """Of the samples that were sent and not answered."""
        return sum(request.nbytes for request in self._under_way())

    def offer(self, message_id: int, upload: Upload) -> None:
        """Take one more.

        Raises:
            BadField: its array cannot be sent.
            MessageTooLarge: nor can one so large.
        """
        if upload.x.nbytes > MAX_PAYLOAD_BYTES:
            raise MessageTooLarge(
                f"the sample has {upload.x.nbytes} bytes, the limit is {MAX_PAYLOAD_BYTES}", "Send it as JPEG"
            )
        message = Sample(
            id=message_id,
            key=upload.key,
            stream=upload.stream,
            taken_ms=upload.taken_ms,
            epoch=upload.epoch,
            seq=upload.seq,
            entropy=min(MAX_ENTROPY, max(0.0, upload.entropy)),
            encoding=upload.encoding,
            x=declare(upload.x),
        )
        self._requests[upload.key] = Request(message, {"x": upload.x})

    def forget(self, key: str) -> None:
        """One is acknowledged, given up or withdrawn."""
        self._requests.pop(key, None)

    def all(self) -> list[Request]:
        """Every one."""
        return list(self._requests.values())

    def restart(self, now_s: float) -> None:
        """Send all of them again, on a new connection."""
        for request in self._requests.values():
            request.restart(now_s)

    def pause(self, until_s: float) -> None:
        """Begin with none before; those under way are repeated as ever."""
        self._pause_s = max(self._pause_s, until_s)

    def due(self, now_s: float) -> list[Request]:
        """Those to send: first what is repeated, then what there is credit for."""
        return [request for request, due_s in self._sendable() if now_s >= due_s]

    def due_s(self) -> list[float]:
        """When each of those is due that may be sent."""
        return [due_s for _, due_s in self._sendable()]

    def _sendable(self) -> Iterator[tuple[Request, float]]:
        for request in self._under_way():
            yield request, request.due_s
        for request in self._startable():
            yield request, max(self._pause_s, request.due_s)

    def _under_way(self) -> list[Request]:
        return [request for request in self._requests.values() if request.under_way]

    def _startable(self) -> list[Request]:
        under_way = self._under_way()
        count, nbytes = len(under_way), sum(request.nbytes for request in under_way)
        startable = []
        for request in self._requests.values():
            if request.under_way:
                continue
            if count >= self.credit or (count and nbytes + request.nbytes > self._window_bytes):
                break
            startable.append(request)
            count, nbytes = count + 1, nbytes + request.nbytes
        return startable
