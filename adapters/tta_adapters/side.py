"""The side adapter: theta is a small network beside the frozen one, which climbs along its activations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tta_adapters.base import Forward, Statistics
from tta_adapters.branch import gaussian
from tta_adapters.network import NetworkAdapter
from tta_adapters.options import whole
from tta_adapters.select import SelectionError, select_modules

TEMPERATURE = 0.1
"""Of the mixing gates, as in the authors' code."""
EPS = 1e-5


class SideAdapter(NetworkAdapter):
    """A ladder of small blocks fed by the frozen network's activations; what it ends with is added to the features.

    Rung i takes the activation h_i behind a block of the network: z_i = mean over positions of
    gelu(down_i(standardised h_i)), s = mu_i * s + (1 - mu_i) * z_i with mu_i = sigmoid(mix_i / 0.1), then
    s = s + out_i(gelu(in_i(standardised s))). The classifier reads features + tanh(gate) * up(standardised s).

    No gradient passes through the network: its activations do not depend on theta, so neither time nor memory goes
    into its backward pass. With gate 0, as at the start, un-adapted output is the network's own, bit for bit, and only
    the gate has a gradient; a warm-up on source data opens it.

    Differs from the paper in two things. A network of any kind does not say what its block is, so a rung is an MLP
    over positions and not a narrow copy of the block. The side path corrects the network's features instead of
    replacing them; the paper's has no start at which nothing changes.

    Args:
        model: the network; see :class:`tta_adapters.network.NetworkAdapter`, as are the other keywords. It needs a
            linear classifier, and ``input_shape`` is needed to learn the activations' widths.
        include: shell patterns of paths of modules whose outputs feed a rung; by default the blocks of the network (the
            members of its outermost lists of composite modules), or its layers where it has none.
        exclude: shell patterns to leave out.
        width: W, of the ladder.
        rungs: at most so many, evenly spread, the last always among them.

    Raises:
        SelectionError: nothing to feed a rung, no linear classifier, ``input_shape`` missing, or a module whose output
            is no tensor.
        ValueError: a width or a number of rungs that is no whole number from 1.

    Source: Sung et al., LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning, NeurIPS 2022,
    section 3.2; the gate as in Zhang et al., Quantized Side Tuning, ACL 2024, but closed at the start.
    """

    name = "side"

    def __init__(
        self,
        model: nn.Module,
        *,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        width: float = 24.0,
        rungs: float = 4.0,
        **common: Any,
    ) -> None:
        super().__init__(model, **common)
        self._width, limit = whole("side.width", width), whole("side.rungs", rungs)
        weight = self.head_weight()
        if weight is None:
            raise SelectionError(
                "the side network corrects what a linear classifier reads, and there is none"
            )
        self._rungs = _spread(_sources(self.module, self._head, include, exclude), limit)
        for index, (path, channels) in enumerate(self._widths().items()):
            self._rung(f"rungs.{index}", path, channels, seed=4 * index)
        features = int(weight[0].shape[1])
        self._add("up", "weight", gaussian([features, self._width], 1 / math.sqrt(self._width), -1))
        self._add("gate", "gate", torch.zeros(1))
        self._add_statistics()

    def _rung(self, name: str, path: str, channels: int, seed: int) -> None:
        width = self._width
        self._add(f"{name}.down.weight", "weight", gaussian([width, channels], 1 / math.sqrt(channels), seed))
        self._add(f"{name}.down.bias", "bias", torch.zeros(width))
        self._add(f"{name}.mix", "gate", torch.zeros(1))
        self._add(f"{name}.in.weight", "weight", gaussian([width, width], 1 / math.sqrt(width), seed + 1))
        self._add(f"{name}.in.bias", "bias", torch.zeros(width))
        self._add(f"{name}.out.weight", "weight", gaussian([width, width], 1 / math.sqrt(width), seed + 2))
        self._add(f"{name}.out.bias", "bias", torch.zeros(width))

    def _widths(self) -> dict[str, int]:
        """Channels of the activation behind each rung's module, by the module's path."""
        if self.input_shape is None:
            raise SelectionError(
                "the side network needs `input_shape`, to learn how wide the activations are"
            )
        taken: dict[str, Tensor] = {}
        hooks = self._tapped(taken)
        try:
            with torch.no_grad():
                super().forward({}, torch.zeros([2, *self.input_shape]))
        finally:
            for hook in hooks:
                hook.remove()
        missing = [path for path in self._rungs if path not in taken]
        if missing:
            raise SelectionError(
                f"module {missing[0]!r} returns no tensor: leave it out with --exclude, or name others with --include"
            )
        return {path: int(_by_position(taken[path]).shape[-1]) for path in self._rungs}

    def _tapped(self, taken: dict[str, Tensor]) -> list[torch.utils.hooks.RemovableHandle]:
        """Hooks that put the activation behind each rung's module into ``taken``."""

        def hook_of(path: str) -> Any:
            def hook(_: nn.Module, __: object, output: object) -> None:
                if isinstance(output, Tensor) and output.dim() >= 2:
                    taken[path] = output

            return hook

        return [self.module.get_submodule(path).register_forward_hook(hook_of(path)) for path in self._rungs]

    def forward(
        self, tensors: Mapping[str, Tensor], x: Tensor, *, statistics: Statistics = "running"
    ) -> Forward:
        """Runs the network and the ladder; see :meth:`tta_adapters.network.NetworkAdapter.forward`."""
        taken: dict[str, Tensor] = {}
        read: list[Tensor] = []
        weight = self._head.weight if self._head is not None else None

        def linear(x: Tensor, called: Tensor, bias: Tensor | None = None) -> Tensor:
            if called is not weight:
                return F.linear(x, called, bias)
            ladder = self._climb(tensors, taken)
            middle = [1] * (x.dim() - 2)
            x = x + torch.tanh(tensors["gate"]) * F.linear(ladder, tensors["up"]).reshape(
                [ladder.shape[0], *middle, -1]
            )
            read.append(x.flatten(1))
            return F.linear(x, called, bias)

        hooks = self._tapped(taken)
        try:
            out = self._run(tensors, x, statistics, {F.linear: linear})
        finally:
            for hook in hooks:
                hook.remove()
        if not read:
            raise SelectionError("the network does not call its classifier: name it with --head")
        return out._replace(features=read[-1])

    def _climb(self, tensors: Mapping[str, Tensor], taken: Mapping[str, Tensor]) -> Tensor:
        """[batch, W], standardised, from the activations taken on the way."""
        s: Tensor | None = None
        for index, path in enumerate(self._rungs):
            if path not in taken:
                raise SelectionError(
                    f"module {path!r} runs after the classifier, or not in every pass: leave it out with --exclude"
                )
            part = {
                key: tensors[f"rungs.{index}.{key}"]
                for key in (
                    "down.weight",
                    "down.bias",
                    "mix",
                    "in.weight",
                    "in.bias",
                    "out.weight",
                    "out.bias",
                )
            }
            h = _standardised(_by_position(taken[path]))
            z = F.gelu(F.linear(h, part["down.weight"], part["down.bias"])).mean(1)
            share = torch.sigmoid(part["mix"] / TEMPERATURE)
            s = (1 - share) * z if s is None else share * s + (1 - share) * z
            inner = F.gelu(F.linear(_standardised(s), part["in.weight"], part["in.bias"]))
            s = s + F.linear(inner, part["out.weight"], part["out.bias"])
        if s is None:
            raise SelectionError("the ladder has no rung")
        return _standardised(s)


