"""Messages between an edge and the cloud. The specification is docs/spec/link.md; there is no socket here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from msgspec import Meta

from .errors import BadField
from .sealed import MAX_BODY_BYTES
from .signing import MAX_SIGNATURES
from .wire import (
    NAME_PATTERN,
    Buffer,
    Codec,
    Limits,
    Message,
    Received,
    RequestId,
    TensorInfo,
    Tensors,
    by_tag,
)

PROTOCOL = b"TTC1"
MAX_TENSORS = 2
MAX_SEALED_BYTES = MAX_BODY_BYTES + 1024 * MAX_SIGNATURES
MAX_PAYLOAD_BYTES = 16 << 20
# The longest text, the cause of a refusal, may have four bytes for each of its characters.
LIMITS = Limits(
    max_header_bytes=16 * 1024,
    max_payload_bytes=MAX_PAYLOAD_BYTES + MAX_SEALED_BYTES,
    max_str_bytes=8 * 1024,
)
MAX_ENTROPY = 64.0  # nats; more than ln of any number of classes
MAX_RETRY_S = 3600.0

BUSY, DRAINING, NOT_GREETED, DUPLICATE = "busy", "draining", "not-greeted", "duplicate-request"
"""Codes of refusals that are a matter of the link; what they ask for is in the specification (L9 to L12)."""

Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
Sha = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Key = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
"""Idempotency key of a sample."""
Count = Annotated[int, Meta(ge=0, le=2**53 - 1)]
Text = Annotated[str, Meta(max_length=512)]
Mode = Literal["off", "local", "cloud", "both"]
State = Literal["staged", "committed", "refused", "rolled-back"]
Encoding = Literal["raw", "jpeg"]


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """Who comes: the first message of a connection."""

    id: RequestId
    version: Text
    bundle_digest: Sha
    mode: Mode
    epoch: Count
    """Of the committed base; 0: the bundle's own theta."""
    seq: Count
    theta_digest: Sha


class Sample(Message, frozen=True, kw_only=True, tag="sample"):
    """One sample that the edge's filter chose."""

    id: RequestId
    key: Key
    stream: Name
    taken_ms: Count
    """Milliseconds since 1970, by the edge's clock."""
    epoch: Count
    seq: Count
    """Of the base that answered it."""
    entropy: Annotated[float, Meta(ge=0, le=MAX_ENTROPY)]
    """Of the edge's answer, in nats."""
    encoding: Encoding = "raw"
    x: TensorInfo
    """[...] without a batch dimension; [n] uint8 where it is a JPEG file."""


class Fetch(Message, frozen=True, kw_only=True, tag="fetch"):
    """Ask for the patch that this edge may have now."""

    id: RequestId


class Progress(Message, frozen=True, kw_only=True, tag="progress"):
    """What became of a patch."""

    id: RequestId
    epoch: Count
    seq: Count
    state: State
    reason: Annotated[str, Meta(max_length=64)] = ""
    detail: Text = ""
    theta_digest: Sha
    """Of the committed base."""


class Ping(Message, frozen=True, kw_only=True, tag="ping"):
    """Is the cloud there; also keeps the edge listed as present."""

    id: RequestId


class GetRoot(Message, frozen=True, kw_only=True, tag="get-root"):
    """Ask for one root of the chain."""

    id: RequestId
    version: Annotated[int, Meta(ge=1, le=2**31 - 1)]


class Enroll(Message, frozen=True, kw_only=True, tag="enroll"):
    """Ask to be let in; only at the door for that."""

    id: RequestId
    token: Annotated[str, Meta(min_length=16, max_length=128)]
    name: Name


class Welcome(Message, frozen=True, kw_only=True, tag="welcome"):
    """The answer to `hello`."""

    id: RequestId
    group: Name
    version: Text
    root_version: Count
    max_open: Annotated[int, Meta(ge=1, le=1024)]
    """Samples that may be unanswered at once."""
    silence_s: Annotated[float, Meta(ge=1, le=86_400)] = 60.0
    """An edge that says nothing for so long is forgotten."""


