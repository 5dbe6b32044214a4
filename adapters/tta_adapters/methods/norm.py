"""Norm: batch statistics in place of the source's, nothing learned by gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tta_adapters.base import Batch, Hyper, MethodSpec, State, Step
from tta_adapters.losses import entropy
from tta_adapters.network import NetworkAdapter
from tta_adapters.norm import statistics_gap
from tta_adapters.select import SelectionError


class Norm:
    """Normalises by a blend of running and batch statistics and lets the running ones follow the stream.

    used = (1 - blend) * running + blend * batch;  running' = (1 - ema) * running + ema * batch.
    blend 1 is BN-1 (plain batch statistics); ema 0 with a small blend is BN-alpha with the source as prior;
    blend = ema is a running average that includes the present batch. Variances are biased.

    Trained: nothing; theta's statistics move. Forwards / backwards per sample: 1 / 0. Needs source data: no.
    Returns the logits computed with the blended statistics of this step.

    Defaults: the batch alone, for batches of 16 and more of any BatchNorm network; ``blend`` 0.1 for single images.

    Source: Schneider et al., Improving robustness against common corruptions by covariate shift adaptation, NeurIPS
    2020, section 3; Nado et al., Evaluating Prediction-Time Batch Normalization, 2020.
    """

    def __init__(self, adapter: NetworkAdapter, *, blend: float = 1.0, ema: float = 0.1) -> None:
        if not adapter.has_running_statistics:
            raise SelectionError(
                "method norm moves BatchNorm statistics and this network has none: "
                "use tent, which trains the affine parameters of any normalisation layer"
            )
        self.adapter = adapter
        self.spec = MethodSpec(
            "norm",
            "batch statistics blended with the running ones, no gradient",
            hyper=(
                Hyper("blend", blend, "share of the batch's statistics in the normalisation", 0.0, 1.0),
                Hyper("ema", ema, "rate at which running statistics follow the batch", 0.0, 1.0),
            ),
            report=("entropy", "accepted", "statistics_gap", "update_norm"),
            min_batch=1,
            forwards=1.0,
            backwards=0.0,
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
        """One pass; theta' differs from theta in the statistics only."""
        setting = self.spec.unpack_hyper(hyper)
        with torch.no_grad():
            tensors = self.adapter.unpack(theta)
            out = self.adapter.forward(tensors, batch.x, statistics=setting["blend"])
            rate = setting["ema"] * (batch.weight.sum() > 0).to(theta.dtype)
            running, observed = (
                theta[self.adapter.trained :],
                self.adapter.batch_statistics(out.statistics),
            )
            proposed = torch.cat([theta[: self.adapter.trained], (1 - rate) * running + rate * observed])
            report = torch.stack(
                [
                    entropy(out.logits).mean(),
                    (batch.weight > 0).to(theta.dtype).mean(),
                    statistics_gap(running, observed),
                    torch.linalg.vector_norm(proposed - theta),
                ]
            )
        return Step(out.logits, proposed, {}, report)
