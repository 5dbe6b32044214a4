"""What methods that learn by gradient share: a forward pass, one optimiser step, running statistics that follow.

A method decides what is minimised and by which samples; a :class:`Learner` does the rest the same way for all of them,
so that they differ in what their papers say and in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tta_adapters.base import Blend, Forward, Hyper, State, StateSpec, Statistics
from tta_adapters.network import NetworkAdapter
from tta_adapters.norm import statistics_gap
from tta_adapters.optim import optimiser
from tta_adapters.select import matches

StatisticsMode = Literal["batch", "running", "ema", "renorm"]

REPORT = ("loss", "entropy", "accepted", "grad_norm", "update_norm", "statistics_gap")
"""What every method that learns by gradient reports, in the order of :func:`report`."""


class Update(NamedTuple):
    """What one optimiser step proposes.

    Attributes:
        theta: [P] float32.
        state: the optimiser's arrays.
        statistics_gap: 0-d; see :func:`tta_adapters.norm.statistics_gap`.
    """

    theta: Tensor
    state: State
    statistics_gap: Tensor


class Learner:
    """An adapter, an optimiser and the statistics that the network is trained under.

    Args:
        name: of the method, for messages.
        adapter: whose theta is trained.
        optimizer: "sgd" or "adam".
        nesterov: Nesterov's form of SGD momentum.
        statistics: what BatchNorms normalise by. "batch": the batch's own statistics, while the running ones in theta
            follow at the rate ``ema``, so that the serving graph agrees with what the step learned under; "ema": the
            running ones after they have followed, with the gradient through the batch's part (RoTTA); "renorm": the
            running ones before they follow, with the gradient that the batch's own would have (CEMA, DELTA);
            "running": theta's, which stay. Only "batch" needs batches whose statistics mean something.
        skip: shell patterns of theta's tensors, separated by spaces, that are not trained.
        lr_batch: batch size that the learning rate of "sgd" is for: a smaller batch steps less in proportion, a larger
            one not more. 0: 64 for networks without BatchNorm, else 1, which scales nothing, as published. None: the
            method does not scale.

    Raises:
        ValueError: an unknown optimizer or statistics mode, a batch size below 1, or patterns that leave nothing to
            train.
    """

    def __init__(
        self,
        name: str,
        adapter: NetworkAdapter,
        *,
        optimizer: str,
        nesterov: bool,
        statistics: StatisticsMode = "batch",
        skip: str = "",
        lr_batch: float | None = None,
    ) -> None:
        if statistics not in get_args(StatisticsMode):
            raise ValueError(
                f"{name}.statistics is {statistics!r}: choose {', '.join(get_args(StatisticsMode))}"
            )
        self.adapter = adapter
        self.statistics = statistics
        self._optimiser = optimiser(optimizer, nesterov=nesterov)
        # The rate exists only where there is something to follow: a hyper entry without effect would be a lie.
        self.follows = statistics != "running" and adapter.has_running_statistics
        if lr_batch is not None and lr_batch and not lr_batch >= 1:
            raise ValueError(
                f"{name}.lr_batch is {lr_batch:g}: a number of samples from 1, or 0 for the published one"
            )
        # Adam's steps do not depend on the size of the gradient, and nobody scales them.
        self._lr_batch = None if optimizer != "sgd" else lr_batch
        if self._lr_batch == 0:
            self._lr_batch = 1.0 if adapter.has_running_statistics else 64.0
        self._mask = _mask(name, adapter, skip.split())

    @property
    def min_batch(self) -> int:
        """The smallest batch whose statistics mean anything."""
        return 2 if self.follows and self.statistics == "batch" else 1

    def hyper(self, lr: float, ema: float, **defaults: float) -> tuple[Hyper, ...]:
        """Settings of the optimiser, then the rate at which running statistics follow, where there are any.

        Args:
            lr: default of the learning rate.
            ema: default of the rate.
            defaults: of other settings of the optimiser, by name.
        """
        own = tuple(
            replace(entry, default=defaults.get(entry.name, entry.default))
            for entry in self._optimiser.hyper(lr)
        )
        if self._lr_batch is not None:
            words = "batch size that lr is for; smaller batches step less in proportion"
            own = (*own, Hyper("lr_batch", self._lr_batch, words, 1.0))
        follow = (Hyper("ema", ema, "rate at which running statistics follow the batch", 0.0, 1.0),)
        return own + (follow if self.follows else ())

    def state(self) -> tuple[StateSpec, ...]:
        """The optimiser's arrays."""
        return self._optimiser.init(self.adapter.trained)

    def forward(
        self, theta: Tensor, x: Tensor, setting: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Forward]:
        """The named tensors of theta [P], trained ones as leaves, and one pass under the learner's statistics.

        Args:
            theta: [P].
            x: [batch, ...].
            setting: hyper values by name; the rate ``ema`` is read where statistics are "ema".
        """
        tensors = self.adapter.unpack(theta)
        return tensors, self.run(tensors, x, setting)

    def run(
        self,
        tensors: Mapping[str, Tensor],
        x: Tensor,
        setting: Mapping[str, Tensor],
        samples: Tensor | None = None,
        forward: Callable[..., Forward] | None = None,
    ) -> Forward:
        """As :meth:`forward`, with theta given by name: another pass that the same gradient goes through.

        Args:
            tensors: theta by name.
            x: [batch, ...].
            setting: hyper values by name.
            samples: [batch], >= 0, how much each counts in the batch's statistics, not all 0; where these are
                "ema" or "batch".
            forward: the adapter's own, with further arguments bound; by default as it is.
        """
        mode = self.statistics
        statistics: Statistics
        if mode == "ema":
            rate = setting["ema"] if self.follows else torch.zeros(())
            statistics = rate if samples is None else Blend(rate, samples)
        elif mode == "batch" and samples is not None:
            statistics = Blend(torch.ones(()), samples)
        else:
            statistics = mode
        return (forward or self.adapter.forward)(tensors, x, statistics=statistics)

    def masked(self, grad: Tensor) -> Tensor:
        """The gradient [T] with 0 where nothing is trained."""
        return grad if self._mask is None else grad * self._mask

    def update(
        self,
        grad: Tensor,
        theta: Tensor,
        state: State,
        setting: Mapping[str, Tensor],
        out: Forward,
        *,
        learns: Tensor,
        seen: Tensor,
    ) -> Update:
        """One optimiser step on the trained part; the statistics follow the batch.

        Args:
            grad: [T] of the objective, already :meth:`masked`.
            theta: [P], before the step.
            state: with the optimiser's arrays, and maybe others.
            setting: hyper values by name.
            out: the pass whose statistics are followed.
            learns: 0-d bool: whether any sample takes part in the objective; else theta's trained part and the
                optimiser's arrays stay as they are.
            seen: 0-d bool: whether any sample was accepted at all; else the statistics stay as well.
        """
        delta, moved = self._optimiser.update(grad, state, setting)
        if self._lr_batch is not None:
            share = torch.ones_like(out.logits[:, 0]).detach().sum() / setting["lr_batch"]
            delta = delta * torch.minimum(share, torch.ones_like(share))
        trained, running = theta[: self.adapter.trained], theta[self.adapter.trained :]
        trained = torch.where(learns, trained + self.masked(delta), trained)
        gap = torch.zeros(())
        if self.follows:
            observed = self.adapter.batch_statistics(out.statistics)
            gap = statistics_gap(running, observed)
            rate = setting["ema"] * seen.to(theta.dtype)
            running = (1 - rate) * running + rate * observed
        kept = {key: torch.where(learns, moved[key], state[key]) for key in moved}
        return Update(torch.cat([trained, running]), kept, gap)


