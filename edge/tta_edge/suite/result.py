"""The result of one player on one stream, and its JSON form."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tta_edge.suite.errors import StoreMalformed
from tta_edge.suite.order import Order, Phase
from tta_edge.suite.play import Played

FORMAT_VERSION = 1

Count = Annotated[int, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a result is the result of; nothing else may move it.

    Attributes:
        bundle: digest.
        stream: name.
        player: name.
        seed: of the run.
        fingerprint: of the stream, see `Order.fingerprint`.
    """

    bundle: str
    stream: str
    player: str
    seed: Count
    fingerprint: str


class PhaseForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A phase; `start` counts the counted samples before it."""

    name: str
    start: Count


class Result(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a player made of a stream.

    Attributes:
        key: what this is the result of.
        model: the bundle's model id.
        samples: all samples of the stream.
        counted: those the error is counted on.
        batches: how many.
        phases: where the domain changes.
        wrong: whether each counted sample was answered wrong, in order of arrival, eight to a byte.
        forwards: cost in forward-equivalents of all samples; None where it is not known.
        adapted: batches that changed theta.
        refused: batches of which something was thrown away.
        diversity: see `Played`.
        true_diversity: see `Played`.
        seconds: it took, on whatever machine.
        format_version: of this form.
    """

    key: Key
    model: str
    samples: Count
    counted: Count
    batches: Count
    phases: tuple[PhaseForm, ...]
    wrong: bytes
    forwards: float | None
    adapted: Count
    refused: Count
    diversity: Share
    true_diversity: Share
    seconds: float
    format_version: int = FORMAT_VERSION

    @property
    def wrong_flags(self) -> NDArray[np.bool_]:
        """[counted] bool, in order of arrival."""
        bits = np.unpackbits(np.frombuffer(self.wrong, dtype=np.uint8), count=self.counted)
        return bits.astype(np.bool_)

    @property
    def error(self) -> float:
        """Share of wrong predictions among the counted samples."""
        return float(self.wrong_flags.mean()) if self.counted else 0.0

    @property
    def forwards_per_sample(self) -> float | None:
        """Cost of a sample, those that do not count included."""
        return None if self.forwards is None else self.forwards / self.samples


def result_of(key: Key, model: str, order: Order, played: Played, seconds: float) -> Result:
    """The result of a played stream."""
    counted = np.cumsum(order.counted, dtype=np.int64)
    return Result(
        key=key,
        model=model,
        samples=order.samples,
        counted=len(played.wrong),
        batches=len(order.sizes),
        phases=tuple(_phase(phase, counted) for phase in order.phases),
        wrong=np.packbits(played.wrong).tobytes(),
        forwards=played.forwards,
        adapted=played.adapted,
        refused=played.refused,
        diversity=min(1.0, max(0.0, played.diversity)),
        true_diversity=min(1.0, max(0.0, played.true_diversity)),
        seconds=seconds,
    )


def _phase(phase: Phase, counted: NDArray[np.int64]) -> PhaseForm:
    return PhaseForm(phase.name, int(counted[phase.start - 1]) if phase.start else 0)


def encode(result: Result) -> bytes:
    """JSON."""
    return msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n"


def decode(data: bytes, origin: Any) -> Result:
    """The result that the bytes hold.

    Args:
        data: of a file.
        origin: where they come from, for the error's first words.

    Raises:
        StoreMalformed: not JSON of this form, or its parts contradict each other.
    """
    try:
        result = msgspec.json.decode(data, type=Result)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StoreMalformed(f"{origin} is no result of a suite: {error}", _AGAIN) from error
    if result.format_version != FORMAT_VERSION:
        raise StoreMalformed(
            f"{origin} has the format version {result.format_version}, this version reads {FORMAT_VERSION}",
            _AGAIN,
        )
    if len(result.wrong) != -(-result.counted // 8) or result.counted > result.samples:
        raise StoreMalformed(
            f"{origin} holds {len(result.wrong)} bytes of flags for {result.counted} of {result.samples} samples",
            _AGAIN,
        )
    return result


_AGAIN = "Remove the file; the suite plays the stream again"
