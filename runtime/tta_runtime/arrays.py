"""Small facts about arrays: finite, read-only, not shared with a writer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def is_finite(array: NDArray[Any]) -> bool:
    """Whether every value is finite; exact.

    The sum of values with NaN or Inf among them is never finite, so a finite sum settles it in one pass
    without a temporary array. A sum may overflow on finite values; only then every value is looked at.
    """
    if array.dtype.kind != "f":
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        if math.isfinite(float(array.sum())):
            return True
    return bool(np.isfinite(array).all())


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    """The same array, read-only from now on; for arrays that nobody else holds."""
    array.flags.writeable = False
    return array


def owned(array: NDArray[Any]) -> NDArray[Any]:
    """A read-only array that nobody else can write to: itself if it is that already, else a copy."""
    if is_fixed(array) and array.flags.c_contiguous:
        return array
    return frozen(np.array(array, order="C"))


def is_fixed(array: object) -> bool:
    """Whether neither the array nor the memory under it can be written to."""
    if isinstance(array, np.ndarray):
        return not array.flags.writeable and (array.base is None or is_fixed(array.base))
    return isinstance(array, bytes)
