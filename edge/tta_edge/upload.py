"""Which samples the edge sends to the cloud, and how many a minute: decisions only, no files and no sockets.

`budgeted` is the default: it keeps to a share of the stream whatever the entropies are. `cema` and `released` are the
published filters with absolute thresholds, `random` and `all` are there to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tta_runtime.errors import BadValue, StateMalformed, did_you_mean
from tta_runtime.numerics import entropy, softmax

Floats = NDArray[np.float64]
Numbers = dict[str, "float | list[float]"]
"""What a filter knows, as it can be saved."""

FOLLOW = 0.1  # weight of the newest in the mean prediction (EATA, ICML 2022, eq. 5)
REDUNDANCY = 0.05  # largest absolute cosine to the mean prediction (CEMA's release)
E_MIN, E_MAX = 0.02, 0.4  # in units of ln C (CEMA's final setting)
WARM_UP = 512  # samples before CEMA's E_max begins to move; the paper and the release leave it open
RECENT = 512  # samples that the budgeted filter's quantiles are of
COUNTED = 128  # samples that tell how many are candidates; few, so that a shift starves nobody for long
USUAL = 0.3  # share of candidates that the budgeted filter expects before it has seen any
USUAL_SAMPLES = 16  # how many samples that expectation is worth at first; nothing once `COUNTED` were seen
OWED = 8.0  # most uploads that are made up for later, or saved
OWED_SHARE = 0.5  # of the share: how far it is moved when as much is owed
NOVEL_HALF = 0.5  # quantile of the cosines below which a sample is among the less redundant ones
_FIX = "Delete the state to start anew"


class Why(str, Enum):
    """Why a sample is sent, or is not; the cloud's intake uses the same words."""

    EVERY = "every"
    """Sent: the filter takes everything."""
    EXPLORE = "explore"
    """Sent: drawn at random, whatever it is."""
    INFORMATIVE = "informative"
    """Sent: its entropy is in the band and its prediction is not what was sent lately."""
    NON_FINITE = "non-finite"
    """Left: its logits hold NaN or Inf."""
    UNINFORMATIVE = "uninformative"
    """Left: its entropy is below the band; the network is certain."""
    UNCERTAIN = "uncertain"
    """Left: its entropy is above the band; the prediction says little."""
    REDUNDANT = "redundant"
    """Left: its prediction is like those sent lately."""
    BUDGET = "budget"
    """Left: it would do, but the share is used up."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What becomes of the samples of a batch.

    Attributes:
        keep: [n], which are sent.
        reasons: n of them.
        entropy: [n], in nats; NaN where the logits are not finite.
    """

    keep: NDArray[np.bool_]
    reasons: tuple[Why, ...]
    entropy: Floats


class UploadFilter(Protocol):
    """Chooses samples of one stream. For one thread at a time; it draws no random numbers itself."""

    def choose(self, logits: NDArray[np.float32], rand: NDArray[np.floating]) -> Choice:
        """Take the samples of a batch in and decide on each.

        Args:
            logits: [n, C]. Rows that are not finite are never sent and leave no trace.
            rand: [n], uniform in [0, 1); the choice is a function of these, the logits and the state.
        """
        ...

    def snapshot(self) -> Numbers:
        """What it knows."""
        ...

    def restore(self, saved: Mapping[str, object]) -> None:
        """Go on from a snapshot.

        Raises:
            StateMalformed: it is none of this filter's for so many classes; nothing has changed.
        """
        ...


class EveryFilter:
    """Sends everything that is finite; with a share, so much of it at random.

    Args:
        classes: C.
        share: of the samples; 1 for all.
    """

    def __init__(self, classes: int, share: float = 1.0) -> None:
        _between("share", share, 0.0, 1.0)
        self._classes = classes
        self._share = share

    def choose(self, logits: NDArray[np.float32], rand: NDArray[np.floating]) -> Choice:
        """See `UploadFilter`."""
        finite, h, _ = _read(logits, rand, self._classes)
        keep = finite & (rand < self._share)
        sent = Why.EVERY if self._share >= 1.0 else Why.EXPLORE
        return _choice(finite, keep, h, lambda i: sent if keep[i] else Why.BUDGET)

    def snapshot(self) -> Numbers:
        """Nothing."""
        return {}

    def restore(self, saved: Mapping[str, object]) -> None:
        """See `UploadFilter`."""
        _keys(saved, set())


