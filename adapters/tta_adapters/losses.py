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
