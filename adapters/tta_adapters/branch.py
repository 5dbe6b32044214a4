"""Branches beside linear and convolution layers: y = layer(x) + branch(x), the layer's own weights frozen.

A branch is two products, down to a few channels and up to the layer's outputs, without bias or non-linearity. A layer
is known by its weight, whose calls of ``F.linear`` and ``F.conv2d`` are answered with the branch added, so subclasses
that pad or reshape around the call keep working.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tta_adapters.base import Forward, Statistics
from tta_adapters.network import NetworkAdapter
from tta_adapters.select import Selected, SelectionError, select_modules
from tta_adapters.tape import join

Through = Callable[[Tensor, Tensor], Tensor]
"""(down, up) -> the branch's output, shaped like the layer's."""

Branch = Callable[[str, Through, Tensor], Tensor]
"""(path of the layer, how to pass through it, the layer's output) -> the output with the branch added."""

Merge = Callable[[str], Tensor]
"""(path of the layer) -> what its branches add to its weight, as a matrix [outputs, inputs of one output]."""


class BranchAdapter(NetworkAdapter):
    """Base of the adapters that add branches to nn.Linear and nn.Conv2d.

    The classifier, convolutions in groups (a branch through fewer channels than a group has would save nothing) and
    the projections inside nn.MultiheadAttention (it reads their weights without calling them) are left as they are.

    Args:
        model: see :class:`tta_adapters.network.NetworkAdapter`, as are the other keywords.
        include: shell patterns of paths of the layers that get a branch.
        exclude: shell patterns to leave out.

    Raises:
        SelectionError: the patterns select no such layer.
    """

    def __init__(
        self, model: nn.Module, *, include: Sequence[str] = ("*",), exclude: Sequence[str] = (), **common: Any
    ) -> None:
        super().__init__(model, **common)
        unfit = [
            name
            for name, module in self.module.named_modules()
            if module is self._head or _is_grouped(module)
        ]
        unfit += [
            join(name, child)
            for name, module in self.module.named_modules()
            if isinstance(module, nn.MultiheadAttention)
            for child, _ in module.named_children()
        ]
        self.selection: list[Selected] = select_modules(
            self.module, (nn.Linear, nn.Conv2d), include=include, exclude=[*exclude, *unfit]
        )
        self._layer_of: dict[int, str] = {id(_weight(item.module)): item.name for item in self.selection}

    def _branched(
        self,
        tensors: Mapping[str, Tensor],
        x: Tensor,
        statistics: Statistics,
        branch: Branch,
        merge: Merge | None,
    ) -> Forward:
        """Runs the network with branches at every selected layer.

        Args:
            tensors: theta by name.
            x: [batch, ...].
            statistics: see :data:`tta_adapters.base.Statistics`.
            branch: adds the branches to a layer's output.
            merge: the same as a change of the layer's weight, where it is one for all samples. A pass without
                gradients (the serving graph) uses it: one small product instead of passes over activations.

        Raises:
            SelectionError: a selected layer's weight is not used by a call of its own, so that its branch would be
                without effect.
        """
        missed = set(self._layer_of.values())
        merges = None if torch.is_grad_enabled() else merge

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            layer = self._layer_of.get(id(weight))
            if layer is None:
                return F.linear(x, weight, bias)
            missed.discard(layer)
            if merges is not None:
                return F.linear(x, weight + merges(layer), bias)
            return branch(layer, lambda down, up: F.linear(F.linear(x, down), up), F.linear(x, weight, bias))

        def conv2d(
            x: Tensor,
            weight: Tensor,
            bias: Tensor | None = None,
            stride: Any = 1,
            padding: Any = 0,
            dilation: Any = 1,
            groups: int = 1,
        ) -> Tensor:
            call = functools.partial(F.conv2d, stride=stride, padding=padding, dilation=dilation)
            layer = self._layer_of.get(id(weight))
            if layer is None:
                return call(x, weight, bias, groups=groups)
            missed.discard(layer)
            if merges is not None:
                return call(x, weight + merges(layer).reshape(weight.shape), bias)
            return branch(layer, lambda down, up: F.conv2d(call(x, down), up), call(x, weight, bias))

        out = self._run(tensors, x, statistics, {F.linear: linear, F.conv2d: conv2d})
        if missed:
            raise SelectionError(
                f"the network computes {', '.join(sorted(missed)[:3])} without calling the layer, which a branch "
                "needs: leave it out with --exclude"
            )
        return out


def product(down: Tensor, up: Tensor) -> Tensor:
    """What a branch adds to its layer's weight, as a matrix [outputs, inputs of one output]."""
    return up.flatten(1) @ down.flatten(1)


def down_shape(module: nn.Module, rank: int) -> list[int]:
    """Shape of the weight that leads from a layer's inputs to ``rank`` channels."""
    return [rank, *_weight(module).shape[1:]]


def up_shape(module: nn.Module, rank: int) -> list[int]:
    """Shape of the weight that leads from ``rank`` channels to a layer's outputs."""
    weight = _weight(module)
    return [weight.shape[0], rank, *[1] * (weight.dim() - 2)]


def gaussian(shape: Sequence[int], std: float, seed: int) -> Tensor:
    """Normal numbers of the given standard deviation that depend on nothing but the seed."""
    return std * torch.randn(list(shape), generator=torch.Generator().manual_seed(seed))


def _weight(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight


def _is_grouped(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1
