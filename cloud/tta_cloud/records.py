"""What the store holds, as values: checked before it is written, and sealed so that a flipped bit is seen when read.

SQLite finds torn pages and broken trees but has no checksum over what is in them. So each row carries a seal over its
own columns, and a row whose seal does not fit is refused with `DamagedRecord` instead of being believed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from tta_cloud.errors import BadRecord, DamagedRecord
from tta_runtime import jpeg
from tta_runtime.jpeg import ImageForm

MAX_TEXT = 1024
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}\Z")]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
SampleKey = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
EdgeKey = Annotated[str, Meta(pattern=r"^[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}\Z")]
"""A CURVE public key in Z85 (ZeroMQ RFC 32)."""
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{0,64}\Z")]
Encoding = Literal["raw", "jpeg"]
DType = Literal["float32", "uint8", "int64"]
PatchState = Literal["built", "refused", "canary", "published", "stopped", "pinned", "rolled-back"]
EdgeState = Literal["pending", "active", "revoked"]
PATCH_STATES: tuple[str, ...] = get_args(PatchState)
EDGE_STATES: tuple[str, ...] = get_args(EdgeState)

T = TypeVar("T", bound=msgspec.Struct)


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One sample as an edge sent it.

    Attributes:
        key: idempotency key, made once by the edge.
        edge: public key of the edge.
        group: of the edge.
        stream: of the edge that it came from.
        taken_ms: when, by the edge's clock; milliseconds since the epoch.
        seq: of the base that answered it.
        entropy: of that answer, in nats.
        encoding: what `x` is: the bytes of the array, little endian and in C order, or a JPEG file.
        dtype: of the array; for a JPEG of the decoded one.
        shape: of the array; for a JPEG of the decoded one.
        x: the bytes.
    """

    key: SampleKey
    edge: EdgeKey
    group: Name
    stream: Name
    taken_ms: Int64
    seq: Count
    entropy: float
    encoding: Encoding
    dtype: DType
    shape: Annotated[tuple[Annotated[int, Meta(ge=1, le=2**31)], ...], Meta(max_length=8)]
    x: Annotated[bytes, Meta(min_length=1)]

    def array(self, form: ImageForm | None = None) -> NDArray[Any]:
        """The array as the model takes it; without a copy and read-only where it is no JPEG.

        Args:
            form: of the model's images; None where it takes none.

        Raises:
            BadRecord: it is a JPEG, and the model takes no images.
            JpegRefused: it is not one that the model's images can be.
            ImagesExtraMissing: Pillow is not installed.
        """
        if self.encoding == "jpeg":
            if form is None:
                raise BadRecord(f"sample {self.key} is a JPEG, the model takes no images", "Delete it")
            return jpeg.decode(self.x, form)
        return np.frombuffer(self.x, np.dtype(self.dtype).newbyteorder("<")).reshape(self.shape)


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """A sample in the store.

    Attributes:
        number: of its arrival; the larger one came later.
        sample: as it was sent.
        received_ms: when, by the cloud's clock; milliseconds since the epoch.
        used: generation of the learner that learnt from it; 0 for none.
    """

    number: Positive
    sample: Sample
    received_ms: Int64
    used: Count


