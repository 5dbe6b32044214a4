"""The few formulas on logits and random numbers that the host needs, in numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logarithm of the predicted probabilities over the last axis; stable for large logits.

    Args:
        logits: [..., classes], unnormalised.

    Returns:
        [..., classes], <= 0.
    """
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Predicted probabilities [..., classes] from logits [..., classes]."""
    exps = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: NDArray[np.float32] = exps / exps.sum(axis=-1, keepdims=True)
    return result


def entropy(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Shannon entropy of the predicted distribution.

    Args:
        logits: [batch, classes], unnormalised.

    Returns:
        [batch], in nats; between 0 and ln(classes).

    Source: Wang et al., Tent, ICLR 2021, eq. 1. https://openreview.net/forum?id=uXl3bZLkr3c
    """
    logp = log_softmax(logits)
    result: NDArray[np.float32] = -(np.exp(logp) * logp).sum(axis=-1)
    return result


def uniforms(seed: int, step: int, count: int) -> NDArray[np.float32]:
    """The random numbers of one step: a function of the recorded seed and the step's number alone.

    Philox is counter-based. The step's number is put into the counter's second 64-bit word: with the number
    itself as the counter, step k + 1 would repeat the numbers of step k, shifted by one block.

    Args:
        seed: >= 0 and < 2**128.
        step: >= 0, how many steps were committed before.
        count: how many.

    Returns:
        [count] float32, uniform in [0, 1).
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=step << 64)).random(count, dtype=np.float32)
