"""Optimisers as pure (init, update) pairs over the trained part of theta.

Each is a value: ``init`` names its state arrays, ``update`` maps (gradient, state, hyper) to (delta, state'), and the
caller adds the delta. Settings that change nothing in the graph's structure (learning rate, momentum, betas) are
entries of the hyper vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tta_adapters.base import Hyper, State, StateSpec


class Optimiser(Protocol):
    """A pure optimiser."""

    def hyper(self, lr: float) -> tuple[Hyper, ...]:
        """Its run-time settings, with ``lr`` as the default learning rate."""
        ...

    def init(self, size: int) -> tuple[StateSpec, ...]:
        """Its state arrays for ``size`` trained values."""
        ...

    def update(self, grad: Tensor, state: State, hyper: Mapping[str, Tensor]) -> tuple[Tensor, State]:
        """Returns (delta to add to the trained values [T], next state)."""
        ...


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent with momentum and no dampening, torch's convention.

    v' = mu * v + g;  delta = -lr * v'  or, with Nesterov, -lr * (g + mu * v').

    Source: Sutskever et al., On the importance of initialization and momentum in deep learning, ICML 2013, in the
    form of torch.optim.SGD (the first step equals plain gradient descent because v starts at zero).
    """

    momentum: float = 0.9
    nesterov: bool = False

    def hyper(self, lr: float) -> tuple[Hyper, ...]:
        """Learning rate and momentum."""
        return (
            Hyper("lr", lr, "learning rate", low=0.0),
            Hyper("momentum", self.momentum, "momentum of SGD", low=0.0, high=1.0),
        )

    def init(self, size: int) -> tuple[StateSpec, ...]:
        """One velocity per trained value."""
        return (StateSpec("momentum", (size,)),)

    def update(self, grad: Tensor, state: State, hyper: Mapping[str, Tensor]) -> tuple[Tensor, State]:
        """See the class; all arrays [T] float32."""
        velocity = hyper["momentum"] * state["momentum"] + grad
        direction = grad + hyper["momentum"] * velocity if self.nesterov else velocity
        return -hyper["lr"] * direction, {"momentum": velocity}


@dataclass(frozen=True)
class Adam:
    """Adam with bias correction, no weight decay.

    m' = b1 m + (1 - b1) g;  v' = b2 v + (1 - b2) g^2;  delta = -lr * (m' / (1 - b1^t)) / (sqrt(v' / (1 - b2^t)) + eps).

    Source: Kingma and Ba, Adam: A Method for Stochastic Optimization, ICLR 2015, algorithm 1.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def hyper(self, lr: float) -> tuple[Hyper, ...]:
        """Learning rate, betas and epsilon."""
        return (
            Hyper("lr", lr, "learning rate", low=0.0),
            Hyper("beta1", self.beta1, "decay of Adam's first moment", low=0.0, high=1.0),
            Hyper("beta2", self.beta2, "decay of Adam's second moment", low=0.0, high=1.0),
            Hyper("eps", self.eps, "Adam's denominator offset", low=0.0),
        )

    def init(self, size: int) -> tuple[StateSpec, ...]:
        """Two moments, and the running powers of the betas instead of a step count.

        Powers start at 1 and are multiplied by beta at each step, so bias correction needs no integer and no
        ``pow`` in the compiled graph.
        """
        return (
            StateSpec("moment1", (size,)),
            StateSpec("moment2", (size,)),
            StateSpec("power1", (), "ones"),
            StateSpec("power2", (), "ones"),
        )

    def update(self, grad: Tensor, state: State, hyper: Mapping[str, Tensor]) -> tuple[Tensor, State]:
        """See the class; moments [T] float32, powers 0-d."""
        beta1, beta2 = hyper["beta1"], hyper["beta2"]
        moment1 = beta1 * state["moment1"] + (1 - beta1) * grad
        moment2 = beta2 * state["moment2"] + (1 - beta2) * grad * grad
        power1, power2 = state["power1"] * beta1, state["power2"] * beta2
        denominator = torch.sqrt(moment2 / (1 - power2)) + hyper["eps"]
        delta = -hyper["lr"] * (moment1 / (1 - power1)) / denominator
        return delta, {"moment1": moment1, "moment2": moment2, "power1": power1, "power2": power2}


def optimiser(name: str, *, nesterov: bool = False) -> Optimiser:
    """Looks an optimiser up by name.

    Raises:
        ValueError: the name is neither "sgd" nor "adam".
    """
    if name == "sgd":
        return Sgd(nesterov=nesterov)
    if name == "adam":
        return Adam()
    raise ValueError(f"unknown optimizer {name!r}: choose sgd or adam")
