"""ViDA written once more, in eager torch and for the tests alone: modules that wrap layers, torch's optimiser, one
sample's scales at a time. No code is shared with tta_adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

View = Callable[[Tensor], Tensor]


class Wrapped(nn.Module):
    """A frozen layer with its two branches; the scales are set from outside."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.branches = nn.ParameterDict()
        self.scale = {"low": torch.ones(1), "high": torch.ones(1)}

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        for name in ("low", "high"):
            down, up = self.branches[f"{name}_down"], self.branches[f"{name}_up"]
            if isinstance(self.layer, nn.Conv2d):
                branch = F.conv2d(F.conv2d(x, down, stride=self.layer.stride, padding=self.layer.padding), up)
            else:
                branch = x @ down.T @ up.T
            y = y + self.scale[name].reshape([-1] + [1] * (y.dim() - 1)) * branch
        return y


class EagerVida:
    """Liu et al., ICLR 2024, with the backbone frozen and one pair of scales for each sample.

    Attributes:
        views: of the next step.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: list[str],
        start: dict[str, Tensor],
        *,
        lr: float,
        decay: float,
        threshold: float,
        spread: float,
        symmetric: bool,
    ) -> None:
        self.student = copy.deepcopy(network).eval().requires_grad_(False)
        for path in layers:
            parent, _, name = path.rpartition(".")
            owner = self.student.get_submodule(parent)
            wrapped = Wrapped(getattr(owner, name))
            for key in ("low_down", "low_up", "high_down", "high_up"):
                wrapped.branches[key] = nn.Parameter(start[f"{path}.vida_{key}"].clone())
            setattr(owner, name, wrapped)
        for module in self.student.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train()
                module.track_running_stats, module.running_mean, module.running_var = False, None, None
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.optimizer = torch.optim.SGD(list(self.parameters()), lr=lr, momentum=0.9)
        self.decay, self.threshold, self.spread, self.symmetric = decay, threshold, spread, symmetric
        self.views: list[View] = []
        self.unsure: list[bool] = []

    def parameters(self, network: nn.Module | None = None) -> Iterator[nn.Parameter]:
        for module in (network or self.student).modules():
            if isinstance(module, Wrapped):
                yield from (
                    module.branches[f"{name}_{end}"] for name in ("low", "high") for end in ("down", "up")
                )

    def shift_teacher(self, noise: Tensor) -> None:
        """Takes the teacher away from the student: where they agree there is little to learn."""
        with torch.no_grad():
            place = 0
            for value in self.parameters(self.teacher):
                value += noise[place : place + value.numel()].reshape(value.shape)
                place += value.numel()

    def theta(self, network: nn.Module | None = None) -> Tensor:
        return torch.cat([value.detach().reshape(-1) for value in self.parameters(network)])

    def step(self, x: Tensor) -> Tensor:
        self._scale(torch.ones(len(x)), torch.ones(len(x)))
        if self.views:
            with torch.no_grad():
                logits = torch.stack([self.teacher(view(x)) for view in self.views])
            low, high = [], []
            self.unsure = []
            for sample in range(len(x)):
                u = self.spread * float(logits[:, sample].var(dim=0, unbiased=True).mean())
                self.unsure.append(u >= self.threshold)
                low.append(1 - min(u, 1) if u >= self.threshold else 1 + min(u, 1))
                high.append(1 + min(u, 1) if u >= self.threshold else 1 - min(u, 1))
            self._scale(torch.tensor(low), torch.tensor(high))
        with torch.no_grad():
            target = self.teacher(x)
        z = self.student(x)
        p, q = z.log_softmax(1), target.log_softmax(1)
        loss = -(q.exp() * p).sum(1)
        if self.symmetric:
            loss = 0.5 * loss - 0.5 * (p.exp() * q).sum(1)
        self.optimizer.zero_grad()
        loss.mean().backward()
        self.optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(self.parameters(self.teacher), self.parameters(), strict=True):
                slow.copy_(self.decay * slow + (1 - self.decay) * fast)
        return target

    def _scale(self, low: Tensor, high: Tensor) -> None:
        for network in (self.student, self.teacher):
            for module in network.modules():
                if isinstance(module, Wrapped):
                    module.scale = {"low": low, "high": high}
