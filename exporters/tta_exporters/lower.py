"""Lowering: ATen operators that ONNX (or ONNX Runtime's fast paths) has no word for, in terms of those it has.

Each function here replaces one operator while tracing. They are mathematics, not patterns: a rewrite that needs to see
more than one operator lives in :mod:`tta_exporters.passes`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch._ops import OpOverload

from tta_exporters.errors import OperatorNotSupported
from tta_exporters.operators import max_pool2d_flat

aten = torch.ops.aten


@functools.cache
def decompositions() -> dict[OpOverload, Callable[..., object]]:
    """The decomposition table: torch's core-ATen one with ours on top."""
    table: dict[OpOverload, Callable[..., object]] = dict(core_aten_decompositions())
    table[aten.convolution_backward.default] = convolution_backward
    table[aten.threshold_backward.default] = threshold_backward
    table[aten.max_pool2d_with_indices.default] = max_pool2d_with_indices
    table[aten.max_pool2d_with_indices_backward.default] = max_pool2d_backward
    table[aten.avg_pool2d_backward.default] = avg_pool2d_backward
    table[aten.hardtanh_backward.default] = hardtanh_backward
    table[aten.constant_pad_nd.default] = constant_pad_nd
    table[aten.slice_backward.default] = slice_backward
    table[aten.squeeze.dims] = squeeze_dims
    table[aten._safe_softmax.default] = lambda x, dim, dtype=None: torch.softmax(x, dim, dtype=dtype)
    table[aten.linalg_vector_norm.default] = vector_norm
    return table


def threshold_backward(grad: Tensor, result: Tensor, threshold: float) -> Tensor:
    """Gradient of ReLU as a product: ONNX Runtime's Where is 8 times slower than Cast and Mul on a CPU."""
    return grad * (result > threshold).to(grad.dtype)


