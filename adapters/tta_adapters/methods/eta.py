"""ETA and EATA: entropy minimisation on reliable, non-redundant samples, EATA with a pull towards the source."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tta_adapters.base import Batch, Hyper, MethodSpec, State, StateSpec, Step, gradient
from tta_adapters.learner import REPORT, Learner, StatisticsMode, report
from tta_adapters.losses import entropy, weighted_mean
from tta_adapters.network import NetworkAdapter
from tta_adapters.select_samples import follow_average, novel, reliable


def redundancy_of(classes: int) -> float:
    """The published cosine threshold for so many classes: 0.4 up to 10, 0.1 up to 100, 0.05 beyond."""
    return 0.4 if classes <= 10 else 0.1 if classes <= 100 else 0.05


class Eta:
    """Minimises exp(E0 - H) * H over samples with entropy H < E0 whose prediction is unlike the average accepted one.

    E0 = ``margin`` * ln C. The factor is a constant for the gradient. The mean goes over the selected samples,
    so a few give a full step; where none is selected, theta and the optimiser stay as they are. ``redundancy``
    0 stands for the published threshold for the number of classes. The whole batch passes through the network:
    selection saves no work, it chooses what to learn from.

    Trained: norm affine. Forwards / backwards per sample: 1 / 1. Needs source data: no. Returns the logits of theta
    *before* the update.

    Defaults: SGD 1e-3 with momentum 0.9, for networks of up to about 100 classes. Published on ImageNet: 2.5e-4 at
    batch 64 for ResNet-50 with BatchNorm or GroupNorm, 1e-3 for ViT-B, both without BatchNorm in proportion to smaller
    batches, which ``lr_batch`` does; for CIFAR-10 Adam 1e-3 at batch 200. E0 = 0.4 ln C on every architecture; the
    cosine by the number of classes.

    Source: Niu et al., Efficient Test-Time Model Adaptation without Forgetting, ICML 2022, eq. 2 to 6.
    """

    name = "eta"

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
        statistics: StatisticsMode = "batch",
    ) -> None:
        self.adapter = adapter
        self._learner = Learner(
            self.name,
            adapter,
            optimizer=optimizer,
            nesterov=nesterov,
            statistics=statistics,
            lr_batch=lr_batch,
        )
        self.spec = MethodSpec(
            self.name,
            f"entropy minimisation on reliable, non-redundant samples by {optimizer}, {statistics} statistics",
            state=(
                *self._learner.state(),
                StateSpec("average", (adapter.classes,)),
                StateSpec("known", ()),
            ),
            hyper=(
                *self._learner.hyper(lr, ema),
                Hyper("margin", margin, "largest entropy of a reliable sample, in units of ln C", 0.0, 1.0),
                Hyper(
                    "redundancy",
                    redundancy or redundancy_of(adapter.classes),
                    "largest cosine to the average accepted prediction",
                    0.0,
                    1.0,
                ),
                *self._more_hyper(),
            ),
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
        """Select, weigh, one step; the prediction is the one made before it."""
        setting = self.spec.unpack_hyper(hyper)
        classes = self.adapter.classes
        with torch.enable_grad():
            tensors, out = self._learner.forward(theta, batch.x, setting)
            per_sample = entropy(out.logits)
            fixed, probabilities = per_sample.detach(), out.logits.detach().softmax(1)
            taken = (
                batch.weight
                * reliable(fixed, setting["margin"], classes)
                * novel(probabilities, state["average"], state["known"], setting["redundancy"])
            )
            factor = torch.exp(setting["margin"] * math.log(classes) - fixed)
            loss = weighted_mean(factor * per_sample, taken) + self._pull(tensors, anchor, setting)
            grad = gradient(loss, self.adapter, tensors)
        new = self._learner.update(
            grad, theta, state, setting, out, learns=taken.sum() > 0, seen=batch.weight.sum() > 0
        )
        figures = report(loss, fixed, taken, grad, new.theta - theta, new.statistics_gap)
        average = follow_average(probabilities, taken, state)
        return Step(out.logits.detach(), new.theta, {**new.state, **average}, figures)

    def _more_hyper(self) -> tuple[Hyper, ...]:
        return ()

    def _pull(
        self, tensors: Mapping[str, Tensor], anchor: Mapping[str, Tensor], setting: Mapping[str, Tensor]
    ) -> Tensor:
        return torch.zeros(())


class Eata(Eta):
    """ETA with an elastic pull: + ``alpha`` * sum F (theta - theta_0)^2 over the trained part.

    F is the Fisher information of each trained value, estimated once from unlabelled source images and kept in
    the anchor: the mean over batches of the squared gradient of the batch's mean cross-entropy against its own
    predictions. It is the square of an average, so its scale belongs to the batch size it was made with, and
    ``alpha`` with it (1 for CIFAR-10, 2000 for ImageNet at batch 64). ``alpha`` 0 stands for the published
    value for the number of classes. Without source images the method is refused: it would be ETA in silence.

    Trained: norm affine. Forwards / backwards per sample: 1 / 1. Needs source data: about 500 unlabelled
    images, once, when the bundle is built. Returns the logits of theta *before* the update.

    Defaults: as ETA's, ``alpha`` by the number of classes on every architecture.

    Source: Niu et al., ICML 2022, eq. 7 and 8.
    """

    name = "eata"

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
        alpha: float = 0.0,
        statistics: StatisticsMode = "batch",
    ) -> None:
        self._alpha = alpha or (1.0 if adapter.classes <= 100 else 2000.0)
        self._fisher: Tensor | None = None
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

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Estimates the Fisher information from unlabelled source images.

        Args:
            batches: x [batch, ...] each; 64 images in each for the published ``alpha``.

        Raises:
            ValueError: there is no batch.
        """
        theta = self.adapter.source_theta().to(self.adapter.dtype)
        setting = self.spec.unpack_hyper(self.spec.default_hyper().to(theta.dtype))
        total, count = torch.zeros(self.adapter.trained, dtype=theta.dtype), 0
        for x in batches:
            with torch.enable_grad():
                tensors, out = self._learner.forward(theta, x, setting)
                loss = F.cross_entropy(out.logits, out.logits.detach().argmax(1))
                grad = gradient(loss, self.adapter, tensors)
            total, count = total + grad * grad, count + 1
        if not count:
            raise ValueError("eata needs source images to estimate the Fisher information from")
        self._fisher = total / count

    def anchor(self) -> dict[str, Tensor]:
        """``theta0`` [P] and ``eata.fisher`` [T].

        Raises:
            ValueError: `calibrate` was not called.
        """
        if self._fisher is None:
            raise ValueError("eata needs source images to estimate the Fisher information from")
        return {"theta0": self.adapter.source_theta(), "eata.fisher": self._fisher.to(torch.float32)}

    def _more_hyper(self) -> tuple[Hyper, ...]:
        return (Hyper("alpha", self._alpha, "strength of the pull towards the source", 0.0),)

    def _pull(
        self, tensors: Mapping[str, Tensor], anchor: Mapping[str, Tensor], setting: Mapping[str, Tensor]
    ) -> Tensor:
        pulls = [
            (
                anchor["eata.fisher"][entry.offset : entry.offset + entry.size]
                * (
                    tensors[entry.name].reshape(-1)
                    - anchor["theta0"][entry.offset : entry.offset + entry.size]
                )
                ** 2
            ).sum()
            for entry in self.adapter.tensors
            if entry.trained
        ]
        return setting["alpha"] * torch.stack(pulls).sum()
