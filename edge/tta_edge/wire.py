"""Messages between a client and the edge daemon as multipart frames. The specification is docs/spec/wire.md.

Frame 0 names the protocol, frame 1 is a typed MessagePack header, the frames after it are the raw tensors
which the header declares. Decoding goes from cheap to expensive and copies no tensor; it raises a `WireError`
or nothing. There is no socket here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args

import msgpack
import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from tta_edge.errors import (
    BadField,
    BadFraming,
    MalformedHeader,
    MessageTooLarge,
    TensorMismatch,
    UnknownField,
    UnknownMessage,
    UnsupportedProtocol,
    WireError,
)
from tta_runtime.errors import did_you_mean

PROTOCOL = b"TTA1"
MAX_TENSORS = 4  # the most that any message declares
SHOWN = 64  # characters of a foreign name that are repeated in an error
MAX_ELEMENTS = 2**40  # of one tensor; zero-sized dimensions count as one
MAX_REQUEST_ID = 2**53 - 1  # exact in every language's number type

Buffer = bytes | memoryview
Tensors = Mapping[str, NDArray[Any]]

DType = Literal["uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"]
RequestId = Annotated[int, Meta(ge=0, le=MAX_REQUEST_ID)]
# Stream ids and bundle names become file names and log fields: one segment, no separators, no leading dot.
NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}\Z"
StreamId = Annotated[str, Meta(pattern=NAME_PATTERN)]
# The empty name stands for the daemon's first bundle, and for all streams where a message may mean all.
OptionalName = Annotated[str, Meta(pattern=r"^([A-Za-z0-9_][A-Za-z0-9._-]{0,63})?\Z")]
StreamState = Literal["adapting", "frozen", "source", "off"]


@dataclass(frozen=True)
class Limits:
    """What a receiver accepts. Everything is checked before anything is allocated from a declared length.

    Attributes:
        max_header_bytes: of frame 1.
        max_payload_bytes: of all tensor frames together.
        max_items: elements of one array or map in a header.
        max_str_bytes: of one string in a header.
    """

    max_header_bytes: int = 8 * 1024
    max_payload_bytes: int = 64 * 1024 * 1024
    max_items: int = 64
    max_str_bytes: int = 1024


# A reply may list the class names of a large model; the client chose its daemon, the daemon not its clients.
REPLY_LIMITS = Limits(
    max_header_bytes=4 * 1024 * 1024,
    max_items=65_536,
    max_str_bytes=64 * 1024,
    max_payload_bytes=256 * 1024 * 1024,
)


class TensorInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Declaration of one raw tensor frame: C-contiguous, little-endian."""

    dtype: DType
    shape: Annotated[tuple[Annotated[int, Meta(ge=0, le=2**31 - 1)], ...], Meta(max_length=8)]

    @property
    def nbytes(self) -> int:
        """Size of the frame in bytes, in unbounded integers: no declared shape overflows it."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


class _Message(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    tag_field="type",
    omit_defaults=True,
):
    """What every message has."""


class Predict(_Message, frozen=True, kw_only=True, tag="predict"):
    """Ask for predictions on one batch and, unless `adapt` is false, let the stream adapt to it."""

    id: RequestId
    bundle: OptionalName = ""
    stream: StreamId = "default"
    adapt: bool = True
    compare: bool = False
    """Send the frozen source's logits too."""
    x: TensorInfo


class Info(_Message, frozen=True, kw_only=True, tag="info"):
    """Ask what is served."""

    id: RequestId
    bundle: OptionalName = ""


class Status(_Message, frozen=True, kw_only=True, tag="status"):
    """Ask how the daemon is doing."""

    id: RequestId


class Reset(_Message, frozen=True, kw_only=True, tag="reset"):
    """Return one stream to the source."""

    id: RequestId
    bundle: OptionalName = ""
    stream: StreamId = "default"


class Rollback(_Message, frozen=True, kw_only=True, tag="rollback"):
    """Return one stream to its last good checkpoint, theta and state together."""

    id: RequestId
    bundle: OptionalName = ""
    stream: StreamId = "default"


class Adapt(_Message, frozen=True, kw_only=True, tag="adapt"):
    """Switch adaptation on or off, for the whole daemon or for one stream."""

    id: RequestId
    on: bool
    bundle: OptionalName = ""
    stream: OptionalName = ""
    """Empty: the kill switch of the whole daemon, whatever `bundle` says."""


