"""Which samples of a batch are worth learning from, as masks of 0 and 1; shapes never depend on the data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tta_adapters.base import State


def reliable(entropies: Tensor, margin: Tensor, classes: int) -> Tensor:
    """1 where the entropy is below ``margin`` * ln C.

    Args:
        entropies: [batch], in nats.
        margin: 0-d, in units of ln C.
        classes: C.

    Source: Niu et al., Efficient Test-Time Model Adaptation without Forgetting, ICML 2022, eq. 3.
    """
    return (entropies < margin * math.log(classes)).to(entropies.dtype)


def novel(probabilities: Tensor, average: Tensor, known: Tensor, threshold: Tensor) -> Tensor:
    """1 where a prediction is unlike the running average of accepted ones: absolute cosine < threshold.

    Args:
        probabilities: [batch, C].
        average: [C], running mean of accepted predictions.
        known: 0-d, 0 while there is no average yet; then every sample is novel.
        threshold: 0-d.

    Source: Niu et al., ICML 2022, eq. 5.
    """
    # The offset only keeps an average that does not exist yet (all zeros) from dividing by zero.
    lengths = torch.linalg.vector_norm(probabilities, dim=1) * torch.linalg.vector_norm(average)
    cosine = (probabilities @ average) / (lengths + 1e-12)
    return torch.where(known > 0, (cosine.abs() < threshold).to(probabilities.dtype), torch.ones_like(cosine))


def follow_average(probabilities: Tensor, taken: Tensor, state: State, decay: float = 0.9) -> State:
    """The running mean of accepted predictions after a batch; as it was if no sample was taken.

    Args:
        probabilities: [batch, C].
        taken: [batch], weights >= 0 of accepted samples.
        state: with ``average`` [C] and ``known`` (0-d).
        decay: of the average; the first batch replaces it.
    """
    total = taken.sum()
    some = total > 0
    mean = (probabilities * taken[:, None]).sum(0) / torch.where(some, total, torch.ones_like(total))
    moved = torch.where(state["known"] > 0, decay * state["average"] + (1 - decay) * mean, mean)
    return {
        "average": torch.where(some, moved, state["average"]),
        "known": torch.where(some, torch.ones_like(state["known"]), state["known"]),
    }