class CemaFilter:
    """E_min < H < E_max, then unlike the mean of the predictions sent so far; the rules of CEMA, batch by batch.

    E_max = ``high`` * ln C until ``warm_up`` samples have come; from then on that times ``scale`` times the mean
    entropy of all samples ever seen over what it was at that moment. E_min = ``low`` * ln C. The cosine is EATA's,
    below ``redundancy`` in absolute value to a running mean that moves by a tenth towards each batch's sent samples.

    The mean of all samples hardly moves after a long time, and 0.05 is a cosine for many classes: with ten of them
    hardly any prediction is so far from a mean of several (EATA takes 0.4 there). Both are as published, and why
    `budgeted` is the default.

    Args:
        classes: C.
        low: None: no lower bound.
        high: of E_max.
        scale: the paper's lambda.
        warm_up: samples; None: E_max never moves.
        redundancy: largest cosine; None: redundant samples are sent as well.

    Source: Chen et al., Towards Robust and Efficient Cloud-Edge Elastic Model Adaptation via Selective Entropy
    Distillation, ICLR 2024, eq. 1 to 4; Niu et al., ICML 2022, eq. 5.
    """

    def __init__(
        self,
        classes: int,
        *,
        low: float | None = E_MIN,
        high: float = E_MAX,
        scale: float = 1.0,
        warm_up: int | None = WARM_UP,
        redundancy: float | None = REDUNDANCY,
    ) -> None:
        self._classes = classes
        self._low = -math.inf if low is None else low * math.log(classes)
        self._high = high * math.log(classes)
        self._scale = scale
        self._warm_up = warm_up
        self._redundancy = redundancy
        self._total, self._count, self._warm = 0.0, 0, 0.0
        self._average = np.zeros(0)

    @property
    def e_max(self) -> float:
        """The present upper bound, in nats."""
        if self._warm <= 0.0:
            return self._high
        return self._high * self._scale * (self._total / self._count) / self._warm

    def choose(self, logits: NDArray[np.float32], rand: NDArray[np.floating]) -> Choice:
        """See `UploadFilter`. What one batch is decides the next: other batches give another choice."""
        finite, h, p = _read(logits, rand, self._classes)
        self._total += float(h[finite].sum())
        self._count += int(finite.sum())
        if self._warm_up is not None and self._warm <= 0.0 and self._count >= max(1, self._warm_up):
            self._warm = self._total / self._count
        high = self.e_max
        certain, uncertain = finite & (h <= self._low), finite & (h >= high)
        keep = finite & ~certain & ~uncertain
        if self._redundancy is not None and len(self._average):
            lengths = np.linalg.norm(p, axis=1) * np.linalg.norm(self._average) + 1e-12
            keep &= np.abs(p @ self._average) / lengths < self._redundancy
        if keep.any():
            mean = p[keep].mean(0)
            self._average = mean if not len(self._average) else (1 - FOLLOW) * self._average + FOLLOW * mean

        def why(i: int) -> Why:
            if keep[i]:
                return Why.INFORMATIVE
            return Why.UNINFORMATIVE if certain[i] else Why.UNCERTAIN if uncertain[i] else Why.REDUNDANT

        return _choice(finite, keep, h, why)

    def snapshot(self) -> Numbers:
        """See `UploadFilter`."""
        return {
            "total": self._total,
            "count": float(self._count),
            "warm": self._warm,
            "average": self._average.tolist(),
        }

    def restore(self, saved: Mapping[str, object]) -> None:
        """See `UploadFilter`."""
        _keys(saved, {"total", "count", "warm", "average"})
        total, count, warm = (_vector(saved, key, 1)[0] for key in ("total", "count", "warm"))
        average = _vector(saved, "average", 0, self._classes)
        if min(total, count, warm) < 0 or count != int(count):
            raise StateMalformed(f"total {total}, count {count}, warm {warm}: none may be negative", _FIX)
        self._total, self._count, self._warm, self._average = float(total), int(count), float(warm), average