class Reload(_Message, frozen=True, kw_only=True, tag="reload"):
    """Read a bundle's directory again and serve what is there now."""

    id: RequestId
    bundle: OptionalName = ""


class Events(_Message, frozen=True, kw_only=True, tag="events"):
    """Ask for the newest events."""

    id: RequestId
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100


class Prediction(_Message, frozen=True, kw_only=True, tag="prediction"):
    """Answer to `predict`."""

    id: RequestId
    adapted: bool
    """Whether this batch's step was committed."""
    collected: bool = False
    """Whether the samples went to the stream's window, to be adapted on later."""
    reason: str = ""
    """The guards' code of why not, or of why the stream was reset; empty where there is nothing to say."""
    steps: int
    distance: float
    """Relative L2 distance of theta to the source theta."""
    theta_digest: str
    report: dict[str, float]
    compute_ms: float
    logits: TensorInfo
    """[batch, classes], float32."""
    source_logits: TensorInfo | None = None
    """[batch, classes], float32: the frozen source's; present when asked for by `compare`."""


class InputInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a request's `x` has to be; a string in `shape` is a dimension of any size."""

    dtype: str
    shape: list[int | str]
    low: float
    high: float


class ServerLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the daemon accepts in one request."""

    max_batch: int
    max_request_bytes: int
    batch: int | None = None
    """The only batch size the method can adapt on, where it has one."""
    min_batch: int = 1
    """Below it a batch is answered but not adapted on."""


class InfoReply(_Message, frozen=True, kw_only=True, tag="info-reply"):
    """Answer to `info`."""

    id: RequestId
    version: str
    bundle: str
    """Its name in this daemon."""
    model_id: str
    bundle_digest: str
    method: str
    methods: list[str]
    hyper: dict[str, float]
    input: InputInfo
    classes: int
    class_names: list[str] | None = None
    limits: ServerLimits


class BundleStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One served bundle."""

    name: str
    model_id: str
    digest: str
    method: str
    provider: str
    """What really runs its graphs."""
    loads: int
    """How often it was loaded since the daemon started."""


AutoMode = Literal["awake", "resting", "source"]


class AutoStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the method auto has decided for a stream."""

    mode: AutoMode
    """`awake`: steps often; `resting`: settled, steps rarely; `source`: a step has nothing to add."""
    change: float
    """How far the images last moved, in standard deviations of single ones."""
    shift: float | None = None
    """Squared distance of the activations from the source's, in squared spreads of single samples; last step."""
    share: float | None = None
    """Of the shift that was undone, 0 to 1."""
    gain: float | None = None
    """Nats of information that the last step's predictions hold beyond the source's."""
    correlated: bool = False
    """Whether labels come in runs; then answers favour the classes that are present."""
    evidence: float = 1.0
    """For it: how far recent mean predictions depart from the long mean, in units of what chance gives."""


class StreamStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One stream's figures."""

    id: str
    bundle: str
    method: str
    steps: int
    theta_digest: str
    distance: float
    state: StreamState
    """`adapting`; `frozen`: the guards suspended it; `source`: its method has no step; `off`: switched off."""
    restored: str
    """What it started from: `source`, or the slot file it was restored from."""
    samples: int
    """Answered since the stream was loaded."""
    window: int = 0
    """Samples that wait for a step."""
    checkpoints: int = 0
    """Good states that a rollback can return to."""
    entropy: float | None = None
    """Running mean entropy of the predictions, in nats."""
    diversity: float | None = None
    """Entropy of the running mean prediction, as a fraction of ln C; near 0 where all goes to one class."""
    agreement: float | None = None
    """Running share of samples, of those compared, where stream and frozen source give the same class."""
    last_event: str = ""
    events: dict[str, int] = msgspec.field(default_factory=dict)
    """Reason code -> how often."""
    auto: AutoStatus | None = None
    """Of a stream whose method is auto."""


