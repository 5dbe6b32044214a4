"""LAME: no parameter changes; the batch's predictions are smoothed along its neighbourhoods."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tta_adapters.base import Batch, Hyper, MethodSpec, State, Step
from tta_adapters.losses import entropy
from tta_adapters.network import NetworkAdapter
from tta_adapters.options import whole

TINY = 1e-10  # keeps the logarithm of a probability that rounds to 0 finite


class Lame:
    """Laplacian adjusted maximum-likelihood estimation over one batch.

    With U = -log(p + 1e-10), features f of length 1 and affinities W_ij = exp(-|f_i - f_j|^2 / (2 s^2)), s the
    mean distance to the ``neighbours``-th neighbour (a sample is its own first): Y_0 = softmax(-U), Y <-
    softmax(-U + ``strength`` * W Y), a fixed number of times. The published code stops when the objective
    settles, which it does well before. A refused sample (weight 0) has no say in those of others.

    Theta stays the source's; what the step returns are log Y, whose softmax is Y. It helps where labels are
    correlated within a batch (video, sorted streams) and ruins streams where they are not.

    Trained: nothing. Forwards / backwards per sample: 1 / 0. Needs source data: no. Returns adjusted
    log-probabilities.

    Defaults: five neighbours, as published, for any architecture. No threshold, no learning rate.

    Source: Boudiaf et al., Parameter-free Online Test-time Adaptation, CVPR 2022, eq. 2 to 6.
    """

    def __init__(
        self,
        adapter: NetworkAdapter,
        *,
        neighbours: float = 5.0,
        iterations: float = 50.0,
        strength: float = 1.0,
    ) -> None:
        self.adapter = adapter
        self._neighbours = whole("lame.neighbours", neighbours, 2)
        self._iterations = whole("lame.iterations", iterations)
        self.spec = MethodSpec(
            "lame",
            "predictions smoothed over the batch's neighbourhoods, nothing learned",
            hyper=(Hyper("strength", strength, "weight of the neighbours' predictions", 0.0),),
            report=("entropy", "accepted", "changed"),
            trains=False,
            min_batch=self._neighbours,
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
        """One pass, then the iterations; theta is returned as it came."""
        setting = self.spec.unpack_hyper(hyper)
        with torch.no_grad():
            out = self.adapter.forward(self.adapter.unpack(theta), batch.x)
            unary = torch.log(out.logits.softmax(1) + TINY)
            affinity = self._affinity(out.features) * (batch.weight > 0).to(theta.dtype)[None, :]
            adjusted = unary.softmax(1)
            for _ in range(self._iterations):
                adjusted = (unary + setting["strength"] * (affinity @ adjusted)).softmax(1)
            logits = torch.log(adjusted + TINY)
            changed = (logits.argmax(1) != out.logits.argmax(1)).to(theta.dtype).mean()
            report = torch.stack([entropy(logits).mean(), (batch.weight > 0).to(theta.dtype).mean(), changed])
        return Step(logits, theta, {}, report)

    def _affinity(self, features: Tensor) -> Tensor:
        """[batch, batch] Gaussian affinities, 1 on the diagonal."""
        unit = features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + TINY)
        squared = (2 - 2 * (unit @ unit.t())).clamp(min=0)
        nearest = torch.topk(squared, self._neighbours, dim=1, largest=False).values[:, -1]
        width = torch.sqrt(nearest).mean()
        return torch.exp(-squared / (2 * width * width + TINY))
