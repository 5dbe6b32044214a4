"""Normalisation layers written so that their backward pass compiles well.

torch's own normalisation kernels return saved statistics that ONNX has no word for, and the automatic derivative of
the textbook formula reads every activation about a dozen times. The functions here keep one centred copy of the
activation and need the fewest passes over it that the algebra allows. All statistics are biased (divide by n), in the
normalisation and in running averages alike: the unbiased variance does not exist for a single sample.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def channel_shape(x: Tensor) -> list[int]:
    """Shape that broadcasts a [C] vector over ``x`` [N, C, ...]."""
    return [1, -1] + [1] * (x.dim() - 2)


def _channel_axes(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


class _BatchNorm(torch.autograd.Function):
    """Batch normalisation by the batch's own statistics: (x, weight, bias) -> (y, mean, variance).

    With c = x - mean, r = 1 / sqrt(var + eps), s = weight * r and means over all axes but the channel:
    dx = s * dy - c * (s * r^2 * mean(dy * c)) - s * mean(dy).

    Source: Ioffe and Szegedy, Batch Normalization, ICML 2015, section 3 (backward rules), rearranged.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        axes, shape = _channel_axes(x), channel_shape(x)
        mean = x.mean(axes, keepdim=True)
        centred = x - mean
        var = (centred * centred).mean(axes, keepdim=True)
        rstd = torch.rsqrt(var + eps)
        scale = weight.reshape(shape) * rstd
        y = centred * scale + bias.reshape(shape)
        ctx.save_for_backward(centred, rstd, scale)
        mean, var = mean.reshape(-1), var.reshape(-1)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable  # type: ignore[misc, untyped-decorator, unused-ignore]
    def backward(
        ctx: Any, dy: Tensor, *_: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        centred, rstd, scale = ctx.saved_tensors
        axes = _channel_axes(dy)
        count = dy.shape[0] * math.prod(dy.shape[2:])
        mean_dy = dy.mean(axes, keepdim=True)
        mean_dot = (dy * centred).mean(axes, keepdim=True)
        dweight = (mean_dot * rstd).reshape(-1) * count
        dbias = mean_dy.reshape(-1) * count
        dx = None
        # The first layer of a network has nobody to pass a gradient to: three passes over its largest activation.
        if ctx.needs_input_grad[0]:
            # In this order a factor and a shift per channel stand together, which compiles to one pass.
            dx = (dy * scale + -(scale * mean_dy)) - centred * (scale * rstd * rstd * mean_dot)
        return dx, dweight, dbias, None


class _Standardise(torch.autograd.Function):
    """x -> (x - mean) / sqrt(var + eps) over the last axis, or x / sqrt(mean(x^2) + eps) where not centred.

    dx = r * (g - mean(g) - y * mean(g * y)), without the mean(g) term where not centred.

    Source: Ba et al., Layer Normalization, 2016; Zhang and Sennrich, RMSNorm, NeurIPS 2019.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, centred: bool) -> Tensor:
        c = x - x.mean(-1, keepdim=True) if centred else x
        rstd = torch.rsqrt((c * c).mean(-1, keepdim=True) + eps)
        y = c * rstd
        ctx.save_for_backward(y, rstd)
        ctx.centred = centred
        return y

    @staticmethod
    @once_differentiable  # type: ignore[misc, untyped-decorator, unused-ignore]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        y, rstd = ctx.saved_tensors
        inner = y * (g * y).mean(-1, keepdim=True)
        if ctx.centred:
            inner = inner + g.mean(-1, keepdim=True)
        return (g - inner) * rstd, None, None


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises by the batch's own statistics.

    Args:
        x: [N, C] or [N, C, ...] float32.
        weight: [C].
        bias: [C].
        eps: added to the variance.

    Returns:
        y like x, mean [C], biased variance [C]; the statistics carry no gradient of their own, y's gradient flows
        through them.
    """
    return _BatchNorm.apply(x, weight, bias, eps)  # type: ignore[no-any-return, no-untyped-call]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [C] and biased variance [C] of ``x`` [N, C, ...] over all axes but the channel."""
    axes = _channel_axes(x)
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    return mean.reshape(-1), (centred * centred).mean(axes)


def scale_shift(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalises ``x`` [N, C, ...] by the given statistics [C]: one multiplication and one addition per value."""
    scale = weight * torch.rsqrt(var + eps)
    shift = bias - mean * scale
    shape = channel_shape(x)
    return x * scale.reshape(shape) + shift.reshape(shape)


def layer_norm(
    x: Tensor, axes: int, weight: Tensor | None, bias: Tensor | None, eps: float, *, centred: bool = True
) -> Tensor:
    """Layer normalisation over the last ``axes`` axes (RMS normalisation where not ``centred``).

    Args:
        x: [..., *normalised shape] float32.
        axes: how many trailing axes are normalised.
        weight: [*normalised shape] or None.
        bias: [*normalised shape] or None.
        eps: added to the variance (to the mean square).
        centred: subtract the mean.
    """
    flat = x if axes == 1 else x.reshape([*x.shape[: x.dim() - axes], -1])
    y: Tensor = _Standardise.apply(flat, eps, centred)  # type: ignore[no-untyped-call]
    y = y if axes == 1 else y.reshape(x.shape)
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias


def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Group normalisation of ``x`` [N, C, ...] with ``groups`` groups; weight and bias [C] or None.

    Source: Wu and He, Group Normalization, ECCV 2018.
    """
    flat = x.reshape([x.shape[0], groups, -1])
    y: Tensor = _Standardise.apply(flat, eps, True).reshape(x.shape)  # type: ignore[no-untyped-call]
    shape = channel_shape(x)
    if weight is not None:
        y = y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)
