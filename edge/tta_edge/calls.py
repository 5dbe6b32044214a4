"""What a client asks and what it makes of the answer, shared by `Client` and `AsyncClient`. No I/O."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from tta_edge import errors as edge_errors
from tta_edge.errors import Busy, RemoteError
from tta_edge.wire import (
    Absorb,
    AbsorbDone,
    Adapt,
    AdaptDone,
    ErrorReply,
    Events,
    EventsReply,
    Export,
    ExportDone,
    Generate,
    Generated,
    GenerateDone,
    Import,
    ImportDone,
    Info,
    InfoReply,
    Predict,
    Prediction,
    Received,
    Reload,
    ReloadDone,
    Request,
    Reset,
    ResetDone,
    Rollback,
    RollbackDone,
    Score,
    ScoreDone,
    ServerLimits,
    Status,
    StatusReply,
    Tensors,
    declare,
    tag,
)
from tta_runtime import errors as runtime_errors
from tta_runtime.errors import BadField, BadValue, TensorMismatch, TooLarge, TtaError, UnknownMessage
from tta_runtime.numerics import entropy
from tta_runtime.tokens import bytes_of, text_of

DEFAULT_ENDPOINT = "tcp://127.0.0.1:5555"
DEFAULT_TIMEOUT_S = 10.0
LONGEST_TIMEOUT_S = 1e6

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Answer to one batch.

    Attributes:
        logits: [batch, classes], float32, read-only.
        source_logits: the frozen source's, [batch, classes]; `None` unless compared.
        entropy: [batch], in nats, of the predicted distributions.
        source_entropy: the same for the frozen source; `None` unless compared.
        adapted: whether the stream adapted to this batch before the reply was sent.
        collected: whether the samples went to the stream's window, to be adapted on in the background.
        reason: code of why it did not adapt, or of why the stream was reset; empty where there is nothing to
            say.
        steps: committed steps of the stream.
        distance: relative L2 distance of theta to the source theta.
        theta_digest: of the theta that the stream has now.
        report: the step's named numbers.
        compute_ms: inside the daemon, without waiting in its queue.
        latency_ms: from the request to the reply, connecting included, earlier attempts not.
    """

    logits: NDArray[np.float32]
    source_logits: NDArray[np.float32] | None
    entropy: NDArray[np.float32]
    source_entropy: NDArray[np.float32] | None
    adapted: bool
    collected: bool
    reason: str
    steps: int
    distance: float
    theta_digest: str
    report: Mapping[str, float]
    compute_ms: float
    latency_ms: float


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """How well a text was predicted.

    Attributes:
        bits: -log2 p of all scored tokens together.
        bytes: UTF-8 bytes that they stand for.
        nats: [scored tokens] float32, -ln p of each.
        skipped: tokens at the beginning that were not scored, because nothing comes before them: 0 or 1.
        before: tokens that were seen before the text.
        compute_ms: inside the daemon, its queue included.
        latency_ms: from the request to the reply.
    """

    bits: float
    bytes: int
    nats: NDArray[np.float32]
    skipped: int
    before: int
    compute_ms: float
    latency_ms: float

    @property
    def bits_per_byte(self) -> float:
        """NaN where no byte was scored."""
        return self.bits / self.bytes if self.bytes else math.nan


@dataclass(frozen=True, kw_only=True)
class TextEnd:
    """How a generated text ended.

    Attributes:
        text: all of it.
        reason: `end` (the model's end token), `max-tokens` or `context` (no more room).
        tokens: that were generated.
        prompt_tokens: of the prompt.
        absorbed: whether the session has absorbed prompt and text.
        durable: whether a restart finds that.
        compute_ms: inside the daemon, other requests between its tokens included.
    """

    text: str
    reason: str
    tokens: int
    prompt_tokens: int
    absorbed: bool
    durable: bool
    compute_ms: float


@dataclass(frozen=True)
class Ask(Generic[T]):
    """One request and how its answer is read.

    Attributes:
        message: the request; its id is put in when it is sent.
        answer: the message that answers it.
        read: from that answer and the time it took, in milliseconds, to what the caller gets.
        tensors: of the request.
    """

    message: Request
    answer: type[Any]
    read: Callable[[Received[Any], float], T]
    tensors: Tensors = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the request's tensors."""
        return sum(array.nbytes for array in self.tensors.values())

    def result(self, received: Received[Any], latency_ms: float) -> T:
        """What the caller gets.

        Raises:
            TtaError: the error that the daemon answered with, or a WireError where its answer is not one.
        """
        message = received.message
        if isinstance(message, ErrorReply):
            raise as_error(message)
        if not isinstance(message, self.answer):
            raise UnknownMessage(
                f"the daemon answered `{tag(self.message)}` with `{tag(message)}`",
                "Use a client and a daemon of the same version",
            )
        return self.read(received, latency_ms)


