"""SAR: sharpness-aware entropy minimisation on reliable samples, with a recovery when it collapses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tta_adapters.base import Batch, Hyper, MethodSpec, State, StateSpec, Step, gradient, initial
from tta_adapters.learner import REPORT, Learner, StatisticsMode, report
from tta_adapters.losses import entropy, weighted_mean
from tta_adapters.network import NetworkAdapter
from tta_adapters.select_samples import reliable


class Sar:
    """Minimises the entropy of reliable samples at the worst theta within ``rho`` of the present one.

    g = gradient of the mean entropy over samples with H < E0; theta^ = theta + rho * g / |g|; the optimiser
    steps from theta with the gradient at theta^ of the mean entropy over those samples that are reliable there
    as well. Where no sample is, theta and the optimiser stay as they are (in the published code momentum moves
    them on).

    Recovery: a running mean of that loss below ``recover_below`` means that everything is predicted with
    certainty; theta's trained part and the optimiser return to the source and the mean begins anew. The
    authors' 0.2 nats for 1000 classes are 0.029 ln C here, so that the guard means the same for any number of
    classes.

    ``skip`` names tensors of theta that are not trained, as shell patterns separated by spaces; the paper
    leaves the last stage of a network out (for a torchvision ResNet: "layer4*").

    Trained: norm affine. Forwards / backwards per sample: 2 / 2. Needs source data: no. Returns the logits of theta
    *before* the update. With BatchNorm it needs balanced batches like any method on batch statistics; it is meant
    for LayerNorm and GroupNorm.

    Defaults: SGD 1e-3 with momentum 0.9, for networks of up to about 100 classes. Published on ImageNet: 2.5e-4 at
    batch 64 for ResNet-50 with BatchNorm or GroupNorm, 1e-3 for ViT-B, both without BatchNorm in proportion to smaller
    batches, which ``lr_batch`` does, twice that at batch 1. E0 = 0.4 ln C, ``rho`` = 0.05 and the recovery on
    every architecture.

    Source: Niu et al., Towards Stable Test-Time Adaptation in Dynamic Wild World, ICLR 2023, eq. 2 to 6 and
    algorithm 1.
    """

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
        rho: float = 0.05,
        recover_below: float = 0.029,
        skip: str = "",
        statistics: StatisticsMode = "batch",
    ) -> None:
        self.adapter = adapter
        self._learner = Learner(
            "sar",
            adapter,
            optimizer=optimizer,
            nesterov=nesterov,
            statistics=statistics,
            skip=skip,
            lr_batch=lr_batch,
        )
        self.spec = MethodSpec(
            "sar",
            f"sharpness-aware entropy minimisation on reliable samples by {optimizer}, {statistics} statistics",
            state=(*self._learner.state(), StateSpec("loss_mean", ()), StateSpec("known", ())),
            hyper=(
                *self._learner.hyper(lr, ema),
                Hyper("margin", margin, "largest entropy of a reliable sample, in units of ln C", 0.0, 1.0),
                Hyper("rho", rho, "radius of the neighbourhood whose worst point counts", 0.0),
                Hyper(
                    "recover_below",
                    recover_below,
                    "running mean loss at which theta returns to the source, in units of ln C",
                    0.0,
                    1.0,
                ),
            ),
            report=(*REPORT, "recovered"),
            min_batch=self._learner.min_batch,
            forwards=2.0,
            backwards=2.0,
        )

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
        """Up to the worst neighbour, down from where theta was, back to the source if that has collapsed."""
        setting = self.spec.unpack_hyper(hyper)
        classes, trained = self.adapter.classes, self.adapter.trained
        with torch.enable_grad():
            tensors, out = self._learner.forward(theta, batch.x, setting)
            first = entropy(out.logits)
            taken = batch.weight * reliable(first.detach(), setting["margin"], classes)
            up = self._learner.masked(gradient(weighted_mean(first, taken), self.adapter, tensors))
        climb = setting["rho"] * up / (torch.linalg.vector_norm(up) + 1e-12)
        with torch.enable_grad():
            climbed = torch.cat([theta[:trained] + climb, theta[trained:]])
            tensors, worst = self._learner.forward(climbed, batch.x, setting)
            second = entropy(worst.logits)
            kept = taken * reliable(second.detach(), setting["margin"], classes)
            loss = weighted_mean(second, kept)
            grad = self._learner.masked(gradient(loss, self.adapter, tensors))
        learns = kept.sum() > 0
        new = self._learner.update(
            grad, theta, state, setting, out, learns=learns, seen=batch.weight.sum() > 0
        )
        value = loss.detach()
        mean = torch.where(state["known"] > 0, 0.9 * state["loss_mean"] + 0.1 * value, value)
        log_classes = torch.log(torch.tensor(float(classes)))
        recovers = learns & (mean < setting["recover_below"] * log_classes)
        proposed = torch.where(
            recovers, torch.cat([anchor["theta0"][:trained], new.theta[trained:]]), new.theta
        )
        fresh = initial(self._learner.state(), theta)
        moved: State = {
            key: torch.where(recovers, fresh[key].to(array.dtype), array) for key, array in new.state.items()
        }
        moved["loss_mean"] = torch.where(learns, torch.where(recovers, 0.0, mean), state["loss_mean"])
        moved["known"] = torch.where(
            learns, torch.where(recovers, 0.0, torch.ones_like(state["known"])), state["known"]
        )
        figures = report(
            value, first, kept, grad, proposed - theta, new.statistics_gap, recovers.to(theta.dtype)
        )
        return Step(out.logits.detach(), proposed, moved, figures)
