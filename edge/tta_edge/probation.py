"""Whether a candidate base may serve: what it says of live samples beside what is served now. Pure.

Labels are not at hand. What can be told is whether a candidate is broken (not finite), blind (all samples one class
where they are not now) or knows less than what serves: the information of its predictions is lower by more than a
margin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tta_edge.events import Reason
from tta_runtime.numerics import entropy, softmax

MARGIN = 0.15
"""Nats of information that a candidate may say less."""
AGREED = 0.2
"""Share of samples that a candidate must call as what serves does: one that has exchanged the classes says as much."""
BLIND = 0.3
"""Entropy of the mean prediction, in units of ln C, below which all samples are of few classes."""


@dataclass(frozen=True, eq=False)
class Said:
    """What a theta has said of the samples of a probation.

    Attributes:
        samples: seen.
        total: [C], sum of their probabilities.
        entropies: sum of their entropies, in nats.
    """

    samples: int
    total: NDArray[np.float64]
    entropies: float

    @classmethod
    def nothing(cls, classes: int) -> Said:
        """Before the first sample."""
        return cls(0, np.zeros(classes), 0.0)

    def more(self, logits: NDArray[np.float32]) -> Said:
        """With further samples [n, C], finite."""
        return Said(
            self.samples + len(logits),
            self.total + softmax(logits.astype(np.float64)).sum(axis=0),
            self.entropies + float(entropy(logits).sum()),
        )

    @property
    def diversity(self) -> float:
        """Entropy of the mean prediction, in nats."""
        mean = self.total / max(1, self.samples)
        return float(-(mean * np.log(mean + 1e-300)).sum())

    @property
    def information(self) -> float:
        """Entropy of the mean less mean entropy, in nats."""
        return self.diversity - self.entropies / max(1, self.samples)


@dataclass(frozen=True, eq=False)
class Probation:
    """A candidate's probation so far.

    Attributes:
        wanted: samples until it is decided.
        candidate: what the candidate has said.
        served: what was served meanwhile.
        agreed: samples on which both named the same class.
        broken: whether the candidate's logits were not finite once.
    """

    wanted: int
    candidate: Said
    served: Said
    agreed: int = 0
    broken: bool = False

    @classmethod
    def begin(cls, classes: int, wanted: int) -> Probation:
        """A new one."""
        return cls(wanted, Said.nothing(classes), Said.nothing(classes))

    def seen(self, candidate: NDArray[np.float32], served: NDArray[np.float32]) -> Probation:
        """With further samples.

        Args:
            candidate: [n, C] logits.
            served: [n, C] logits, finite.
        """
        if not np.isfinite(candidate).all():
            return replace(self, broken=True)
        agreed = self.agreed + int((candidate.argmax(axis=1) == served.argmax(axis=1)).sum())
        return replace(
            self, candidate=self.candidate.more(candidate), served=self.served.more(served), agreed=agreed
        )

    @property
    def decided(self) -> bool:
        """Whether it is over."""
        return self.broken or self.candidate.samples >= self.wanted

    def objection(self, *, returns: bool = False) -> tuple[Reason, str] | None:
        """Why the candidate must not serve, with the values behind it; None where nothing speaks against it.

        Args:
            returns: whether it has served before. Then what serves is no measure for it: that may be what is to be
                taken back, as sure of itself as it is wrong.
        """
        if self.broken:
            return Reason.NON_FINITE_LOGITS, "the candidate's logits hold NaN or Inf"
        mine, its = self.candidate, self.served
        low = BLIND * math.log(max(2, len(mine.total)))
        if mine.diversity < low <= its.diversity:
            detail = f"the candidate's mean prediction has {mine.diversity:.2f} nats, what serves {its.diversity:.2f}"
            return Reason.COLLAPSE, detail
        if returns:
            return None
        if self.agreed < AGREED * mine.samples:
            return (
                Reason.DISAGREES,
                f"of {mine.samples} samples {self.agreed} are called as what serves calls them",
            )
        if mine.information < its.information - MARGIN:
            return (
                Reason.LESS_INFORMATION,
                f"the candidate says {mine.information:.3f} nats of {mine.samples} samples, what serves "
                f"{its.information:.3f}",
            )
        return None
