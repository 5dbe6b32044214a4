"""Operators of ours that have one ONNX node as their meaning, where ATen's own would need several.

Each is declared with an eager implementation (the oracle in tests), a shape function for tracing, and its ONNX form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset18 as op
from torch import Tensor


@torch.library.custom_op("tta::max_pool2d_flat", mutates_args=())
def max_pool2d_flat(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    """Max pooling of ``x`` [N, C, H, W] with each maximum's index in the *whole flattened input*.

    ATen counts within a plane, ONNX within the tensor; converting costs a second pooling in the graph, and the
    backward pass wants the flat index anyway.
    """
    values, indices = torch.ops.aten.max_pool2d_with_indices(
        x, kernel_size, stride, padding, dilation, ceil_mode
    )
    planes = torch.arange(x.shape[0] * x.shape[1]).reshape(x.shape[0], x.shape[1], 1, 1)
    return values, indices + planes * (x.shape[2] * x.shape[3])


@max_pool2d_flat.register_fake
def _(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    values, indices = torch.ops.aten.max_pool2d_with_indices(
        x, kernel_size, stride, padding, dilation, ceil_mode
    )
    return values, indices


def _onnx_max_pool2d_flat(
    x: Any,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Any:
    pads = [*_pair(padding), *_pair(padding)]
    return op.MaxPool(
        x,
        kernel_shape=_pair(kernel_size),
        strides=_pair(stride) if stride else _pair(kernel_size),
        pads=pads,
        dilations=_pair(dilation),
        ceil_mode=int(ceil_mode),
    )


def _pair(values: Sequence[int]) -> list[int]:
    return [int(value) for value in values] if len(values) == 2 else [int(values[0])] * 2


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """ONNX forms of the operators here, for torch.onnx.export's custom translation table."""
    return {torch.ops.tta.max_pool2d_flat.default: _onnx_max_pool2d_flat}
