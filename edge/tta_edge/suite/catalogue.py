"""The streams of each suite: names and how they are laid out. What each is for stands in docs/suite.md."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from tta_edge.streams.shifts import Shift, common_names
from tta_edge.suite import order as orders
from tta_edge.suite.errors import UnknownStreamName, UnknownSuite
from tta_edge.suite.order import GIVEN, NATURAL, PLAIN, Kind, Labels, Order
from tta_runtime.errors import did_you_mean

BATCH = 64
SEVERITY = 5
CONCENTRATION = 0.1
"""Of the Dirichlet distribution of the label-correlated streams."""
BATCH_SIZES = (1, 4, 16, 64, 200)
NOISE, CONTRAST, FOG = (f"{name}:{SEVERITY}" for name in ("gaussian_noise", "contrast", "fog"))
JPEG = "jpeg_compression:1"
"""Quality 80 on small images: what a camera or a gateway does to pictures on their way."""
POISONED = 10
GRADUAL = ("gaussian_noise", "fog")

Make = Callable[[Labels, np.random.Generator], Order]


@dataclass(frozen=True)
class Scale:
    """How long the streams of a suite are, in samples.

    Attributes:
        images: of the source that are used, a drawn subset.
        online: each of the fifteen corruptions by itself.
        series: each shift of a series.
        single: every other stream under one shift.
        long: the long stream.
        methods: that play by default, as far as the bundle has them.
    """

    images: int
    online: int
    series: int
    single: int
    long: int
    methods: tuple[str, ...]


SCALES: Mapping[str, Scale] = {
    "quick": Scale(1000, 1000, 128, 960, 8000, ("source", "norm", "tent", "rdumb", "auto")),
    "safety": Scale(
        5000, 5000, 1000, 5000, 100_000, ("source", "norm", "tent", "sar", "rdumb", "roid", "auto")
    ),
}
LONG_PLAYERS = ("source", "tent", "auto")
"""Who plays the long stream unless methods are named."""


@dataclass(frozen=True)
class StreamSpec:
    """A named stream.

    Attributes:
        name: `family/variant`, or the family alone.
        domains: the domains it takes images from.
        make: labels by domain and the stream's random numbers -> the order.
        draws: what the random numbers are named after; streams of one name share them.
        players: who plays it by default; None: all.
        needs_float: whether only a model that takes floats can be fed with it.
    """

    name: str
    domains: tuple[str, ...]
    make: Make
    draws: str = ""
    players: tuple[str, ...] | None = None
    needs_float: bool = False

    @property
    def family(self) -> str:
        """The part of the name before the stroke."""
        return self.name.partition("/")[0]

    def lay_out(self, labels: Labels, seed: int) -> Order:
        """The order under a seed.

        Raises:
            TooFewImages: the stream needs more images than there are.
        """
        return self.make(labels, orders.generator(seed, self.draws or self.name))


def scale_of(suite: str) -> Scale:
    """The scale of the suite of that name.

    Raises:
        UnknownSuite: there is none.
    """
    if suite not in SCALES:
        raise UnknownSuite(f"unknown suite `{suite}`" + did_you_mean(suite, SCALES), "Use quick or safety")
    return SCALES[suite]


def limited(scale: Scale, limit: int | None) -> Scale:
    """The scale with no stream longer than so many samples, the series in proportion."""
    if limit is None:
        return scale
    return replace(
        scale,
        images=min(scale.images, limit),
        online=min(scale.online, limit),
        series=max(1, min(scale.series, limit // 4)),
        single=min(scale.single, limit),
        long=min(scale.long, 4 * limit),
    )


def streams(scale: Scale, *, natural: bool = False) -> tuple[StreamSpec, ...]:
    """All streams of a suite but the ready-made ones.

    Args:
        scale: see `scale_of`.
        natural: whether there are images of a naturally shifted domain.
    """
    common = tuple(f"{name}:{SEVERITY}" for name in common_names())
    return (
        StreamSpec("clean", (PLAIN,), _one(PLAIN, scale.single)),
        StreamSpec("jpeg", (JPEG,), _one(JPEG, scale.single)),
        *(
            StreamSpec(f"online/{name}", (name,), _one(name, scale.online), draws="online")
            for name in common
        ),
        StreamSpec("continual", common, _rounds(common, scale.series)),
        StreamSpec("recurring", common, _rounds(common, -(-scale.series // 2), rounds=2)),
        *(_gradual(name, -(-scale.series // 2)) for name in GRADUAL),
        StreamSpec("mixed", common, partial(_mixed, common, scale.single)),
        *(_sorted(name, scale.single) for name in (PLAIN, NOISE, CONTRAST)),
        *(_dirichlet(name, scale.single) for name in (PLAIN, NOISE, CONTRAST)),
        *(
            StreamSpec(f"batch-{size}/{NOISE}", (NOISE,), _one(NOISE, scale.single, batch=size))
            for size in BATCH_SIZES
        ),
        StreamSpec(f"batch-1/{PLAIN}", (PLAIN,), _one(PLAIN, scale.single, batch=1)),
        StreamSpec(f"batch-1/{CONTRAST}", (CONTRAST,), _one(CONTRAST, scale.single, batch=1)),
        StreamSpec("poisoned", (PLAIN,), partial(_poisoned, scale.single)),
        StreamSpec("nan", (NOISE,), partial(_broken, (NOISE,), scale.single, _NAN), needs_float=True),
        StreamSpec("dead-camera", (PLAIN,), partial(_broken, (PLAIN,), scale.single, _DEAD)),
        *(_naturals(scale) if natural else ()),
        StreamSpec(
            "long", (PLAIN, NOISE, FOG, CONTRAST),
            _rounds((PLAIN, NOISE, FOG, CONTRAST), scale.long // 4), players=LONG_PLAYERS,
        ),
    )  # fmt: skip


def chosen(specs: Sequence[StreamSpec], patterns: Sequence[str]) -> tuple[StreamSpec, ...]:
    """The streams that fit one of the patterns, in the suite's order; all without a pattern.

    Args:
        specs: to choose from.
        patterns: names or families, with * and ? as in a shell.

    Raises:
        UnknownStreamName: a pattern fits none.
    """
    names = [name for spec in specs for name in (spec.name, spec.family)]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UnknownStreamName(
                f"no stream is called `{pattern}`" + did_you_mean(pattern, names),
                "Choose from the list in docs/suite.md",
            )
    return tuple(
        spec
        for spec in specs
        if not patterns
        or any(fnmatch.fnmatchcase(name, each) for each in patterns for name in (spec.name, spec.family))
    )


# ------------------------------------------------------------------------------------------ families


def _one(domain: str, samples: int, *, batch: int = BATCH) -> Make:
    return partial(_series_of, (domain,), samples, 1, batch)


def _rounds(domains: tuple[str, ...], samples: int, rounds: int = 1) -> Make:
    return partial(_series_of, domains, samples, rounds, BATCH)


def _series_of(
    domains: tuple[str, ...], samples: int, rounds: int, batch: int, labels: Labels, rng: np.random.Generator
) -> Order:
    """The domains one after the other, again and again, in shuffled order."""
    parts = [(name, orders.drawn(len(labels[name]), samples, rng)) for _ in range(rounds) for name in domains]
    return orders.series(parts, batch=batch)


def _gradual(name: str, samples: int) -> StreamSpec:
    """Severity 1 to 5 and back."""
    domains = tuple(str(Shift(name, severity)) for severity in (1, 2, 3, 4, 5, 4, 3, 2, 1))
    return StreamSpec(f"gradual/{name}", tuple(dict.fromkeys(domains)), _rounds(domains, samples))


def _mixed(domains: tuple[str, ...], samples: int, labels: Labels, rng: np.random.Generator) -> Order:
    index = orders.drawn(len(labels[domains[0]]), samples, rng)
    return orders.mixed(domains, index, batch=BATCH, rng=rng)


def _sorted(domain: str, samples: int) -> StreamSpec:
    def make(labels: Labels, rng: np.random.Generator) -> Order:
        return orders.series([(domain, orders.by_label(labels[domain], samples, rng))], batch=BATCH)

    return StreamSpec(f"sorted/{domain}", (domain,), make)


def _dirichlet(domain: str, samples: int) -> StreamSpec:
    def make(labels: Labels, rng: np.random.Generator) -> Order:
        index = orders.dirichlet(labels[domain], samples, CONCENTRATION, rng)
        return orders.series([(domain, index)], batch=BATCH)

    return StreamSpec(f"dirichlet/{domain}", (domain,), make)


def _poisoned(samples: int, labels: Labels, rng: np.random.Generator) -> Order:
    """A few poisoned samples alone in the first batch, honest clean ones from then on."""
    order = orders.series([(PLAIN, orders.drawn(len(labels[PLAIN]), samples, rng))], batch=BATCH)
    poison = np.full(POISONED, Kind.NOISE, dtype=np.uint8)
    mixed = orders.insert(order, np.zeros(POISONED, dtype=np.intp), poison, batch=BATCH)
    return replace(mixed, sizes=np.concatenate([[POISONED], order.sizes]))


@dataclass(frozen=True)
class _Breaks:
    """Frames that show no scene: single ones scattered, and runs of whole batches.

    Attributes:
        scattered: kind of the single ones.
        share: of the samples before which one is put.
        runs: (kind, place in the stream as a fraction); each run has two batches.
    """

    scattered: Kind
    share: float
    runs: tuple[tuple[Kind, float], ...]


_NAN = _Breaks(Kind.NAN, 0.01, ((Kind.NAN, 0.5),))
_DEAD = _Breaks(Kind.BLACK, 0.02, ((Kind.BLACK, 1 / 3), (Kind.IMAGE, 2 / 3)))


def _broken(
    domains: tuple[str, ...], samples: int, breaks: _Breaks, labels: Labels, rng: np.random.Generator
) -> Order:
    order = _series_of(domains, samples, 1, BATCH, labels, rng)
    scattered = np.flatnonzero(rng.random(samples) < breaks.share)
    places = [scattered, *(np.full(2 * BATCH, round(samples * at)) for _, at in breaks.runs)]
    kinds = [np.full(len(scattered), breaks.scattered)]
    kinds += [np.full(2 * BATCH, kind) for kind, _ in breaks.runs]
    return orders.insert(
        order, np.concatenate(places).astype(np.intp), np.concatenate(kinds).astype(np.uint8), batch=BATCH
    )


def _naturals(scale: Scale) -> tuple[StreamSpec, ...]:
    """Another site: by itself, sorted, correlated, one by one, and coming and going."""
    return (
        StreamSpec(f"online/{NATURAL}", (NATURAL,), _one(NATURAL, scale.online), draws="online-natural"),
        StreamSpec(f"series/{NATURAL}", (PLAIN, NATURAL), _rounds((PLAIN, NATURAL), scale.series, rounds=2)),
        _sorted(NATURAL, scale.single),
        _dirichlet(NATURAL, scale.single),
        StreamSpec(f"batch-1/{NATURAL}", (NATURAL,), _one(NATURAL, scale.single, batch=1)),
    )


def given(name: str, order: Order) -> StreamSpec:
    """A ready-made stream under a name."""
    return StreamSpec(name, (GIVEN,), lambda labels, rng: order)
