"""RoTTA once more, in eager torch and for the tests alone: modules with robust statistics, a memory of lists, one image
after the other. No code is shared with tta_adapters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float32]


class RobustNorm(nn.Module):
    """BatchNorm2d by statistics that follow the batch before they are used, in training; by stored ones otherwise."""

    def __init__(self, source: nn.BatchNorm2d, rate: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(source.weight.clone()), nn.Parameter(source.bias.clone())
        self.mean, self.var = source.running_mean.clone(), source.running_var.clone()
        self.rate, self.eps = rate, source.eps

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mean, self.var
        if self.training:
            own_mean, own_var = x.mean([0, 2, 3]), x.var([0, 2, 3], unbiased=False)
            mean = (1 - self.rate) * mean + self.rate * own_mean
            var = (1 - self.rate) * var + self.rate * own_var
            self.mean, self.var = mean.detach(), var.detach()
        shape = (1, -1, 1, 1)
        y = (x - mean.reshape(shape)) / torch.sqrt(var.reshape(shape) + self.eps)
        return y * self.weight.reshape(shape) + self.bias.reshape(shape)


def robust(network: nn.Module, rate: float) -> nn.Module:
    """A copy with robust statistics, only its norm layers trained."""
    network = copy.deepcopy(network).requires_grad_(False)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, RobustNorm(child, rate))
    for module in network.modules():
        if isinstance(module, (RobustNorm, nn.GroupNorm, nn.LayerNorm)):
            module.requires_grad_(True)
    return network


@dataclass
class Item:
    """One remembered image."""

    image: Tensor
    label: int
    uncertainty: float
    age: int = 0


class ListMemory:
    """The published memory: a list for each class."""

    def __init__(self, capacity: int, classes: int) -> None:
        self.capacity, self.classes = capacity, classes
        self.items: list[list[Item]] = [[] for _ in range(classes)]
        self.evicted = self.dropped = 0

    def score(self, item: Item) -> float:
        return 1 / (1 + math.exp(-item.age / self.capacity)) + item.uncertainty / math.log(self.classes)

    def add(self, item: Item) -> None:
        mine = self.items[item.label]
        room = True
        if len(mine) < self.capacity / self.classes:
            if sum(map(len, self.items)) >= self.capacity:
                most = max(map(len, self.items))
                room = self.evict([c for c in range(self.classes) if len(self.items[c]) == most], item)
        else:
            room = self.evict([item.label], item)
        if room:
            self.items[item.label].append(item)
        else:
            self.dropped += 1
        for held in self.all():
            held.age += 1

    def evict(self, classes: list[int], item: Item) -> bool:
        worst = max((held for c in classes for held in self.items[c]), key=self.score)
        if self.score(worst) <= self.score(item):
            return False
        self.items[worst.label] = [held for held in self.items[worst.label] if held is not worst]
        self.evicted += 1
        return True

    def all(self) -> list[Item]:
        return [held for items in self.items for held in items]


class EagerRotta:
    """Yuan et al., CVPR 2023."""

    view: Callable[[Tensor], Tensor]

    def __init__(
        self,
        network: nn.Module,
        *,
        lr: float,
        classes: int,
        rate: float = 0.05,
        follow: float = 0.001,
        capacity: int = 64,
        adam: bool = True,
    ) -> None:
        self.student, self.teacher = robust(network, rate), robust(network, rate)
        self.parameters = [value for value in self.student.parameters() if value.requires_grad]
        self.slow = [value for value in self.teacher.parameters() if value.requires_grad]
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(self.parameters, lr=lr)
            if adam
            else torch.optim.SGD(self.parameters, lr=lr, momentum=0.9)
        )
        self.memory = ListMemory(capacity, classes)
        self.follow, self.capacity, self.count, self.updates = follow, capacity, 0, 0

    def theta(self) -> Array:
        return torch.cat([value.detach().reshape(-1) for value in self.parameters]).numpy()

    def teacher_theta(self) -> Array:
        return torch.cat([value.detach().reshape(-1) for value in self.slow]).numpy()

    def step(self, x: Array) -> Array:
        images = torch.from_numpy(x)
        self.teacher.eval()
        with torch.no_grad():
            answer = self.teacher(images)
        p = answer.softmax(1)
        uncertain = -(p * torch.log(p + 1e-6)).sum(1)
        for image, label, u in zip(images, p.argmax(1).tolist(), uncertain.tolist(), strict=True):
            self.memory.add(Item(image, label, u))
            self.count += 1
            if self.count % self.capacity == 0:
                self.update()
        return answer.numpy()

    def update(self) -> None:
        held = self.memory.all()
        images = torch.stack([item.image for item in held])
        age = torch.tensor([item.age / self.capacity for item in held])
        weight = torch.exp(-age) / (1 + torch.exp(-age))
        self.student.train()
        self.teacher.train()
        with torch.no_grad():
            target = self.teacher(images).softmax(1)
        logits = self.student(self.view(images))
        loss = (weight * -(target * logits.log_softmax(1)).sum(1)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(self.slow, self.parameters, strict=True):
                slow.copy_((1 - self.follow) * slow + self.follow * fast)
        self.updates += 1
