"""Weights must be numbers before they become a bundle."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tta_exporters.errors import NetworkRefused


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuses weights that hold NaN or Inf.

    Raises:
        NetworkRefused: some do; names the first.
    """
    spoilt = [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
    if spoilt:
        raise NetworkRefused(
            f"{len(spoilt)} tensors of the network hold NaN or Inf: {', '.join(spoilt[:3])}",
            "Give the weights of a training run that did not diverge",
        )