def followed(teacher: Tensor, student: Tensor, trained: int, decay: Tensor, seen: Tensor) -> Tensor:
    """A teacher [P] that has come nearer to the student [P]: its trained part slowly, its statistics at once.

    Args:
        teacher: before.
        student: after its step.
        trained: T, length of the trained part.
        decay: 0-d, share of the teacher that stays.
        seen: 0-d bool: whether any sample was accepted; else the teacher stays as it is.
    """
    slow = decay * teacher[:trained] + (1 - decay) * student[:trained]
    return torch.where(seen, torch.cat([slow, student[trained:]]), teacher)


def report(
    loss: Tensor,
    entropies: Tensor,
    taken: Tensor,
    grad: Tensor,
    moved: Tensor,
    gap: Tensor,
    *more: Tensor,
) -> Tensor:
    """The report vector [6 + more], detached.

    Args:
        loss: 0-d.
        entropies: [batch].
        taken: [batch], above 0 for samples that take part in the objective.
        grad: [T].
        moved: [P], theta' - theta.
        gap: 0-d, the statistics gap.
        more: 0-d each, what the method reports beside these.
    """
    return torch.stack(
        [
            loss.detach(),
            entropies.detach().mean(),
            (taken > 0).to(moved.dtype).mean(),
            torch.linalg.vector_norm(grad),
            torch.linalg.vector_norm(moved),
            gap,
            *more,
        ]
    )


def _mask(name: str, adapter: NetworkAdapter, patterns: list[str]) -> Tensor | None:
    """[T] of 1 for values that are trained and 0 for those that a pattern leaves out; None for no pattern."""
    if not patterns:
        return None
    trained = [entry for entry in adapter.tensors if entry.trained]
    pieces = [torch.full((entry.size,), float(not matches(entry.name, patterns))) for entry in trained]
    mask = torch.cat(pieces)
    if not mask.any():
        raise ValueError(f"{name}.skip={' '.join(patterns)!r} leaves none of {len(trained)} tensors to train")
    return mask
