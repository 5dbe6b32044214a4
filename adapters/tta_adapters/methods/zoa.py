"""ZOA: two forward passes and no backward pass; the gradient is estimated from one random direction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tta_adapters.base import Batch, Forward, Hyper, MethodSpec, State, Step
from tta_adapters.learner import Learner, StatisticsMode
from tta_adapters.losses import entropy, weighted_mean
from tta_adapters.network import NetworkAdapter


class Zoa:
    """One-sided simultaneous perturbation on the norm affine.

    With a random direction D, D_i = +-U[0.5, 1]: g_i = (L(theta + c D) - L(theta)) / (c D_i), then plain
    gradient descent. L is the mean entropy plus ``discrepancy`` times the mean squared difference between mean
    and standard deviation of the batch's features and those of the source.

    Two things differ from the paper: the discrepancy looks at the features before the classifier and not at
    every block's, and there is no bank of domain vectors.

    Trained: norm affine. Forwards / backwards per sample: 2 / 0. Needs source data: a few hundred unlabelled
    images, once, when the bundle is built. Returns the logits of theta *before* the update.

    Defaults: SGD 5e-4 without momentum and c = 0.02 for any architecture. No threshold.

    Source: Deng et al., Test-Time Model Adaptation for Quantized Neural Networks, ACM MM 2025, section 3 (arXiv
    2508.02180).
    """

    def __init__(
        self,
        adapter: NetworkAdapter,
        *,
        lr: float = 5e-4,
        ema: float = 0.1,
        reach: float = 0.02,
        discrepancy: float = 30.0,
        skip: str = "",
        statistics: StatisticsMode = "batch",
    ) -> None:
        self.adapter = adapter
        self._learner = Learner(
            "zoa", adapter, optimizer="sgd", nesterov=False, statistics=statistics, skip=skip
        )
        self._source: tuple[Tensor, Tensor] | None = None
        self.spec = MethodSpec(
            "zoa",
            f"two forward passes, gradient along a random direction, {statistics} statistics",
            state=self._learner.state(),
            hyper=(
                *self._learner.hyper(lr, ema, momentum=0.0),
                Hyper("reach", reach, "length c of the perturbation", 1e-6),
                Hyper("discrepancy", discrepancy, "weight of the distance of feature statistics", 0.0),
            ),
            report=("loss", "entropy", "accepted", "slope", "update_norm", "statistics_gap"),
            min_batch=2,
            rand=adapter.trained,
            forwards=2.0,
            backwards=0.0,
        )

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Takes mean and standard deviation of the features of source images.

        Args:
            batches: x [batch, ...] each.

        Raises:
            ValueError: there is no batch.
        """
        theta = self.adapter.source_theta().to(self.adapter.dtype)
        with torch.no_grad():
            features = [self.adapter.forward(self.adapter.unpack(theta), x).features for x in batches]
        if not features:
            raise ValueError("zoa needs source images to take feature statistics from")
        together = torch.cat(features)
        self._source = together.mean(0), together.std(0, correction=0)

    def anchor(self) -> dict[str, Tensor]:
        """``zoa.mean`` and ``zoa.std``, [F] each, of the source's features.

        Raises:
            ValueError: `calibrate` was not called.
        """
        if self._source is None:
            raise ValueError("zoa needs source images to take feature statistics from")
        mean, std = self._source
        return {"zoa.mean": mean.to(torch.float32), "zoa.std": std.to(torch.float32)}

    def step(
        self,
        batch: Batch,
        theta: Tensor,
        state: State,
        anchor: Mapping[str, Tensor],
        hyper: Tensor,
        rand: Tensor,
    ) -> Step:
        """Here, and a little aside; the difference says which way is down."""
        setting = self.spec.unpack_hyper(hyper)
        trained = self.adapter.trained
        with torch.no_grad():
            # One uniform gives sign and size: below 1/2 negative, then twice what is left of it.
            upper = rand >= 0.5
            size = 0.5 + (rand - 0.5 * upper.to(rand.dtype))
            direction = self._learner.masked(torch.where(upper, size, -size))
            aside = torch.cat([theta[:trained] + setting["reach"] * direction, theta[trained:]])
            _, out = self._learner.forward(theta, batch.x, setting)
            _, moved = self._learner.forward(aside, batch.x, setting)
            here = self._loss(out, batch.weight, anchor, setting)
            there = self._loss(moved, batch.weight, anchor, setting)
            slope = (there - here) / setting["reach"]
            grad = self._learner.masked(slope / torch.where(upper, size, -size))
            seen = batch.weight.sum() > 0
            new = self._learner.update(grad, theta, state, setting, out, learns=seen, seen=seen)
            report = torch.stack(
                [
                    here,
                    entropy(out.logits).mean(),
                    (batch.weight > 0).to(theta.dtype).mean(),
                    slope,
                    torch.linalg.vector_norm(new.theta - theta),
                    new.statistics_gap,
                ]
            )
        return Step(out.logits, new.theta, new.state, report)

    def _loss(
        self, out: Forward, weight: Tensor, anchor: Mapping[str, Tensor], setting: Mapping[str, Tensor]
    ) -> Tensor:
        total = weight.sum()
        share = (weight / torch.where(total > 0, total, torch.ones_like(total)))[:, None]
        mean = (share * out.features).sum(0)
        centred = out.features - mean
        # The offset keeps a dead feature's square root from having no derivative to speak of.
        std = torch.sqrt((share * centred * centred).sum(0) + 1e-12)
        apart = ((mean - anchor["zoa.mean"]) ** 2).mean() + ((std - anchor["zoa.std"]) ** 2).mean()
        return weighted_mean(entropy(out.logits), weight) + setting["discrepancy"] * apart
