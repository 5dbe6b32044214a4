"""RoTTA: a teacher with robust statistics, and a student that learns from it on a balanced memory of recent images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tta_adapters.augment import image_shape, random_views, uniforms_for
from tta_adapters.base import Batch, Forward, Hyper, MethodSpec, State, StateSpec, Step, gradient
from tta_adapters.learner import REPORT, Learner, report
from tta_adapters.losses import cross_entropy, entropy
from tta_adapters.memory import BalancedMemory, timeliness
from tta_adapters.network import NetworkAdapter

TINY = 1e-6  # keeps the logarithm of a probability that rounds to 0 finite, as published
LARGEST = 4096  # places of a memory


class Rotta:
    """Answers with a slow teacher; learns on a memory that stays balanced where the stream is not.

    Each image enters a memory of ``memory`` places with the teacher's prediction and its entropy (its rule is in
    ``tta_adapters/memory.py``). After every ``memory`` images: L = mean over stored images s of
    w * H(student(view(s)), softmax(teacher(s))), with w = exp(-age / N) / (1 + exp(-age / N)) and a random view as
    CoTTA's; one optimiser step of the student, teacher' = (1 - ``follow``) * teacher + ``follow`` * student. Both
    normalise by statistics that follow the memory at the rate ``ema`` before they are used, each by its own.

    Where it departs from the paper: a batch of more than ``memory`` images is one step, not several, and a step falls
    on the end of a batch. Its memory may hold fewer images than it has places; the empty ones pass through the network
    and count nowhere, statistics included. One view serves the whole memory. A graph has one shape, so a step on a
    batch smaller than the memory computes an update that it may not use: its cost below is that of batches of
    ``memory`` images, and 1 + 2 * ``memory`` / batch forwards in general.

    The memory belongs to the state of each stream: 64 images of 3x32x32 are 0.8 MB there, of 3x224x224 39 MB.

    Works on single images and on sorted streams; made for BatchNorm. Other networks have no statistics to follow and
    learn their norm affine all the same.

    Trained: norm affine. Forwards / backwards per sample: 3 / 1. Needs source data: no. Returns the *teacher's* logits,
    before the update, and the teacher serves between steps.

    Defaults, as published for CIFAR-10 and ResNets: Adam 1e-3, rates 0.05 and 0.001, 64 places.

    Source: Yuan et al., Robust Test-Time Adaptation in Dynamic Scenarios, CVPR 2023, eq. 2 to 9.
    """

    def __init__(
        self,
        adapter: NetworkAdapter,
        *,
        optimizer: str = "adam",
        nesterov: bool = True,
        lr: float = 1e-3,
        ema: float = 0.05,
        memory: float = 64.0,
        follow: float = 0.001,
    ) -> None:
        if not (2 <= memory <= LARGEST and memory == int(memory)):
            raise ValueError(f"rotta.memory is {memory:g}: a whole number from 2 to {LARGEST}")
        image = image_shape("rotta keeps", adapter.input_shape)
        self.adapter = adapter
        self._places = int(memory)
        self._memory = BalancedMemory(self._places, adapter.classes, image)
        self._learner = Learner("rotta", adapter, optimizer=optimizer, nesterov=nesterov, statistics="ema")
        self.spec = MethodSpec(
            "rotta",
            f"towards a teacher on a balanced memory of {self._places} images by {optimizer}, robust statistics",
            state=(
                *self._learner.state(),
                StateSpec("teacher", (adapter.size,), "theta"),
                *self._memory.state(),
                StateSpec("count", ()),
            ),
            hyper=(
                *self._learner.hyper(lr, ema),
                Hyper("follow", follow, "share of the student that the teacher takes over", 0.0, 1.0),
            ),
            report=(*REPORT, "filled", "learned"),
            serve_vector="state:teacher",
            rand=uniforms_for(1, image),
            forwards=3.0,
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
        """Ask the teacher, remember, and where it is time learn from what is remembered."""
        setting = self.spec.unpack_hyper(hyper)
        accepted = batch.weight > 0
        with torch.no_grad():
            answer = self.adapter.forward(self.adapter.unpack(state["teacher"]), batch.x).logits
            p = answer.softmax(1)
            uncertainty = -(p * torch.log(p + TINY)).sum(1)
            memory = self._memory.after(state, batch.x, answer.argmax(1), uncertainty, accepted)
            count = state["count"] + accepted.to(theta.dtype).sum()
            due = count >= self._places
            # An empty memory has no statistics; then nothing is due, and what is computed is not used.
            filled = memory["memory_filled"]
            counts = torch.where(filled.sum() > 0, filled, torch.ones_like(filled))
            images = memory["memory_image"]
            slow = self._learner.run(self.adapter.unpack(state["teacher"]), images, setting, counts)
            view = self.adapter.from_unit(next(random_views(self.adapter.to_unit(images), rand, 1)))
        with torch.enable_grad():
            tensors = self.adapter.unpack(theta)
            out = self._learner.run(tensors, view, setting, counts)
            weight = timeliness(memory["memory_age"], self._places) * counts / counts.sum()
            loss = (weight * cross_entropy(out.logits, slow.logits)).sum()
            grad = gradient(loss, self.adapter, tensors)
        new = self._learner.update(grad, theta, state, setting, out, learns=due, seen=due)
        teacher = torch.where(
            due, self._followed(state["teacher"], new.theta, slow, setting), state["teacher"]
        )
        learned = due.to(theta.dtype)
        figures = report(
            learned * loss,
            entropy(answer),
            batch.weight,
            learned * grad,
            new.theta - theta,
            learned * new.statistics_gap,
            filled.mean(),
            learned,
        )
        left = torch.where(due, count - self._places * torch.floor(count / self._places), count)
        return Step(answer, new.theta, {**new.state, **memory, "teacher": teacher, "count": left}, figures)

    def _followed(
        self, teacher: Tensor, student: Tensor, out: Forward, setting: Mapping[str, Tensor]
    ) -> Tensor:
        """The teacher [P] a little nearer to the student, with statistics that followed its own pass."""
        trained, share = self.adapter.trained, setting["follow"]
        learned = (1 - share) * teacher[:trained] + share * student[:trained]
        running = teacher[trained:]
        if self._learner.follows:
            rate = setting["ema"]
            running = (1 - rate) * running + rate * self.adapter.batch_statistics(out.statistics)
        return torch.cat([learned, running])
