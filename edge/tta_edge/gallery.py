"""A window of recent samples, balanced by predicted class, and the bound on what all windows hold."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(eq=False)
class _Entry:
    """One sample.

    Attributes:
        key: no other sample of the window ever has it.
        x: [...].
        logits: [C], what it was last predicted as.
        source: [C], the frozen source's; None until they are known.
        sight: [S].
        favour: [C], added to what it is predicted as: where labels come in runs, the classes of its time.
    """

    key: int
    x: NDArray[Any]
    logits: NDArray[np.float32]
    source: NDArray[np.float32] | None
    sight: Floats
    favour: NDArray[np.float32]
    predicted: int = field(init=False)
    """The class; kept, because every arrival counts those of the whole window."""

    def __post_init__(self) -> None:
        self.name()

    def name(self) -> None:
        """Name its class."""
        self.predicted = int((self.logits + self.favour).argmax())


@dataclass(frozen=True, eq=False)
class Contents:
    """What a window holds, oldest first.

    Attributes:
        x: [n, ...].
        logits: [n, C], what the samples were last predicted as.
        source: [n, C], the frozen source's; NaN where they are not known.
        sights: [n, S].
        keys: [n].
    """

    x: NDArray[Any]
    logits: NDArray[np.float32]
    source: NDArray[np.float32]
    sights: Floats
    keys: tuple[int, ...]


class Gallery:
    """Up to so many samples with the logits that they were last given.

    A full window takes a sample in by giving up the oldest of the class that has most, or of the sample's own where
    none has more.

    Args:
        capacity: samples.

    Attributes:
        nbytes: of the samples.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._next = 0
        self.clear()

    def clear(self) -> None:
        """Forget all samples."""
        self._entries: list[_Entry] = []
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(
        self,
        x: NDArray[Any],
        logits: NDArray[np.float32],
        sights: Floats,
        *,
        source: bool = False,
        favour: NDArray[np.float32] | None = None,
        at_most: int | None = None,
    ) -> int:
        """Take samples in; what the window holds already is left out.

        Args:
            x: [batch, ...].
            logits: [batch, C].
            sights: [batch, S], from `tta_edge.sight.sight`.
            source: whether the logits are the frozen source's.
            favour: [C], added to the logits of these samples now and later; None: nothing is.
            at_most: samples that there is memory for; None: the capacity.

        Returns:
            How many were taken.
        """
        capacity = self._capacity if at_most is None else min(self._capacity, at_most)
        if self._entries and self._entries[0].x.shape != x.shape[1:]:  # those of one step are alike
            self.clear()
        taken = 0
        known = {entry.sight.tobytes() for entry in self._entries}
        favour = np.zeros(logits.shape[1], dtype=np.float32) if favour is None else favour
        for sample, own, seen in zip(x, logits, sights, strict=True):
            if capacity < 1 or seen.tobytes() in known:
                continue
            known.add(seen.tobytes())
            kept = own.copy()
            entry = _Entry(self._next, np.array(sample), kept, kept if source else None, seen.copy(), favour)
            while len(self) >= capacity:
                self.nbytes -= self._entries.pop(self._crowded(entry.predicted)).x.nbytes
            self._entries.append(entry)
            self._next += 1
            self.nbytes += sample.nbytes
            taken += 1
        return taken

    def contents(self) -> Contents:
        """The samples; there is at least one."""
        unknown = np.full_like(self._entries[0].logits, np.nan)
        return Contents(
            np.stack([entry.x for entry in self._entries]),
            np.stack([entry.logits for entry in self._entries]),
            np.stack([unknown if entry.source is None else entry.source for entry in self._entries]),
            np.stack([entry.sight for entry in self._entries]),
            tuple(entry.key for entry in self._entries),
        )

    def relabel(self, keys: Sequence[int], logits: NDArray[np.float32], source: NDArray[np.float32]) -> None:
        """Replace what samples were predicted as; those that have left are passed over.

        Args:
            keys: [n], as `contents` gave them.
            logits: [n, C].
            source: [n, C], of the frozen source.
        """
        now = dict(zip(keys, zip(logits, source, strict=True), strict=True))
        for entry in self._entries:
            if entry.key in now:
                entry.logits, entry.source = (each.copy() for each in now[entry.key])
                entry.name()

    def _crowded(self, arriving: int) -> int:
        """The place of the sample that leaves."""
        owners = [entry.predicted for entry in self._entries]
        counts = np.bincount([*owners, arriving])
        most = counts.max()
        crowded = {arriving} if counts[arriving] == most else set(np.flatnonzero(counts == most).tolist())
        return next((place for place, owner in enumerate(owners) if owner in crowded), 0)


class Shelf:
    """The windows of all streams of a daemon within a number of bytes. For any thread.

    For a sample beyond it other windows are emptied, first the one that got no sample for the longest.

    Args:
        max_bytes: of all windows together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._galleries: OrderedDict[int, Gallery] = OrderedDict()  # the last one was fed last

    @property
    def nbytes(self) -> int:
        """Of all windows."""
        with self._lock:
            return self._held()

    def add(
        self,
        gallery: Gallery,
        x: NDArray[Any],
        logits: NDArray[np.float32],
        sights: Floats,
        *,
        source: bool,
        favour: NDArray[np.float32] | None = None,
        at_most: int = sys.maxsize,
    ) -> int:
        """`Gallery.add` within the bound."""
        with self._lock:
            self._galleries[id(gallery)] = gallery
            self._galleries.move_to_end(id(gallery))
            room = min(at_most, self._max_bytes // max(1, x[0].nbytes))
            taken = gallery.add(x, logits, sights, source=source, favour=favour, at_most=room)
            while self._held() > self._max_bytes:
                _, other = self._galleries.popitem(last=False)
                other.clear()
            return taken

    def contents(self, gallery: Gallery, least: int) -> Contents | None:
        """`Gallery.contents`; None where the window holds fewer than so many samples."""
        with self._lock:
            return gallery.contents() if len(gallery) >= max(1, least) else None

    def relabel(
        self,
        gallery: Gallery,
        keys: Sequence[int],
        logits: NDArray[np.float32],
        source: NDArray[np.float32],
    ) -> None:
        """`Gallery.relabel`."""
        with self._lock:
            gallery.relabel(keys, logits, source)

    def clear(self, gallery: Gallery) -> None:
        """Empty a window; it counts for nothing until it is fed again."""
        with self._lock:
            gallery.clear()
            self._galleries.pop(id(gallery), None)

    def _held(self) -> int:
        return sum(gallery.nbytes for gallery in self._galleries.values())
