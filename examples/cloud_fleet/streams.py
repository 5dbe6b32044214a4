"""What each edge sees: its images under its shift, with the labels that judge its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta_edge.streams.errors import InputMismatch
from tta_edge.streams.order import batches, order
from tta_edge.streams.preprocess import Preprocess, preprocess
from tta_edge.streams.shifts import Shift
from tta_edge.streams.source import Source, align_labels
from tta_edge.streams.sources import open_source
from tta_runtime.errors import BadValue
from tta_runtime.manifest import Manifest

CHUNK = 1000


@dataclass(frozen=True, eq=False)
class Feed:
    """One edge's stream.

    Attributes:
        edge: name of the edge.
        shift: for people.
        images: uint8 [n, height, width, channels].
        clean: the same images without the shift; None where there are none.
        labels: [n].
        to_input: from images to what the model takes.
    """

    edge: str
    shift: str
    images: NDArray[np.uint8]
    clean: NDArray[np.uint8] | None
    labels: NDArray[np.int64]
    to_input: Preprocess

    def batch(self, begin: int, size: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Inputs and labels from a place on."""
        return self.to_input(self.images[begin : begin + size]), self.labels[begin : begin + size]


def feeds(
    streams: Sequence[str], shifts: str | None, manifest: Manifest, *, samples: int, in_order: str, seed: int
) -> list[Feed]:
    """One for each edge: of one stream under several shifts, of several under one, or of as many as shifts.

    Args:
        streams: as `tta-edge stream` takes them.
        shifts: as it takes them; None: the images as they are.
        manifest: of the edges' bundle.
        samples: of each edge, at most.
        in_order: `given`, or `sorted` by label.
        seed: of the shifts.

    Raises:
        StreamError: a stream or a shift is not what it should be.
        InputMismatch: a stream has no labels.
        BadValue: neither as many shifts as streams, nor one of either.
    """
    sources = [open_source(text) for text in streams]
    under = sources[0].parse(shifts)
    count = max(len(sources), len(under))
    if {len(sources), len(under)} - {1, count}:
        raise BadValue(
            f"there are {len(sources)} streams and {len(under)} shifts",
            "Give as many shifts as streams, or one of either",
        )
    return [
        _feed(
            f"edge-{place + 1}", sources[place % len(sources)], under[place % len(under)], manifest, samples,
            in_order, seed,
        )
        for place in range(count)
    ]  # fmt: skip


def _feed(
    edge: str, source: Source, shift: Shift | None, manifest: Manifest, samples: int, in_order: str, seed: int
) -> Feed:
    labels = align_labels(source, manifest.classes, manifest.class_names)
    if labels is None:
        raise InputMismatch(
            f"{source.name} has no labels", "Give an npz with x and y: answers are judged by them"
        )
    places = order(source.count, limit=samples)
    if in_order == "sorted":
        places = places[np.argsort(labels[places], kind="stable")]
    spec = manifest.input
    to_input = preprocess(source.shape, dtype=spec.dtype, shape=spec.shape, low=spec.low, high=spec.high)

    def made(wanted: Shift | None) -> NDArray[np.uint8]:
        parts = batches(source, wanted, places, batch=CHUNK, seed=seed)
        return np.concatenate([part.images for part in parts])

    clean = made(None) if shift is not None and not source.given else None
    name = source.name if shift is None else str(shift)
    return Feed(edge, name, made(shift), clean, labels[places], to_input)