def stacked(rows: Sequence[Stored], form: ImageForm | None) -> NDArray[Any]:
    """[n, ...], the arrays of at least one sample; raises as `Sample.array`."""
    return np.stack([each.sample.array(form) for each in rows])


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A patch in the ledger without what it holds.

    Attributes:
        group: who gets it.
        epoch: of the root of trust.
        seq: its number in the epoch, from 1.
        state: see `ledger.TRANSITIONS`.
        reason: why it is in this state; may be empty.
        created_ms: milliseconds since the epoch.
    """

    group: Name
    epoch: Count
    seq: Positive
    state: PatchState
    reason: Text
    created_ms: Int64


class Patch(msgspec.Struct, frozen=True, kw_only=True):
    """A patch with its bytes, none of which are read here.

    Attributes:
        entry: where it stands in the ledger.
        body: what was signed.
        signatures: over the body, as their writer encoded them.
        payload: theta.
    """

    entry: Entry
    body: bytes
    signatures: bytes
    payload: bytes


class Edge(msgspec.Struct, frozen=True, kw_only=True):
    """An edge that was registered.

    Attributes:
        key: its CURVE public key.
        name: for people.
        group: what it gets and whom its samples teach.
        state: only an active one is served.
        first_seen_ms: when it was registered; milliseconds since the epoch.
        last_seen_ms: when it was heard of last.
        epoch: of the base that it reported last.
        seq: of that base; 0 for none.
        theta_digest: of that base; may be empty.
        progress: what it reported of it (staged, committed, ...); may be empty.
    """

    key: EdgeKey
    name: Name
    group: Name
    state: EdgeState
    first_seen_ms: Int64
    last_seen_ms: Int64
    epoch: Count = 0
    seq: Count = 0
    theta_digest: Digest = ""
    progress: Text = ""


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """A one-time permission to enrol. The token itself is not kept, only its hash.

    Attributes:
        hash: SHA-256 of the token.
        name: of the edge that may enrol.
        group: that it will be in.
        expires_ms: from when on it is refused; milliseconds since the epoch.
        used_by: public key of the edge that has used it; empty if none has.
        used_ms: when.
    """

    hash: Annotated[bytes, Meta(min_length=32, max_length=32)]
    name: Name
    group: Name
    expires_ms: Int64
    used_by: Annotated[str, Meta(max_length=40)] = ""
    used_ms: Int64 = 0


class Learner(msgspec.Struct, frozen=True, kw_only=True):
    """What a learner needs in order to go on after a kill.

    Attributes:
        group: whose it is.
        generation: how many snapshots there were; samples say which one has learnt from them.
        snapshot: bytes that only the learner reads.
        saved_ms: milliseconds since the epoch.
    """

    group: Name
    generation: Positive
    snapshot: bytes
    saved_ms: Int64


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """From where a group started.

    Attributes:
        group: whose.
        parent: the group whose patch it began with; empty: the bundle's own theta.
        epoch: of that patch; 0 for none.
        seq: of that patch; 0 for none.
        distance: of the nearest group's samples, see `nearest.distance`; 0 where there was none to compare with.
        samples: of the group that were looked at.
        reason: why, with the distances of the nearest groups.
        decided_ms: milliseconds since the epoch.
    """

    group: Name
    parent: Annotated[str, Meta(max_length=64)]
    epoch: Count
    seq: Count
    distance: Annotated[float, Meta(ge=0)]
    samples: Count
    reason: Text
    decided_ms: Int64


def checked(record: T) -> T:
    """The same record, after its values were compared with their declared ranges.

    Raises:
        BadRecord: one is out of range, or a sample's bytes do not fit its shape.
    """
    what = type(record).__name__.lower()
    try:
        msgspec.convert(msgspec.to_builtins(record, builtin_types=(bytes,)), type(record))
        msgspec.msgpack.encode(record)  # a lone surrogate is a str that no text can hold
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise BadRecord(f"the {what} cannot be stored: {error}", "Correct the value") from error
    if isinstance(record, Sample):
        _check_sample(record)
    return record


def _check_sample(sample: Sample) -> None:
    if not math.isfinite(sample.entropy):
        raise BadRecord(f"the sample's entropy is {sample.entropy}, expected a finite number")
    expected = math.prod(sample.shape) * np.dtype(sample.dtype).itemsize
    if sample.encoding == "raw" and len(sample.x) != expected:
        raise BadRecord(
            f"the sample has {len(sample.x)} bytes, {sample.dtype} of shape {list(sample.shape)} has {expected}"
        )


def seal(*values: object) -> bytes:
    """16 bytes that say whether a row still holds these values; it detects damage, and does not authenticate."""
    return hashlib.blake2b(msgspec.msgpack.encode(values), digest_size=16).digest()


def restored(kind: type[T], values: Mapping[str, Any], found: object, sealed: Sequence[object]) -> T:
    """A record from the columns of a row.

    Args:
        kind: of the record.
        values: its fields.
        found: the seal in the row.
        sealed: what the seal is over, from the row.

    Raises:
        DamagedRecord: the seal or a type does not fit.
    """
    try:
        if found != seal(*sealed):
            raise DamagedRecord(
                f"a stored {kind.__name__.lower()} does not carry the seal that it was stored with"
            )
        return msgspec.convert(values, kind)
    except (msgspec.ValidationError, UnicodeEncodeError, OverflowError) as error:
        raise DamagedRecord(f"a stored {kind.__name__.lower()} cannot be read: {error}") from error
