"""ViDA: the branches beside frozen layers learn from a teacher, weighed for each sample by how sure the teacher is."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from tta_adapters.augment import image_shape, random_views, uniforms_for
from tta_adapters.base import Batch, Hyper, MethodSpec, State, StateSpec, Step, gradient
from tta_adapters.learner import REPORT, Learner, StatisticsMode, followed, report
from tta_adapters.losses import cross_entropy, entropy, symmetric_cross_entropy, weighted_mean
from tta_adapters.network import NetworkAdapter
from tta_adapters.select import SelectionError
from tta_adapters.vida import Scales, VidaAdapter


class Vida:
    """One optimiser step of the student's branches towards the teacher, a step of the teacher towards the student.

    How unsure the teacher is of a sample, u = ``spread`` * mean over classes of the variance of its logits over
    ``views`` random views, sets how much each branch says for this sample, in student and teacher alike: from
    ``threshold`` on high = 1 + u and low = 1 - u, below it high = 1 - u and low = 1 + u (u counts as 1 at most).
    ``views=0`` leaves both at 1. Which branches there are is the adapter's matter (``--adapter-set high=0``).

    The backbone is frozen, as the paper says; the authors' code trains it. The paper measures u by passes with dropout;
    their code by views, as here, but as one number for the whole batch, and never sets the high branch's scale. Their
    CIFAR code returns some values to the source in each step, which is left out. The graph that serves between steps
    knows no views: its branches stand at 1.

    ``loss`` is "sce", symmetric (the authors' ImageNet code), or "ce" (their CIFAR code), whose gradient is zero where
    student and teacher agree, as they do at the start.

    The full method is not the best where we measured it ([a small transformer](results.md#vida-and-its-parts)). What
    the branches gain, 0.3 points of 46, they have from the warm-up. Beside that start the error rises along the
    stream ([curves](img/vida-continual.svg)): by 0.1 points with both branches, by 0.2 with the views besides, by 1.7
    with the low-rank ones alone. The teacher is wrong for almost every second image there, and the student learns
    from nothing else. The views hardly tell samples apart: u is 0.05 on average and reaches ``threshold`` for none,
    so all get nearly the same scales. Look at ``unsure`` in the report: where it stays at 0 or 1, choose ``spread``
    and ``threshold`` anew, or save the passes with ``views=0``.

    Trained: the branches of the adapter `vida`. Forwards / backwards per sample: 2 + ``views`` / 1. Needs source data:
    for the warm-up of the adapter. Returns the *teacher's* logits, before the update, and the teacher serves between
    steps.

    Source: Liu et al., ViDA: Homeostatic Visual Domain Adapter for Continual Test Time Adaptation, ICLR 2024,
    sections 3.2 and 3.3.
    """

    def __init__(
        self,
        adapter: NetworkAdapter,
        *,
        optimizer: str = "adam",
        nesterov: bool = True,
        lr: float = 1e-4,
        ema: float = 0.1,
        views: float = 10.0,
        threshold: float = 0.2,
        spread: float = 0.1,
        decay: float = 0.999,
        loss: str = "sce",
        statistics: StatisticsMode = "batch",
    ) -> None:
        if not isinstance(adapter, VidaAdapter):
            raise SelectionError(f"the method vida works on the adapter vida, this one is {adapter.name}")
        if views < 0 or views == 1 or views != int(views):
            raise ValueError(f"vida.views is {views:g}: 0, or a whole number from 2")
        if loss not in ("ce", "sce"):
            raise ValueError(f"vida.loss is {loss!r}: choose ce or sce")
        image = image_shape(f"vida.views={views:g} needs", adapter.input_shape) if views else ()
        self.adapter: VidaAdapter = adapter
        self._views, self._symmetric = int(views), loss == "sce"
        self._learner = Learner(
            "vida", adapter, optimizer=optimizer, nesterov=nesterov, statistics=statistics
        )
        scales = (
            Hyper("threshold", threshold, "uncertainty from which the high-rank branch says more", 0.0),
            Hyper("spread", spread, "factor from the variance of logits to uncertainty", 0.0),
        )
        self.spec = MethodSpec(
            "vida",
            f"branches towards a teacher, weighed by {self._views} views, by {optimizer}, {statistics} statistics",
            state=(*self._learner.state(), StateSpec("teacher", (adapter.size,), "theta")),
            hyper=(
                *self._learner.hyper(lr, ema),
                *(scales if self._views else ()),
                Hyper("decay", decay, "share of the teacher that stays", 0.0, 1.0),
            ),
            report=(*REPORT, "uncertainty", "unsure"),
            min_batch=self._learner.min_batch,
            serve_vector="state:teacher",
            rand=uniforms_for(self._views, image),
            forwards=2.0 + self._views,
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
        """Ask the teacher how sure it is, weigh the branches, learn, let the teacher follow."""
        setting = self.spec.unpack_hyper(hyper)
        with torch.no_grad():
            teaching = self.adapter.unpack(state["teacher"])
            scales, unsureness = self._scales(teaching, batch.x, rand, setting)
            forward = functools.partial(self.adapter.forward, scales=scales)
            target = self._learner.run(teaching, batch.x, setting, forward=forward).logits
        with torch.enable_grad():
            tensors = self.adapter.unpack(theta)
            out = self._learner.run(tensors, batch.x, setting, forward=forward)
            distance = symmetric_cross_entropy if self._symmetric else cross_entropy
            loss = weighted_mean(distance(out.logits, target), batch.weight)
            grad = gradient(loss, self.adapter, tensors)
        seen = batch.weight.sum() > 0
        new = self._learner.update(grad, theta, state, setting, out, learns=seen, seen=seen)
        teacher = followed(state["teacher"], new.theta, self.adapter.trained, setting["decay"], seen)
        figures = report(
            loss,
            entropy(target),
            batch.weight,
            grad,
            new.theta - theta,
            new.statistics_gap,
            unsureness.mean(),
            (unsureness >= setting["threshold"]).to(theta.dtype).mean() if self._views else unsureness.mean(),
        )
        return Step(target, new.theta, {**new.state, "teacher": teacher}, figures)

    def _scales(
        self, teaching: Mapping[str, Tensor], x: Tensor, rand: Tensor, setting: Mapping[str, Tensor]
    ) -> tuple[Scales | None, Tensor]:
        """What the branches say, and how unsure the teacher is [batch]."""
        if not self._views:
            return None, torch.zeros_like(x.flatten(1)[:, 0], dtype=self.adapter.dtype)
        unit = self.adapter.to_unit(x)
        logits = torch.stack(
            [
                self._learner.run(teaching, self.adapter.from_unit(view), setting).logits
                for view in random_views(unit, rand, self._views)
            ]
        )
        centred = logits - logits.mean(0)
        variance = (centred * centred).sum(0) / (self._views - 1)
        unsureness = setting["spread"] * variance.mean(1)
        u = torch.minimum(unsureness, torch.ones_like(unsureness))
        more = torch.where(unsureness >= setting["threshold"], u, -u)
        return Scales(low=1 - more, high=1 + more), unsureness