def predict(x: ArrayLike, *, stream: str, bundle: str, adapt: bool, compare: bool) -> Ask[Reply]:
    """Ask for predictions; see `Client.predict`."""
    array = np.asarray(x)
    message = Predict(id=0, bundle=bundle, stream=stream, adapt=adapt, compare=compare, x=declare(array))
    samples = array.shape[:1]
    return Ask(_checked(message), Prediction, lambda got, ms: _reply(got, samples, ms), {"x": array})


def info(bundle: str) -> Ask[InfoReply]:
    """Ask what is served."""
    return _plain(Info(id=0, bundle=bundle), InfoReply)


def status() -> Ask[StatusReply]:
    """Ask how the daemon is doing."""
    return _plain(Status(id=0), StatusReply)


def reset(stream: str, bundle: str) -> Ask[ResetDone]:
    """Ask to return a stream to the source."""
    return _plain(Reset(id=0, bundle=bundle, stream=stream), ResetDone)


def rollback(stream: str, bundle: str) -> Ask[RollbackDone]:
    """Ask to return a stream to its last good checkpoint."""
    return _plain(Rollback(id=0, bundle=bundle, stream=stream), RollbackDone)


def adapt(on: bool, stream: str, bundle: str) -> Ask[AdaptDone]:
    """Ask to switch adaptation."""
    return _plain(Adapt(id=0, on=on, bundle=bundle, stream=stream), AdaptDone)


def reload(bundle: str) -> Ask[ReloadDone]:
    """Ask to read a bundle again."""
    return _plain(Reload(id=0, bundle=bundle), ReloadDone)


def events(limit: int) -> Ask[EventsReply]:
    """Ask for the newest events."""
    return _plain(Events(id=0, limit=limit), EventsReply)


def score(text: str | bytes, *, session: str, bundle: str, context: str | bytes | None) -> Ask[TextScore]:
    """Ask how well a text is predicted; see `Client.score`."""
    tensors = {"text": _text(text)}
    if context is not None:
        tensors["context"] = _text(context, "the context")
    declared = {name: declare(array) for name, array in tensors.items()}
    message = Score(id=0, bundle=bundle, session=session, **declared)
    return Ask(_checked(message), ScoreDone, _score, tensors)


def generate(
    prompt: str | bytes,
    *,
    session: str,
    bundle: str,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    absorb: bool,
) -> Ask[TextEnd]:
    """Ask for what follows a prompt; see `Client.generate`."""
    tensors = {"prompt": _text(prompt, "the prompt")}
    message = Generate(
        id=0, bundle=bundle, session=session, prompt=declare(tensors["prompt"]), max_tokens=max_tokens,
        temperature=float(temperature), top_k=top_k, top_p=float(top_p), seed=seed, absorb=absorb,
    )  # fmt: skip
    return Ask(_checked(message), GenerateDone, _end_of_text, tensors)


def absorb(text: str | bytes, *, session: str, bundle: str) -> Ask[AbsorbDone]:
    """Ask a session to take a text in; see `Client.absorb`."""
    tensors = {"text": _text(text)}
    message = Absorb(id=0, bundle=bundle, session=session, text=declare(tensors["text"]))
    return Ask(_checked(message), AbsorbDone, lambda received, _: received.message, tensors)


def export_session(session: str, bundle: str) -> Ask[bytes]:
    """Ask for a session as a file."""
    message = Export(id=0, bundle=bundle, session=session)
    return Ask(_checked(message), ExportDone, lambda received, _: received.tensors["data"].tobytes())


def import_session(session: str, data: bytes, bundle: str) -> Ask[ImportDone]:
    """Ask to begin a session with an exported one."""
    tensors = {"data": np.frombuffer(data, np.uint8)}
    message = Import(id=0, bundle=bundle, session=session, data=declare(tensors["data"]))
    return Ask(_checked(message), ImportDone, lambda received, _: received.message, tensors)


class Parts:
    """Puts the parts of a text together; some may be missing, the end has them all."""

    def __init__(self) -> None:
        self._have = 0

    def part(self, received: Received[Any]) -> str:
        """What a part adds; nothing where one before it is missing."""
        message: Generated = received.message
        if message.start != self._have:
            return ""
        self._have += len(message.text.encode())
        return message.text

    def rest(self, end: TextEnd) -> str:
        """What the parts have left out."""
        return end.text.encode()[self._have :].decode("utf-8", "replace")


