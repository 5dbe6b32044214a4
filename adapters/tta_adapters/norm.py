"""The norm adapter: theta is the affine parameters and running statistics of normalisation layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tta_adapters.network import NetworkAdapter
from tta_adapters.select import Selected, SelectionError, describe, select_modules
from tta_adapters.tape import join

NORM_TYPES: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


class NormAdapter(NetworkAdapter):
    """Theta = weight and bias of the selected normalisation layers, then running mean and variance of all BatchNorms.

    The affine parameters come first and are trained; the statistics follow, so that an edge that only serves still
    carries everything its BatchNorms need and works at batch 1. Statistics belong to theta for *every* BatchNorm,
    selected or not: a shift reaches all layers.

    Args:
        model: the network, [batch, ...] -> logits [batch, classes]; it is copied, put in eval mode and frozen.
        include: shell patterns of module paths whose affine parameters are trained.
        exclude: shell patterns to leave out, e.g. "layer4*".
        preprocess: applied to the input before the network, e.g. from 0..255 to the network's own normalisation.
        head: path of the classifier, whose input is reported as features; by default the last nn.Linear.
        classes: C, the length of the logits; by default the outputs of the classifier.
        input_range: smallest and largest value that users send.
        input_shape: of one input, without the batch; None where it is not known.

    Raises:
        SelectionError: the patterns select no normalisation layer, or ``head`` does not exist.
    """

    name = "norm"

    def __init__(
        self,
        model: nn.Module,
        *,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        preprocess: Callable[[Tensor], Tensor] | None = None,
        head: str | None = None,
        classes: int | None = None,
        input_range: tuple[float, float] = (0.0, 1.0),
        input_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(
            model,
            preprocess=preprocess,
            head=head,
            classes=classes,
            input_range=input_range,
            input_shape=input_shape,
        )
        self.selection: list[Selected] = select_modules(
            self.module, NORM_TYPES, include=include, exclude=exclude
        )
        for item in self.selection:
            for kind in ("weight", "bias"):
                self._add(join(item.name, kind), kind, getattr(item.module, kind, None))
        if not self.tensors:
            raise SelectionError("the selected normalisation layers have no affine parameters to train")
        self._add_statistics()

    def describe(self) -> str:
        """The selection as a printable table."""
        return describe(self.selection)


def statistics_gap(running: Tensor, observed: Tensor) -> Tensor:
    """How far a batch lies from the running statistics: mean over channels of |difference of means| / std.

    It tells how different the normalisation a step learned under is from the one that serves between steps.

    Args:
        running: [2 M] float32, M means then M variances, as in theta's untrained part.
        observed: [2 M] float32, the batch's, in the same order.

    Returns:
        0-d, in units of the running standard deviation.
    """
    half = running.shape[0] // 2
    # The offset only keeps a dead channel (variance 0) from dividing by zero.
    return ((observed[:half] - running[:half]).abs() * torch.rsqrt(running[half:] + 1e-5)).mean()