def _standardised(x: Tensor) -> Tensor:
    """Zero mean and unit variance over the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + EPS)


def _by_position(x: Tensor) -> Tensor:
    """[batch, positions, channels] of tokens [batch, T, C], of an image [batch, C, H, W], or of one with channels last.

    An image has its channels last where its second and third axes are equal and the third and fourth are not.
    """
    if x.dim() == 2:
        return x[:, None]
    if x.dim() == 3:
        return x
    if x.dim() == 4 and x.shape[1] == x.shape[2] != x.shape[3]:
        return x.flatten(1, 2)
    return x.flatten(2).transpose(1, 2)


def _sources(
    module: nn.Module, head: nn.Module | None, include: Sequence[str], exclude: Sequence[str]
) -> list[str]:
    """Paths of the modules that may feed a rung, in the order of the network."""
    if list(include) != ["*"]:
        return [item.name for item in select_modules(module, (nn.Module,), include=include, exclude=exclude)]
    blocks = _blocks(module)
    if blocks:
        return [item.name for item in select_modules(module, (nn.Module,), include=blocks, exclude=exclude)]
    classifier = [name for name, value in module.named_modules() if value is head]
    layers = select_modules(module, (nn.Linear, nn.Conv2d), exclude=[*exclude, *classifier])
    return [item.name for item in layers]


def _blocks(module: nn.Module, prefix: str = "") -> list[str]:
    """The composite members of the outermost lists of modules."""
    found: list[str] = []
    composite = [
        (f"{prefix}{name}", child)
        for name, child in module.named_children()
        if any(True for _ in child.children())
    ]
    if isinstance(module, nn.Sequential | nn.ModuleList) and composite:
        return [path for path, _ in composite]
    for path, child in composite:
        found += _blocks(child, f"{path}.")
    return found


def _spread(paths: list[str], limit: int) -> list[str]:
    """At most ``limit`` of the paths, evenly spread, the last among them."""
    if len(paths) <= limit:
        return paths
    return [paths[(index + 1) * len(paths) // limit - 1] for index in range(limit)]
