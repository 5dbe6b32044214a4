"""The images of a suite under each shift, made once and kept as files that all workers map.

Image i under a shift is the same wherever it occurs: its noise is drawn from the seed, the shift and i. So every method
sees the same pixels, and a stream costs little more than its predictions.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta_edge.streams.errors import LabelsMissing
from tta_edge.streams.preprocess import Preprocess
from tta_edge.streams.shifts import parse_shift, prepare
from tta_edge.streams.source import Images, Source, align_labels
from tta_edge.suite.errors import StoreMalformed, StoreUnwritable
from tta_edge.suite.order import GIVEN, NATURAL, PLAIN, Kind, Labels, Order, generator
from tta_runtime.atomic import write_atomic

MAX_SHOWN = 4096
"""Samples rendered at once."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Labelled images of one size.

    Attributes:
        images: uint8 [n, height, width, channels].
        labels: int64 [n], as the model counts its classes.
        digest: of both.
    """

    images: Images
    labels: NDArray[np.int64]
    digest: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels


def pool(
    source: Source, count: int, seed: int, *, classes: int, class_names: Sequence[str] | None = None
) -> Pool:
    """A drawn subset of a source, in memory; all of it where it has no more images.

    Args:
        source: labelled images.
        count: how many at most.
        seed: of the run.
        classes: how many the model has.
        class_names: the model's, or None.

    Raises:
        LabelsMissing: the source has no labels.
        InputMismatch: the labels are not the model's.
        StreamError: an image cannot be read.
    """
    labels = align_labels(source, classes, class_names)
    if labels is None:
        raise LabelsMissing(f"{source.name} has no labels, so there is no error to measure", "Give labels")
    places = np.sort(generator(seed, "images").permutation(source.count)[:count])
    return make_pool(source.shifted(None, seed)(places, 0), labels[places])


def make_pool(images: Images, labels: NDArray[np.int64]) -> Pool:
    """A pool of arrays.

    Args:
        images: uint8 [n, height, width, channels].
        labels: int64 [n].
    """
    digest = hashlib.blake2b(repr(images.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(images).data)
    digest.update(np.ascontiguousarray(labels).data)
    return Pool(images, labels, digest.hexdigest())


class Gallery:
    """A pool, its shifted versions on disk, and what else streams of a model are made of.

    Args:
        plain: the images as they are.
        directory: where the shifted ones are kept; made when needed.
        seed: of the shifts.
        natural: images of another domain, of the same size; None where there are none.
    """

    def __init__(self, plain: Pool, directory: Path, seed: int, natural: Pool | None = None) -> None:
        self.plain = plain
        self.natural = natural
        self._directory = directory
        self._seed = seed
        self._mapped: dict[str, Images] = {}

    @property
    def digest(self) -> str:
        """Of everything that decides what a stream of images shows."""
        other = "" if self.natural is None else self.natural.digest
        return hashlib.blake2b(
            f"{self.plain.digest}/{other}/{self._seed}".encode(), digest_size=16
        ).hexdigest()

    def labels(self, domains: Sequence[str]) -> Labels:
        """Domain -> the labels of its images."""
        return {name: self._pool(name).labels for name in domains}

    def path(self, domain: str) -> Path:
        """The file of a shifted domain."""
        name = f"{self.plain.digest[:16]}-{self._seed}-{domain.replace(':', '-')}.npy"
        return self._directory / name

    def missing(self, domains: Sequence[str]) -> tuple[str, ...]:
        """The domains that `make` must be called for, each once."""
        ready = (PLAIN, NATURAL, GIVEN)
        return tuple(
            name for name in dict.fromkeys(domains) if name not in ready and not self.path(name).is_file()
        )

    def make(self, domain: str) -> None:
        """Shift all images and write the file.

        Raises:
            StreamError: the shift cannot be made of such images.
            StoreUnwritable: the file cannot be written.
        """
        corruption = prepare(parse_shift(domain), self.plain.shape, self._seed)
        buffer = io.BytesIO()
        np.save(buffer, corruption(self.plain.images), allow_pickle=False)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path(domain), buffer.getvalue())
        except OSError as error:
            raise StoreUnwritable(
                f"cannot write {self.path(domain)}: {error.strerror}", "Name another --store"
            ) from error

    def images(self, domain: str) -> Images:
        """All images of a domain; a shifted one must have been made.

        Returns:
            uint8 [n, height, width, channels].

        Raises:
            StoreMalformed: the file of a shifted domain is damaged.
        """
        if domain in (PLAIN, NATURAL):
            return self._pool(domain).images
        if domain not in self._mapped:
            self._mapped[domain] = self._map(domain)
        return self._mapped[domain]

    def _pool(self, domain: str) -> Pool:
        if domain != NATURAL:
            return self.plain
        assert self.natural is not None  # a stream of it is only in the catalogue where it is there
        return self.natural

    def _map(self, domain: str) -> Images:
        path = self.path(domain)
        try:
            array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise StoreMalformed(f"{path} is not a readable npy file: {error}", "Remove it") from error
        if array.dtype != np.uint8 or array.shape != self.plain.images.shape:
            raise StoreMalformed(
                f"{path} holds {array.dtype} {list(array.shape)}, expected uint8 {list(self.plain.images.shape)}",
                "Remove it",
            )
        return array


def render(
    order: Order, images: Mapping[str, Images], start: int, stop: int, to_input: Preprocess, seed: int
) -> NDArray[Any]:
    """What a model gets for a stretch of a stream.

    Args:
        order: the stream.
        images: domain -> uint8 [images, height, width, channels].
        start: first sample.
        stop: behind the last one.
        to_input: from images to the model's input.
        seed: of frames of noise.

    Returns:
        [stop - start, ...] as the model takes it. NaN frames are NaN all over, which only floats can hold.
    """
    part = slice(start, stop)
    kind, domain, index = order.kind[part], order.domain[part], order.index[part]
    shape = images[order.domains[0]].shape[1:]
    pixels = np.zeros((len(kind), *shape), dtype=np.uint8)
    for place, name in enumerate(order.domains):
        own = (domain == place) & (kind == Kind.IMAGE)
        if own.any():
            pixels[own] = images[name][index[own]]
    for at in np.flatnonzero(kind == Kind.NOISE):
        rng = generator(seed, f"noise/{start + at}")
        pixels[at] = 255 * rng.integers(0, 2, shape, dtype=np.uint8)
    x = to_input(pixels)
    if (kind == Kind.NAN).any():
        x[kind == Kind.NAN] = np.nan
    return x


def truth(order: Order, labels: Labels) -> NDArray[np.int64]:
    """The label of each sample of a stream; of frames without a scene it means nothing.

    Args:
        order: the stream.
        labels: domain -> labels of its images.

    Returns:
        [n].
    """
    result = np.zeros(order.samples, dtype=np.int64)
    for place, name in enumerate(order.domains):
        own = order.domain == place
        result[own] = labels[name][order.index[own]]
    return result
