"""Distill: one step of a student towards a teacher's logits, the part of CEMA that runs where the bigger model is."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tta_adapters.base import Batch, Hyper, MethodSpec, State, Step, gradient
from tta_adapters.learner import REPORT, Learner, StatisticsMode, report
from tta_adapters.losses import entropy, weighted_mean
from tta_adapters.network import NetworkAdapter


class Distill:
    """Learns a teacher's distribution and label, and to be certain, each sample weighed by how sure its side is.

    With student logits z, teacher logits t, E0 = ``margin`` * ln C and w(H) = exp(E0 - H), a constant for the gradient:
    L = mean over accepted samples of ``alpha`` * w(H(z)) * H(z) + ``beta`` * w(H(t)) * T^2 * KL(softmax(t / T) ||
    softmax(z / T)) + ``gamma`` * w(H(t)) * (-log softmax(z) at argmax t). With 1000 classes a weight goes from 0.016 to
    15.8, with 10 from 0.25 to 2.5.

    Normalises as a serving network does and learns as under batch statistics (``statistics="renorm"``), so that a patch
    of theta, running statistics included, is all that an edge needs, at any batch size. The published code begins its
    running statistics at the first batch and keeps unbiased variances; here they begin at the source's and are biased.

    A step needs ``target``: nobody can adapt by it who has no teacher. It stands in for the loop around it, which
    mixes new samples with remembered ones, and that is the caller's.

    Trained: norm affine; theta's statistics follow. Forwards / backwards per sample: 1 / 1. Needs source data: no, a
    teacher's logits of each batch. Returns the logits of theta *before* the update.

    Defaults, as published for ResNets on ImageNet: SGD 2.5e-3 with momentum 0.9 on batches of 32 new and 96 remembered
    samples, weights 3, 3 and 1, temperature 1, E0 = 0.4 ln C.

    Source: Chen et al., Towards Robust and Efficient Cloud-Edge Elastic Model Adaptation via Selective Entropy
    Distillation, ICLR 2024, eq. 6 and algorithm 2.
    """

    def __init__(
        self,
        adapter: NetworkAdapter,
        *,
        optimizer: str = "sgd",
        nesterov: bool = False,
        lr: float = 2.5e-3,
        ema: float = 0.1,
        margin: float = 0.4,
        alpha: float = 3.0,
        beta: float = 3.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        statistics: StatisticsMode = "renorm",
    ) -> None:
        self.adapter = adapter
        self._learner = Learner(
            "distill", adapter, optimizer=optimizer, nesterov=nesterov, statistics=statistics
        )
        self.spec = MethodSpec(
            "distill",
            f"towards a teacher's logits by {optimizer}, {statistics} statistics",
            state=self._learner.state(),
            hyper=(
                *self._learner.hyper(lr, ema),
                Hyper("margin", margin, "entropy at which a sample weighs 1, in units of ln C", 0.0, 1.0),
                Hyper("alpha", alpha, "weight of the student's own entropy", 0.0),
                Hyper("beta", beta, "weight of the divergence from the teacher", 0.0),
                Hyper("gamma", gamma, "weight of the teacher's label", 0.0),
                Hyper("temperature", temperature, "of both distributions in the divergence", 0.01, 100.0),
            ),
            report=(*REPORT, "divergence", "agreement"),
            min_batch=self._learner.min_batch,
            target=True,
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
        """One optimiser step towards ``batch.target``.

        Raises:
            ValueError: there is no target.
        """
        if batch.target is None:
            raise ValueError("distill needs a teacher's logits: give the batch a target")
        setting, target = self.spec.unpack_hyper(hyper), batch.target
        bound, heat = setting["margin"] * math.log(self.adapter.classes), setting["temperature"]
        label = target.argmax(1)
        hot = (label[:, None] == torch.arange(target.shape[1])[None, :]).to(theta.dtype)
        sure = torch.exp(bound - entropy(target))
        with torch.enable_grad():
            tensors, out = self._learner.forward(theta, batch.x, setting)
            own = entropy(out.logits)
            divergence = kl_divergence(target / heat, out.logits / heat)
            named = -(hot * torch.log_softmax(out.logits, dim=1)).sum(1)
            objective = (
                setting["alpha"] * torch.exp(bound - own.detach()) * own
                + setting["beta"] * sure * heat * heat * divergence
                + setting["gamma"] * sure * named
            )
            loss = weighted_mean(objective, batch.weight)
            grad = gradient(loss, self.adapter, tensors)
        seen = batch.weight.sum() > 0
        new = self._learner.update(grad, theta, state, setting, out, learns=seen, seen=seen)
        figures = report(
            loss,
            own,
            batch.weight,
            grad,
            new.theta - theta,
            new.statistics_gap,
            weighted_mean(divergence.detach(), batch.weight),
            weighted_mean((out.logits.argmax(1) == label).to(theta.dtype), batch.weight),
        )
        return Step(out.logits.detach(), new.theta, new.state, figures)


def kl_divergence(target: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(logits)), [batch] in nats, from logits [batch, classes] of each."""
    log_t, log_z = torch.log_softmax(target, dim=1), torch.log_softmax(logits, dim=1)
    return (log_t.exp() * (log_t - log_z)).sum(1)
