"""The samples of one stream that wait for a background step, bounded; never those of two streams together."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Window:
    """First in, first out; beyond `capacity` the oldest samples are dropped.

    Args:
        capacity: most samples that wait.

    Attributes:
        fresh: samples put in since the last `take`, dropped ones included.
        nbytes: of the waiting samples.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.fresh = 0
        self.nbytes = 0
        self._samples: deque[NDArray[Any]] = deque()

    def __len__(self) -> int:
        return len(self._samples)

    def growth(self, samples: int) -> int:
        """How many more samples would wait after a `put` of so many."""
        return min(self.capacity, len(self) + samples) - len(self)

    def put(self, x: NDArray[Any]) -> int:
        """Add the samples of a batch; they are copied, because a request's arrays are views of its frames.

        Args:
            x: [batch, ...].

        Returns:
            How many samples were dropped to make room.
        """
        self.fresh += len(x)
        kept = x[-self.capacity :]
        dropped = len(x) - len(kept)
        for sample in kept:
            self._samples.append(np.array(sample))
            self.nbytes += sample.nbytes
        while len(self._samples) > self.capacity:
            self.nbytes -= self._samples.popleft().nbytes
            dropped += 1
        return dropped

    def take(self, count: int, *, newest: bool) -> tuple[NDArray[Any], int]:
        """Remove samples for one step.

        Args:
            count: how many; at most `len`.
            newest: the newest ones, and drop those before them; else the oldest ones.

        Returns:
            The samples, [count, ...], and how many others were dropped.
        """
        dropped = len(self._samples) - count if newest else 0
        for _ in range(dropped):
            self.nbytes -= self._samples.popleft().nbytes
        taken = np.stack([self._samples.popleft() for _ in range(count)])
        self.nbytes -= taken.nbytes
        self.fresh = 0
        return taken, dropped

    def clear(self) -> int:
        """Drop everything; returns how many samples that were."""
        dropped = len(self._samples)
        self._samples.clear()
        self.fresh = self.nbytes = 0
        return dropped
