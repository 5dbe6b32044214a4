"""Which token comes next: a pure function of the logits, the parameters and the position in a text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import BadSampling
from .numerics import uniforms


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: logits are divided by it; 0 takes the most probable token.
        top_k: only the so many most probable tokens; 0: all.
        top_p: only the most probable tokens that together have this probability; 1: all.
        seed: of the random numbers: the same one gives the same text.

    Raises:
        BadSampling: a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        self._need(0 <= self.temperature <= 100, "temperature", self.temperature, "from 0 to 100")
        self._need(self.top_k >= 0, "top_k", self.top_k, "from 0, which is all")
        self._need(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        self._need(0 <= self.seed < 1 << 63, "seed", self.seed, "from 0 to 2**63 - 1")

    @staticmethod
    def _need(good: bool, name: str, value: float, expected: str) -> None:
        if not good:
            raise BadSampling(f"{name} is {value}, expected a number {expected}", f"Correct {name}")


GREEDY = Sampling(temperature=0.0)


def candidates(
    logits: NDArray[np.float32], sampling: Sampling
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that may come next, the most probable one first, with their probabilities.

    Args:
        logits: [vocabulary], finite.
        sampling: with a temperature above 0, or 0 for the most probable token alone.

    Returns:
        Tokens [n] and probabilities [n] that sum to 1. Of equally probable tokens the lower one comes first.

    Source: top-p is the nucleus of Holtzman et al., The Curious Case of Neural Text Degeneration, ICLR 2020, eq. 2-3.
    """
    # A stable sort: equal logits keep the order of the tokens.
    order = np.argsort(-logits, kind="stable").astype(np.int64)
    if sampling.temperature == 0:
        return order[:1], np.ones(1)
    if sampling.top_k:
        order = order[: sampling.top_k]
    below = logits[order].astype(np.float64)
    below -= below[0]
    # The largest is 0, so that what a tiny temperature makes infinite is only what has no chance.
    with np.errstate(over="ignore"):
        exps = np.exp(below / sampling.temperature)
    p = exps / exps.sum()
    if sampling.top_p < 1:
        kept = int(np.searchsorted(np.cumsum(p), sampling.top_p)) + 1
        order, p = order[:kept], p[:kept] / p[:kept].sum()
    return order, p


def draw(logits: NDArray[np.float32], sampling: Sampling, position: int) -> int:
    """The next token.

    Args:
        logits: [vocabulary], finite.
        sampling: how.
        position: how many tokens were drawn before with the same seed.
    """
    tokens, p = candidates(logits, sampling)
    if len(tokens) == 1:
        return int(tokens[0])
    u = float(uniforms(sampling.seed, position, 1)[0])
    place = int(np.searchsorted(np.cumsum(p), u, side="right"))
    return int(tokens[min(place, len(tokens) - 1)])  # rounding may leave the sum below u


def surprise_nats(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """-ln p of the tokens that came, computed in float64.

    Args:
        logits: [tokens, vocabulary].
        targets: [tokens].

    Returns:
        [tokens], >= 0.
    """
    z = logits.astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), targets]
    return result


def bits(nats: float) -> float:
    """Nats in bits."""
    return nats / math.log(2)
