"""Published methods written once more, in eager torch and for the tests alone: the authors' configuration (network in
training mode, running statistics removed, dropout off), torch's optimisers, boolean indexing. No code is shared with
tta_adapters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float32]


class Eager:
    """A network whose normalisation layers are trained under batch statistics."""

    def __init__(self, network: nn.Module, *, lr: float, adam: bool = False, nesterov: bool = False) -> None:
        self.network = copy.deepcopy(network).train().requires_grad_(False)
        self.parameters: list[nn.Parameter] = []
        for module in self.network.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.track_running_stats = False
                module.running_mean = module.running_var = None
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
                module.requires_grad_(True)
                self.parameters += [module.weight, module.bias]
        self.source = [value.detach().clone() for value in self.parameters]
        self._make: Callable[[], torch.optim.Optimizer] = lambda: (
            torch.optim.Adam(self.parameters, lr=lr)
            if adam
            else torch.optim.SGD(self.parameters, lr=lr, momentum=0.9, nesterov=nesterov)
        )
        self.optimizer = self._make()

    def return_to_source(self) -> None:
        with torch.no_grad():
            for value, source in zip(self.parameters, self.source, strict=True):
                value.copy_(source)
        self.optimizer = self._make()

    def theta(self) -> Array:
        return torch.cat([value.detach().reshape(-1) for value in self.parameters]).numpy()

    def step(self, x: Array) -> Array:
        return self.adapt(torch.from_numpy(x)).detach().numpy()

    def adapt(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


class EagerEata(Eager):
    """Niu et al., ICML 2022; `fisher_images` None is ETA."""

    def __init__(
        self,
        network: nn.Module,
        *,
        lr: float,
        margin: float = 0.4,
        redundancy: float = 0.4,
        fisher_images: Sequence[Tensor] | None = None,
        alpha: float = 1.0,
        reset_every: int | None = None,
    ) -> None:
        super().__init__(network, lr=lr)
        self.margin, self.redundancy, self.alpha, self.reset_every = margin, redundancy, alpha, reset_every
        self.average: Tensor | None = None
        self.steps = 0
        self.fisher: list[Tensor] | None = None
        if fisher_images is not None:
            self.fisher = [torch.zeros_like(value) for value in self.parameters]
            for x in fisher_images:
                logits = self.network(x)
                nn.functional.cross_entropy(logits, logits.argmax(1)).backward()
                for total, value in zip(self.fisher, self.parameters, strict=True):
                    assert value.grad is not None
                    total += value.grad**2 / len(fisher_images)
                self.optimizer.zero_grad()

    def adapt(self, x: Tensor) -> Tensor:
        if self.reset_every is not None and self.steps and self.steps % self.reset_every == 0:
            self.return_to_source()
            self.average = None
        self.steps += 1
        logits = self.network(x)
        bound = self.margin * math.log(logits.shape[1])
        entropies, p = entropy(logits), logits.detach().softmax(1)
        chosen = torch.where(entropies.detach() < bound)[0]
        if self.average is not None:
            similar = nn.functional.cosine_similarity(self.average[None], p[chosen], dim=1)
            chosen = chosen[similar.abs() < self.redundancy]
        if len(chosen):
            mean = p[chosen].mean(0)
            self.average = mean if self.average is None else 0.9 * self.average + 0.1 * mean
            weight = torch.exp(bound - entropies[chosen].detach())
            loss = (weight * entropies[chosen]).mean()
            if self.fisher is not None:
                for value, source, fisher in zip(self.parameters, self.source, self.fisher, strict=True):
                    loss = loss + self.alpha * (fisher * (value - source) ** 2).sum()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return logits


class EagerSar(Eager):
    """Niu et al., ICLR 2023."""

    def __init__(
        self,
        network: nn.Module,
        *,
        lr: float,
        margin: float = 0.4,
        rho: float = 0.05,
        recover_below: float = 0.029,
    ) -> None:
        super().__init__(network, lr=lr)
        self.margin, self.rho, self.recover_below = margin, rho, recover_below
        self.mean: float | None = None
        self.recoveries = 0

    def adapt(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        classes = logits.shape[1]
        bound = self.margin * math.log(classes)
        entropies = entropy(logits)
        chosen = torch.where(entropies.detach() < bound)[0]
        if not len(chosen):
            return logits
        entropies[chosen].mean().backward()
        start = [value.detach().clone() for value in self.parameters]
        grads = [value.grad for value in self.parameters if value.grad is not None]
        norm = torch.sqrt(sum((grad**2).sum() for grad in grads))
        with torch.no_grad():
            for value in self.parameters:
                value += self.rho * value.grad / (norm + 1e-12)
        self.optimizer.zero_grad()
        there = entropy(self.network(x))[chosen]
        kept = there[there.detach() < bound]
        if len(kept):
            kept.mean().backward()
        with torch.no_grad():
            for value, old in zip(self.parameters, start, strict=True):
                value.copy_(old)
        if not len(kept):
            self.optimizer.zero_grad()
            return logits
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss = float(kept.detach().mean())
        self.mean = loss if self.mean is None else 0.9 * self.mean + 0.1 * loss
        if self.mean < self.recover_below * math.log(classes):
            self.return_to_source()
            self.mean = None
            self.recoveries += 1
        return logits


def lame(logits: Array, features: Array, *, neighbours: int = 5, most: int = 100) -> Array:
    """Boudiaf et al., CVPR 2022, in numpy and float64, stopped when the objective settles; gives probabilities."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    p = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    unary = -np.log(p + 1e-10)
    unit = features.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    distance = np.linalg.norm(unit[:, None] - unit[None], axis=2)
    width = np.sort(distance, axis=1)[:, neighbours - 1].mean()
    affinity = np.exp(-(distance**2) / (2 * width**2))
    y = np.exp(-unary) / np.exp(-unary).sum(1, keepdims=True)
    before = math.inf
    for k in range(most):
        z = -unary + affinity @ y
        y = np.exp(z - z.max(1, keepdims=True))
        y /= y.sum(1, keepdims=True)
        now = float((unary * y - (affinity @ y) * y + y * np.log(y + 1e-30)).sum())
        if k > 1 and abs(now - before) <= 1e-8 * abs(before):
            break
        before = now
    return y.astype(np.float32)


