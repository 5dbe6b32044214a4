"""Tent: entropy minimisation on the affine parameters of normalisation layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tta_adapters.base import Batch, MethodSpec, State, Step, gradient
from tta_adapters.learner import REPORT, Learner, StatisticsMode, report
from tta_adapters.losses import entropy, weighted_mean
from tta_adapters.network import NetworkAdapter


class Tent:
    """Minimises the mean entropy of the predictions by one optimiser step per batch.

    Normalises by batch statistics as the authors do (``statistics="batch"``) and, at the rate ``ema``, lets the
    running statistics in theta follow, so that the serving graph at batch 1 agrees with what the step learned
    under; ``statistics="running"`` trains under theta's own statistics and keeps them. Dropout is off. A batch whose
    every weight is 0 changes nothing (momentum included).

    Trained: norm affine. Forwards / backwards per sample: 1 / 1. Needs source data: no. Returns the logits of theta
    *before* the update, as published.

    Defaults: SGD 1e-3 with Nesterov momentum 0.9, for networks of up to about 100 classes. Published: Adam 1e-3 for
    CIFAR-10 at batch 200; on ImageNet SGD 2.5e-4 at batch 64 for ResNet-50 with BatchNorm or GroupNorm, 1e-3 for ViT-B,
    both without BatchNorm in proportion to smaller batches, which ``lr_batch`` does. No threshold.

    Source: Wang et al., Tent: Fully Test-Time Adaptation by Entropy Minimization, ICLR 2021, eq. 1 and section 3.
    """

    def __init__(
        self,
        adapter: NetworkAdapter,
        *,
        optimizer: str = "sgd",
        nesterov: bool = True,
        lr: float = 1e-3,
        lr_batch: float = 0.0,
        ema: float = 0.1,
        statistics: StatisticsMode = "batch",
    ) -> None:
        self.adapter = adapter
        self._learner = Learner(
            "tent", adapter, optimizer=optimizer, nesterov=nesterov, statistics=statistics, lr_batch=lr_batch
        )
        self.spec = MethodSpec(
            "tent",
            f"entropy minimisation on norm affine by {optimizer}, {statistics} statistics",
            state=self._learner.state(),
            hyper=self._learner.hyper(lr, ema),
            report=REPORT,
            min_batch=self._learner.min_batch,
            forwards=1.0,
            backwards=1.0,
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
            tensors, out = self._learner.forward(theta, batch.x, setting)
            per_sample = entropy(out.logits)
            loss = weighted_mean(per_sample, batch.weight)
            grad = gradient(loss, self.adapter, tensors)
        seen = batch.weight.sum() > 0
        new = self._learner.update(grad, theta, state, setting, out, learns=seen, seen=seen)
        figures = report(loss, per_sample, batch.weight, grad, new.theta - theta, new.statistics_gap)
        return Step(out.logits.detach(), new.theta, new.state, figures)
