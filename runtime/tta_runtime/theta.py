"""Theta: everything that may change at run time, as one flat float32 vector with a named layout.

Pure functions over `ThetaLayout` and vectors of shape [P] (P = layout.size, float32). The entries are
contiguous and in order, so a named tensor is a view of the vector and one-vector operations (distance,
digest, EMA) need no names.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import LayoutMismatch, NonFiniteTheta
from .manifest import ThetaEntry, ThetaLayout

Vector = NDArray[np.float32]


def make_layout(tensors: Sequence[tuple[str, NDArray[np.float32], str, bool]]) -> tuple[ThetaLayout, Vector]:
    """Layout and vector of named tensors, given as (name, values, kind, trained).

    The trained ones are moved to the front; the order is otherwise kept.

    Returns:
        The layout, digest included, and the flat vector [P].
    """
    ordered = [t for t in tensors if t[3]] + [t for t in tensors if not t[3]]
    entries: list[ThetaEntry] = []
    offset = trained = 0
    for name, values, kind, learned in ordered:
        shape = [int(n) for n in values.shape]
        entries.append(ThetaEntry(name=name, shape=shape, offset=offset, kind=kind, trained=learned))
        offset += math.prod(shape)
        trained = offset if learned else trained
    vector = np.zeros(offset, dtype=np.float32)
    for entry, (_, values, _, _) in zip(entries, ordered, strict=True):
        vector[entry.offset : entry.offset + values.size] = values.ravel()
    layout = ThetaLayout(size=offset, trained=trained, digest="", entries=entries)
    return ThetaLayout(size=offset, trained=trained, digest=digest(layout, vector), entries=entries), vector


def check(layout: ThetaLayout, vector: NDArray[Any]) -> Vector:
    """The vector itself if it is a finite float32 [P].

    Raises:
        LayoutMismatch: another dtype or shape.
        NonFiniteTheta: NaN or Inf; the cause names the first tensor that holds one.
    """
    if vector.dtype != np.float32 or vector.shape != (layout.size,):
        raise LayoutMismatch(
            f"theta is {vector.dtype} {list(vector.shape)}, the layout is float32 [{layout.size}]",
            "Use a vector made for this bundle",
        )
    finite = np.isfinite(vector)
    if not finite.all():
        first = int(np.argmin(finite))
        raise NonFiniteTheta(
            f"theta holds {vector.size - int(finite.sum())} values that are not finite, the first in "
            f"`{name_at(layout, first)}`",
            "Lower the learning rate, or keep the previous theta",
        )
    return vector


def name_at(layout: ThetaLayout, index: int) -> str:
    """Name of the tensor that holds element `index` of the vector."""
    for entry in layout.entries:
        if entry.offset <= index < entry.offset + math.prod(entry.shape):
            return entry.name
    raise IndexError(f"index {index} is outside of theta [{layout.size}]")


def pack(layout: ThetaLayout, tensors: Mapping[str, NDArray[Any]]) -> Vector:
    """Flat vector [P] from named float32 tensors.

    Raises:
        LayoutMismatch: a name is missing or unknown, or a tensor has another shape or dtype.
    """
    names = {entry.name for entry in layout.entries}
    missing, unknown = sorted(names - tensors.keys()), sorted(tensors.keys() - names)
    if missing or unknown:
        raise LayoutMismatch(
            f"tensors do not fit the layout: missing {missing[:5]}, unknown {unknown[:5]}",
            "Use the tensors of this bundle's model",
        )
    vector = np.empty(layout.size, dtype=np.float32)
    for entry in layout.entries:
        value = tensors[entry.name]
        if value.dtype != np.float32 or list(value.shape) != entry.shape:
            raise LayoutMismatch(
                f"`{entry.name}` is {value.dtype} {list(value.shape)}, the layout says float32 {entry.shape}",
                "Use the tensors of this bundle's model",
            )
        vector[entry.offset : entry.offset + value.size] = value.ravel()
    return vector


def unpack(layout: ThetaLayout, vector: Vector) -> dict[str, Vector]:
    """Named tensors as views of the vector [P]: writing to one writes to the vector, if that is writeable."""
    return {
        entry.name: vector[entry.offset : entry.offset + math.prod(entry.shape)].reshape(entry.shape)
        for entry in layout.entries
    }


def digest(layout: ThetaLayout, vector: Vector) -> str:
    """Name of a theta: sha256 (hex) over names, shapes and values in the layout's order.

    For every entry: utf-8 name, NUL, the shape as ascii "d0,d1", NUL, the values as little-endian float32.
    Equal digests mean bit-equal tensors of equal names and shapes.
    """
    sha = hashlib.sha256()
    values = np.ascontiguousarray(vector, dtype="<f4")
    for entry in layout.entries:
        sha.update(entry.name.encode())
        sha.update(b"\0" + ",".join(map(str, entry.shape)).encode("ascii") + b"\0")
        sha.update(values[entry.offset : entry.offset + math.prod(entry.shape)].data)
    return sha.hexdigest()


def layout_digest(layout: ThetaLayout) -> str:
    """sha256 (hex) of the layout alone: names, shapes, offsets, kinds and what is trained."""
    sha = hashlib.sha256(f"{layout.size},{layout.trained}".encode("ascii"))
    for e in layout.entries:
        sha.update(f"\0{e.name}\0{e.shape}\0{e.offset}\0{e.kind}\0{e.trained}".encode())
    return sha.hexdigest()


def distance(a: Vector, b: Vector) -> float:
    """Relative distance ||a - b|| / ||b|| in the Euclidean norm; 0 when equal, inf when only b is zero.

    Computed in float64: a float32 sum of squares over millions of elements loses the last digits.
    """
    difference = a.astype(np.float64) - b
    norm = float(np.linalg.norm(difference))
    if norm == 0.0:
        return 0.0
    base = float(np.linalg.norm(b.astype(np.float64)))
    return norm / base if base > 0.0 else math.inf


@dataclass(frozen=True)
class TensorDiff:
    """How one named tensor differs between two thetas."""

    name: str
    kind: str
    trained: bool
    size: int
    relative: float
    """||a - b|| / ||b||."""
    norm: float
    """||a - b||."""
    max_abs: float


def diff(layout: ThetaLayout, a: Vector, b: Vector) -> list[TensorDiff]:
    """One row for each tensor, in the layout's order: how far `a` is from `b`."""
    rows = []
    for entry in layout.entries:
        part = slice(entry.offset, entry.offset + math.prod(entry.shape))
        gap = np.abs(a[part].astype(np.float64) - b[part])
        rows.append(
            TensorDiff(
                name=entry.name,
                kind=entry.kind,
                trained=entry.trained,
                size=gap.size,
                relative=distance(a[part], b[part]),
                norm=float(np.linalg.norm(gap)),
                max_abs=float(gap.max(initial=0.0)),
            )
        )
    return rows
