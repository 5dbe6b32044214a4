"""The client library: one daemon, one call at a time, a deadline on each, errors by the daemon's own names.

with Client("tcp://127.0.0.1:5555") as client:
    reply = client.predict(x)
    print(reply.logits.argmax(axis=1), reply.adapted, reply.distance)
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import closing
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TypeVar

from numpy.typing import ArrayLike

from tta_edge import calls
from tta_edge.calls import (
    DEFAULT_ENDPOINT,
    DEFAULT_TIMEOUT_S,
    Ask,
    Parts,
    Reply,
    TextEnd,
    TextScore,
    as_error,
)
from tta_edge.client_io import IoThread
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
from tta_runtime.errors import TtaError

__all__ = [
    "DEFAULT_ENDPOINT",
    "DEFAULT_TIMEOUT_S",
    "Client",
    "Reply",
    "Retry",
    "TextEnd",
    "TextScore",
    "TextStream",
    "as_error",
]

T = TypeVar("T")


class Client:
    """A connection to one daemon, which is found again after it was restarted.

    Several threads may share one. Every call raises, besides what the daemon refuses it with:

    - `Unreachable`: no connection within the deadline; nothing was sent.
    - `DeadlineExceeded`: no answer within the deadline; the request may still be carried out.
    - `ConnectionLost`: the connection broke while the request was open; it may have been carried out.
    - `Busy`, `Draining`: the daemon has no place, or is shutting down; nothing was done.
    - `WireError`: a field that the daemon would not take, or an answer that breaks the specification.
    - `ClientClosed`: the client was closed before, or by another thread meanwhile.

    Args:
        endpoint: `tcp://HOST:PORT`.
        timeout_s: of every call, connecting included; each method takes one of its own for a single call.
        retry: whether a call that was certainly not carried out is made again; without it never.

    Raises:
        BadEndpoint: the endpoint is malformed. Whether somebody listens shows with the first call.
        BadValue: timeout_s is not a positive number of seconds.
    """

    def __init__(
        self,
        endpoint: str = DEFAULT_ENDPOINT,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry: Retry | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.timeout_s = calls.checked_timeout(timeout_s)
        self._retry = retry or NEVER
        self._io = IoThread(endpoint)
        self._limits: tuple[int, ServerLimits] | None = None  # with the number of connections lost before
        weakref.finalize(self, self._io.stop)  # one that is dropped without `close` leaves no thread behind

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls of other threads end with `ClientClosed`. May be repeated."""
        self._io.stop()
        self._io.join()

    def predict(
        self,
        x: ArrayLike,
        stream: str = "default",
        bundle: str = "",
        *,
        adapt: bool = True,
        compare: bool = False,
        timeout_s: float | None = None,
    ) -> Reply:
        """Predictions for one batch, which the stream adapts to, in the same pass or in the background.

        Args:
            x: [batch, ...] of the dtype and shape that `info().input` says.
            stream: whose theta answers and adapts; streams never share anything.
            bundle: which of the daemon's; empty for its first.
            adapt: false leaves the stream as it is and collects nothing.
            compare: ask for the frozen source's logits too (one more forward pass).
            timeout_s: of this call, instead of the client's.

        Raises:
            InputError: the batch is not what the bundle takes, or larger than the daemon takes.
            TooManyStreams: the stream is new and the daemon holds no more.
        """
        ask = calls.predict(x, stream=stream, bundle=bundle, adapt=adapt, compare=compare)
        return self._call(ask, timeout_s)

    def info(self, bundle: str = "", *, timeout_s: float | None = None) -> InfoReply:
        """What is served: model, method, input, classes, limits."""
        return self._call(calls.info(bundle), timeout_s)

    def status(self, *, timeout_s: float | None = None) -> StatusReply:
        """How the daemon is doing: bundles, streams, requests, latency."""
        return self._call(calls.status(), timeout_s)

    def reset(
        self, stream: str = "default", bundle: str = "", *, timeout_s: float | None = None
    ) -> ResetDone:
        """Return a stream to the source.

        Raises:
            UnknownStream: the daemon has no such stream.
        """
        return self._call(calls.reset(stream, bundle), timeout_s)

    def rollback(
        self, stream: str = "default", bundle: str = "", *, timeout_s: float | None = None
    ) -> RollbackDone:
        """Return a stream to its last good checkpoint, or to the source where it has none.

        Raises:
            UnknownStream: the daemon has no such stream.
        """
        return self._call(calls.rollback(stream, bundle), timeout_s)

    def adapt(
        self, on: bool, stream: str = "", bundle: str = "", *, timeout_s: float | None = None
    ) -> AdaptDone:
        """Switch adaptation on or off, for one stream or, without a name, for the whole daemon.

        Raises:
            UnknownStream: the daemon has no such stream.
        """
        return self._call(calls.adapt(on, stream, bundle), timeout_s)

    def reload(self, bundle: str = "", *, timeout_s: float | None = None) -> ReloadDone:
        """Read a bundle's directory again; returns when the new one answers, so allow it some time.

        Raises:
            BundleError: what is there now cannot be served; the old one goes on.
            ReloadUnderWay: another reload of it has not finished.
        """
        return self._call(calls.reload(bundle), timeout_s)

    def events(self, limit: int = 100, *, timeout_s: float | None = None) -> EventsReply:
        """The newest `limit` (1 to 1000) events of the daemon, oldest first."""
        return self._call(calls.events(limit), timeout_s)

    # ------------------------------------------------------------------------------------------ language models

    def score(
        self,
        text: str | bytes,
        session: str = "",
        bundle: str = "",
        *,
        context: str | bytes | None = None,
        timeout_s: float | None = None,
    ) -> TextScore:
        """How well a text is predicted. Changes nothing.

        Args:
            text: a str, or UTF-8.
            session: whose theta and live context come before it; empty: the source's, with none.
            bundle: which of the daemon's; empty for its first.
            context: seen before the text and not scored.
            timeout_s: of this call, instead of the client's.

        Raises:
            WrongTask: the bundle is for images.
            UnknownSession: there is no such session.
            InvalidUtf8, EmptyText, TooLarge: the text is refused.
            ContextTooLong: it is longer, with what comes before it, than the model sees at once.
        """
        return self._call(calls.score(text, session=session, bundle=bundle, context=context), timeout_s)

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
    ) -> TextStream:
        """The text that follows a prompt, in parts as they come. Nothing is sent before the first one is asked for.

        Args:
            prompt: a str, or UTF-8.
            session: as in `score`.
            bundle: which of the daemon's; empty for its first.
            max_tokens: at most so many.
            temperature: 0 takes the most probable token.
            top_k: only the so many most probable tokens; 0: all.
            top_p: only the most probable tokens that together have this probability.
            seed: the same one gives the same text.
            absorb: let the session absorb the prompt and what followed, at the end.
            timeout_s: of the wait for each part, instead of the client's.

        Raises:
            BadField: a parameter is out of its range.
            InvalidUtf8: the prompt is no text.
            TtaError: while it is read, what `score` raises.
        """
        ask = calls.generate(
            prompt, session=session, bundle=bundle, max_tokens=max_tokens, temperature=temperature, top_k=top_k,
            top_p=top_p, seed=seed, absorb=absorb,
        )  # fmt: skip
        return TextStream(
            self, ask, self.timeout_s if timeout_s is None else calls.checked_timeout(timeout_s)
        )

    def absorb(
        self, text: str | bytes, session: str, bundle: str = "", *, timeout_s: float | None = None
    ) -> AbsorbDone:
        """Have a session take a text in; the session begins with its first text.

        Args:
            text: a str, or UTF-8.
            session: its name.
            bundle: which of the daemon's; empty for its first.
            timeout_s: of this call, instead of the client's. Allow a long text some time.

        Raises:
            InvalidUtf8, EmptyText, TooLarge: the text is refused.
            TooManySessions: the session is new and there is no room for it.
            AbsorbUnsupported: the bundle's method absorbs nothing.
        """
        return self._call(calls.absorb(text, session=session, bundle=bundle), timeout_s)

    def export_session(self, session: str, bundle: str = "", *, timeout_s: float | None = None) -> bytes:
        """A session as the bytes of a state file; `import_session` of a daemon with the same bundle takes it.

        Raises:
            UnknownSession: there is no such session.
        """
        return self._call(calls.export_session(session, bundle), timeout_s)

    def import_session(
        self, session: str, data: bytes, bundle: str = "", *, timeout_s: float | None = None
    ) -> ImportDone:
        """Begin a session with what another one was exported as.

        Raises:
            SessionExists: there is one of that name.
            StateOfOtherTokenizer, StateOfOtherBundle: it was exported by another model.
            StateError: the subclass that names what else is wrong with it.
        """
        return self._call(calls.import_session(session, data, bundle), timeout_s)

    def _call(self, ask: Ask[T], timeout_s: float | None) -> T:
        timeout_s = self.timeout_s if timeout_s is None else calls.checked_timeout(timeout_s)
        attempts = Attempts(self._retry)
        while True:
            try:
                return self._attempt(ask, timeout_s)
            except TtaError as error:
                wait_s = attempts.failed(error)
            time.sleep(wait_s)

    def _attempt(self, ask: Ask[T], timeout_s: float) -> T:
        began_s = time.monotonic()
        if ask.tensors:
            calls.check_size(ask.nbytes, self._known_limits(timeout_s, began_s), self.endpoint)
        return ask.result(*self._exchange(ask, timeout_s, began_s))

    def _known_limits(self, timeout_s: float, began_s: float) -> ServerLimits:
        """What the daemon takes in one request; asked again after a connection was lost."""
        losses = self._io.losses
        if self._limits is None or self._limits[0] != losses:
            ask = calls.info("")
            info = ask.result(*self._exchange(ask, timeout_s, began_s))
            self._limits = losses, info.limits
        return self._limits[1]

    def _stream(
        self, ask: Ask[TextEnd], timeout_s: float, stop: _Stop
    ) -> Generator[Received[Any] | TextEnd, None, None]:
        """The parts of an answer, then what it ends with; made again, as a call is, where no part has come."""
        attempts = Attempts(self._retry)
        while not stop.told.is_set():
            began_s, came = time.monotonic(), False
            try:
                calls.check_size(ask.nbytes, self._known_limits(timeout_s, began_s), self.endpoint)
                with closing(self._listen(ask, timeout_s, stop)) as heard:
                    for received in heard:
                        came = came or isinstance(received.message, PARTS)
                        yield received if isinstance(received.message, PARTS) else ask.result(received, 0.0)
                return
            except TtaError as error:
                if stop.told.is_set():
                    return
                wait_s = attempts.failed(error, begun=came)
            stop.told.wait(wait_s)

    def _listen(self, ask: Ask[Any], timeout_s: float, stop: _Stop) -> Generator[Received[Any], None, None]:
        if stop.told.is_set():
            return
        heard: SimpleQueue[Received[Any] | None] = SimpleQueue()
        call = Call(ask.message, ask.tensors, timeout_s, time.monotonic(), part=heard.put)
        self._io.submit(call, lambda: heard.put(None))

        def end() -> None:
            self._io.cancel(call)
            heard.put(None)

        try:
            stop.then(end)
            while (
                part := heard.get()
            ) is not None and not stop.told.is_set():  # its thread keeps the deadline
                yield part
        finally:
            stop.then(None)
            if call.outcome is None:
                self._io.cancel(call)
        if not stop.told.is_set():
            yield call.received()[0]

    def _exchange(self, ask: Ask[Any], timeout_s: float, began_s: float) -> tuple[Received[Any], float]:
        ended = threading.Event()
        call = Call(ask.message, ask.tensors, timeout_s, began_s)
        self._io.submit(call, ended.set)
        try:
            ended.wait()  # its thread keeps the deadline
        finally:
            if call.outcome is None:
                self._io.cancel(call)
        return call.received()


