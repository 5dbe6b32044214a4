"""What a batch must be before it reaches an engine. Pure checks, cheap ones first; nothing is converted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import is_finite
from .errors import BadTarget, BadWeight, EmptyBatch, NonFinite, TooLarge, WrongDtype, WrongShape
from .manifest import InputSpec


@dataclass(frozen=True)
class Limits:
    """Bounds for one batch."""

    max_batch: int = 1024
    """Samples."""
    max_bytes: int = 256 << 20


def check_batch(spec: InputSpec, limits: Limits, x: NDArray[Any]) -> NDArray[Any]:
    """The batch as a C-contiguous array, if it is one that the model takes.

    A value outside of the spec's low..high is not an error: real sensors clip and noise overshoots.

    Args:
        spec: the manifest's input.
        limits: bounds for one batch.
        x: [batch, ...] of exactly the spec's dtype and shape.

    Raises:
        InputError: WrongDtype, WrongShape, EmptyBatch, TooLarge or NonFinite.
    """
    try:
        x = np.asarray(x)
    except ValueError as error:  # a ragged list
        raise WrongShape(f"x is not an array: {error}", f"Give an array of shape {spec.shape}") from error
    if str(x.dtype) != spec.dtype:
        raise WrongDtype(
            f"x is {x.dtype}, the model takes {spec.dtype}",
            f"Use x.astype(np.{spec.dtype}) with values from {spec.low:g} to {spec.high:g}",
        )
    if not _fits(spec.shape, x.shape):
        single = x.ndim == len(spec.shape) - 1
        raise WrongShape(
            f"x has shape {list(x.shape)}, the model takes {spec.shape}",
            "Add the batch dimension: x[None]"
            if single
            else "Check the order and the size of the dimensions",
        )
    if x.size == 0:
        raise EmptyBatch(f"x has shape {list(x.shape)}, it holds no sample", "Send at least one sample")
    if len(x) > limits.max_batch:
        raise TooLarge(f"x has {len(x)} samples, the limit is {limits.max_batch}", "Send smaller batches")
    if x.nbytes > limits.max_bytes:
        raise TooLarge(f"x has {x.nbytes} bytes, the limit is {limits.max_bytes}", "Send smaller batches")
    if not is_finite(x):
        bad = int(np.argmin(np.isfinite(x).reshape(len(x), -1).all(axis=1)))
        raise NonFinite(f"x holds NaN or Inf, first in sample {bad}", "Drop or repair that sample")
    return np.ascontiguousarray(x)


def check_weight(weight: NDArray[np.float32] | None, batch: int) -> NDArray[np.float32]:
    """The weights of a batch's samples, all 1 if none are given.

    Args:
        weight: [batch] float32, finite, >= 0; 0 refuses a sample.
        batch: the number of samples.

    Raises:
        BadWeight: anything else.
    """
    if weight is None:
        return np.ones(batch, dtype=np.float32)
    if not isinstance(weight, np.ndarray) or weight.dtype != np.float32 or weight.shape != (batch,):
        kind = (
            f"{weight.dtype} {list(weight.shape)}"
            if isinstance(weight, np.ndarray)
            else type(weight).__name__
        )
        raise BadWeight(f"weight is {kind}, expected float32 [{batch}]", "Give one weight for each sample")
    if not (is_finite(weight) and (weight >= 0).all()):
        raise BadWeight("weight holds a negative value, NaN or Inf", "Use 0 to refuse a sample, 1 to take it")
    return np.ascontiguousarray(weight)


def check_target(target: NDArray[np.float32], batch: int, classes: int) -> NDArray[np.float32]:
    """The teacher's logits for a batch as a C-contiguous array.

    Args:
        target: [batch, classes] float32, finite.
        batch: the number of samples.
        classes: the number of classes.

    Raises:
        BadTarget: anything else.
    """
    shape = (batch, classes)
    if not isinstance(target, np.ndarray) or target.dtype != np.float32 or target.shape != shape:
        kind = (
            f"{target.dtype} {list(target.shape)}"
            if isinstance(target, np.ndarray)
            else type(target).__name__
        )
        raise BadTarget(
            f"target is {kind}, expected float32 {list(shape)}", "Give a teacher's logits for each sample"
        )
    if not is_finite(target):
        bad = int(np.argmin(np.isfinite(target).all(axis=1)))
        raise BadTarget(
            f"target holds NaN or Inf, first in sample {bad}", "Leave that sample out, or repair the teacher"
        )
    return np.ascontiguousarray(target)


def _fits(want: list[int | str], got: tuple[int, ...]) -> bool:
    """The batch dimension and named dimensions are free, the others fixed."""
    return len(want) == len(got) and all(
        isinstance(n, str) or n == m for n, m in zip(want[1:], got[1:], strict=True)
    )
