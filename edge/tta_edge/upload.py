"""Which samples are worth sending: filters over the entropies of answers. Pure: a filter is a value, a choice the next.

An absolute threshold on entropy starves exactly when help is needed: under a strong shift nearly all answers are
uncertain. The budgeted filter, the default, therefore looks at a stream's own recent entropies and at a share that an
operator is willing to send; part of it is drawn at random, so that nothing is never sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tta_runtime.numerics import entropy, softmax

Floats = NDArray[np.float64]
MEAN_RATE = 0.1
"""Share of the newest surviving batch in the running mean of probabilities, as published (EATA)."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What to send of a batch.

    Attributes:
        keep: [n], whether each sample is sent.
        reasons: [n], why not: `non-finite`, `uncertain`, `certain`, `redundant`, `budget`; "" where it is sent.
    """

    keep: NDArray[np.bool_]
    reasons: list[str]


class Filter(Protocol):
    """A filter of one stream."""

    def choose(self, logits: NDArray[np.float32], rand: Floats) -> tuple[Choice, Filter]:
        """What to send, and the filter from then on.

        Args:
            logits: [n, C] of the answers, in their order.
            rand: [n], uniform in [0, 1): what is left to chance.
        """


@dataclass(frozen=True, eq=False)
class Cema:
    """The filter of CEMA: neither certain, nor uncertain, nor like what was sent before.

    E_min < H < E_max; E_max = `margin` ln C * `scale` * (mean entropy of all answers now / at the end of the warm-up),
    so the threshold falls as the model adapts. Then EATA's test: the cosine of a sample's probabilities and their
    running mean over what was sent is below `redundancy`.

    The released configuration has no lower threshold and no warm-up, so its upper one never moves: `released()`.

    Attributes:
        minimum: E_min in units of ln C; None: none.
        margin: E_max at the beginning, in units of ln C.
        scale: lambda.
        warm_up: samples; None: the threshold never moves.
        redundancy: largest absolute cosine; None: not tested.
        seen: samples so far.
        total: sum of their entropies.
        reference: mean entropy at the end of the warm-up; 0 before.
        mean: [C], running mean of probabilities; None before anything was sent.

    Source: Chen et al., ICLR 2024, algorithm 1 and eq. 2 to 4.
    """

    minimum: float | None = 0.02
    margin: float = 0.4
    scale: float = 1.0
    warm_up: int | None = 256
    redundancy: float | None = 0.05
    seen: int = 0
    total: float = 0.0
    reference: float = 0.0
    mean: Floats | None = None

    @classmethod
    def released(cls) -> Cema:
        """As the published code is configured."""
        return cls(minimum=None, warm_up=None)

    def choose(self, logits: NDArray[np.float32], rand: Floats) -> tuple[Choice, Cema]:
        """See :class:`Filter`; nothing is left to chance."""
        finite, clean = _clean(logits)
        h, p = entropy(clean).astype(np.float64), softmax(clean.astype(np.float64))
        ln_c = math.log(max(2, logits.shape[1]))
        seen, total = self.seen + int(finite.sum()), self.total + float(h[finite].sum())
        reference = self.reference
        if not reference and self.warm_up is not None and seen >= self.warm_up:
            reference = total / seen
        limit = self.margin * ln_c * (self.scale * total / seen / reference if reference else 1.0)
        reasons = np.where(finite, "", "non-finite").astype(object)
        reasons[finite & (h >= limit)] = "uncertain"
        if self.minimum is not None:
            reasons[finite & (h <= self.minimum * ln_c)] = "certain"
        if self.redundancy is not None and self.mean is not None:
            close = np.abs(_cosines(p, self.mean)) >= self.redundancy
            reasons[(reasons == "") & close] = "redundant"
        keep = np.asarray(reasons == "")
        mean = self.mean
        if keep.any():
            new = p[keep].mean(axis=0)
            mean = new if mean is None else (1 - MEAN_RATE) * mean + MEAN_RATE * new
        after = replace(self, seen=seen, total=total, reference=reference, mean=mean)
        return Choice(keep, reasons.tolist()), after


@dataclass(frozen=True, eq=False)
class Budgeted:
    """About a given share of a stream, whatever its entropies are.

    A sample is drawn at random with probability `share * explore`, or lies within a band of the stream's own recent
    entropies that is as wide as the rest of the share and lies around `centre`: neither what the model is sure of,
    which teaches little, nor what it has no idea of. Decided one by one, so the size of batches does not matter.

    Attributes:
        share: of the stream that is sent.
        explore: part of it that is drawn at random.
        centre: quantile of recent entropies around which the band lies.
        remembered: how many recent entropies are known.
        recent: [m], the newest entropies, oldest first.
    """

    share: float = 0.1
    explore: float = 0.5
    centre: float = 0.5
    remembered: int = 512
    recent: Floats = field(default_factory=lambda: np.zeros(0))

    def choose(self, logits: NDArray[np.float32], rand: Floats) -> tuple[Choice, Budgeted]:
        """See :class:`Filter`."""
        finite, clean = _clean(logits)
        h = entropy(clean).astype(np.float64)
        drawn, width = (
            self.share * self.explore,
            self.share * (1 - self.explore) / (1 - self.share * self.explore),
        )
        low = min(max(0.0, self.centre - width / 2), 1 - width)
        recent, reasons = self.recent, []
        for i in range(len(logits)):
            if not finite[i]:
                reasons.append("non-finite")
                continue
            # Ties are broken by chance: where all entropies are equal, a band is a share of them none the less.
            below, equal = int((recent < h[i]).sum()), int((recent == h[i]).sum())
            spread = rand[i] / drawn % 1.0 if drawn else rand[i]
            place = (below + (equal + 1) * spread) / (len(recent) + 1)
            chosen = rand[i] < drawn or low <= place < low + width
            reasons.append("" if chosen else "budget")
            recent = np.append(recent, h[i])[-self.remembered :]
        keep = np.array([not reason for reason in reasons], dtype=bool)
        return Choice(keep, reasons), replace(self, recent=recent)


@dataclass(frozen=True)
class Random:
    """A share of the stream by chance alone; 1 is all of it."""

    share: float = 1.0

    def choose(self, logits: NDArray[np.float32], rand: Floats) -> tuple[Choice, Random]:
        """See :class:`Filter`."""
        finite, _ = _clean(logits)
        keep = np.asarray(finite & (rand < self.share))
        names = ["" if k else "budget" if f else "non-finite" for k, f in zip(keep, finite, strict=True)]
        return Choice(keep, names), self


FILTERS: Mapping[str, Callable[[float], Filter]] = {
    "budgeted": lambda share: Budgeted(share=share),
    "cema": lambda share: Cema(),
    "released": lambda share: Cema.released(),
    "random": lambda share: Random(share),
    "all": lambda share: Random(1.0),
}
"""By name, given the share of the stream that may be sent; CEMA's two have no use for it."""


