"""Each decomposition against torch's own derivative, in float64, over the shapes networks use."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tta_exporters import lower


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CONVOLUTIONS = [
    # kernel, stride, padding, dilation, groups, transposed
    (3, 1, 1, 1, 1, False),
    (3, 2, 1, 1, 1, False),
    (1, 2, 0, 1, 1, False),
    (1, 1, 0, 1, 1, False),
    (5, 1, 0, 1, 2, False),
    (3, 1, 2, 2, 1, False),
    (7, 2, 3, 1, 4, False),
    (3, 1, 1, 1, 4, False),
    (1, 1, 1, 1, 1, False),
    (2, 1, 3, 1, 1, False),
    (3, 2, 1, 1, 1, True),
    (4, 4, 0, 1, 1, False),
]


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "groups", "transposed"), CONVOLUTIONS)
@pytest.mark.parametrize("size", [8, 9])
def test_input_gradient_of_a_convolution(
    kernel: int, stride: int, padding: int, dilation: int, groups: int, transposed: bool, size: int
) -> None:
    x = random(2, 4, size, size + 1).requires_grad_(True)
    weight = (
        random(4, 8 // groups, kernel, kernel, seed=1)
        if transposed
        else random(8, 4 // groups, kernel, kernel, seed=1)
    )
    arguments = ([stride] * 2, [padding] * 2, [dilation] * 2, transposed, [0, 0], groups)
    y = torch.ops.aten.convolution(x, weight, None, *arguments)
    grad = random(*y.shape, seed=2)
    (expected,) = torch.autograd.grad(y, x, grad)
    found, _, bias = lower.convolution_backward(
        grad, x.detach(), weight, [8], *arguments, output_mask=[True, False, True]
    )
    assert found is not None
    assert bias is not None
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(bias, grad.sum((0, 2, 3)))


def test_one_dimensional_convolution() -> None:
    x, weight = random(2, 3, 9).requires_grad_(True), random(5, 3, 3, seed=1)
    y = F.conv1d(x, weight, padding=1)
    grad = random(*y.shape, seed=2)
    found = lower.convolution_backward(
        grad, x.detach(), weight, None, [1], [1], [1], False, [0], 1, [True, False, False]
    )[0]
    assert found is not None
    torch.testing.assert_close(found, torch.autograd.grad(y, x, grad)[0])


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "groups", "transposed"), CONVOLUTIONS)
@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("outputs", [4, 8, 12])
def test_weight_gradient_of_a_convolution(
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    transposed: bool,
    size: int,
    outputs: int,
) -> None:
    """More output than input channels and fewer: the smaller side is laid out."""
    x = random(3, 8, size, size + 1)
    shape = (8, outputs // groups) if transposed else (outputs, 8 // groups)
    weight = random(*shape, kernel, kernel, seed=1).requires_grad_(True)
    arguments = ([stride] * 2, [padding] * 2, [dilation] * 2, transposed, [0, 0], groups)
    y = torch.ops.aten.convolution(x, weight, None, *arguments)
    grad = random(*y.shape, seed=2)
    (expected,) = torch.autograd.grad(y, weight, grad)
    found = lower.convolution_backward(
        grad, x, weight.detach(), None, *arguments, output_mask=[False, True, False]
    )
    assert found[1] is not None
    torch.testing.assert_close(found[1], expected)
    assert found[0] is None
    assert found[2] is None


def test_weight_gradient_of_a_one_dimensional_convolution() -> None:
    x, weight = random(2, 6, 9), random(3, 6, 3, seed=1).requires_grad_(True)
    y = F.conv1d(x, weight, padding=2, stride=2)
    grad = random(*y.shape, seed=2)
    found = lower.weight_gradient(grad, x, [3], [2], [2], [1], 1)
    torch.testing.assert_close(found, torch.autograd.grad(y, weight, grad)[0])


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "ceil_mode"), [(3, 2, 1, False), (2, 2, 0, False), (3, 2, 0, True)]
)
@pytest.mark.parametrize("ties", [False, True])
def test_max_pooling_sends_the_gradient_to_the_first_maximum(
    kernel: int, stride: int, padding: int, ceil_mode: bool, ties: bool
) -> None:
    x = random(2, 3, 9, 8)
    x = x.round() if ties else x
    x.requires_grad_(True)
    y = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode)
    grad = random(*y.shape, seed=2)
    (expected,) = torch.autograd.grad(y, x, grad)
    arguments = ([kernel] * 2, [stride] * 2, [padding] * 2, [1, 1], ceil_mode)
    values, indices = lower.max_pool2d_with_indices(x.detach(), *arguments)
    torch.testing.assert_close(values, y.detach())
    found = lower.max_pool2d_backward(grad, x.detach(), *arguments, indices)
    torch.testing.assert_close(found, expected)


def test_relu_and_relu6_gradients() -> None:
    x = (3 * random(50)).requires_grad_(True)
    grad = random(50, seed=1)
    (expected,) = torch.autograd.grad(torch.relu(x), x, grad)
    torch.testing.assert_close(lower.threshold_backward(grad, torch.relu(x.detach()), 0), expected)
    (expected,) = torch.autograd.grad(F.relu6(x), x, grad)
    torch.testing.assert_close(lower.hardtanh_backward(grad, x.detach(), 0, 6), expected)


def test_vector_norm_and_squeeze() -> None:
    x = random(3, 1, 4, 1)
    torch.testing.assert_close(lower.vector_norm(x), torch.linalg.vector_norm(x))
    torch.testing.assert_close(lower.vector_norm(x, dim=[2], keepdim=True), x.norm(dim=2, keepdim=True))
    assert lower.squeeze_dims(x, [1, -1, 0]).shape == (3, 4)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "ceil_mode", "include"),
    [
        (2, 2, 0, False, True),
        (3, 2, 1, False, True),
        (3, 2, 1, False, False),
        (3, 2, 0, True, True),
        (3, 2, 1, True, False),
        (2, 3, 0, False, True),
    ],
)
def test_average_pooling_spreads_the_gradient(
    kernel: int, stride: int, padding: int, ceil_mode: bool, include: bool
) -> None:
    x = random(2, 3, 9, 8).requires_grad_(True)
    y = F.avg_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode, count_include_pad=include)
    grad = random(*y.shape, seed=2)
    (expected,) = torch.autograd.grad(y, x, grad)
    found = lower.avg_pool2d_backward(
        grad, x.detach(), [kernel], [stride], [padding], ceil_mode, include, None
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("pad", [[1, 2], [1, 0, 0, 3], [-1, 2], [0, -2, 1, -1], [0, 0]])
def test_padding(pad: list[int]) -> None:
    x = random(2, 3, 5, 6)
    torch.testing.assert_close(lower.constant_pad_nd(x, pad, 1.5), F.pad(x, pad, value=1.5))


@pytest.mark.parametrize(
    ("dim", "start", "end", "step"),
    [(2, 0, 9, 2), (3, 1, 8, 3), (1, 1, 3, 1), (-1, -4, -1, 1), (2, 0, 9223372036854775807, 4), (2, 8, 9, 2)],
)
def test_a_slice_sends_its_gradient_back_to_where_it_came_from(
    dim: int, start: int, end: int, step: int
) -> None:
    x = random(2, 3, 9, 8).requires_grad_(True)
    y = torch.ops.aten.slice.Tensor(x, dim, start, end, step)
    grad = random(*y.shape, seed=2)
    (expected,) = torch.autograd.grad(y, x, grad)
    found = lower.slice_backward(grad, x.shape, dim, start, end, step)
    torch.testing.assert_close(found, expected)