def _text(text: str | bytes, what: str = "the text") -> NDArray[np.uint8]:
    """[bytes]; raises InvalidUtf8 of what is no text. Bytes are left to the daemon to judge."""
    return np.frombuffer(text if isinstance(text, bytes) else bytes_of(text, what), np.uint8)


def _score(received: Received[Any], latency_ms: float) -> TextScore:
    done: ScoreDone = received.message
    return TextScore(
        bits=done.bits, bytes=done.bytes, nats=received.tensors["nats"], skipped=done.skipped,
        before=done.before, compute_ms=done.compute_ms, latency_ms=latency_ms,
    )  # fmt: skip


def _end_of_text(received: Received[Any], latency_ms: float) -> TextEnd:
    del latency_ms
    done: GenerateDone = received.message
    return TextEnd(
        text=text_of(received.tensors["text"].tobytes(), "the answer"), reason=done.reason, tokens=done.tokens,
        prompt_tokens=done.prompt_tokens, absorbed=done.absorbed, durable=done.durable, compute_ms=done.compute_ms,
    )  # fmt: skip


def check_size(nbytes: int, limits: ServerLimits, endpoint: str) -> None:
    """Refuse what would make the daemon close the connection without a word (W3).

    Raises:
        TooLarge: the request has more bytes than the daemon takes.
    """
    if nbytes > limits.max_request_bytes:
        raise TooLarge(
            f"the batch has {nbytes} bytes, {endpoint} takes {limits.max_request_bytes}",
            "Send smaller batches, or raise `max_request_bytes` of the daemon",
        )


def checked_timeout(timeout_s: float) -> float:
    """A deadline that can be kept.

    Raises:
        BadValue: not a positive number of seconds.
    """
    if not 0 < timeout_s <= LONGEST_TIMEOUT_S:
        raise BadValue(f"timeout_s is {timeout_s}", f"Use seconds above 0 and up to {LONGEST_TIMEOUT_S:g}")
    return timeout_s


def as_error(reply: ErrorReply) -> TtaError:
    """The error that a reply carries, as the class with its code; a `RemoteError` if there is none here."""
    kind = _errors_by_code().get(reply.code)
    if kind is None:
        return RemoteError(f"{reply.code}: {reply.cause}", reply.fix)
    error = kind(reply.cause, reply.fix)
    if isinstance(error, Busy):
        error.retry_after_s = reply.retry_after_s
    return error


@cache
def _errors_by_code() -> Mapping[str, type[TtaError]]:
    """Every named error of the runtime and the edge by its code."""
    modules = (runtime_errors, edge_errors)
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return {kind.code: kind for kind in classes if issubclass(kind, TtaError)}


M = TypeVar("M", bound=Request)


def _plain(message: Request, answer: type[T]) -> Ask[T]:
    """An Ask without tensors whose caller gets the answer as it is."""
    return Ask(_checked(message), answer, lambda received, _: received.message)


def _checked(message: M) -> M:
    """The message, if the daemon would take its fields: names and ranges are refused here as there (W7)."""
    try:
        return msgspec.convert(msgspec.to_builtins(message), type(message))
    except (msgspec.ValidationError, TypeError) as error:
        raise BadField(
            f"message `{tag(message)}`: {error}", "Correct the argument; see docs/spec/wire.md"
        ) from error


def _reply(received: Received[Any], samples: tuple[int, ...], latency_ms: float) -> Reply:
    answer: Prediction = received.message
    logits, source = received.tensors["logits"], received.tensors.get("source_logits")
    for array in (logits, source):
        _check_logits(array, (*samples, logits.shape[-1] if logits.ndim else 0))
    return Reply(
        logits=logits,
        source_logits=source,
        entropy=entropy(logits),
        source_entropy=None if source is None else entropy(source),
        adapted=answer.adapted,
        collected=answer.collected,
        reason=answer.reason,
        steps=answer.steps,
        distance=answer.distance,
        theta_digest=answer.theta_digest,
        report=answer.report,
        compute_ms=answer.compute_ms,
        latency_ms=latency_ms,
    )


def _check_logits(array: NDArray[Any] | None, shape: tuple[int, ...]) -> None:
    if array is not None and (array.dtype != np.float32 or array.shape != shape or shape[-1] == 0):
        raise TensorMismatch(
            f"the daemon answered with {array.dtype.name}{list(array.shape)}, "
            f"logits of this request are float32{list(shape)}",
            "Use a client and a daemon of the same version",
        )