class _Stop:
    """Ends the reading of a text from any thread.

    Attributes:
        told: whether it shall end.
    """

    def __init__(self) -> None:
        self.told = threading.Event()
        self._end: Callable[[], None] | None = None

    def tell(self) -> None:
        """End it."""
        self.told.set()
        if (end := self._end) is not None:
            end()

    def then(self, end: Callable[[], None] | None) -> None:
        """What ends what is being read now; it may be called twice."""
        self._end = end
        if end is not None and self.told.is_set():  # before there was anything to end
            end()


class TextStream:
    """A text as it is generated: an iterator of its parts, each a str of whole characters.

    Ending early (`close`, or leaving the `with` block) asks the daemon to stop. One thread may close what another one
    reads: that one finds the text at its end, and `end` None.

    Args:
        client: whose connection is used.
        ask: the request.
        timeout_s: longest wait for a part.

    Attributes:
        end: how it ended; None before the last part.
    """

    def __init__(self, client: Client, ask: Ask[TextEnd], timeout_s: float) -> None:
        self.end: TextEnd | None = None
        self._stop = _Stop()
        self._reading = threading.Lock()
        self._parts = self._read(client, ask, timeout_s)

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        with self._reading:
            return next(self._parts)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Read no further. May be repeated, and called from any thread."""
        self._stop.tell()
        if self._reading.acquire(blocking=False):  # else it is being read, and ends there
            try:
                self._parts.close()
            finally:
                self._reading.release()

    def _read(self, client: Client, ask: Ask[TextEnd], timeout_s: float) -> Generator[str, None, None]:
        parts = Parts()
        with closing(client._stream(ask, timeout_s, self._stop)) as heard:
            for received in heard:
                if isinstance(received, TextEnd):
                    self.end = received
                    text = parts.rest(received)
                else:
                    text = parts.part(received)
                if text:
                    yield text
