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
        shape = channel_shape(x)
        mean, centred, var = _centred(x)
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
        mean_dy, mean_dot, count = _reduced(dy, centred)
        dweight = (mean_dot * rstd).reshape(-1) * count
        dbias = mean_dy.reshape(-1) * count
        dx = None
        # The first layer of a network has nobody to pass a gradient to: three passes over its largest activation.
        if ctx.needs_input_grad[0]:
            # In this order a factor and a shift per channel stand together, which compiles to one pass.
            dx = (dy * scale + -(scale * mean_dy)) - centred * (scale * rstd * rstd * mean_dot)
        return dx, dweight, dbias, None


class _BlendedNorm(torch.autograd.Function):
    """Batch normalisation by (1 - a) * running + a * batch statistics: -> (y, batch mean, batch variance).

    Batch statistics are weighted by p [N] with mean 1. With c = x - batch mean, e = x - the mean used, r = 1 /
    sqrt(var used + eps), s = weight * r and means over all axes but the channel: dx = s * dy - p * (a * s * mean(dy) +
    c * (a * s * r^2 * mean(dy * e))). With a = 1 and p = 1 it is batch normalisation.

    Source: Yuan et al., Robust Test-Time Adaptation in Dynamic Scenarios, CVPR 2023, section 3.2 (robust batch
    normalization); the derivative follows from it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor,
        bias: Tensor,
        share: Tensor,
        part: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = channel_shape(x)
        own_mean, centred, own_var = _centred(x, part)
        aside = (1 - share) * (own_mean - mean.reshape(shape))
        used = (1 - share) * var.reshape(shape) + share * own_var
        rstd = torch.rsqrt(used + eps)
        scale = weight.reshape(shape) * rstd
        y = centred * scale + (aside * scale + bias.reshape(shape))
        ctx.save_for_backward(centred, rstd, scale, aside, share, part)
        own_mean, own_var = own_mean.reshape(-1), own_var.reshape(-1)
        ctx.mark_non_differentiable(own_mean, own_var)
        return y, own_mean, own_var

    @staticmethod
    @once_differentiable  # type: ignore[misc, untyped-decorator, unused-ignore]
    def backward(
        ctx: Any, dy: Tensor, *_: Tensor | None
    ) -> tuple[Tensor | None, None, None, Tensor, Tensor, None, None, None]:
        centred, rstd, scale, aside, share, part = ctx.saved_tensors
        mean_dy, mean_dot, count = _reduced(dy, centred)
        dot = mean_dot + aside * mean_dy
        dx = None
        if ctx.needs_input_grad[0]:
            by_mean, by_var = -(share * scale * mean_dy), share * scale * rstd * rstd * dot
            if part is None:
                dx = (dy * scale + by_mean) - centred * by_var
            else:
                dx = dy * scale + part * (by_mean - centred * by_var)
        dweight, dbias = (dot * rstd).reshape(-1) * count, mean_dy.reshape(-1) * count
        return dx, None, None, dweight, dbias, None, None, None


class _Renorm(torch.autograd.Function):
    """Batch renormalisation, the value by running statistics: -> (y, batch mean, batch variance).

    y = weight * ((x - batch mean) / batch std * r + d) + bias with r = batch std / running std and d = (batch mean -
    running mean) / running std held constant. With s = weight / running std and q = 1 / batch variance:
    dx = s * dy - s * mean(dy) - c * (s * q * mean(dy * c)).

    Source: Ioffe, Batch Renormalization, NeurIPS 2017, algorithm 1; at test time: Zhao et al., DELTA, ICLR 2023, eq. 4.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = channel_shape(x)
        own_mean, centred, own_var = _centred(x)
        aside = own_mean - mean.reshape(shape)
        rstd = torch.rsqrt(var + eps).reshape(shape)
        own_rstd = torch.rsqrt(own_var + eps)
        scale = weight.reshape(shape) * rstd
        y = centred * scale + (aside * scale + bias.reshape(shape))
        ctx.save_for_backward(centred, rstd, own_rstd, scale, aside)
        own_mean, own_var = own_mean.reshape(-1), own_var.reshape(-1)
        ctx.mark_non_differentiable(own_mean, own_var)
        return y, own_mean, own_var

    @staticmethod
    @once_differentiable  # type: ignore[misc, untyped-decorator, unused-ignore]
    def backward(
        ctx: Any, dy: Tensor, *_: Tensor | None
    ) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        centred, rstd, own_rstd, scale, aside = ctx.saved_tensors
        mean_dy, mean_dot, count = _reduced(dy, centred)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy * scale + -(scale * mean_dy)) - centred * (scale * own_rstd * own_rstd * mean_dot)
        dot = mean_dot + aside * mean_dy
        return dx, None, None, (dot * rstd).reshape(-1) * count, mean_dy.reshape(-1) * count, None


def _centred(x: Tensor, part: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, x - mean and biased variance over all axes but the channel, which are kept as axes of length 1.

    Args:
        x: [N, C, ...].
        part: [N, 1, ...] with mean 1, how much each sample counts; None: all alike.
    """
    axes = _channel_axes(x)
    mean = (x if part is None else x * part).mean(axes, keepdim=True)
    centred = x - mean
    squares = centred * centred
    return mean, centred, (squares if part is None else squares * part).mean(axes, keepdim=True)


def _reduced(dy: Tensor, centred: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean of dy and of dy * centred over all axes but the channel, and over how many values they go."""
    axes = _channel_axes(dy)
    count = dy.shape[0] * math.prod(dy.shape[2:])
    return dy.mean(axes, keepdim=True), (dy * centred).mean(axes, keepdim=True), count


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


def blended_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    share: Tensor,
    eps: float,
    samples: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises by (1 - share) * running + share * batch statistics; y's gradient flows through the batch's part.

    Args:
        x: [N, C] or [N, C, ...] float32.
        mean: [C], running; no gradient.
        var: [C], running; no gradient.
        weight: [C].
        bias: [C].
        share: 0-d, of the batch; no gradient.
        eps: added to the variance.
        samples: [N], >= 0, how much each counts in the batch's statistics; None: all alike.

    Returns:
        y like x, the batch's mean [C] and biased variance [C], without a gradient.
    """
    part = None
    if samples is not None:
        part = (samples / samples.mean()).reshape([-1] + [1] * (x.dim() - 1))
    return _BlendedNorm.apply(x, mean, var, weight, bias, share, part, eps)  # type: ignore[no-any-return, no-untyped-call]


def renorm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises by running statistics, with the gradient of batch normalisation.

    Args and returns as :func:`blended_norm`.
    """
    return _Renorm.apply(x, mean, var, weight, bias, eps)  # type: ignore[no-any-return, no-untyped-call]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [C] and biased variance [C] of ``x`` [N, C, ...] over all axes but the channel."""
    mean, _, var = _centred(x)
    return mean.reshape(-1), var.reshape(-1)


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