def hardtanh_backward(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """Gradient of a clamp (ReLU6) as a product, like :func:`threshold_backward`."""
    return grad * torch.logical_and(x > low, x < high).to(grad.dtype)


def constant_pad_nd(x: Tensor, pad: Sequence[int], value: float = 0) -> Tensor:
    """Padding by concatenation; torch's own tracing rule fixes the batch size. Negative padding crops.

    Args:
        x: any shape.
        pad: (before, after) of the last axis, then of the one before it, and so on.
        value: what to pad with.
    """
    for position in range(len(pad) // 2):
        axis = x.dim() - 1 - position
        before, after = int(pad[2 * position]), int(pad[2 * position + 1])
        cropped = x.shape[axis] + min(before, 0) + min(after, 0)
        if before < 0 or after < 0:
            x = x.narrow(axis, max(-before, 0), cropped)
        parts = [x]
        if before > 0:
            parts.insert(0, _filled(x, axis, before, value))
        if after > 0:
            parts.append(_filled(x, axis, after, value))
        x = torch.cat(parts, dim=axis) if len(parts) > 1 else x
    return x


def _filled(x: Tensor, axis: int, length: int, value: float) -> Tensor:
    shape = [length if index == axis else size for index, size in enumerate(x.shape)]
    return torch.full(shape, value, dtype=x.dtype)


def slice_backward(
    grad: Tensor, input_sizes: Sequence[int], dim: int, start: int, end: int, step: int
) -> Tensor:
    """Gradient of a slice: zeros around it and, at a larger step, between its values.

    torch's own rule writes into a tensor of zeros, which becomes a ScatterND between two transposes.
    """
    del end
    axis, length = dim % grad.dim(), input_sizes[dim]
    first = min(max(start + length if start < 0 else start, 0), length)
    spread = _spread(grad, axis, step)
    return constant_pad_nd(
        spread, [0, 0] * (grad.dim() - 1 - axis) + [first, length - first - spread.shape[axis]]
    )


def _spread(x: Tensor, axis: int, step: int) -> Tensor:
    """``step - 1`` zeros after every index of an axis."""
    if step == 1:
        return x
    shape = list(x.shape)
    apart = x.reshape([*shape[: axis + 1], 1, *shape[axis + 1 :]])
    apart = torch.cat([apart, _filled(apart, axis + 1, step - 1, 0)], dim=axis + 1)
    return apart.reshape([*shape[:axis], shape[axis] * step, *shape[axis + 1 :]])


def squeeze_dims(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Removes the axes of length 1 among ``dims``; a reshape, since every such axis is known while tracing."""
    gone = {axis % x.dim() for axis in dims}
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in gone or size != 1])


def vector_norm(
    x: Tensor,
    ord: float = 2,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Euclidean norm; other orders are left to torch's own decomposition."""
    if ord != 2 or dtype is not None:
        return NotImplemented  # type: ignore[no-any-return]
    square = x * x
    total: Tensor = square.sum() if dim is None else square.sum(list(dim), keepdim=keepdim)
    return total.sqrt()


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a convolution by convolutions and matrix products.

    Weight gradient: see :func:`weight_gradient`. Input gradient: at stride 1 a plain convolution with flipped
    weights whose channels are exchanged (constants, so the exchange happens once, when the bundle is built, and the
    runtime's fast path takes it); at larger strides a transposed convolution.

    Args:
        grad: [N, O, ...].
        x: [N, I, ...].
        weight: [O, I / groups, k...] (transposed: [I, O / groups, k...]).
        bias_sizes: unused; the bias gradient's shape follows from ``grad``.
        stride: per spatial axis, as are padding, dilation and output_padding.
        padding: see stride.
        dilation: see stride.
        transposed: whether the forward was a transposed convolution.
        output_padding: see stride.
        groups: number of groups.
        output_mask: which of (input, weight, bias) gradients are asked for.
    """
    del bias_sizes, output_padding
    spatial = list(range(2, weight.dim()))
    grad_input = None
    if output_mask[0]:
        if transposed:
            grad_input = torch.ops.aten.convolution(
                grad, weight, None, stride, padding, dilation, False, [0] * len(spatial), groups
            )
        elif all(step == 1 for step in stride):
            grad_input = _unit_stride_input_gradient(grad, weight, padding, dilation, groups)
        else:
            extra = [
                x.shape[axis] - ((grad.shape[axis] - 1) * s - 2 * p + d * (weight.shape[axis] - 1) + 1)
                for axis, s, p, d in zip(spatial, stride, padding, dilation, strict=True)
            ]
            grad_input = torch.ops.aten.convolution(
                grad, weight, None, stride, padding, dilation, True, extra, groups
            )
    grad_weight = None
    if output_mask[1]:
        # A transposed convolution reads its gradient where a plain one reads its input, and the other way round.
        ends = (x, grad) if transposed else (grad, x)
        grad_weight = weight_gradient(*ends, list(weight.shape[2:]), stride, padding, dilation, groups)
    grad_bias = grad.sum([0, *spatial]) if output_mask[2] else None
    return grad_input, grad_weight, grad_bias


def weight_gradient(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradient of a convolution's weights: dW[o, i, k] = sum over n, p of grad[n, o, p] x[n, i, p * s + k * d - pad].

    One matrix product between the images of the two sides, for all kernel positions k at once. The side with fewer
    channels is laid out once for every k: the input as its strided windows, or (a low-rank branch makes few channels
    of many) the output's gradient, spread and shifted, while the large input is read as it is.

    Args:
        grad: [N, O, ...], of the output.
        x: [N, I, ...].
        kernel: per spatial axis, as are stride, padding and dilation.
        stride: see kernel.
        padding: see kernel.
        dilation: see kernel.
        groups: number of groups.

    Returns:
        [O, I / groups, *kernel].
    """
    out_channels, in_channels = int(grad.shape[1]), int(x.shape[1])
    offsets = list(itertools.product(*(range(k) for k in kernel)))
    if groups == 1 and out_channels < in_channels and len(offsets) > 1:
        shifted = _shifted_gradients(grad, list(x.shape[2:]), kernel, stride, padding, dilation)
        products = torch.bmm(shifted.flatten(2), x.flatten(2).transpose(1, 2)).sum(0)
        by_offset = products.reshape([len(offsets), out_channels, in_channels])
        return by_offset.permute(1, 2, 0).reshape([out_channels, in_channels, *kernel])
    windows = _windows(x, list(grad.shape[2:]), kernel, stride, padding, dilation)
    count, positions = len(offsets), math.prod(grad.shape[2:])
    outputs, inputs = out_channels // groups, in_channels // groups
    left = grad.reshape([grad.shape[0] * groups, outputs, positions])
    if groups > 1:
        windows = windows.reshape([x.shape[0], count, groups, inputs, positions]).transpose(1, 2)
    right = windows.reshape([x.shape[0] * groups, count * inputs, positions])
    products = torch.bmm(left, right.transpose(1, 2))
    products = products.reshape([x.shape[0], groups, outputs, count, inputs]).sum(0)
    return products.transpose(2, 3).reshape([out_channels, inputs, *kernel])


def _windows(
    x: Tensor,
    outputs: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """[N, K * I, *outputs]: for each kernel position the values that it meets."""
    pad = [length for p in reversed(list(padding)) for length in (p, p)]
    padded = constant_pad_nd(x, pad) if any(pad) else x
    pieces = []
    for offset in itertools.product(*(range(k) for k in kernel)):
        piece = padded
        for axis, (k, out, s, d) in enumerate(zip(offset, outputs, stride, dilation, strict=True), 2):
            start, stop = k * d, k * d + (out - 1) * s + 1
            if start or s > 1 or stop != piece.shape[axis]:
                piece = torch.ops.aten.slice(piece, axis, start, stop, s)
        pieces.append(piece)
    return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]


def _shifted_gradients(
    grad: Tensor,
    inputs: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """[N, K * O, *inputs]: for each kernel position the output's gradient where the input was that it met."""
    spread, first = grad, []
    for axis, (length, k, s, p, d) in enumerate(
        zip(inputs, kernel, stride, padding, dilation, strict=True), 2
    ):
        spread = _spread(spread, axis, s)
        before, after = max((k - 1) * d - p, 0), length + p - int(spread.shape[axis])
        spread = constant_pad_nd(spread, [0, 0] * (grad.dim() - 1 - axis) + [before, after])
        first.append(before + p)
    pieces = []
    for offset in itertools.product(*(range(k) for k in kernel)):
        piece = spread
        for axis, (k, length, start, d) in enumerate(zip(offset, inputs, first, dilation, strict=True), 2):
            piece = piece.narrow(axis, start - k * d, length)
        pieces.append(piece)
    return torch.cat(pieces, dim=1)


def _unit_stride_input_gradient(
    grad: Tensor, weight: Tensor, padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    spatial = list(range(2, weight.dim()))
    out_channels, in_per_group = weight.shape[0], weight.shape[1]
    flipped = weight.flip(spatial)
    if groups == 1:
        flipped = flipped.transpose(0, 1)
    else:
        kernel = list(weight.shape[2:])
        flipped = flipped.reshape([groups, out_channels // groups, in_per_group, *kernel]).transpose(1, 2)
        flipped = flipped.reshape([groups * in_per_group, out_channels // groups, *kernel])
    full = [d * (weight.shape[axis] - 1) - p for axis, d, p in zip(spatial, dilation, padding, strict=True)]
    result: Tensor = torch.ops.aten.convolution(
        grad,
        flipped.contiguous(),
        None,
        [1] * len(spatial),
        [max(pad, 0) for pad in full],
        dilation,
        False,
        [0] * len(spatial),
        groups,
    )
    # A forward padding larger than the kernel's reach means that border outputs saw only padding: crop them.
    for axis, pad in zip(spatial, full, strict=True):
        if pad < 0:
            result = result.narrow(axis, -pad, result.shape[axis] + 2 * pad)
    return result


def max_pool2d_with_indices(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Max pooling with flat indices; only :func:`max_pool2d_backward` reads them."""
    if x.dim() != 4:
        raise OperatorNotSupported("aten.max_pool2d_with_indices", "", "the input has no batch axis")
    pooled: tuple[Tensor, Tensor] = max_pool2d_flat(x, kernel_size, stride, padding, dilation, ceil_mode)
    return pooled


def max_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """Gradient of max pooling: every window adds its gradient at the flat position of its maximum."""
    del kernel_size, stride, padding, dilation, ceil_mode
    # Not x.numel(): a symbolic count of elements has no ONNX form, a product with the batch has.
    flat = torch.zeros([x.shape[0] * math.prod(x.shape[1:])], dtype=grad.dtype)
    return flat.scatter_add(0, indices.reshape([-1]), grad.reshape([-1])).reshape(x.shape)


def avg_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Gradient of average pooling: each window spreads its gradient evenly, a depthwise transposed convolution."""
    del ceil_mode  # the output's size says all there is to say
    kernel = [int(kernel_size[index % len(kernel_size)]) for index in range(2)]
    step = [int(stride[index % len(stride)]) for index in range(2)] if len(stride) else kernel
    pad = [int(padding[index % len(padding)]) for index in range(2)]
    lengths, outputs = [int(n) for n in x.shape[2:]], [int(n) for n in grad.shape[2:]]
    rows, columns = (
        _window_sizes(length, output, k, s, p, padded=count_include_pad)
        for length, output, k, s, p in zip(lengths, outputs, kernel, step, pad, strict=True)
    )
    counts = torch.outer(torch.tensor(rows), torch.tensor(columns)).to(grad.dtype)
    share = torch.full_like(counts, 1.0 / divisor_override) if divisor_override else 1.0 / counts
    channels = int(x.shape[1])
    ones = torch.ones([channels, 1, *kernel], dtype=grad.dtype)
    spread: Tensor = torch.ops.aten.convolution(
        grad * share, ones, None, step, [0, 0], [1, 1], True, [0, 0], channels
    )
    for axis, length, p in zip((2, 3), lengths, pad, strict=True):
        missing = length + p - spread.shape[axis]
        if missing > 0:
            spread = constant_pad_nd(spread, [0, missing] if axis == 3 else [0, 0, 0, missing])
        spread = spread.narrow(axis, p, length)
    return spread


def _window_sizes(length: int, outputs: int, kernel: int, step: int, pad: int, *, padded: bool) -> list[int]:
    """How many positions each window counts along one axis."""
    low, high = (-pad, length + pad) if padded else (0, length)
    starts = [index * step - pad for index in range(outputs)]
    return [min(start + kernel, high) - max(start, low) for start in starts]
