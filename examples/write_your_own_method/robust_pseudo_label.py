"""A method of your own in one file: self-learning with pseudo-labels and a loss that forgives wrong ones.

Run it with `python examples/write_your_own_method/robust_pseudo_label.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tta_adapters import Batch, Hyper, MethodSpec, NormAdapter, State, Step, check_method
from tta_adapters.base import gradient
from tta_adapters.losses import weighted_mean
from tta_adapters.optim import optimiser


def generalised_cross_entropy(logits: Tensor, q: Tensor) -> Tensor:
    """(1 - p_y^q) / q with the network's own prediction as label y.

    q -> 0 is the cross entropy, q = 1 the mean absolute error, which a wrong label pulls at least.

    Args:
        logits: [batch, classes], unnormalised.
        q: 0-d, in (0, 1].

    Returns:
        [batch], between 0 and 1 / q.

    Source: Zhang and Sabuncu, Generalized Cross Entropy Loss, NeurIPS 2018, eq. 6.
    """
    p = torch.softmax(logits, dim=1).amax(dim=1)  # of the predicted class, which is the label
    return (1 - p**q) / q


class RobustPseudoLabel:
    """Minimises the generalised cross entropy of the network's own labels over the norm affine parameters.

    Source: Rusak et al., If your data distribution shifts, use self-learning, TMLR 2022, section 3 (RPL).
    """

    def __init__(self, adapter: NormAdapter, *, lr: float = 1e-3, q: float = 0.8, ema: float = 0.1) -> None:
        if not adapter.has_running_statistics:
            raise ValueError("robust-pseudo-label is written for networks with BatchNorm")
        self.adapter = adapter
        self._optimiser = optimiser("sgd")
        self.spec = MethodSpec(
            "robust-pseudo-label",
            "generalised cross entropy of hard pseudo-labels on norm affine",
            state=self._optimiser.init(adapter.trained),
            hyper=(
                *self._optimiser.hyper(lr),
                Hyper("q", q, "how forgiving the loss is: near 0 cross entropy, 1 most forgiving", 0.01, 1.0),
                Hyper("ema", ema, "rate at which running statistics follow the batch", 0.0, 1.0),
            ),
            report=("loss", "update_norm"),
            min_batch=2,
            forwards=1.0,
            backwards=1.0,
        )

    def anchor(self) -> dict[str, Tensor]:
        """Needs no facts of the source."""
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
        """Predict, one step on the loss, let the running statistics follow the batch."""
        setting = self.spec.unpack_hyper(hyper)
        with torch.enable_grad():
            tensors = self.adapter.unpack(theta)
            out = self.adapter.forward(tensors, batch.x, statistics="batch")
            loss = weighted_mean(generalised_cross_entropy(out.logits, setting["q"]), batch.weight)
            grad = gradient(loss, self.adapter, tensors)
        delta, moved = self._optimiser.update(grad, state, setting)

        trained, running = theta[: self.adapter.trained], theta[self.adapter.trained :]
        observed = self.adapter.batch_statistics(out.statistics)
        proposed = torch.cat([trained + delta, (1 - setting["ema"]) * running + setting["ema"] * observed])

        # A batch whose every sample was refused changes nothing, momentum included.
        alive = batch.weight.sum() > 0
        proposed = torch.where(alive, proposed, theta)
        kept = {name: torch.where(alive, moved[name], state[name]) for name in state}
        report = torch.stack([loss.detach(), torch.linalg.vector_norm(proposed - theta)])
        return Step(out.logits.detach(), proposed, kept, report)


if __name__ == "__main__":
    check_method(RobustPseudoLabel)
    print("RobustPseudoLabel keeps the contract of a method")
