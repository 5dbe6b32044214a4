"""Everything that one bundle needs to play the streams of a suite. Made in the main process and in every worker."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tta_edge.streams.errors import InputMismatch
from tta_edge.streams.preprocess import preprocess
from tta_edge.streams.source import Images
from tta_edge.streams.sources import open_source
from tta_edge.suite.catalogue import Scale, StreamSpec, chosen, given, streams
from tta_edge.suite.errors import SuiteOption
from tta_edge.suite.given import Given, read_given
from tta_edge.suite.images import Gallery, pool
from tta_edge.suite.order import GIVEN, Labels, Order
from tta_edge.suite.play import play
from tta_edge.suite.players import Player, make_player
from tta_edge.suite.result import Key, Result, result_of
from tta_runtime.bundle import Bundle
from tta_runtime.engine import EngineOptions


@dataclass(frozen=True)
class Seat:
    """One bundle and its data, as the user named them.

    Attributes:
        bundle: directory.
        source: text of its images, e.g. "npz:FILE".
        natural: text of images of another domain; None where there are none.
        given: files of ready-made streams.
    """

    bundle: str
    source: str
    natural: str | None = None
    given: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setup:
    """What all bundles have in common.

    Attributes:
        scale: how long the streams are.
        seed: of everything drawn.
        images: directory of the shifted images.
        patterns: names of streams to play; empty: all.
        threads: of each engine.
    """

    scale: Scale
    seed: int
    images: str
    patterns: tuple[str, ...] = ()
    threads: int = 1


class Stage:
    """A bundle with its images, streams and players.

    Args:
        seat: which bundle and data.
        setup: what is played.

    Attributes:
        bundle: opened.
        gallery: its images.
        specs: the streams that it plays, in order.

    Raises:
        TtaError: the bundle or the data are refused, or a pattern fits no stream.
    """

    def __init__(self, seat: Seat, setup: Setup) -> None:
        self.seat = seat
        self._setup = setup
        self.bundle = Bundle.open(seat.bundle)
        manifest = self.bundle.manifest
        self.model = manifest.model_id
        source = open_source(seat.source)
        natural = None if seat.natural is None else open_source(seat.natural)
        if natural is not None and natural.shape != source.shape:
            raise InputMismatch(
                f"{natural.name} has images of {_size(natural.shape)}, {source.name} of {_size(source.shape)}",
                "Bring both to the size that the model takes",
            )
        pools = [
            None
            if each is None
            else pool(
                each,
                setup.scale.images,
                setup.seed,
                classes=manifest.classes,
                class_names=manifest.class_names,
            )
            for each in (source, natural)
        ]
        assert pools[0] is not None
        self.gallery = Gallery(pools[0], Path(setup.images), setup.seed, pools[1])
        self._given = self._read_given(seat.given, source.shape)
        spec = manifest.input
        self._to_input = preprocess(
            source.shape, dtype=spec.dtype, shape=spec.shape, low=spec.low, high=spec.high
        )
        ready = tuple(given(name, each.order) for name, each in self._given.items())
        known = (*streams(setup.scale, natural=natural is not None), *ready)
        fitting = tuple(each for each in known if spec.dtype == "float32" or not each.needs_float)
        self.specs = chosen(fitting, setup.patterns)
        self._players: dict[str, Player] = {}

    def _read_given(self, files: Sequence[str], shape: tuple[int, int, int]) -> dict[str, Given]:
        found: dict[str, Given] = {}
        for file in files:
            each = read_given(Path(file), self.bundle.manifest.classes)
            if each.pool.shape != shape:
                raise InputMismatch(
                    f"{file} has images of {_size(each.pool.shape)}, {self.seat.source} of {_size(shape)}",
                    "Make it from the same images",
                )
            if each.name in found:
                raise SuiteOption(f"two files give the stream {each.name}", "Rename one of them")
            found[each.name] = each
        return found

    @property
    def missing_domains(self) -> tuple[str, ...]:
        """Shifted images that must be made before the streams can be played."""
        return self.gallery.missing([name for spec in self.specs for name in spec.domains])

    def spec(self, name: str) -> StreamSpec:
        """The stream of that name."""
        return next(spec for spec in self.specs if spec.name == name)

    def order(self, spec: StreamSpec) -> Order:
        """The stream, laid out.

        Raises:
            TooFewImages: it needs more images than there are.
        """
        return spec.lay_out(self._labels(spec), self._setup.seed)

    def key(self, spec: StreamSpec, player: str) -> Key:
        """What the result of a player on a stream is kept under.

        Raises:
            TooFewImages: as `order`.
        """
        ready = self._given.get(spec.name)
        images = self.gallery.digest if ready is None else ready.pool.digest
        # Two streams of one order may show other frames of noise under another seed or size of image.
        images = hashlib.blake2b(f"{images}/{self._setup.seed}".encode(), digest_size=16).hexdigest()
        return Key(
            bundle=self.bundle.digest,
            stream=spec.name,
            player=player,
            seed=self._setup.seed,
            fingerprint=self.order(spec).fingerprint(images),
        )

    def play(self, name: str, player: str, progress: Callable[[int], None] | None = None) -> Result:
        """Let a player answer a stream.

        Args:
            name: of the stream.
            player: name.
            progress: told of the samples of each batch.

        Raises:
            TtaError: the player cannot be made, or fails.
        """
        spec = self.spec(name)
        order = self.order(spec)
        if player not in self._players:
            self._players[player] = make_player(
                player,
                self.bundle,
                options=EngineOptions(threads=self._setup.threads),
                seed=self._setup.seed,
            )
        began = time.perf_counter()
        played = play(
            order,
            self._images(spec),
            self._labels(spec),
            self._players[player],
            self._to_input,
            classes=self.bundle.manifest.classes,
            seed=self._setup.seed,
            progress=progress,
        )
        seconds = time.perf_counter() - began
        return result_of(self.key(spec, player), self.model, order, played, seconds)

    def _labels(self, spec: StreamSpec) -> Labels:
        if spec.name in self._given:
            return {GIVEN: self._given[spec.name].pool.labels}
        return self.gallery.labels(spec.domains)

    def _images(self, spec: StreamSpec) -> Mapping[str, Images]:
        if spec.name in self._given:
            return {GIVEN: self._given[spec.name].pool.images}
        return {name: self.gallery.images(name) for name in spec.domains}


def _size(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))