class EagerT3a:
    """Iwasawa and Matsuo, NeurIPS 2021: a list of supports that grows and is cut."""

    def __init__(self, weight: Tensor, bias: Tensor, supports: int = 20) -> None:
        self.count = supports
        logits = weight @ weight.t() + bias
        self.features, self.labels, self.entropies = weight.clone(), logits.argmax(1), entropy(logits)

    def step(self, features: Tensor, logits: Tensor) -> Tensor:
        self.features = torch.cat([self.features, features])
        self.labels = torch.cat([self.labels, logits.argmax(1)])
        self.entropies = torch.cat([self.entropies, entropy(logits)])
        kept: list[int] = []
        for label in range(logits.shape[1]):
            mine = torch.where(self.labels == label)[0]
            kept += mine[self.entropies[mine].argsort()][: self.count].tolist()
        self.features, self.labels = self.features[kept], self.labels[kept]
        self.entropies = self.entropies[kept]
        unit = nn.functional.normalize(self.features, dim=1)
        hot = nn.functional.one_hot(self.labels, logits.shape[1]).to(unit.dtype)
        return features @ nn.functional.normalize(unit.t() @ hot, dim=0)


View = Callable[[Tensor], Tensor]
"""A random view of a batch of images; the tests draw it, so that both sides see the same one."""


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return -(target.softmax(1) * logits.log_softmax(1)).sum(1)


class EagerRoid(Eager):
    """Marsden et al., WACV 2024."""

    view: View

    def __init__(self, network: nn.Module, *, lr: float, pull: float = 0.01) -> None:
        super().__init__(network, lr=lr, nesterov=True)
        self.pull = pull
        self.average: Tensor | None = None

    def adapt(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        count, classes = logits.shape
        p = logits.detach().softmax(1)
        if self.average is None:
            self.average = torch.full((classes,), 1.0 / classes)
        unlike = 1 - nn.functional.cosine_similarity(self.average[None], p, dim=1)
        unlike = (unlike - unlike.min()) / (unlike.max() - unlike.min())
        dropped = unlike < unlike.mean()
        certain = -entropy(logits.detach())
        certain = (certain - certain.min()) / (certain.max() - certain.min())
        weight = torch.exp(3 * unlike * certain)
        weight[dropped] = 0
        self.average = 0.9 * self.average + 0.1 * p.mean(0)
        q = logits.softmax(1).clip(max=0.99)
        likelihood = -(q * torch.log(q / (1 - q) + 1e-5)).sum(1)
        other, here = self.network(self.view(x[~dropped])), logits[~dropped]
        consistency = 0.5 * soft_cross_entropy(other, here) + 0.5 * soft_cross_entropy(here, other)
        (((weight * likelihood).sum() + (weight[~dropped] * consistency).sum()) / count).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for value, source in zip(self.parameters, self.source, strict=True):
                value.copy_((1 - self.pull) * value + self.pull * source)
        prior = p.mean(0)
        smooth = max(1 / count, 1 / classes) / prior.max()
        return logits.detach() * (prior + smooth) / (1 + smooth * classes)


class EagerCotta(Eager):
    """Wang et al., CVPR 2022, on the parameters of norm layers."""

    views: Sequence[View]
    restored: Tensor
    """[T] bool: which values return to the source in this step."""

    def __init__(
        self,
        network: nn.Module,
        *,
        lr: float,
        confidence: float,
        decay: float = 0.999,
        symmetric: bool = False,
        adam: bool = False,
    ) -> None:
        super().__init__(network, lr=lr, adam=adam)
        self.anchor, self.teacher = (Eager(network, lr=lr) for _ in range(2))
        self.confidence, self.decay, self.symmetric = confidence, decay, symmetric
        self.used_views = 0

    def adapt(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        with torch.no_grad():
            sure = self.anchor.network(x).softmax(1).max(1).values.mean()
            target = self.teacher.network(x)
            if sure < self.confidence:
                target = torch.stack([self.teacher.network(view(x)) for view in self.views]).mean(0)
                self.used_views += 1
        loss = soft_cross_entropy(logits, target)
        if self.symmetric:
            loss = 0.5 * loss + 0.5 * soft_cross_entropy(target, logits)
        loss.mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters, self.parameters, strict=True):
                slow.copy_(self.decay * slow + (1 - self.decay) * fast)
            start = 0
            for value, source in zip(self.parameters, self.source, strict=True):
                mask = self.restored[start : start + value.numel()].reshape(value.shape)
                value.copy_(torch.where(mask, source, value))
                start += value.numel()
        return target
