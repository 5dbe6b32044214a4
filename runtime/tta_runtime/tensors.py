"""Named arrays as safetensors bytes; nothing is allocated from a length that was not checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import safetensors
from numpy.typing import NDArray

DTYPES: Mapping[str, str] = {"float32": "F32", "uint8": "U8", "int64": "I64"}
"""The dtypes of the bundle format and their names in safetensors."""

MAX_HEADER_BYTES = 1 << 20
"""Limit for the JSON header; the safetensors library itself allows 100 MB."""

MAX_OVERHEAD_BYTES = 8 + MAX_HEADER_BYTES


class TensorsMalformed(ValueError):
    """The bytes are not a safetensors file within the limits. Callers turn it into their own named error."""


class _Header(msgspec.Struct, frozen=True):
    metadata: dict[str, str] = msgspec.field(name="__metadata__", default_factory=dict)


def encode(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Safetensors bytes of named arrays; equal input gives equal bytes.

    Written here, because the library's order of metadata keys differs from call to call. The widest dtypes
    come first and the header is padded with spaces, so that every array is aligned.

    Raises:
        TensorsMalformed: a dtype outside of `DTYPES`.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    parts: list[bytes] = []
    offset = 0
    for name in sorted(tensors, key=lambda n: (-tensors[n].itemsize, n)):
        array = tensors[name]
        if str(array.dtype) not in DTYPES:
            raise TensorsMalformed(f"`{name}` has dtype {array.dtype}, expected one of {sorted(DTYPES)}")
        parts.append(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        end = offset + array.nbytes
        header[name] = {
            "dtype": DTYPES[str(array.dtype)],
            "shape": array.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def decode(data: bytes) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Arrays, each read-only, and metadata from safetensors bytes.

    The library checks the rest of the header: no holes, no overlap, offsets inside the file, shape times
    dtype equal to the length. Its limit for the header is too generous, so the length is checked here
    first.

    Raises:
        TensorsMalformed: anything that is not exactly such a file, or a dtype outside of `DTYPES`.
    """
    if len(data) < 8:
        raise TensorsMalformed(f"{len(data)} bytes are too few for a safetensors header")
    header_bytes = int.from_bytes(data[:8], "little")
    if header_bytes > min(MAX_HEADER_BYTES, len(data) - 8):
        raise TensorsMalformed(
            f"the header claims {header_bytes} bytes, the file has {len(data) - 8} after it and the limit is "
            f"{MAX_HEADER_BYTES}"
        )
    try:
        listed: list[tuple[str, Any]] = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
        header = msgspec.json.decode(data[8 : 8 + header_bytes], type=_Header)
    except (safetensors.SafetensorError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TensorsMalformed(str(error)) from error
    known = {code: np.dtype(name).newbyteorder("<") for name, code in DTYPES.items()}
    arrays: dict[str, NDArray[Any]] = {}
    for name, item in listed:
        if item["dtype"] not in known:
            raise TensorsMalformed(f"`{name}` has dtype {item['dtype']}, expected one of {sorted(known)}")
        array = np.frombuffer(bytes(item["data"]), dtype=known[item["dtype"]])
        if array.size != math.prod(item["shape"]):
            raise TensorsMalformed(f"`{name}` has {array.size} values, its shape is {item['shape']}")
        arrays[name] = array.reshape(item["shape"])
    return arrays, header.metadata
