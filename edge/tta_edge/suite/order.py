"""What arrives in a stream, sample by sample, and in which batches. Pure functions of labels and a generator.

A stream is laid out before any image is touched: which image, under which shift, in which batch. Frames that no
scene gave (NaN, black, noise) stand in the order as well, and do not count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from tta_edge.suite.errors import TooFewImages

Places = NDArray[np.intp]
Labels = Mapping[str, NDArray[np.int64]]
"""Domain -> [images], the labels of its images."""

PLAIN = "none"
"""The domain of the images as they are."""
NATURAL = "natural"
"""The domain of images that were not made from the others: another site, another camera."""
GIVEN = "given"
"""The domain of a ready-made stream."""


class Kind(IntEnum):
    """What a frame shows."""

    IMAGE = 0
    NAN = 1
    BLACK = 2
    NOISE = 3
    """Every value black or white by chance, again and again other ones."""


@dataclass(frozen=True)
class Phase:
    """Where a stream begins to come from another domain.

    Attributes:
        name: of the domain, or what else is new.
        start: place of its first sample.
    """

    name: str
    start: int


@dataclass(frozen=True, eq=False)
class Order:
    """A stream before it is rendered.

    Attributes:
        domains: names of the domains that occur.
        domain: [n], place of each sample's domain in `domains`.
        index: [n], which image of that domain.
        kind: [n], see `Kind`; for other kinds than IMAGE domain and index mean nothing.
        counted: [n] bool, whether the error is counted on the sample: honest, real ones only.
        sizes: [batches], samples of each batch; they sum to n.
        phases: where the domain changes, for streams that have such places; the first starts at 0.
    """

    domains: tuple[str, ...]
    domain: NDArray[np.int16]
    index: Places
    kind: NDArray[np.uint8]
    counted: NDArray[np.bool_]
    sizes: Places
    phases: tuple[Phase, ...]

    @property
    def samples(self) -> int:
        """All samples, counted or not."""
        return len(self.index)

    def fingerprint(self, images: str) -> str:
        """A digest of the order and of what it is taken from: equal streams have equal ones.

        Args:
            images: digest of the images.
        """
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((images, self.domains, self.phases)).encode())
        for array in (self.domain, self.index, self.kind, self.counted, self.sizes):
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return digest.hexdigest()


def generator(seed: int, name: str) -> np.random.Generator:
    """The random numbers of one stream: other streams of the same run do not move them."""
    digest = hashlib.blake2b(f"suite/{seed}/{name}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8")))


# ------------------------------------------------------------------------------------------ which image


def drawn(count: int, samples: int, rng: np.random.Generator) -> Places:
    """Images in drawn orders, one whole pass after the other: none comes a second time before all came once.

    Args:
        count: images there are, at least 1.
        samples: how many to draw.
        rng: the stream's.

    Returns:
        [samples].
    """
    passes = [rng.permutation(count) for _ in range(-(-samples // count))]
    return np.concatenate(passes)[:samples] if passes else np.zeros(0, dtype=np.intp)


def by_label(labels: NDArray[np.int64], samples: int, rng: np.random.Generator) -> Places:
    """Some of the images, one class after the other, classes and images in drawn order.

    Args:
        labels: [images].
        samples: how many, at most as many as there are images.
        rng: the stream's.

    Returns:
        [samples], each image at most once.

    Raises:
        TooFewImages: more samples than images.
    """
    places = _subset(labels, samples, rng)
    classes = rng.permutation(np.unique(labels))
    return np.concatenate([places[labels[places] == each] for each in classes])


def dirichlet(
    labels: NDArray[np.int64], samples: int, concentration: float, rng: np.random.Generator
) -> Places:
    """Some of the images, labels correlated in time.

    The stream has as many stretches as there are classes. Each class is divided among the stretches by shares drawn
    from a symmetric Dirichlet distribution, and each stretch is shuffled: the smaller the concentration, the fewer
    classes at a time. (The division of Gong et al., NOTE, NeurIPS 2022, section 4.)

    Args:
        labels: [images].
        samples: how many, at most as many as there are images.
        concentration: of the distribution, above 0.
        rng: the stream's.

    Returns:
        [samples], each image at most once.

    Raises:
        TooFewImages: more samples than images.
    """
    places = _subset(labels, samples, rng)
    classes = np.unique(labels)
    stretches: list[list[Places]] = [[] for _ in classes]
    for each in classes:
        own = places[labels[places] == each]
        shares = rng.dirichlet(np.full(len(classes), concentration))
        cuts = np.round(np.cumsum(shares)[:-1] * len(own)).astype(np.intp)
        for stretch, part in zip(stretches, np.split(own, cuts), strict=True):
            stretch.append(part)
    return np.concatenate([rng.permutation(np.concatenate(parts)) for parts in stretches])


def _subset(labels: NDArray[np.int64], samples: int, rng: np.random.Generator) -> Places:
    if samples > len(labels):
        raise TooFewImages(
            f"a label-correlated stream of {samples} samples needs as many images, there are {len(labels)}",
            "Give more images, or a smaller --limit",
        )
    return rng.permutation(len(labels))[:samples]


# ------------------------------------------------------------------------------------------ laying out


def series(parts: Sequence[tuple[str, Places]], *, batch: int) -> Order:
    """One domain after the other; no batch holds samples of two.

    Args:
        parts: (domain, images of it) in order of arrival.
        batch: samples of a batch, the last of each part excepted.
    """
    domains = tuple(dict.fromkeys(name for name, _ in parts))
    lengths = [len(index) for _, index in parts]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(int)
    return _order(
        domains,
        np.repeat([domains.index(name) for name, _ in parts], lengths),
        np.concatenate([index for _, index in parts]),
        np.concatenate([cut(length, batch) for length in lengths]),
        tuple(Phase(name, int(start)) for (name, _), start in zip(parts, starts, strict=True)),
    )


def mixed(domains: Sequence[str], index: Places, *, batch: int, rng: np.random.Generator) -> Order:
    """Every sample from a domain drawn for it alone, each domain equally often up to one.

    Args:
        domains: to draw from.
        index: [n], the images in order of arrival.
        batch: samples of a batch.
        rng: the stream's.
    """
    turns = np.resize(np.arange(len(domains)), len(index))
    return _order(tuple(domains), rng.permutation(turns), index, cut(len(index), batch), (Phase("mixed", 0),))


def insert(order: Order, places: NDArray[np.intp], kinds: NDArray[np.uint8], *, batch: int) -> Order:
    """The order with frames in between that show no scene and do not count; batches are cut anew.

    Args:
        order: of images.
        places: [k], before which of its samples; may repeat.
        kinds: [k], see `Kind`; IMAGE repeats the sample before, as a frozen camera does.
        batch: samples of a batch.
    """
    ranks = np.argsort(places, kind="stable")
    where, what = places[ranks], kinds[ranks]
    before = np.maximum(where - 1, 0)
    shifted = tuple(
        replace(phase, start=phase.start + int((where <= phase.start).sum()) * (phase.start > 0))
        for phase in order.phases
    )
    kind = np.insert(order.kind, where, what)
    return Order(
        order.domains,
        np.insert(order.domain, where, order.domain[before]),
        np.insert(order.index, where, order.index[before]),
        kind,
        np.insert(order.counted, where, False),
        cut(len(kind), batch),
        shifted,
    )


def cut(samples: int, batch: int) -> Places:
    """Sizes of the batches of a stretch: all `batch`, the last one what is left."""
    whole, rest = divmod(samples, batch)
    return np.array([batch] * whole + [rest] * (rest > 0), dtype=np.intp)


def ready_made(counted: NDArray[np.bool_], *, batch: int) -> Order:
    """The order of a stream that comes as arrays: as it is.

    Args:
        counted: [n], whether each sample counts.
        batch: samples of a batch.
    """
    samples = len(counted)
    order = _order((GIVEN,), np.zeros(samples), np.arange(samples), cut(samples, batch), (Phase(GIVEN, 0),))
    return replace(order, counted=counted)


def _order(
    domains: tuple[str, ...],
    domain: NDArray[np.generic],
    index: Places,
    sizes: Places,
    phases: tuple[Phase, ...],
) -> Order:
    """An order of images that all count."""
    samples = len(index)
    return Order(
        domains,
        domain.astype(np.int16),
        index.astype(np.intp),
        np.zeros(samples, dtype=np.uint8),
        np.ones(samples, dtype=np.bool_),
        sizes,
        phases,
    )