class BudgetedFilter:
    """Sends a share of the stream whatever its entropies are, a part at random and the rest by choice.

    Absolute thresholds starve when help is needed most: after a shift every entropy is above them (in the accounting of
    CEMA's release 44 % of the images are sent at severity 1 and 29 % at severity 5). Here a sample is a candidate if

    * its entropy lies in the ``band`` of quantiles of the stream's last `RECENT` entropies: those below say what the
      network knows already, those above are mostly wrong or no object at all, and
    * its prediction is less like the mean of what was sent lately than half of the recent ones.

    Candidates are drawn with the probability that fills the share, known from how many of the last `COUNTED` samples
    were candidates; where they are too few, as in the first moments after a shift or on a stream that grows ever more
    uncertain, random ones take their place. What was sent too little or too much of late moves the share a little. So
    about the same share is sent everywhere, and the random part sees what the thresholds do not.

    Quantiles are ranks; equal values are put in a random order, so a stream of equal entropies is served as any other.
    Each sample is decided on by itself, in the same arithmetic whatever stands beside it in the batch: samples one by
    one give the choice of a batch.

    Args:
        classes: C.
        share: of the samples that are sent.
        explore: share of these that are drawn from all.
        band: quantiles of the entropy between which a sample may be a candidate.
    """

    def __init__(
        self,
        classes: int,
        share: float = 0.1,
        *,
        explore: float = 0.4,
        band: tuple[float, float] = (0.2, 0.8),
    ) -> None:
        _between("share", share, 0.0, 1.0)
        _between("explore", explore, 0.0, 1.0)
        if not 0.0 <= band[0] < band[1] <= 1.0:
            raise BadValue(f"band is {band}, expected two quantiles from 0 to 1, the lower one first")
        self._classes = classes
        self._share = share
        self._explore = explore
        self._band = band
        self._entropy, self._cosine, self._candidate = np.zeros((3, 0))
        self._average = np.zeros(0)
        self._owed = 0.0

    def choose(self, logits: NDArray[np.float32], rand: NDArray[np.floating]) -> Choice:
        """See `UploadFilter`."""
        finite, h, p = _read(logits, rand, self._classes)
        kept = np.zeros(len(h), dtype=bool)
        reasons = []
        for i in np.flatnonzero(finite):
            kept[i], why = self._one(float(h[i]), p[i], float(rand[i]))
            self._owed = min(OWED, max(-OWED, self._owed + self._share - kept[i]))
            reasons.append(why)
        told = iter(reasons)
        return _choice(finite, kept, h, lambda _: next(told))

    def snapshot(self) -> Numbers:
        """See `UploadFilter`."""
        return {
            "entropy": self._entropy.tolist(),
            "cosine": self._cosine.tolist(),
            "candidate": self._candidate.tolist(),
            "average": self._average.tolist(),
            "owed": self._owed,
        }

    def restore(self, saved: Mapping[str, object]) -> None:
        """See `UploadFilter`."""
        _keys(saved, {"entropy", "cosine", "candidate", "average", "owed"})
        recent = _vector(saved, "entropy", *range(RECENT + 1))
        cosine = _vector(saved, "cosine", len(recent))
        candidate = _vector(saved, "candidate", min(len(recent), COUNTED))
        average = _vector(saved, "average", 0, self._classes)
        if not np.isin(candidate, (0.0, 1.0)).all():
            raise StateMalformed("candidate holds other values than 0 and 1", _FIX)
        (owed,) = _vector(saved, "owed", 1)
        if abs(owed) > OWED:
            raise StateMalformed(f"owed is {owed}, at most {OWED} either way", _FIX)
        self._entropy, self._cosine, self._candidate, self._average = recent, cosine, candidate, average
        self._owed = float(owed)

    def _one(self, h: float, p: Floats, u: float) -> tuple[bool, Why]:
        for_entropy, for_cosine, for_drawing = _independent(u)
        level = _rank(self._entropy, h, for_entropy)
        cosine = self._like(p)
        redundant = _rank(self._cosine, cosine, for_cosine) > NOVEL_HALF
        inside = self._band[0] <= level <= self._band[1]
        explore, draw = self._chances()
        candidate = inside and not redundant
        self._remember(h, cosine, candidate)
        if u < explore:
            why = Why.EXPLORE
        elif not inside:
            return False, Why.UNINFORMATIVE if level < self._band[0] else Why.UNCERTAIN
        elif redundant:
            return False, Why.REDUNDANT
        elif for_drawing >= draw:
            return False, Why.BUDGET
        else:
            why = Why.INFORMATIVE
        self._average = p if not len(self._average) else (1 - FOLLOW) * self._average + FOLLOW * p
        return True, why

    def _chances(self) -> tuple[float, float]:
        """Of any sample to be explored, and of a candidate that is not explored to be drawn: together the share."""
        seen = len(self._candidate)
        prior = USUAL_SAMPLES * (1.0 - seen / COUNTED)
        likely = (float(self._candidate.sum()) + USUAL * prior) / (seen + prior)
        share = min(1.0, self._share * (1.0 + OWED_SHARE * self._owed / OWED))
        explore = max(self._explore * share, (share - likely) / max(1.0 - likely, 1e-12))
        draw = (share - explore) / max((1.0 - explore) * likely, 1e-12)
        return explore, draw

    def _like(self, p: Floats) -> float:
        if not len(self._average):
            return 0.0
        # Sums over one row at a time: a matrix product may round differently with the size of the batch.
        lengths = math.sqrt(float((p * p).sum()) * float((self._average * self._average).sum()))
        return float((p * self._average).sum()) / (lengths + 1e-12)

    def _remember(self, h: float, cosine: float, candidate: bool) -> None:
        self._entropy = np.append(self._entropy[-RECENT + 1 :], h)
        self._cosine = np.append(self._cosine[-RECENT + 1 :], cosine)
        self._candidate = np.append(self._candidate[-COUNTED + 1 :], float(candidate))


