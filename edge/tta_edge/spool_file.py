r"""A file of samples that wait for upload: bytes from typed data and back. Nothing is read or written here.

    TTASPL1\n | u32 records | u32 CRC-32 of these 12 bytes | record | record | ...
    record: u32 header bytes | u32 payload bytes | SHA-256 of all else of the record | header | payload

Numbers are little endian. The header is a MessagePack map, see `_Header`; the payload is the array (C-contiguous,
little endian) or the bytes of a JPEG. The first half of a record's SHA-256 is the sample's idempotency key: it covers
the content, the stream, the record's number, and 16 random bytes drawn at each start of the spool, so equal frames have
different keys, before and after a restart, on this edge and on others.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from tta_edge.errors import SampleRefused, SpoolDamaged
from tta_edge.wire import NAME_PATTERN, DType, TensorInfo

Encoding = Literal["raw", "jpeg"]
MAX_SAMPLE_BYTES = 16 * 1024 * 1024
"""Of one payload; what the link carries."""
MAX_HEADER_BYTES = 4096
MAGIC = b"TTASPL1\n"
NONCE_BYTES = 16
_COUNT = struct.Struct("<II")
_LENGTHS = struct.Struct("<II")
_DIGEST = 32
HEAD_BYTES = len(MAGIC) + _COUNT.size
_FIXED = _LENGTHS.size + _DIGEST
_FIX = "Nothing is to be done: the sample is left out"
_Time = Annotated[int, Meta(ge=0, le=2**63 - 1)]


@dataclass(frozen=True, eq=False)
class Sample:
    """One input that may be uploaded.

    Attributes:
        stream: its name.
        taken_ms: when it was answered, on the wall clock, since the epoch.
        seq: of the base that answered; 0 for the source.
        entropy: of the answer, in nats.
        dtype: of the array, also of that in a JPEG.
        shape: without the batch.
        data: the array's bytes (C-contiguous, little endian), or a JPEG.
        encoding: which of both.
    """

    stream: str
    taken_ms: int
    seq: int
    entropy: float
    dtype: str
    shape: tuple[int, ...]
    data: bytes
    encoding: Encoding = "raw"

    @classmethod
    def of(cls, x: NDArray[Any], *, stream: str, taken_ms: int, seq: int, entropy: float) -> Sample:
        """A sample of an array [...], without a batch dimension."""
        little = np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("<"))
        # ascontiguousarray makes a row of a scalar.
        return cls(stream, taken_ms, seq, entropy, x.dtype.name, x.shape, little.tobytes())

    def array(self) -> NDArray[Any]:
        """The array of a raw sample, read-only; of a JPEG its bytes."""
        if self.encoding == "jpeg":
            return np.frombuffer(self.data, np.uint8)
        return np.frombuffer(self.data, np.dtype(self.dtype).newbyteorder("<")).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Record:
    """A sample as it was found in a file.

    Attributes:
        key: 32 hexadecimal digits; no other sample ever has it.
        number: later samples have larger ones.
        sample: what waits.
        offset: where the record begins in the file.
        length: bytes of the record.
    """

    key: str
    number: int
    sample: Sample
    offset: int
    length: int


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    number: _Time
    nonce: Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    stream: Annotated[str, Meta(pattern=NAME_PATTERN)]
    taken_ms: _Time
    seq: _Time
    entropy: float
    encoding: Encoding
    dtype: DType
    shape: Annotated[tuple[Annotated[int, Meta(ge=0, le=2**31 - 1)], ...], Meta(max_length=8)]


def encode_record(sample: Sample, number: int, nonce: bytes) -> tuple[str, bytes]:
    """Key and bytes of a record.

    Raises:
        SampleRefused: a field is out of range, or shape and bytes disagree.
    """
    header = msgspec.msgpack.encode(
        {
            "number": number,
            "nonce": nonce,
            "stream": sample.stream,
            "taken_ms": sample.taken_ms,
            "seq": sample.seq,
            "entropy": float(sample.entropy),
            "encoding": sample.encoding,
            "dtype": sample.dtype,
            "shape": sample.shape,
        }
    )
    wrong = _wrong(header, sample.data)
    if isinstance(wrong, str):
        raise SampleRefused(f"a sample of stream `{sample.stream[:64]}`: {wrong}", "Correct the caller")
    lengths = _LENGTHS.pack(len(header), len(sample.data))
    digest = _digest(lengths, header, sample.data)
    return _key(digest), b"".join((lengths, digest, header, sample.data))


def decode_record(data: bytes | memoryview, offset: int = 0) -> Record:
    """The record that begins at an offset; there may be more after it.

    Raises:
        SpoolDamaged: it is not what `encode_record` has made.
    """
    view = memoryview(data)
    header_bytes, payload_bytes = _lengths(view, offset)
    start = offset + _FIXED
    header = view[start : start + header_bytes]
    payload = view[start + header_bytes : start + header_bytes + payload_bytes]
    digest = _digest(view[offset : offset + _LENGTHS.size], header, payload)
    if view[offset + _LENGTHS.size : start] != digest:
        raise SpoolDamaged(f"the record at byte {offset} does not match its checksum", _FIX)
    found = _wrong(header, payload)
    if isinstance(found, str):
        raise SpoolDamaged(f"the record at byte {offset}: {found}", _FIX)
    sample = Sample(
        found.stream, found.taken_ms, found.seq, found.entropy, found.dtype, found.shape, bytes(payload),
        found.encoding,
    )  # fmt: skip
    return Record(_key(digest), found.number, sample, offset, _FIXED + header_bytes + payload_bytes)


def encode_file(records: Sequence[bytes]) -> list[bytes]:
    """The parts of a file of records."""
    head = MAGIC + struct.pack("<I", len(records))
    return [head + struct.pack("<I", zlib.crc32(head)), *records]


def decode_file(data: bytes) -> tuple[list[Record], int]:
    """The good records of a file, in their order, and how many are damaged or missing.

    A record whose checksum is wrong is left out, and the next one is looked for where its lengths say; from a damaged
    length on, the rest of the file is lost. Never raises.
    """
    view = memoryview(data)
    head = view[:HEAD_BYTES]
    whole = len(head) == HEAD_BYTES and head[: len(MAGIC)] == MAGIC
    count, check = _COUNT.unpack(head[len(MAGIC) :]) if whole else (0, 0)
    whole = whole and check == zlib.crc32(head[:-4])
    records: list[Record] = []
    bad, offset = 0, HEAD_BYTES
    while offset < len(view):
        try:
            record = decode_record(view, offset)
        except SpoolDamaged:
            bad += 1
            try:
                offset += _FIXED + sum(_lengths(view, offset))
            except SpoolDamaged:
                break
        else:
            records.append(record)
            offset += record.length
    if not whole:
        return records, max(bad, 1)
    return records, max(bad, count - len(records))


def _lengths(view: memoryview, offset: int) -> tuple[int, int]:
    """Bytes of header and payload, both within what there is."""
    if len(view) - offset < _FIXED:
        raise SpoolDamaged(f"{len(view) - offset} bytes at byte {offset} are no record", _FIX)
    header_bytes, payload_bytes = _LENGTHS.unpack_from(view, offset)
    rest = len(view) - offset - _FIXED
    if header_bytes > MAX_HEADER_BYTES or header_bytes + payload_bytes > rest:
        told = f"the record at byte {offset} has {header_bytes} + {payload_bytes} bytes, there are {rest}"
        raise SpoolDamaged(told, _FIX)
    return header_bytes, payload_bytes


def _wrong(header: bytes | memoryview, payload: bytes | memoryview) -> _Header | str:
    """The header, or what is wrong with it or with the payload."""
    try:
        found = msgspec.msgpack.decode(header, type=_Header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return str(error)
    if not math.isfinite(found.entropy) or found.entropy < 0:
        return f"entropy is {found.entropy}, expected a finite number from 0"
    if len(payload) > MAX_SAMPLE_BYTES or not payload:
        return f"it has {len(payload)} bytes, expected 1 to {MAX_SAMPLE_BYTES}"
    nbytes = TensorInfo(found.dtype, found.shape).nbytes
    if found.encoding == "raw" and nbytes != len(payload):
        return f"shape {list(found.shape)} of {found.dtype} takes {nbytes} bytes, it has {len(payload)}"
    if found.encoding == "jpeg" and found.dtype != "uint8":
        return f"a JPEG holds uint8, not {found.dtype}"
    return found


def _digest(*parts: bytes | memoryview) -> bytes:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.digest()


def _key(digest: bytes) -> str:
    return digest[:16].hex()


DTYPES: tuple[str, ...] = get_args(DType)
"""Those a sample may have."""
