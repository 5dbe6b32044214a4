"""Tent: entropy minimisation on the affine parameters of normalisation layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from tta_adapters.base import Batch, Hyper, MethodSpec, State, Step, gradient
from tta_adapters.losses import entropy, weighted_mean
from tta_adapters.norm import NormAdapter, statistics_gap
from tta_adapters.optim import optimiser


class Tent:
    """Minimises the mean entropy of the predictions by one optimiser step per batch.

    Normalises by batch statistics as the authors do (``statistics="batch"``) and, at the rate ``ema``, lets the
    running statistics in theta follow, so that the serving graph at batch 1 agrees with what the step learned
    under; ``statistics="running"`` trains under theta's own statistics and keeps them. Dropout is off. A batch whose
    every weight is 0 changes nothing (momentum included).

    Trained: norm affine. Forwards / backwards per sample: 1 / 1. Needs source data: no. Returns the logits of theta
    *before* the update, as published.

    Source: Wang et al., Tent: Fully Test-Time Adaptation by Entropy Minimization, ICLR 2021, eq. 1 and section 3.
    """

    def __init__(
        self,
        adapter: NormAdapter,
        *,
        optimizer: str = "sgd",
        nesterov: bool = True,
        lr: float = 1e-3,
        ema: float = 0.1,
        statistics: Literal["batch", "running"] = "batch",
    ) -> None:
        if statistics not in ("batch", "running"):
            raise ValueError(f"tent.statistics is {statistics!r}: choose batch or running")
        self.adapter = adapter
        self._optimiser = optimiser(optimizer, nesterov=nesterov)
        self._statistics: Literal["batch", "running"] = statistics
        # The rate exists only where there is something to follow: a hyper entry without effect would be a lie.
        self._follows = statistics == "batch" and adapter.has_running_statistics
        follow = (Hyper("ema", ema, "rate at which running statistics follow the batch", 0.0, 1.0),)
        self.spec = MethodSpec(
            "tent",
            f"entropy minimisation on norm affine by {optimizer}, {statistics} statistics",
            state=self._optimiser.init(adapter.trained),
            hyper=self._optimiser.hyper(lr) + (follow if self._follows else ()),
            report=("loss", "entropy", "accepted", "grad_norm", "update_norm", "statistics_gap"),
            min_batch=2 if self._follows else 1,
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
        """The paper's loop body: predict, entropy, one step; the prediction is the one made before the step."""
        setting = self.spec.unpack_hyper(hyper)
        with torch.enable_grad():
            tensors = self.adapter.unpack(theta)
            out = self.adapter.forward(tensors, batch.x, statistics=self._statistics)
            per_sample = entropy(out.logits)
            loss = weighted_mean(per_sample, batch.weight)
            grad = gradient(loss, self.adapter, tensors)
        delta, moved = self._optimiser.update(grad, state, setting)
        alive = batch.weight.sum() > 0
        trained = theta[: self.adapter.trained]
        trained = torch.where(alive, trained + delta, trained)
        running = theta[self.adapter.trained :]
        gap = torch.zeros(())
        if self._follows:
            rate = setting["ema"] * alive.to(theta.dtype)
            observed = self.adapter.batch_statistics(out.statistics)
            gap = statistics_gap(running, observed)
            running = (1 - rate) * running + rate * observed
        proposed = torch.cat([trained, running])
        report = torch.stack(
            [
                loss.detach(),
                per_sample.detach().mean(),
                (batch.weight > 0).to(theta.dtype).mean(),
                torch.linalg.vector_norm(grad),
                torch.linalg.vector_norm(proposed - theta),
                gap,
            ]
        )
        kept = {name: torch.where(alive, moved[name], state[name]) for name in state}
        return Step(out.logits.detach(), proposed, kept, report)
