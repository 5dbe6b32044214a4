"""The LoRA adapter: theta is a low-rank update of linear and convolution layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from tta_adapters.base import Forward, Statistics
from tta_adapters.branch import BranchAdapter, Through, down_shape, gaussian, product, up_shape
from tta_adapters.options import whole


class LoraAdapter(BranchAdapter):
    """y = W x + b + (alpha / rank) * up(down(x)) for each selected layer; down is random, up zero.

    A convolution's down is a convolution like its own with ``rank`` outputs, its up a 1x1 convolution. Un-adapted
    output is the network's own, bit for bit, because the branch adds zeros. Down is N(0, 1 / inputs of one output),
    the same numbers in every build.

    Args:
        model: the network; see :class:`tta_adapters.network.NetworkAdapter`, as are the other keywords.
        include: shell patterns of paths of the layers that get a branch.
        exclude: shell patterns to leave out.
        rank: channels between down and up.
        alpha: scale of the branch, divided by the rank.

    Raises:
        SelectionError: the patterns select no layer.
        ValueError: a rank that is no whole number from 1.

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, eq. 3 and section 4.1.
    """

    name = "lora"

    def __init__(
        self,
        model: nn.Module,
        *,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        rank: float = 4.0,
        alpha: float = 4.0,
        **common: Any,
    ) -> None:
        super().__init__(model, include=include, exclude=exclude, **common)
        size = whole("lora.rank", rank)
        self._scale = alpha / size
        for index, item in enumerate(self.selection):
            down = down_shape(item.module, size)
            std = 1 / math.sqrt(math.prod(down[1:]))
            self._add(f"{item.name}.lora_down", "down", gaussian(down, std, index))
            self._add(f"{item.name}.lora_up", "up", gaussian(up_shape(item.module, size), 0.0, index))
        self._add_statistics()

    def forward(
        self, tensors: Mapping[str, Tensor], x: Tensor, *, statistics: Statistics = "running"
    ) -> Forward:
        """Runs the network with its branches; see :meth:`tta_adapters.network.NetworkAdapter.forward`."""

        def weights(layer: str) -> tuple[Tensor, Tensor]:
            # The scale meets the small weights, not the large output.
            return tensors[f"{layer}.lora_down"], self._scale * tensors[f"{layer}.lora_up"]

        def branch(layer: str, through: Through, y: Tensor) -> Tensor:
            return y + through(*weights(layer))

        return self._branched(tensors, x, statistics, branch, lambda layer: product(*weights(layer)))
