"""Randomness of a shift: one independent Philox stream for every image, found again from its index alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Draws:
    """The random numbers of a block of consecutive images under one shift.

    The Philox key comes from (seed, shift, severity), the counter's highest word from the image's index in
    the stream. So image 4,711 is corrupted the same way whether it comes alone, in a block, or in the whole
    stream.

    Args:
        seed: the run's seed.
        name: the shift's name.
        severity: 1 to 5.
        first: index in the stream of the block's first image.
        count: how many images.
    """

    def __init__(self, seed: int, name: str, severity: int, first: int, count: int) -> None:
        digest = hashlib.blake2b(f"{seed}/{name}/{severity}".encode(), digest_size=16).digest()
        key = np.frombuffer(digest, dtype="<u8")
        self._generators = [
            np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, index]))
            for index in range(first, first + count)
        ]

    def __len__(self) -> int:
        return len(self._generators)

    def stack(self, draw: Callable[[np.random.Generator], Any]) -> NDArray[Any]:
        """`draw(generator)` for each image, stacked along a new first axis."""
        return np.stack([draw(generator) for generator in self._generators])

    def uniform(self, low: float, high: float, shape: tuple[int, ...] = ()) -> NDArray[np.float64]:
        """[batch, *shape], uniform in [low, high)."""
        return np.asarray(self.stack(lambda generator: generator.uniform(low, high, shape)))

    def random(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """[batch, *shape] float32, uniform in [0, 1)."""
        return self.stack(lambda generator: generator.random(shape, dtype=np.float32))

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """[batch, *shape] float32, standard normal."""
        return self.stack(lambda generator: generator.standard_normal(shape, dtype=np.float32))
