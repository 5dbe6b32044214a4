"""Labels that come in runs: whether they do, and then which classes a batch is likely to hold."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tta_runtime.numerics import softmax

Floats = NDArray[np.float64]

RECENT = 32  # samples that tell the present classes, where a request has fewer
JUDGED = 64  # samples compared with the long mean at a time
ON, OFF = 2.0, 0.5  # excess over what chance gives, in units of it, for many classes
FEW = 3.0  # over sqrt(C - 1), the factor of both where C classes are few, for chance itself varies more then
MOST = 20.0  # of one comparison, so that what began or ended long ago is forgotten
FOLLOW = 0.2  # weight of the newest comparison
LONG = 1024.0  # samples of the long mean
PSEUDO = 5.0  # samples that come evenly, added to those of a batch
ROUNDS = 10


def expectation_maximisation(p: Floats) -> Floats:
    """The class proportions that explain predictions best, with some that come evenly added.

    Args:
        p: [batch, C], probabilities of a classifier for classes that come evenly.

    Returns:
        [C], all above 0.

    Source: Saerens et al., Adjusting the Outputs of a Classifier to New a Priori Probabilities, Neural Computation
    2002, eq. 2.9, with a Dirichlet prior.
    """
    classes = p.shape[1]
    pi = np.full(classes, 1.0 / classes)
    for _ in range(ROUNDS):
        r = p * pi
        r /= r.sum(1, keepdims=True)
        pi = (r.sum(0) + PSEUDO / classes) / (len(p) + PSEUDO)
    return pi


class Prior:
    """Notices that neighbouring samples share their classes, and uses it.

    Attributes:
        correlated: whether they do.
        evidence: departure of recent mean predictions from the long mean, in units of what chance gives; running mean.
        favour: [C], to be added to logits: the log of the classes' present proportions over even ones; zeros where
            labels do not come in runs.
    """

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self.correlated = False
        self.evidence = 1.0
        self._neutral = np.zeros(classes, dtype=np.float32)
        self.forget()

    def forget(self) -> None:
        """The images have changed: earlier predictions say nothing of later ones. What was noticed stays."""
        self.compare_anew()
        self._recent = np.zeros((0, self._classes))
        self.favour = self._neutral

    def compare_anew(self) -> None:
        """Another model predicts: the long mean begins anew. The present classes stay in favour."""
        self._long = np.full(self._classes, 1.0 / self._classes)
        self._weight = 0.0
        self._open = np.zeros((0, self._classes))

    def observe(self, logits: NDArray[np.float32], usual: NDArray[np.bool_]) -> None:
        """Take what a batch was predicted as.

        Args:
            logits: [batch, C], finite, of the serving graph.
            usual: [batch], which samples tell of the others.
        """
        if usual.any():
            p = np.asarray(softmax(logits[usual].astype(np.float64)), dtype=np.float64)
            self._recent = np.concatenate([self._recent, p])[-max(RECENT, len(p)) :]
            self._judge(p)
        self.favour = self._neutral
        if self.correlated and len(self._recent):
            pi = expectation_maximisation(self._recent)
            self.favour = np.log(pi * self._classes).astype(np.float32)

    def correct(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits [batch, C], with the present classes in favour where labels come in runs."""
        return logits if self.favour is self._neutral else logits + self.favour

    def _judge(self, p: Floats) -> None:
        self._open = np.concatenate([self._open, p])
        if len(self._open) < JUDGED:
            return
        samples, mean = len(self._open), self._open.mean(0)
        self._open = np.zeros((0, self._classes))
        if self._weight >= JUDGED:
            # A long mean of one class only would leave nothing to chance.
            likely = (self._weight * self._long + JUDGED / self._classes) / (self._weight + JUDGED)
            chance = (likely * (1 - likely)).sum() / samples
            ratio = float(((mean - self._long) ** 2).sum() / max(chance, 1e-12))
            self.evidence += FOLLOW * (min(ratio, MOST) - self.evidence)
            excess = (OFF if self.correlated else ON) * max(1.0, FEW / math.sqrt(max(1, self._classes - 1)))
            self.correlated = self.evidence > 1.0 + excess
        self._weight = min(self._weight + samples, LONG)
        self._long += samples / self._weight * (mean - self._long)
