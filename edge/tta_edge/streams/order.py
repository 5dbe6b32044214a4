"""In what order images arrive, cut into which batches, and where a method starts afresh."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tta_edge.streams.shifts import Shift
from tta_edge.streams.source import Source

Setting = Literal["online", "continual"]
"""online: reset to the source model before each shift; continual: never reset, one shift follows the
other.
"""

SETTINGS: tuple[Setting, ...] = ("online", "continual")
CHUNK_VALUES = 1 << 22
"""Values read and shifted at once; many batches of small images share the fixed cost of a shift."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Images that arrive together.

    Attributes:
        images: uint8 [batch, height, width, channels].
        indices: [batch], their places in the source.
        first: place in the stream of the first one.
    """

    images: NDArray[np.uint8]
    indices: NDArray[np.intp]
    first: int


def order(count: int, *, limit: int | None = None, shuffle: bool = False, seed: int = 0) -> NDArray[np.intp]:
    """The places in the source, in order of arrival.

    Args:
        count: how many images the source has.
        limit: keep the first so many; None: all.
        shuffle: draw the order (before the limit applies) from the seed instead of the file's.
        seed: the run's seed.

    Returns:
        [min(count, limit)], each place at most once.
    """
    places = np.arange(count)
    if shuffle:
        places = np.random.Generator(np.random.Philox(key=seed)).permutation(count)
    return places[:limit]


def batches(
    source: Source, shift: Shift | None, places: NDArray[np.intp], *, batch: int, seed: int
) -> Iterator[Batch]:
    """The stream of one shift; the last batch may be smaller. The same for any chunking.

    Args:
        source: where the images come from.
        shift: what happens to them; None: nothing.
        places: from `order`.
        batch: images in a batch, at least 1.
        seed: the run's seed.

    Raises:
        StreamError: the shift cannot be made, or an image cannot be read.
    """
    shifted = source.shifted(shift, seed)
    values = batch * source.shape[0] * source.shape[1] * source.shape[2]
    chunk = batch * max(1, CHUNK_VALUES // values)
    for start in range(0, len(places), chunk):
        part = places[start : start + chunk]
        images = shifted(part, start)
        for inner in range(0, len(part), batch):
            stop = inner + batch
            yield Batch(images[inner:stop], part[inner:stop], start + inner)
