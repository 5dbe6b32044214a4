"""The state file: theta and a method's state of one stream, saved and loaded whole. See docs/spec/state.md.

One safetensors file. Tensors: `theta`, [P] float32, and `state.NAME` for each array of the method's state.
Metadata, all strings: format, format_version, model_id, source (digest of the bundle's source theta),
layout (digest of the layout), method, hyper (JSON), steps, seed, generation (which of two files is the newer
one, see slots.py), notes (of whoever saved it), sha256 (over all other metadata and the tensors).

These functions turn bytes into typed data and back; nothing is written here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from . import tensors, theta
from .errors import (
    LayoutMismatch,
    NewerState,
    NonFiniteTheta,
    OlderState,
    StateMalformed,
    StateMismatch,
    StateMissing,
    StateOfOtherBundle,
    StateTampered,
    StateUnreadable,
)
from .files import read_at_most, reason
from .manifest import Manifest, StateSpec

FORMAT = "tta-state"
FORMAT_VERSION = 2
MAX_NOTES = 512 * 1024
"""Characters of the notes."""
_KEYS = (
    "format", "format_version", "model_id", "source", "layout", "method", "hyper", "steps", "seed",
    "generation", "notes", "sha256",
)  # fmt: skip
_FIX = "Delete the file to start from the source, or restore it from a copy"
_MAX_COUNT = 1 << 63
MAX_GENERATION = _MAX_COUNT - 1


@dataclass(frozen=True, eq=False)
class Saved:
    """What a state file holds."""

    theta: NDArray[np.float32]
    """[P], finite."""
    state: Mapping[str, NDArray[Any]]
    method: str
    hyper: Mapping[str, float]
    """A record of what the state was made with; loading does not apply it."""
    steps: int
    seed: int
    generation: int = 0
    """Grows with every save of the same stream."""
    notes: str = ""
    """What the one who saved wants to find again; at most `MAX_NOTES` characters."""


def max_bytes(manifest: Manifest, specs: list[StateSpec]) -> int:
    """The largest size a state file of this method can have; a larger one need not be read."""
    payload = 4 * manifest.theta.size
    payload += sum(math.prod(s.shape) * np.dtype(s.dtype).itemsize for s in specs)
    return payload + tensors.MAX_OVERHEAD_BYTES


def read(path: Path | str, limit: int) -> bytes:
    """The bytes of a state file.

    Args:
        path: the file.
        limit: in bytes, from `max_bytes`.

    Raises:
        StateMissing: there is no such file.
        StateUnreadable: the operating system refuses.
        StateMalformed: it has more bytes than any state of its method.
    """
    try:
        data = read_at_most(path, limit)
    except FileNotFoundError as error:
        raise StateMissing(
            f"there is no state file {path}", "Check the path, or start from the source"
        ) from error
    except OSError as error:
        raise StateUnreadable(f"{path} cannot be read: {reason(error)}", "Check its permissions") from error
    if len(data) > limit:
        raise StateMalformed(f"{path} has more than {limit} bytes, the most a state of its method has", _FIX)
    return data


def encode(manifest: Manifest, saved: Saved) -> bytes:
    """The bytes of a state file; equal input gives equal bytes."""
    arrays: dict[str, NDArray[Any]] = {"theta": saved.theta}
    arrays |= {f"state.{name}": array for name, array in saved.state.items()}
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "model_id": manifest.model_id,
        "source": manifest.theta.digest,
        "layout": theta.layout_digest(manifest.theta),
        "method": saved.method,
        "hyper": msgspec.json.encode(dict(sorted(saved.hyper.items()))).decode(),
        "steps": str(saved.steps),
        "seed": str(saved.seed),
        "generation": str(saved.generation),
        "notes": saved.notes,
    }
    return tensors.encode(arrays, metadata | {"sha256": checksum(metadata, arrays)})


def decode(data: bytes, manifest: Manifest, method: str) -> Saved:
    """State from bytes, checked against the bundle and the method that shall use it.

    Raises:
        StateMalformed: not a state file, a wrong key or value in its metadata, or values that are not finite.
        NewerState, OlderState: another format version.
        StateTampered: the contents do not match the checksum.
        StateOfOtherBundle: saved with another source theta or layout.
        StateMismatch: saved for another method, or arrays that do not fit this method.
    """
    try:
        arrays, metadata = tensors.decode(data)
    except tensors.TensorsMalformed as error:
        raise StateMalformed(f"not a whole state file: {error}", _FIX) from error
    if metadata.get("format") != FORMAT:
        raise StateMalformed(f"format is `{metadata.get('format', '')[:80]}`, expected `{FORMAT}`", _FIX)
    version = _count(metadata, "format_version")
    if version > FORMAT_VERSION:
        raise NewerState(
            f"the state file has format_version {version}, this tta-runtime reads up to {FORMAT_VERSION}",
            "Upgrade tta-runtime, or delete the file to start from the source",
        )
    if version < FORMAT_VERSION:
        raise OlderState(
            f"the state file has format_version {version}, this tta-runtime reads {FORMAT_VERSION}",
            "Delete the file to start from the source, or go on with the tta-runtime that wrote it",
        )
    if sorted(metadata) != sorted(_KEYS):
        raise StateMalformed(f"metadata has keys {sorted(metadata)[:20]}, expected {sorted(_KEYS)}", _FIX)
    found = checksum({k: v for k, v in metadata.items() if k != "sha256"}, arrays)
    if metadata["sha256"] != found:
        raise StateTampered(
            f"the contents have sha256 {found}, the file says {metadata['sha256'][:80]}", _FIX
        )
    for key, mine in (("source", manifest.theta.digest), ("layout", theta.layout_digest(manifest.theta))):
        if metadata[key] != mine:
            raise StateOfOtherBundle(
                f"state of model `{metadata['model_id'][:80]}` was saved with {key} {metadata[key][:64]}, "
                f"this bundle is `{manifest.model_id}` with {key} {mine}",
                "Load it with its own bundle, or delete the file to start from the source",
            )
    if metadata["method"] != method:
        raise StateMismatch(
            f"the state was saved for method `{metadata['method'][:80]}`, this is `{method}`",
            "Choose that method, or delete the file to start from the source",
        )
    specs = manifest.methods[method].state
    expected = {"theta": ("float32", [manifest.theta.size])}
    expected |= {f"state.{s.name}": (s.dtype, s.shape) for s in specs}
    given = {name: (str(a.dtype), list(a.shape)) for name, a in arrays.items()}
    if given != expected:
        raise StateMismatch(f"the file holds {given}, method `{method}` has {expected}", _FIX)
    state = {s.name: arrays[f"state.{s.name}"] for s in specs}
    for name, array in state.items():
        if not np.isfinite(array).all():
            raise StateMalformed(f"state `{name}` holds values that are not finite", _FIX)
    try:
        vector = theta.check(manifest.theta, arrays["theta"])
    except (LayoutMismatch, NonFiniteTheta) as error:
        raise StateMalformed(error.cause, _FIX) from error
    try:
        hyper = msgspec.json.decode(metadata["hyper"], type=dict[str, float])
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise StateMalformed(f"metadata hyper: {error}", _FIX) from error
    if len(metadata["notes"]) > MAX_NOTES:
        raise StateMalformed(f"the notes have {len(metadata['notes'])} characters, at most {MAX_NOTES}", _FIX)
    steps, seed = _count(metadata, "steps"), _count(metadata, "seed", 1 << 128)
    return Saved(vector, state, method, hyper, steps, seed, _count(metadata, "generation"), metadata["notes"])


def _count(metadata: Mapping[str, str], key: str, end: int = _MAX_COUNT) -> int:
    text = metadata.get(key, "")
    # isascii: int() would also take other scripts' digits, which would not round-trip.
    if not (
        0 < len(text) <= 39
        and text.isascii()
        and text.isdigit()
        and text == str(int(text))
        and int(text) < end
    ):
        raise StateMalformed(f"metadata {key} is `{text[:80]}`, expected a number from 0", _FIX)
    return int(text)


def checksum(metadata: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]) -> str:
    """sha256 over the metadata (sorted JSON) and each tensor's name, dtype, shape and bytes, by name."""
    sha = hashlib.sha256(msgspec.json.encode(dict(sorted(metadata.items()))))
    for name in sorted(arrays):
        array = arrays[name]
        sha.update(msgspec.json.encode([name, str(array.dtype), list(array.shape)]))
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()
