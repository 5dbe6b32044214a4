"""RDumb: ETA that returns to the source after a fixed number of steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from tta_adapters.base import Batch, Hyper, State, StateSpec, Step, init_state
from tta_adapters.learner import StatisticsMode
from tta_adapters.methods.eta import Eta
from tta_adapters.network import NetworkAdapter


class Rdumb(Eta):
    """ETA that begins anew after every ``period`` steps.

    Before such a step the trained part of theta, the optimiser and the average prediction are those of the source
    again. Running statistics in theta go on following the stream: the original has none.

    Trained: norm affine. Forwards / backwards per sample: 1 / 1. Needs source data: no. Returns the logits of theta
    *before* the update (after the return, where there is one).

    Defaults: as ETA's; 1000 steps, as published at batch 64 for ResNet-50.

    Source: Press et al., RDumb: A simple approach that questions our progress in continual test-time adaptation,
    NeurIPS 2023, section 4.
    """

    name = "rdumb"

    def __init__(
        self,
        adapter: NetworkAdapter,
        *,
        optimizer: str = "sgd",
        nesterov: bool = False,
        lr: float = 1e-3,
        lr_batch: float = 0.0,
        ema: float = 0.1,
        margin: float = 0.4,
        redundancy: float = 0.0,
        period: float = 1000.0,
        statistics: StatisticsMode = "batch",
    ) -> None:
        self._period = period
        super().__init__(
            adapter,
            optimizer=optimizer,
            nesterov=nesterov,
            lr=lr,
            lr_batch=lr_batch,
            ema=ema,
            margin=margin,
            redundancy=redundancy,
            statistics=statistics,
        )
        self._inner = self.spec
        self.spec = dataclasses.replace(self.spec, state=(*self.spec.state, StateSpec("count", ())))

    def anchor(self) -> dict[str, Tensor]:
        """``theta0`` [P], to return to."""
        return {"theta0": self.adapter.source_theta()}

    def step(
        self,
        batch: Batch,
        theta: Tensor,
        state: State,
        anchor: Mapping[str, Tensor],
        hyper: Tensor,
        rand: Tensor,
    ) -> Step:
        """Back to the source where it is time, then one step of ETA."""
        trained = self.adapter.trained
        returns = state["count"] >= self.spec.unpack_hyper(hyper)["period"]
        source = torch.cat([anchor["theta0"][:trained], theta[trained:]])
        fresh = init_state(self._inner, theta)
        seen = batch.weight.sum() > 0
        begun = torch.where(returns & seen, source, theta)
        inner = {
            key: torch.where(returns & seen, fresh[key].to(state[key].dtype), state[key]) for key in fresh
        }
        out = super().step(batch, begun, inner, anchor, hyper, rand)
        one = torch.ones_like(state["count"])
        count = torch.where(seen, torch.where(returns, one, state["count"] + one), state["count"])
        return out._replace(state={**out.state, "count": count})

    def _more_hyper(self) -> tuple[Hyper, ...]:
        return (Hyper("period", self._period, "steps between two returns to the source", 1.0),)
