"""Objectives on logits, per sample, and their weighted mean."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of the predicted distribution.

    Args:
        logits: [batch, classes], unnormalised.

    Returns:
        [batch], in nats; between 0 and ln(classes).

    Source: Wang et al., Tent: Fully Test-Time Adaptation by Entropy Minimization, ICLR 2021, eq. 1.
    """
    log_p = torch.log_softmax(logits, dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean of ``values`` [batch] under ``weight`` [batch] >= 0; 0 (not NaN) where every weight is 0."""
    total = weight.sum()
    # A batch whose every sample was refused must yield a finite value; the caller skips its step by `total > 0`.
    return (values * weight).sum() / torch.where(total > 0, total, torch.ones_like(total))


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy against soft targets given as logits.

    Args:
        logits: [batch, classes].
        target: [batch, classes], unnormalised.

    Returns:
        [batch], in nats.
    """
    return -(target.softmax(1) * torch.log_softmax(logits, dim=1)).sum(1)


def symmetric_cross_entropy(one: Tensor, other: Tensor) -> Tensor:
    """Mean of the cross-entropies of each against the other, [batch] from logits [batch, classes].

    Source: Wang et al., Symmetric Cross Entropy for Robust Learning with Noisy Labels, ICCV 2019, with equal weights.
    """
    return 0.5 * cross_entropy(one, other) + 0.5 * cross_entropy(other, one)


def soft_likelihood_ratio(logits: Tensor) -> Tensor:
    """Negative log-likelihood ratio of the prediction against its complement, weighted by the prediction.

    Args:
        logits: [batch, classes].

    Returns:
        [batch]; its gradient does not vanish where a prediction is certain, as that of the entropy does.

    Source: Marsden et al., Universal Test-time Adaptation through Weight Ensembling, Diversity Weighting, and Prior
    Correction, WACV 2024, eq. 3, with probabilities clipped at 0.99.
    """
    p = logits.softmax(1)
    q = torch.minimum(p, torch.full_like(p, 0.99))
    return -(q * torch.log(q / (1 - q) + 1e-5)).sum(1)