class Requests(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many requests were answered, and with what."""

    ok: int
    failed: int
    open: int = 0
    failures: dict[str, int] = msgspec.field(default_factory=dict)
    """Error code -> how often."""


class StatusReply(_Message, frozen=True, kw_only=True, tag="status-reply"):
    """Answer to `status`."""

    id: RequestId
    version: str
    uptime_s: float
    adapt: bool
    """The kill switch: whether any stream may adapt."""
    policy: str
    bundles: list[BundleStatus]
    streams: list[StreamStatus]
    """Those in memory, the most recently used last."""
    stored_streams: int
    """On disk only."""
    state_dir: str = ""
    requests: Requests
    latency_ms: dict[str, float]
    rss_bytes: int
    """Resident memory of the daemon."""
    disk_error: str = ""
    """Why the last write to the state directory failed; empty when it succeeded."""


class ResetDone(_Message, frozen=True, kw_only=True, tag="reset-done"):
    """Answer to `reset`."""

    id: RequestId
    stream: str
    theta_digest: str
    durable: bool = True
    """Whether a restart finds the stream at the source; false while the state directory cannot be written."""


class RollbackDone(_Message, frozen=True, kw_only=True, tag="rollback-done"):
    """Answer to `rollback`."""

    id: RequestId
    stream: str
    theta_digest: str
    steps: int
    to: Literal["checkpoint", "source"]
    durable: bool = True
    """Whether a restart finds the stream as it is now."""


class AdaptDone(_Message, frozen=True, kw_only=True, tag="adapt-done"):
    """Answer to `adapt`."""

    id: RequestId
    on: bool
    stream: str
    durable: bool
    """Whether the switch survives a restart: there is a state directory and it was written."""


class ReloadDone(_Message, frozen=True, kw_only=True, tag="reload-done"):
    """Answer to `reload`, when the new bundle answers."""

    id: RequestId
    bundle: str
    bundle_digest: str
    changed: bool
    """Whether the directory held another bundle than before."""
    kept_streams: int
    """Streams that go on with their theta."""
    restarted_streams: int
    """Streams that start from the new source, because theirs does not fit it."""


class EventEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Something the daemon did by itself or was told to do."""

    seq: int
    """1, 2, ... since the daemon started."""
    time: str
    """UTC, ISO 8601."""
    bundle: str
    stream: str
    """Empty where it concerns the whole daemon."""
    action: str
    reason: str
    detail: str


class EventsReply(_Message, frozen=True, kw_only=True, tag="events-reply"):
    """Answer to `events`: the newest, oldest first."""

    id: RequestId
    events: list[EventEntry]


class ErrorReply(_Message, frozen=True, kw_only=True, tag="error"):
    """Answer to anything that was refused. Nothing has changed in the daemon."""

    id: RequestId | None = None
    """`None` where the request was too broken to read its id."""
    code: str
    cause: str
    fix: str
    retry_after_s: float | None = None


Request = Predict | Info | Status | Reset | Rollback | Adapt | Reload | Events
Reply = (
    Prediction
    | InfoReply
    | StatusReply
    | ResetDone
    | RollbackDone
    | AdaptDone
    | ReloadDone
    | EventsReply
    | ErrorReply
)
M = TypeVar("M", bound=_Message)


@dataclass(frozen=True)
class Received(Generic[M]):
    """A decoded message: the typed header and read-only views of its tensor frames, by field name."""

    message: M
    tensors: Tensors


def _by_tag(types: Iterable[type[_Message]]) -> dict[str, type[_Message]]:
    return {str(t.__struct_config__.tag): t for t in types}


REQUESTS = _by_tag(get_args(Request))
REPLIES = _by_tag(get_args(Reply))

_TENSOR_FIELDS: dict[type[_Message], tuple[str, ...]] = {
    t: tuple(f.name for f in msgspec.structs.fields(t) if TensorInfo in (f.type, *get_args(f.type)))
    for t in (*REQUESTS.values(), *REPLIES.values())
}


def tag(message: _Message) -> str:
    """The name a message carries in its header's `type`."""
    return str(message.__struct_config__.tag)


def declare(array: NDArray[Any]) -> TensorInfo:
    """The declaration of an array as a tensor frame.

    Raises:
        BadField: the array's dtype or number of dimensions cannot be sent.
    """
    try:
        return msgspec.convert({"dtype": array.dtype.name, "shape": array.shape}, TensorInfo)
    except msgspec.ValidationError as error:
        raise BadField(
            f"an array of dtype {array.dtype} and shape {array.shape} cannot be sent ({error})",
            f"Send one of {', '.join(get_args(DType))} with at most 8 dimensions",
        ) from error


def encode(message: _Message, tensors: Tensors | None = None) -> list[Buffer]:
    """Frames of a message, the tensors not copied where they already are contiguous and little-endian.

    Args:
        message: with a `declare`d TensorInfo for each tensor it carries.
        tensors: field name -> array, exactly the declared ones.

    Raises:
        TensorMismatch: tensors and declaration disagree.
    """
    tensors = tensors or {}
    declared = _declared(message)
    if set(declared) != set(tensors):
        raise TensorMismatch(
            f"message `{tag(message)}` declares {sorted(declared)} and was given {sorted(tensors)}",
            "Pass exactly the declared tensors",
        )
    frames: list[Buffer] = [PROTOCOL, msgpack.packb(msgspec.to_builtins(message))]
    for name, info in declared.items():
        array = tensors[name]
        if declare(array) != info:
            raise TensorMismatch(
                f"tensor `{name}` is {array.dtype.name}{list(array.shape)}, declared "
                f"{info.dtype}{list(info.shape)}",
                "Declare the array that is sent",
            )
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        frames.append(little.reshape(-1).view(np.uint8).data)
    return frames


def decode_request(frames: Sequence[Buffer], limits: Limits) -> Received[Any]:
    """A request from its frames; raises a WireError (see `decode`)."""
    return decode(frames, limits, REQUESTS)


def decode_reply(frames: Sequence[Buffer], limits: Limits = REPLY_LIMITS) -> Received[Any]:
    """A reply from its frames; raises a WireError (see `decode`)."""
    return decode(frames, limits, REPLIES)


def decode(frames: Sequence[Buffer], limits: Limits, types: Mapping[str, type[_Message]]) -> Received[Any]:
    """Check frames against the specification, clause by clause, and give them a type.

    Args:
        frames: without any routing prefix.
        limits: of the receiver.
        types: the messages that may come, by tag.

    Returns:
        The typed header and read-only views into `frames`, which must stay unchanged while they are used.

    Raises:
        BadFraming: W1.
        UnsupportedProtocol: W2.
        MessageTooLarge: W3.
        MalformedHeader: W4.
        UnknownMessage: W5.
        UnknownField: W6.
        BadField: W7.
        TensorMismatch: W8, W9.
    """
    _check_framing(frames)
    _check_sizes(frames, limits)
    header = _unpack(bytes(frames[1]), limits)
    try:
        message = _typed(header, types)
        return Received(message, _views(_declared(message), frames[2:]))
    except WireError as error:
        error.request_id = _readable_id(header)
        raise


def _check_framing(frames: Sequence[Buffer]) -> None:
    if not 2 <= len(frames) <= 2 + MAX_TENSORS:  # W1
        raise BadFraming(
            f"a message has 2 to {2 + MAX_TENSORS} frames, this one has {len(frames)}",
            "Send protocol name, header, then the declared tensors; see docs/spec/wire.md",
        )
    if bytes(frames[0][:16]) != PROTOCOL:  # W2
        raise UnsupportedProtocol(
            f"frame 0 is {bytes(frames[0][:16])!r}, this end speaks {PROTOCOL!r}",
            "Use a client and a daemon of the same protocol version",
        )


def _check_sizes(frames: Sequence[Buffer], limits: Limits) -> None:
    if len(frames[1]) > limits.max_header_bytes:  # W3
        raise MessageTooLarge(
            f"the header has {len(frames[1])} bytes, the limit is {limits.max_header_bytes}",
            "Send data as tensor frames, not inside the header",
        )
    payload = sum(len(frame) for frame in frames[2:])
    if payload > limits.max_payload_bytes:
        raise MessageTooLarge(
            f"the tensors have {payload} bytes, the limit is {limits.max_payload_bytes}",
            "Send smaller batches, or raise `max_request_bytes` of the daemon",
        )


class _BadKeyError(ValueError):
    """A key that is not a string, or two values for one: which one counts would depend on the reader."""


def _unique(pairs: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise _BadKeyError(f"key {key!r} is not a string")
        if key in result:
            raise _BadKeyError(f"key {key!r} occurs twice")
        result[key] = value
    return result


def _unpack(header: bytes, limits: Limits) -> dict[str, Any]:
    try:
        # A list or map of n elements takes at least n bytes: no honest header is refused by the smaller
        # limit, and a short one cannot ask for a long allocation.
        items = min(limits.max_items, len(header))
        value = msgpack.unpackb(
            header,
            raw=False,
            strict_map_key=True,
            max_str_len=limits.max_str_bytes,
            max_bin_len=0,
            max_ext_len=0,
            max_array_len=items,
            max_map_len=items,
            object_pairs_hook=_unique,
        )
    except (ValueError, msgpack.UnpackException) as error:  # W4
        raise MalformedHeader(
            f"the header is not one MessagePack map within the limits ({error or type(error).__name__})",
            "Encode one map with string keys; see docs/spec/wire.md for the limits",
        ) from error
    if not isinstance(value, dict):
        raise MalformedHeader(
            f"the header is a MessagePack {type(value).__name__}, not a map",
            "Encode one map with string keys",
        )
    return value


def _typed(header: dict[str, Any], types: Mapping[str, type[_Message]]) -> _Message:
    name = header.get("type")
    if not isinstance(name, str) or name not in types:  # W5
        shown = str(name)[:SHOWN]
        raise UnknownMessage(
            f"unknown message type `{shown}`{did_you_mean(shown, types)}",
            "Send a message of docs/spec/wire.md",
        )
    cls = types[name]
    _check_fields(name, header, cls, extra=("type",))  # W6
    for field in _TENSOR_FIELDS[cls]:
        if isinstance(header.get(field), dict):
            _check_fields(f"{name}.{field}", header[field], TensorInfo)
    try:
        return msgspec.convert(header, cls)
    except msgspec.ValidationError as error:  # W7
        raise BadField(f"message `{name}`: {error}", "Correct the field; see docs/spec/wire.md") from error


def _check_fields(
    where: str, given: dict[str, Any], cls: type[msgspec.Struct], extra: Sequence[str] = ()
) -> None:
    known = (*cls.__struct_fields__, *extra)
    for key in given:
        if key not in known:
            raise UnknownField(
                f"message `{where}` has no field `{key[:SHOWN]}`{did_you_mean(key[:SHOWN], known)}",
                "Correct its name, or use a client and a daemon of the same version",
            )


def _declared(message: _Message) -> dict[str, TensorInfo]:
    """The tensors a message carries, in the order of their frames."""
    infos = {name: getattr(message, name) for name in _TENSOR_FIELDS[type(message)]}
    return {name: info for name, info in infos.items() if info is not None}


def _views(declared: Mapping[str, TensorInfo], frames: Sequence[Buffer]) -> dict[str, NDArray[Any]]:
    if len(declared) != len(frames):  # W8
        raise TensorMismatch(
            f"the header declares {len(declared)} tensors, {len(frames)} frames follow it",
            "Send one frame for each declared tensor, in the order of the fields",
        )
    views: dict[str, NDArray[Any]] = {}
    for (name, info), frame in zip(declared.items(), frames, strict=True):
        # numpy cannot lay out a shape such as [0, 2**31, 2**31, 2**31], though it needs no bytes at all.
        layable = prod(max(size, 1) for size in info.shape) <= MAX_ELEMENTS
        if info.nbytes != len(frame) or not layable:  # W9
            raise TensorMismatch(
                f"tensor `{name}` is declared {info.dtype}{list(info.shape)} = {info.nbytes} bytes, "
                f"its frame has {len(frame)}",
                "Send the tensor C-contiguous and whole",
            )
        dtype = np.dtype(info.dtype).newbyteorder("<")
        view: NDArray[Any] = np.ndarray(info.shape, dtype=dtype, buffer=frame)
        if not view.flags.aligned:  # only small frames are: the socket library packs several into one buffer
            view = view.copy()
        view.flags.writeable = False
        views[name] = view
    return views


def _readable_id(header: dict[str, Any]) -> int | None:
    """The request's id where it can be read, so that the refusal finds the call that waits for it."""
    value = header.get("id")
    return value if type(value) is int and 0 <= value <= MAX_REQUEST_ID else None
