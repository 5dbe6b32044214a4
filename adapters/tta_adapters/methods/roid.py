"""ROID: certain and diverse samples, a consistency with a random view, a pull to the source, a corrected prior."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tta_adapters.augment import PARAMETERS, ROID, augment
from tta_adapters.base import Batch, Hyper, MethodSpec, State, StateSpec, Step, gradient
from tta_adapters.learner import REPORT, Learner, StatisticsMode, report
from tta_adapters.losses import entropy, soft_likelihood_ratio, symmetric_cross_entropy, weighted_mean
from tta_adapters.network import NetworkAdapter

DECAY = 0.9  # of the running mean prediction
SHARPNESS = 3.0  # of the sample weights: one over the published temperature
FAR = 1e4  # stands outside of any cosine or entropy


class Roid:
    """Weighs samples by certainty and by how unlike the average prediction they are, learns, returns a little.

    d = 1 - cos(average, p) and c = -H, each scaled to 0..1 over the batch; samples with d at least the mean get
    weight exp(3 d c), the others 0. L = mean of weight * (soft likelihood ratio + symmetric cross-entropy
    between a random view's prediction and the prediction), the mean over all accepted samples. After the step
    the trained part is (1 - ``pull``) * theta + ``pull`` * theta_0. Returned logits are multiplied by (prior +
    s) / (1 + s C), with the batch's mean prediction as prior and s = max(1/B, 1/C) / max prior.

    Samples of weight 0 pass through the network with the view and have no part in its batch statistics; the published
    code leaves them out. Weights are scaled over a batch, so it wants batches of 16 and more.

    The correction assumes that the batch's mean prediction is the batch's prior. With few classes and a source that is
    wrong in one direction it makes matters worse: on a network without BatchNorm under strong noise (ten classes, mean
    prediction far from uniform) it costs 6 points by itself. ``correct`` 0 leaves it out.

    Trained: norm affine. Forwards / backwards per sample: 2 / 2. Needs source data: no (the source theta).
    Returns the logits of theta *before* the update, corrected.

    Defaults: SGD 2.5e-4 with Nesterov momentum 0.9, as published for ImageNet and any architecture at batch 64; for
    CIFAR-10 and WideResNet the authors take Adam 1e-3 at batch 200. The likelihood ratio's gradient does not fade where
    predictions are certain, so rates that suit Tent are too high here. No threshold.

    Source: Marsden et al., Universal Test-time Adaptation through Weight Ensembling, Diversity Weighting, and Prior
    Correction, WACV 2024, eq. 2 to 8.
    """

    def __init__(
        self,
        adapter: NetworkAdapter,
        *,
        optimizer: str = "sgd",
        nesterov: bool = True,
        lr: float = 2.5e-4,
        ema: float = 0.1,
        pull: float = 0.01,
        correct: float = 1.0,
        statistics: StatisticsMode = "batch",
    ) -> None:
        self.adapter = adapter
        self._learner = Learner(
            "roid", adapter, optimizer=optimizer, nesterov=nesterov, statistics=statistics
        )
        self.spec = MethodSpec(
            "roid",
            f"weighted likelihood ratio and consistency by {optimizer}, pulled to the source, {statistics} statistics",
            state=(
                *self._learner.state(),
                StateSpec("average", (adapter.classes,)),
                StateSpec("known", ()),
            ),
            hyper=(
                *self._learner.hyper(lr, ema),
                Hyper("pull", pull, "share of the source theta mixed in after each step", 0.0, 1.0),
                Hyper("correct", correct, "share of the prior correction in the answer", 0.0, 1.0),
            ),
            report=REPORT,
            min_batch=2,
            rand=PARAMETERS,
            forwards=2.0,
            backwards=2.0,
        )

    def anchor(self) -> dict[str, Tensor]:
        """``theta0`` [P], to be pulled to."""
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
        """Weigh, learn, return a little, correct."""
        setting = self.spec.unpack_hyper(hyper)
        classes, trained = self.adapter.classes, self.adapter.trained
        with torch.no_grad():
            view = self.adapter.from_unit(augment(self.adapter.to_unit(batch.x), rand, ROID))
        with torch.enable_grad():
            tensors, out = self._learner.forward(theta, batch.x, setting)
            present = (batch.weight > 0).to(theta.dtype)
            uniform = torch.full_like(state["average"], 1.0 / classes)
            average = torch.where(state["known"] > 0, state["average"], uniform)
            weight = sample_weights(out.logits.detach(), average, present)
            kept = (weight > 0).to(theta.dtype)
            # Where nothing is accepted there is no batch to normalise by, and nothing is learned.
            kept = torch.where(kept.sum() > 0, kept, torch.ones_like(kept))
            other = self._learner.run(tensors, view, setting, kept)
            objective = soft_likelihood_ratio(out.logits) + symmetric_cross_entropy(other.logits, out.logits)
            loss = weighted_mean(weight * objective, present)
            grad = gradient(loss, self.adapter, tensors)
        seen = present.sum() > 0
        new = self._learner.update(grad, theta, state, setting, out, learns=seen, seen=seen)
        pulled = (1 - setting["pull"]) * new.theta[:trained] + setting["pull"] * anchor["theta0"][:trained]
        proposed = torch.where(seen, torch.cat([pulled, new.theta[trained:]]), theta)
        probabilities = out.logits.detach().softmax(1)
        count = torch.where(seen, present.sum(), torch.ones_like(present.sum()))
        mean = (probabilities * present[:, None]).sum(0) / count
        moved: State = dict(new.state)
        moved["average"] = torch.where(seen, DECAY * average + (1 - DECAY) * mean, state["average"])
        moved["known"] = torch.where(seen, torch.ones_like(state["known"]), state["known"])
        figures = report(
            loss, entropy(out.logits), weight * present, grad, proposed - theta, new.statistics_gap
        )
        logits, share = out.logits.detach(), setting["correct"]
        answer = (1 - share) * logits + share * corrected(logits, mean, count, classes)
        return Step(answer, proposed, moved, figures)


def sample_weights(logits: Tensor, average: Tensor, present: Tensor) -> Tensor:
    """The published weights.

    Args:
        logits: [batch, C], detached.
        average: [C], running mean prediction.
        present: [batch], 1 for accepted samples; the others have no say in any minimum, maximum or mean.

    Returns:
        [batch], >= 0.
    """
    p = logits.softmax(1)
    lengths = torch.linalg.vector_norm(p, dim=1) * torch.linalg.vector_norm(average)
    unlike = _scaled(1 - (p @ average) / (lengths + 1e-12), present)
    certain = _scaled(-entropy(logits), present)
    kept = unlike >= weighted_mean(unlike, present)
    return torch.exp(SHARPNESS * unlike * certain) * kept.to(p.dtype) * present


def _scaled(values: Tensor, present: Tensor) -> Tensor:
    """To 0..1 over the accepted samples; 0 where they are all alike."""
    low = torch.where(present > 0, values, torch.full_like(values, FAR)).amin(0)
    high = torch.where(present > 0, values, torch.full_like(values, -FAR)).amax(0)
    width = high - low
    return (values - low) / torch.where(width > 0, width, torch.ones_like(width))


def corrected(logits: Tensor, prior: Tensor, count: Tensor, classes: int) -> Tensor:
    """Logits [batch, C] multiplied by the smoothed prior [C] of a batch of ``count`` samples."""
    smallest = torch.maximum(1.0 / count, torch.full_like(count, 1.0 / classes))
    largest = prior.amax(0)
    smooth = smallest / torch.where(largest > 0, largest, torch.ones_like(largest))
    factor = (prior + smooth) / (1 + smooth * classes)
    # Without an accepted sample there is no prior to correct by.
    return torch.where(largest > 0, logits * factor, logits)
