"""A memory of recent samples, balanced over predicted classes, that forgets the old and the uncertain first."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tta_adapters.base import State, StateSpec
from tta_adapters.loop import Carry, fold

NOWHERE = -1.0  # below any score


class Memory(NamedTuple):
    """What the memory of N places knows of each, [N] float32 each, and where its image comes from.

    Attributes:
        source: index into the places before the batch, then the batch: [N + batch].
        label: predicted class.
        uncertainty: entropy of the prediction, nats.
        age: samples that came since, its own coming counted.
        filled: 1 where the place holds a sample; filled places come first.
    """

    source: Tensor
    label: Tensor
    uncertainty: Tensor
    age: Tensor
    filled: Tensor


class BalancedMemory:
    """Category-balanced sampling with timeliness and uncertainty, as arrays of fixed shape.

    One sample after the other: with the score 1 / (1 + exp(-age / N)) + u / ln C, a new one of a class that has fewer
    than N / C places takes a free place, or where there is none that of the highest score among the largest classes;
    one of a class that has its share takes that of the highest score of its class. Either only if that score is above
    its own; else it is not kept. Then everything in the memory is a sample older.

    Args:
        places: N.
        classes: C.
        shape: of one image.

    Source: Yuan et al., Robust Test-Time Adaptation in Dynamic Scenarios, CVPR 2023, section 3.3 and algorithm 1.
    """

    def __init__(self, places: int, classes: int, shape: tuple[int, ...]) -> None:
        self.places, self.classes = places, classes
        self._shape = shape

    def state(self) -> tuple[StateSpec, ...]:
        """The arrays; an empty memory is all zeros."""
        facts = [
            StateSpec(f"memory_{name}", (self.places,)) for name in ("label", "uncertainty", "age", "filled")
        ]
        return (StateSpec("memory_image", (self.places, *self._shape)), *facts)

    def after(self, state: State, x: Tensor, label: Tensor, uncertainty: Tensor, accepted: Tensor) -> State:
        """The arrays after a batch.

        Args:
            state: with the memory's arrays, and maybe others.
            x: [batch, ...], images as users send them.
            label: [batch] int64, predicted classes.
            uncertainty: [batch], nats.
            accepted: [batch] bool; others leave no trace.
        """
        images = state["memory_image"]
        dtype, count = images.dtype, x.shape[0]
        before = Memory(
            torch.arange(self.places).to(dtype),
            *(state[f"memory_{name}"] for name in ("label", "uncertainty", "age", "filled")),
        )
        index = torch.arange(count).to(dtype) + self.places
        new = Memory(
            *fold(self._insert, tuple(before), (index, label.to(dtype), uncertainty, accepted.to(dtype)))
        )
        kept = torch.cat([images, x.to(dtype)])[new.source.to(torch.int64)]
        return {
            "memory_image": kept,
            "memory_label": new.label,
            "memory_uncertainty": new.uncertainty,
            "memory_age": new.age,
            "memory_filled": new.filled,
        }

    def _insert(self, carry: Carry, sample: Carry) -> Carry:
        """One sample, (index, label, uncertainty, accepted), 0-d each."""
        now = Memory(*carry)
        index, label, uncertainty, accepted = sample
        filled = now.filled > 0
        scores = self._score(now.age, now.uncertainty)
        alike = (now.label[:, None] == now.label[None, :]) & filled[:, None] & filled[None, :]
        sizes = alike.to(scores.dtype).sum(1)
        mine = filled & (now.label == label)
        below = mine.to(scores.dtype).sum() < self.places / self.classes
        full = now.filled.sum() >= self.places
        # Written out: ONNX Runtime has no choice between truth values.
        among = (below & filled & (sizes == sizes.amax(0))) | (~below & mine)
        rivals = torch.where(among, scores, torch.full_like(scores, NOWHERE))
        wins = rivals.amax(0) > self._score(torch.zeros_like(uncertainty), uncertainty)
        free = below & ~full
        # A place is looked for along an axis of a matrix: TensorRT has no maximum over a vector.
        sought = torch.where(free, 1 - now.filled, rivals)
        place = sought[None].argmax(1)
        here = (torch.arange(self.places) == place) & (free | wins) & (accepted > 0)
        kept = torch.where(here, torch.ones_like(now.filled), now.filled)
        return (
            torch.where(here, index, now.source),
            torch.where(here, label, now.label),
            torch.where(here, uncertainty, now.uncertainty),
            torch.where(here, torch.zeros_like(now.age), now.age) + kept * accepted,
            kept,
        )

    def _score(self, age: Tensor, uncertainty: Tensor) -> Tensor:
        return torch.sigmoid(age / self.places) + uncertainty / math.log(self.classes)


def timeliness(age: Tensor, places: int) -> Tensor:
    """exp(-age / N) / (1 + exp(-age / N)): 1/2 for the newest, towards 0 for the oldest, [N]."""
    return torch.sigmoid(-age / places)