FILTERS: Mapping[str, Callable[[int, float], UploadFilter]] = {
    "budgeted": BudgetedFilter,
    "cema": lambda classes, share: CemaFilter(classes),
    "released": lambda classes, share: CemaFilter(classes, low=None, warm_up=None),
    "random": EveryFilter,
    "all": lambda classes, share: EveryFilter(classes),
}
"""Name of a filter -> makes it for so many classes and a share, which the filters with thresholds do not heed."""


def make_filter(name: str, classes: int, share: float = 0.1) -> UploadFilter:
    """A new filter.

    Raises:
        BadValue: there is none of that name, or the share is not from 0 to 1.
    """
    _between("share", share, 0.0, 1.0)
    if name not in FILTERS:
        raise BadValue(f"there is no upload filter `{name[:64]}`{did_you_mean(name, FILTERS)}", "Correct it")
    return FILTERS[name](classes, share)


# ------------------------------------------------------------------------------------------ how many a minute


@dataclass(frozen=True)
class RateLimit:
    """What may be sent, in the long run and at once.

    Attributes:
        samples_per_min: samples; `math.inf` for any number.
        bytes_per_min: bytes.
        burst_s: what was not used of so many seconds may be sent at once.
    """

    samples_per_min: float = math.inf
    bytes_per_min: float = math.inf
    burst_s: float = 10.0

    def full(self, now_s: float) -> Tokens:
        """The tokens of one who has sent nothing for long."""
        samples, size = (rate * self.burst_s / 60.0 for rate in (self.samples_per_min, self.bytes_per_min))
        return Tokens(max(1.0, samples), max(1.0, size), now_s)


@dataclass(frozen=True)
class Tokens:
    """What may be sent now.

    Attributes:
        samples: whole ones may be sent.
        size: bytes; negative after a sample that is larger than a burst.
        at_s: when that was.
    """

    samples: float
    size: float
    at_s: float