class Accepted(Message, frozen=True, kw_only=True, tag="accepted"):
    """A sample is durable, or is not wanted: either way the edge may forget it."""

    id: RequestId
    key: Key
    stored: bool
    reason: Annotated[str, Meta(max_length=64)] = ""


class PatchMessage(Message, frozen=True, kw_only=True, tag="patch"):
    """A signed patch and its payload; `id` where it was fetched."""

    id: RequestId | None = None
    sealed: TensorInfo
    """[n] uint8, body and signatures."""
    payload: TensorInfo
    """[n] uint8."""


class HeadMessage(Message, frozen=True, kw_only=True, tag="head"):
    """A signed head; nobody asked for it."""

    sealed: TensorInfo


class RootMessage(Message, frozen=True, kw_only=True, tag="root"):
    """A signed root."""

    id: RequestId | None = None
    sealed: TensorInfo


class Noted(Message, frozen=True, kw_only=True, tag="noted"):
    """The answer to `progress`, to `ping`, and to `fetch` where there is nothing for this edge."""

    id: RequestId


class Enrolled(Message, frozen=True, kw_only=True, tag="enrolled"):
    """The answer to `enroll`."""

    id: RequestId
    group: Name
    endpoint: Text
    """Where enrolled edges connect."""
    sealed: TensorInfo
    """The root that the edge begins with."""


class Refusal(Message, frozen=True, kw_only=True, tag="error"):
    """A request that was not carried out."""

    id: RequestId | None = None
    code: Annotated[str, Meta(max_length=64)]
    cause: Annotated[str, Meta(max_length=2048)]
    fix: Text = ""
    retry_after_s: Annotated[float, Meta(ge=0, le=MAX_RETRY_S)] | None = None


FromEdge = Hello | Sample | Fetch | Progress | Ping | GetRoot | Enroll
FromCloud = Welcome | Accepted | PatchMessage | HeadMessage | RootMessage | Noted | Enrolled | Refusal
FROM_EDGE, FROM_CLOUD = by_tag(get_args(FromEdge)), by_tag(get_args(FromCloud))
_CODEC = Codec(
    PROTOCOL, (*FROM_EDGE.values(), *FROM_CLOUD.values()), max_tensors=MAX_TENSORS, spec="docs/spec/link.md"
)


def encode_message(message: Message, tensors: Tensors | None = None) -> list[Buffer]:
    """Frames of a message; see `wire.Codec.encode`."""
    return _CODEC.encode(message, tensors)


def decode_from_edge(frames: Sequence[Buffer], limits: Limits = LIMITS) -> Received[Any]:
    """What an edge sent; raises a WireError (see `wire.Codec.decode`)."""
    return _checked(_CODEC.decode(frames, limits, FROM_EDGE))


def decode_from_cloud(frames: Sequence[Buffer], limits: Limits = LIMITS) -> Received[Any]:
    """What the cloud sent; raises a WireError (see `wire.Codec.decode`)."""
    return _checked(_CODEC.decode(frames, limits, FROM_CLOUD))


def _checked(received: Received[Any]) -> Received[Any]:
    """L4: frames that are files or signed bodies are rows of bytes within their limits."""
    message = received.message
    limits = {"sealed": MAX_SEALED_BYTES, "payload": MAX_PAYLOAD_BYTES}
    if isinstance(message, Sample) and message.encoding == "jpeg":
        limits["x"] = MAX_PAYLOAD_BYTES
    for name, limit in limits.items():
        info = getattr(message, name, None)
        if isinstance(info, TensorInfo) and not (
            info.dtype == "uint8" and len(info.shape) == 1 and info.nbytes <= limit
        ):
            error = BadField(
                f"`{name}` is {info.dtype}{list(info.shape)}, expected at most {limit} bytes as uint8 [n]",
                "Correct the field; see docs/spec/link.md",
            )
            error.request_id = message.id if hasattr(message, "id") else None
            raise error
    return received
