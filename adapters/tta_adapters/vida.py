"""The ViDA adapter: theta is a low-rank and a high-rank branch beside each layer, weighed for each sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from tta_adapters.augment import sum_of
from tta_adapters.base import Forward, Statistics
from tta_adapters.branch import BranchAdapter, Through, down_shape, gaussian, product, up_shape
from tta_adapters.options import whole
from tta_adapters.select import SelectionError


class Scales(NamedTuple):
    """How much each branch says for each sample; [batch] float32 both.

    Attributes:
        low: of the low-rank branches, which are to keep what domains share.
        high: of the high-rank branches, which are to take up what is a domain's own.
    """

    low: Tensor
    high: Tensor


class VidaAdapter(BranchAdapter):
    """y = W x + b + s1 * low_up(low_down(x)) + s2 * high_up(high_down(x)) for each selected layer; the rest frozen.

    Each branch starts from down ~ N(0, 1 / rank^2 standard deviation) and up = 0, so that un-adapted output is the
    network's own, bit for bit. The scales are inputs of a pass, one pair for each sample; without them both are 1, as
    in the graph that serves. A rank of 0 leaves that branch out.

    The paper puts branches beside the projections of attention (``include="*attn*"`` or the like); by default every
    layer has them. Its high rank of 128 is meant for layers of width 768.

    Args:
        model: the network; see :class:`tta_adapters.network.NetworkAdapter`, as are the other keywords.
        include: shell patterns of paths of the layers that get branches.
        exclude: shell patterns to leave out.
        low: rank of the low-rank branches.
        high: rank of the high-rank branches.

    Raises:
        SelectionError: the patterns select no layer.
        ValueError: a rank that is no whole number from 0, or both are 0.

    Source: Liu et al., ViDA: Homeostatic Visual Domain Adapter for Continual Test Time Adaptation, ICLR 2024,
    section 3.2.
    """

    name = "vida"

    def __init__(
        self,
        model: nn.Module,
        *,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        low: float = 1.0,
        high: float = 128.0,
        **common: Any,
    ) -> None:
        super().__init__(model, include=include, exclude=exclude, **common)
        ranks = {"low": whole("vida.low", low, 0), "high": whole("vida.high", high, 0)}
        self._branches = [name for name, rank in ranks.items() if rank]
        if not self._branches:
            raise ValueError("vida.low and vida.high are 0: give one of them a rank")
        for index, item in enumerate(self.selection):
            for side, branch in enumerate(self._branches):
                rank = ranks[branch]
                down = gaussian(down_shape(item.module, rank), rank**-2, 2 * index + side)
                self._add(f"{item.name}.vida_{branch}_down", "down", down)
                up = gaussian(up_shape(item.module, rank), 0.0, 0)
                self._add(f"{item.name}.vida_{branch}_up", "up", up)
        self._add_statistics()

    def forward(
        self,
        tensors: Mapping[str, Tensor],
        x: Tensor,
        *,
        statistics: Statistics = "running",
        scales: Scales | None = None,
    ) -> Forward:
        """Runs the network with its branches; see :meth:`tta_adapters.network.NetworkAdapter.forward`.

        Args:
            tensors: what :meth:`unpack` returned.
            x: [batch, ...].
            statistics: see :data:`tta_adapters.base.Statistics`.
            scales: of the branches for each sample; None: 1.

        Raises:
            SelectionError: with scales, a layer whose leading axis is not the batch.
        """

        def weights(layer: str, name: str) -> tuple[Tensor, Tensor]:
            return tensors[f"{layer}.vida_{name}_down"], tensors[f"{layer}.vida_{name}_up"]

        def branch(layer: str, through: Through, y: Tensor) -> Tensor:
            for name in self._branches:
                update = through(*weights(layer, name))
                y = y + (update if scales is None else _scaled(update, getattr(scales, name), layer))
            return y

        def merge(layer: str) -> Tensor:
            return sum_of([product(*weights(layer, name)) for name in self._branches])

        return self._branched(tensors, x, statistics, branch, merge if scales is None else None)


def _scaled(update: Tensor, scale: Tensor, layer: str) -> Tensor:
    if update.shape[0] != scale.shape[0]:
        raise SelectionError(
            f"layer {layer} works on {update.shape[0]} pieces for {scale.shape[0]} samples, so no scale belongs to "
            "each: leave it out with --exclude"
        )
    return update * scale.reshape([-1] + [1] * (update.dim() - 1))