def refilled(limit: RateLimit, tokens: Tokens, now_s: float) -> Tokens:
    """The tokens after some time; a clock that has gone back adds none, and time goes on from there."""
    full = limit.full(now_s)
    elapsed_s = max(0.0, now_s - tokens.at_s)
    if elapsed_s == 0.0:  # infinity times nothing is no number
        return Tokens(tokens.samples, tokens.size, now_s)
    samples = min(full.samples, tokens.samples + limit.samples_per_min * elapsed_s / 60.0)
    size = min(full.size, tokens.size + limit.bytes_per_min * elapsed_s / 60.0)
    return Tokens(samples, size, now_s)


def wait_s(limit: RateLimit, tokens: Tokens, nbytes: int) -> float:
    """How long until a sample may be sent; 0 where it may be now, infinity where the rate is 0.

    Args:
        limit: the rates.
        tokens: of `refilled`.
        nbytes: of the sample. One that is larger than a burst needs a full bucket, and owes the rest.
    """
    full = limit.full(tokens.at_s)
    waits = [0.0]
    for has, needs, rate in (
        (tokens.samples, 1.0, limit.samples_per_min),
        (tokens.size, min(float(nbytes), full.size), limit.bytes_per_min),
    ):
        if has < needs - 1e-9:  # rounding must not leave a wait that no clock can tell from none
            waits.append((needs - has) * 60.0 / rate if rate > 0 else math.inf)
    return max(waits)


def spent(tokens: Tokens, nbytes: int) -> Tokens:
    """The tokens after a sample of so many bytes was sent."""
    return Tokens(tokens.samples - 1.0, tokens.size - nbytes, tokens.at_s)


# ------------------------------------------------------------------------------------------ inside


def _read(
    logits: NDArray[np.float32], rand: NDArray[np.floating], classes: int
) -> tuple[NDArray[np.bool_], Floats, Floats]:
    """Which rows are finite, their entropies [n] and probabilities [n, C].

    One row at a time, so that it is the same arithmetic in every batch.
    """
    if logits.ndim != 2 or logits.shape[1] != classes or rand.shape != (len(logits),):
        raise ValueError(f"logits {logits.shape} and rand {rand.shape}, expected [n, {classes}] and [n]")
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(logits).all(1), dtype=np.bool_)
    h: Floats = np.full(len(logits), np.nan)
    p: Floats = np.zeros(logits.shape)
    for i in np.flatnonzero(finite):
        row = logits[i : i + 1].astype(np.float32)
        h[i], p[i] = entropy(row)[0], softmax(row)[0]
    return finite, h, p


def _choice(
    finite: NDArray[np.bool_], keep: NDArray[np.bool_], h: Floats, why: Callable[[int], Why]
) -> Choice:
    reasons = tuple(why(i) if finite[i] else Why.NON_FINITE for i in range(len(finite)))
    return Choice(keep, reasons, h)


def _rank(recent: Floats, value: float, u: float) -> float:
    """Where a value stands among the recent ones, from 0 to 1; uniform if it is one of them in any order."""
    below, equal = int((recent < value).sum()), int((recent == value).sum())
    return (below + u * (equal + 1)) / (len(recent) + 1)


def _independent(u: float) -> tuple[float, float, float]:
    """Three uniform numbers made from one, by the mixing function of SplitMix64."""
    state, found = int(u * 2.0**53), []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        mixed = state
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> shift)) * factor % 2**64
        found.append((mixed ^ (mixed >> 31)) / 2.0**64)
    return found[0], found[1], found[2]


def _between(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise BadValue(f"{name} is {value}, expected {least} to {most}", f"Correct `{name}`")


def _keys(saved: Mapping[str, object], expected: set[str]) -> None:
    if set(saved) != expected:
        raise StateMalformed(f"the filter's state has {sorted(saved)[:9]}, expected {sorted(expected)}", _FIX)


def _vector(saved: Mapping[str, object], key: str, *lengths: int) -> Floats:
    try:
        vector = np.array(saved[key], dtype=np.float64, ndmin=1)
    except (TypeError, ValueError, OverflowError) as error:
        raise StateMalformed(f"{key} of the filter's state is no list of numbers: {error}", _FIX) from error
    if vector.ndim != 1 or len(vector) not in lengths or not np.isfinite(vector).all():
        raise StateMalformed(f"{key} of the filter's state has shape {vector.shape} or is not finite", _FIX)
    return vector
