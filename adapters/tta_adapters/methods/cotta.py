"""CoTTA: a student learns from a slow teacher's mean over random views, and forgets a little of what it learned."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tta_adapters.augment import image_shape, random_views, uniforms_for
from tta_adapters.base import Batch, Hyper, MethodSpec, State, StateSpec, Step, gradient
from tta_adapters.learner import REPORT, Learner, StatisticsMode, followed, report
from tta_adapters.losses import cross_entropy, entropy, symmetric_cross_entropy, weighted_mean
from tta_adapters.network import NetworkAdapter
from tta_adapters.options import whole


class Cotta:
    """One optimiser step of the student towards the teacher's prediction, a step of the teacher towards the student.

    The target is the mean of the teacher's logits over ``views`` random views where the source is unsure of the
    batch (mean largest probability below ``confidence``), else the teacher's logits of the images as they are.
    A graph has one shape, so the views are always computed, as in the authors' CIFAR code. teacher' = ``decay``
    * teacher + (1 - ``decay``) * theta'. Then each trained value returns to the source with probability
    ``restore``.

    ``loss`` is "ce" (the authors' CIFAR code) or "sce", symmetric (their ImageNet code). The views' noise is
    one field for each step, shifted from view to view.

    Trained: what the adapter trains, the norm affine here; the paper trains every weight. Forwards / backwards
    per sample: 3 + ``views`` / 1. Needs source data: no (the source theta). Returns the *teacher's* logits,
    before the update, and the teacher serves between steps.

    Defaults: Adam 1e-3 as published for CIFAR-10 at batch 200, with ``confidence`` 0.92 (0.72 for CIFAR-100) and
    ``restore`` 0.01. On ImageNet: SGD 0.01 with Nesterov momentum at batch 64, ``loss`` sce, ``confidence`` 0.1,
    ``restore`` 0.001; that rate ruins a ViT, for which others take 0.005. A confidence is a probability: it has no unit
    of ln C.

    Source: Wang et al., Continual Test-Time Domain Adaptation, CVPR 2022, eq. 1 to 9.
    """

    def __init__(
        self,
        adapter: NetworkAdapter,
        *,
        optimizer: str = "adam",
        nesterov: bool = True,
        lr: float = 1e-3,
        ema: float = 0.1,
        views: float = 32.0,
        confidence: float = 0.92,
        decay: float = 0.999,
        restore: float = 0.01,
        loss: str = "ce",
        statistics: StatisticsMode = "batch",
    ) -> None:
        self._views = whole("cotta.views", views, 0)
        if loss not in ("ce", "sce"):
            raise ValueError(f"cotta.loss is {loss!r}: choose ce or sce")
        image = image_shape(f"cotta.views={views:g} needs", adapter.input_shape) if self._views else ()
        self.adapter = adapter
        self._symmetric = loss == "sce"
        self._learner = Learner(
            "cotta", adapter, optimizer=optimizer, nesterov=nesterov, statistics=statistics
        )
        self.spec = MethodSpec(
            "cotta",
            f"towards a teacher's mean over {self._views} views by {optimizer}, {statistics} statistics",
            state=(*self._learner.state(), StateSpec("teacher", (adapter.size,), "theta")),
            hyper=(
                *self._learner.hyper(lr, ema),
                Hyper("confidence", confidence, "source confidence from which no views are needed", 0.0, 1.0),
                Hyper("decay", decay, "share of the teacher that stays", 0.0, 1.0),
                Hyper("restore", restore, "probability of a value to return to the source", 0.0, 1.0),
            ),
            report=(*REPORT, "source_confidence"),
            min_batch=self._learner.min_batch,
            serve_vector="state:teacher",
            rand=adapter.trained + uniforms_for(self._views, image),
            forwards=3.0 + self._views,
            backwards=1.0,
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
        """Ask the teacher, learn, let the teacher follow, restore."""
        setting = self.spec.unpack_hyper(hyper)
        trained = self.adapter.trained
        with torch.no_grad():
            source = self._logits(anchor["theta0"], batch.x, setting)
            confidence = weighted_mean(source.softmax(1).amax(1), batch.weight)
            target = self._logits(state["teacher"], batch.x, setting)
            if self._views:
                mean = self._mean_over_views(state["teacher"], batch.x, rand[trained:], setting)
                target = torch.where(confidence < setting["confidence"], mean, target)
        with torch.enable_grad():
            tensors, out = self._learner.forward(theta, batch.x, setting)
            distance = symmetric_cross_entropy if self._symmetric else cross_entropy
            loss = weighted_mean(distance(out.logits, target), batch.weight)
            grad = gradient(loss, self.adapter, tensors)
        seen = batch.weight.sum() > 0
        new = self._learner.update(grad, theta, state, setting, out, learns=seen, seen=seen)
        learned, running = new.theta[:trained], new.theta[trained:]
        teacher = followed(state["teacher"], new.theta, trained, setting["decay"], seen)
        returns = seen & (rand[:trained] < setting["restore"])
        proposed = torch.cat([torch.where(returns, anchor["theta0"][:trained], learned), running])
        figures = report(
            loss,
            entropy(target),
            batch.weight,
            grad,
            proposed - theta,
            new.statistics_gap,
            confidence,
        )
        return Step(target, proposed, {**new.state, "teacher": teacher}, figures)

    def _logits(self, theta: Tensor, x: Tensor, setting: Mapping[str, Tensor]) -> Tensor:
        return self._learner.forward(theta, x, setting)[1].logits

    def _mean_over_views(
        self, theta: Tensor, x: Tensor, rand: Tensor, setting: Mapping[str, Tensor]
    ) -> Tensor:
        unit = self.adapter.to_unit(x)
        total = torch.zeros(())
        for view in random_views(unit, rand, self._views):
            total = total + self._logits(theta, self.adapter.from_unit(view), setting)
        return total / self._views