@dataclass(frozen=True)
class RateLimit:
    """At most so many samples and bytes a minute, saved up for at most one minute.

    Attributes:
        samples: a minute; 0: no limit.
        size: bytes a minute; 0: no limit.
        samples_left: that may be sent now.
        size_left: bytes likewise.
        at_s: when that was so.
    """

    samples: int = 0
    size: int = 0
    samples_left: float = math.inf
    size_left: float = math.inf
    at_s: float = -math.inf

    def take(self, nbytes: int, now_s: float) -> tuple[bool, RateLimit]:
        """Whether a sample of so many bytes may be sent now, and the limit from then on.

        A clock that is set back gives nothing and takes nothing.
        """
        began = math.isinf(self.at_s)
        passed = 0.0 if began else max(0.0, now_s - self.at_s) / 60
        left, bytes_left = (
            math.inf if not most else float(most) if began else min(most, had + passed * most)
            for most, had in ((self.samples, self.samples_left), (self.size, self.size_left))
        )
        allowed = left >= 1 and bytes_left >= nbytes
        after = (left - 1, bytes_left - nbytes) if allowed else (left, bytes_left)
        return allowed, replace(
            self, samples_left=after[0], size_left=after[1], at_s=now_s if began else max(now_s, self.at_s)
        )


def _clean(logits: NDArray[np.float32]) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    finite = np.asarray(np.isfinite(logits).all(axis=1))
    return finite, np.where(finite[:, None], logits, 0).astype(np.float32)


def _cosines(p: NDArray[np.floating[Any]], mean: Floats) -> Floats:
    return np.asarray(p @ mean / (np.linalg.norm(p, axis=1) * np.linalg.norm(mean) + 1e-12))
