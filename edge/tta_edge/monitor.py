"""Collapse: predictions that fall into one class or few, whatever is in the images.

The entropy of the running mean prediction, as a fraction of ln C, is near 1 where classes come evenly and near 0
where everything is called the same. It is low on an honest stream of one class as well, so a low value is only a
suspicion. Then the frozen source answers beside the stream for a while: if its mean prediction on the same samples
is clearly more diverse, adapting has collapsed.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta_runtime.numerics import entropy, softmax

HORIZON = 512.0  # samples after which an observation counts for 1/e
MIN_SAMPLES = 256  # before that a running mean says little
PROBE_SAMPLES = 128  # compared with the frozen source before a verdict
QUIET_SAMPLES = 2048  # after a suspicion that proved wrong
MARGIN = 0.2  # of ln C, by which the source must be more diverse


def diversity(mean: NDArray[np.float64]) -> float:
    """Entropy of a distribution as a fraction of ln C.

    Args:
        mean: [C], non-negative; it is normalised here.

    Returns:
        From 0 (one class) to 1 (all alike).
    """
    p = mean / mean.sum()
    p = p[p > 0]
    return float(-(p * np.log(p)).sum() / math.log(len(mean))) if len(mean) > 1 else 1.0


@dataclass
class Running:
    """An exponential mean over samples, right from the first one.

    Attributes:
        total: weighted sum.
        weight: sum of the weights, which approaches 1.
    """

    total: NDArray[np.float64]
    weight: float = 0.0

    def add(self, value: NDArray[np.float64] | float, samples: int) -> None:
        """Take the mean of so many further samples."""
        keep = math.exp(-samples / HORIZON)
        self.total = keep * self.total + (1 - keep) * value
        self.weight = keep * self.weight + (1 - keep)

    @property
    def mean(self) -> NDArray[np.float64] | None:
        """The running mean; None before the first sample."""
        return self.total / self.weight if self.weight else None


@dataclass
class _Probe:
    """Sums of the predictions of stream and source on the same samples."""

    adapted: NDArray[np.float64]
    source: NDArray[np.float64]
    samples: int = 0


@dataclass
class Monitor:
    """What one stream's predictions look like, and whether they have collapsed.

    Attributes:
        classes: C.
        min_diversity: below it collapse is suspected; 0 turns the detector off.
        observed: samples since the last `clear`.
    """

    classes: int
    min_diversity: float
    observed: int = 0
    _mean: Running = field(init=False)
    _entropy: Running = field(init=False)
    _agreement: Running = field(init=False)
    _quiet_until: int = 0
    _probe: _Probe | None = None

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything, as after a reset or a rollback."""
        self.observed = self._quiet_until = 0
        self._probe = None
        self._mean = Running(np.zeros(self.classes))
        self._entropy, self._agreement = Running(np.zeros(())), Running(np.zeros(()))

    @property
    def entropy(self) -> float | None:
        """Running mean entropy of the predictions, in nats."""
        return _number(self._entropy.mean)

    @property
    def agreement(self) -> float | None:
        """Running share of compared samples where stream and source give the same class."""
        return _number(self._agreement.mean)

    @property
    def diversity(self) -> float | None:
        """Entropy of the running mean prediction as a fraction of ln C."""
        return None if self._mean.mean is None else diversity(self._mean.mean)

    @property
    def suspicious(self) -> bool:
        """Whether the frozen source's answers are wanted beside the stream's."""
        return self._probe is not None

    def observe(
        self, logits: NDArray[np.float32], source_logits: NDArray[np.float32] | None = None
    ) -> str | None:
        """Take one batch of answers.

        Args:
            logits: [batch, C], finite.
            source_logits: the frozen source's on the same samples, where they are known.

        Returns:
            The values behind a collapse, in words; None while there is none.
        """
        samples = len(logits)
        mean = softmax(logits.astype(np.float64)).mean(axis=0)
        self.observed += samples
        self._mean.add(mean, samples)
        self._entropy.add(float(entropy(logits).mean()), samples)
        if source_logits is not None:
            same = float((logits.argmax(axis=1) == source_logits.argmax(axis=1)).mean())
            self._agreement.add(same, samples)
            if self._probe is not None:
                return self._compare(self._probe, mean, source_logits)
        elif self._probe is None and self._suspect():
            self._probe = _Probe(np.zeros(self.classes), np.zeros(self.classes))
        return None

    def _suspect(self) -> bool:
        if self.min_diversity == 0 or self.observed < max(MIN_SAMPLES, self._quiet_until):
            return False
        now = self.diversity
        return now is not None and now < self.min_diversity

    def _compare(
        self, probe: _Probe, mean: NDArray[np.float64], source_logits: NDArray[np.float32]
    ) -> str | None:
        samples = len(source_logits)
        probe.adapted += samples * mean
        probe.source += softmax(source_logits.astype(np.float64)).sum(axis=0)
        probe.samples += samples
        if probe.samples < PROBE_SAMPLES:
            return None
        self._probe = None
        self._quiet_until = self.observed + QUIET_SAMPLES
        adapted, source = diversity(probe.adapted), diversity(probe.source)
        if adapted < self.min_diversity and source > adapted + MARGIN:
            return (
                f"diversity of {probe.samples} predictions is {adapted:.3f}, the frozen source's {source:.3f}; "
                f"min_diversity is {self.min_diversity:g}"
            )
        return None

    # ------------------------------------------------------------------------------------- to disk and back

    def notes(self) -> dict[str, Any]:
        """Everything as JSON values, exact to the last bit."""
        probe = self._probe
        return {
            "observed": self.observed,
            "quiet_until": self._quiet_until,
            "mean": [_packed(self._mean.total), self._mean.weight],
            "entropy": [float(self._entropy.total), self._entropy.weight],
            "agreement": [float(self._agreement.total), self._agreement.weight],
            "probe": None
            if probe is None
            else [_packed(probe.adapted), _packed(probe.source), probe.samples],
        }

    def take_notes(self, notes: dict[str, Any]) -> None:
        """Go on where `notes` was called.

        Raises:
            ValueError, KeyError, TypeError: they are not the notes of such a monitor; then `clear` it.
        """
        self.observed, self._quiet_until = int(notes["observed"]), int(notes["quiet_until"])
        total, weight = notes["mean"]
        self._mean = Running(_unpacked(total, self.classes), float(weight))
        self._entropy, self._agreement = (
            Running(np.array(float(notes[name][0])), float(notes[name][1]))
            for name in ("entropy", "agreement")
        )
        probe = notes["probe"]
        self._probe = None
        if probe is not None:
            adapted, source = (_unpacked(text, self.classes) for text in probe[:2])
            self._probe = _Probe(adapted, source, int(probe[2]))


def _number(value: NDArray[np.float64] | None) -> float | None:
    return None if value is None else float(value)


def _packed(array: NDArray[np.float64]) -> str:
    return base64.b64encode(array.astype("<f8").tobytes()).decode()


def _unpacked(text: str, size: int) -> NDArray[np.float64]:
    array = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f8").astype(np.float64)
    if array.shape != (size,) or not np.isfinite(array).all():
        raise ValueError(f"{array.shape} values, expected {size} finite ones")
    return array
