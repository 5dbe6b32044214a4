"""What images look like, in a few numbers that shifts move and classes hardly do; no engine is needed.

Brightness, contrast, local differences of first and second order, their ratios, and colourfulness. On CIFAR-10 the mean
of a class lies within 1.03 standard deviations of the mean of all in each of them, and most corruptions move one by 2
to 19.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

OFFSET = 1e-3  # in units of the input's range; below it a logarithm would measure rounding
STRONG = 1.1  # standard deviations; more than classes move
CHANCE = 3.0  # standard errors on top
WEAK = 0.5
WEAK_SAMPLES = 64
CHUNK = 16  # fewest samples that are judged together
MEMORY = 2048.0  # samples after which the reference follows, so that slow drift does not add up to a shift
SPREAD_FLOOR = 0.05  # smallest standard deviation of the reference: frames that are alike have none


class Change(Enum):
    """How far images have gone from those before."""

    NONE = "none"
    WEAK = "weak"
    STRONG = "strong"


def sight(x: NDArray[Any], low: float, high: float) -> Floats:
    """The numbers of each sample.

    Args:
        x: [batch, C, H, W], or [batch, ...] of anything else.
        low: smallest value that users send.
        high: largest.

    Returns:
        [batch, 7] for images of at least 3x3 pixels, else [batch, 2].
    """
    unit = (x.astype(np.float32) - low) / (high - low)
    flat = unit.reshape(len(unit), -1)
    mean, spread = flat.mean(1), _log(flat.std(1))
    if x.ndim != 4 or min(x.shape[2:]) < 3:
        return np.column_stack([mean, spread]).astype(np.float64)
    first = _log(np.abs(np.diff(unit, axis=3)).mean((1, 2, 3)))
    second = _log(np.abs(np.diff(unit, 2, axis=3)).mean((1, 2, 3)))
    colour = _log((unit.max(1) - unit.min(1)).mean((1, 2)))
    columns = [mean, spread, first, second, colour, second - first, first - spread]
    return np.column_stack(columns).astype(np.float64)


def _log(value: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(np.log(value + np.float32(OFFSET)), dtype=np.float32)


class Watch:
    """Compares what arrives with what came before."""

    def __init__(self) -> None:
        self._sum, self._square = np.zeros(0), np.zeros(0)
        self._count = 0.0
        self._chunk: list[Floats] = []
        self._slow: list[Floats] = []
        self.effect = 0.0

    def observe(self, seen: Floats) -> Change:
        """Take some samples.

        Args:
            seen: [batch, S], from `sight`.
        """
        self._chunk.append(seen)
        if sum(len(each) for each in self._chunk) < CHUNK:
            return Change.NONE
        chunk = np.concatenate(self._chunk)
        self._chunk = []
        if self._count == 0:
            self._start(chunk)
            return Change.STRONG
        self.effect = self._distance(chunk)
        if self.effect > STRONG + CHANCE / np.sqrt(len(chunk)):
            self._start(chunk)
            return Change.STRONG
        change = Change.NONE
        self._slow.append(chunk)
        if sum(len(each) for each in self._slow) >= WEAK_SAMPLES:
            if self._count >= WEAK_SAMPLES and self._distance(np.concatenate(self._slow)) > WEAK:
                change = Change.WEAK
            self._slow = []
        self._take(chunk)
        return change

    def _start(self, chunk: Floats) -> None:
        self._sum, self._square = np.zeros(chunk.shape[1]), np.zeros(chunk.shape[1])
        self._count = 0.0
        self._slow = []
        self._take(chunk)

    def _take(self, chunk: Floats) -> None:
        keep = min(1.0, MEMORY / (self._count + len(chunk)))
        self._sum = keep * (self._sum + chunk.sum(0))
        self._square = keep * (self._square + (chunk * chunk).sum(0))
        self._count = keep * (self._count + len(chunk))

    def _distance(self, chunk: Floats) -> float:
        mean = self._sum / self._count
        spread = np.sqrt(np.maximum(self._square / self._count - mean * mean, SPREAD_FLOOR**2))
        return float((np.abs(chunk.mean(0) - mean) / spread).max())
