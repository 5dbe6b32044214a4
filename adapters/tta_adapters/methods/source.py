"""Source: the frozen network, the yardstick of every other method."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tta_adapters.base import Adapter, Batch, MethodSpec, State, Step


class Source:
    """Serves theta as it is.

    Trained: nothing. Forwards / backwards per sample: 0 / 0. Needs source data: no. Returns the logits of theta.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.spec = MethodSpec(
            "source", "the frozen source model", trains=False, steps=False, forwards=0.0, backwards=0.0
        )

    def anchor(self) -> dict[str, Tensor]:
        """No anchor."""
        return {}

    def step(
        self,
        batch: Batch,
        theta: Tensor,
        state: State,
        anchor: Mapping[str, Tensor],
        hyper: Tensor,
        rand: Tensor,
    ) -> Step:
        """Predicts; theta and state are returned as they came."""
        with torch.no_grad():
            logits = self.adapter.forward(self.adapter.unpack(theta), batch.x).logits
        return Step(logits, theta, state, torch.zeros(0))
