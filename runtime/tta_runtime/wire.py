"""Messages as multipart frames: what the daemon's clients and the cloud's edges have in common.

Frame 0 names the protocol, frame 1 is a typed MessagePack header, the frames after it are the raw tensors
which the header declares. Decoding goes from cheap to expensive and copies no tensor; it raises a `WireError`
or nothing. There is no socket here. Rules W1 to W9 are those of docs/spec/wire.md.
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

from .errors import (
    BadField,
    BadFraming,
    MalformedHeader,
    MessageTooLarge,
    TensorMismatch,
    UnknownField,
    UnknownMessage,
    UnsupportedProtocol,
    WireError,
    did_you_mean,
)
from .packed import unpack

SHOWN = 64  # characters of a foreign name that are repeated in an error
MAX_ELEMENTS = 2**40  # of one tensor; zero-sized dimensions count as one
MAX_REQUEST_ID = 2**53 - 1  # exact in every language's number type
# Names become file names and log fields: one segment, no separators, no leading dot.
NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}\Z"

Buffer = bytes | memoryview
Tensors = Mapping[str, NDArray[Any]]

DType = Literal["uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"]
RequestId = Annotated[int, Meta(ge=0, le=MAX_REQUEST_ID)]


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


class TensorInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Declaration of one raw tensor frame: C-contiguous, little-endian."""

    dtype: DType
    shape: Annotated[tuple[Annotated[int, Meta(ge=0, le=2**31 - 1)], ...], Meta(max_length=8)]

    @property
    def nbytes(self) -> int:
        """Size of the frame in bytes, in unbounded integers: no declared shape overflows it."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


class Message(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    tag_field="type",
    omit_defaults=True,
):
    """What every message has."""


M = TypeVar("M", bound=Message)


@dataclass(frozen=True)
class Received(Generic[M]):
    """A decoded message: the typed header and read-only views of its tensor frames, by field name."""

    message: M
    tensors: Tensors


def by_tag(types: Iterable[type[Message]]) -> dict[str, type[Message]]:
    """Messages by the name that their headers carry."""
    return {str(t.__struct_config__.tag): t for t in types}


def tag(message: Message) -> str:
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


class Codec:
    """The frames of one protocol.

    Args:
        protocol: what frame 0 is.
        types: all messages of the protocol, in either direction.
        max_tensors: the most that any of them declares.
        spec: the page that specifies it, for those who are refused.
        send_less: what to do about a payload over the limit.
    """

    def __init__(
        self,
        protocol: bytes,
        types: Iterable[type[Message]],
        *,
        max_tensors: int,
        spec: str,
        send_less: str = "Send less in one message",
    ) -> None:
        self._protocol, self._max_tensors, self._spec, self._send_less = (
            protocol,
            max_tensors,
            spec,
            send_less,
        )
        self._fields: dict[type[Message], tuple[str, ...]] = {
            t: tuple(f.name for f in msgspec.structs.fields(t) if TensorInfo in (f.type, *get_args(f.type)))
            for t in types
        }

    def encode(self, message: Message, tensors: Tensors | None = None) -> list[Buffer]:
        """Frames of a message, the tensors not copied where they already are contiguous and little-endian.

        Args:
            message: with a `declare`d TensorInfo for each tensor it carries.
            tensors: field name -> array, exactly the declared ones.

        Raises:
            BadField: a field holds what MessagePack has no form for, such as a number of more than 64 bits.
            TensorMismatch: tensors and declaration disagree.
        """
        tensors = tensors or {}
        declared = self._declared(message)
        if set(declared) != set(tensors):
            raise TensorMismatch(
                f"message `{tag(message)}` declares {sorted(declared)} and was given {sorted(tensors)}",
                "Pass exactly the declared tensors",
            )
        try:
            header: bytes = msgpack.packb(msgspec.to_builtins(message))
        except (TypeError, ValueError, OverflowError) as error:
            raise BadField(
                f"message `{tag(message)}` cannot be encoded: {error}", f"Correct the field; see {self._spec}"
            ) from error
        frames: list[Buffer] = [self._protocol, header]
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

    def decode(
        self, frames: Sequence[Buffer], limits: Limits, types: Mapping[str, type[Message]]
    ) -> Received[Any]:
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
        self._check_framing(frames)
        self._check_sizes(frames, limits)
        header = _unpack(bytes(frames[1]), limits, self._spec)
        try:
            message = self._typed(header, types)
            return Received(message, _views(self._declared(message), frames[2:]))
        except WireError as error:
            error.request_id = _readable_id(header)
            raise

    def _check_framing(self, frames: Sequence[Buffer]) -> None:
        if not 2 <= len(frames) <= 2 + self._max_tensors:  # W1
            raise BadFraming(
                f"a message has 2 to {2 + self._max_tensors} frames, this one has {len(frames)}",
                f"Send protocol name, header, then the declared tensors; see {self._spec}",
            )
        if bytes(frames[0][:16]) != self._protocol:  # W2
            raise UnsupportedProtocol(
                f"frame 0 is {bytes(frames[0][:16])!r}, this end speaks {self._protocol!r}",
                "Use the same protocol version at both ends",
            )

    def _check_sizes(self, frames: Sequence[Buffer], limits: Limits) -> None:
        if len(frames[1]) > limits.max_header_bytes:  # W3
            raise MessageTooLarge(
                f"the header has {len(frames[1])} bytes, the limit is {limits.max_header_bytes}",
                "Send data as tensor frames, not inside the header",
            )
        payload = sum(len(frame) for frame in frames[2:])
        if payload > limits.max_payload_bytes:
            raise MessageTooLarge(
                f"the tensors have {payload} bytes, the limit is {limits.max_payload_bytes}",
                self._send_less,
            )

    def _typed(self, header: dict[str, Any], types: Mapping[str, type[Message]]) -> Message:
        name = header.get("type")
        if not isinstance(name, str) or name not in types:  # W5
            shown = str(name)[:SHOWN]
            raise UnknownMessage(
                f"unknown message type `{shown}`{did_you_mean(shown, types)}",
                f"Send a message of {self._spec}",
            )
        cls = types[name]
        self._check_fields(name, header, cls, extra=("type",))  # W6
        for field in self._fields[cls]:
            if isinstance(header.get(field), dict):
                self._check_fields(f"{name}.{field}", header[field], TensorInfo)
        try:
            return msgspec.convert(header, cls)
        except msgspec.ValidationError as error:  # W7
            raise BadField(f"message `{name}`: {error}", f"Correct the field; see {self._spec}") from error

    def _check_fields(
        self, where: str, given: dict[str, Any], cls: type[msgspec.Struct], extra: Sequence[str] = ()
    ) -> None:
        known = (*cls.__struct_fields__, *extra)
        for key in given:
            if key not in known:
                raise UnknownField(
                    f"message `{where}` has no field `{key[:SHOWN]}`{did_you_mean(key[:SHOWN], known)}",
                    "Correct its name, or use the same version at both ends",
                )

    def _declared(self, message: Message) -> dict[str, TensorInfo]:
        """The tensors a message carries, in the order of their frames."""
        infos = {name: getattr(message, name) for name in self._fields[type(message)]}
        return {name: info for name, info in infos.items() if info is not None}


def _unpack(header: bytes, limits: Limits, spec: str) -> dict[str, Any]:
    try:
        value = unpack(
            header, max_items=limits.max_items, max_str_bytes=limits.max_str_bytes, max_bin_bytes=0
        )
    except ValueError as error:  # W4
        raise MalformedHeader(
            f"the header is not one MessagePack map within the limits ({error})",
            f"Encode one map with string keys; see {spec} for the limits",
        ) from error
    if not isinstance(value, dict):
        raise MalformedHeader(
            f"the header is a MessagePack {type(value).__name__}, not a map",
            "Encode one map with string keys",
        )
    return value


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
