"""The normalisation functions against torch's own kernels and automatic derivatives, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tta_adapters import normalise

SHAPES = [(6, 4), (6, 4, 5), (6, 4, 5, 3)]


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [value.clone().requires_grad_(True) for value in inputs]
    y = function(*leaves)
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=y.dtype)
    return [y, *torch.autograd.grad((y * seed).sum(), leaves)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_and_its_gradients(shape: tuple[int, ...]) -> None:
    inputs = random(*shape), random(4, seed=1), random(4, seed=2)
    found = gradients(lambda x, w, b: normalise.batch_norm(x, w, b, 1e-5)[0], *inputs)
    expected = gradients(lambda x, w, b: F.batch_norm(x, None, None, w, b, True, 0.0, 1e-5), *inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_batch_norm_gradient_by_finite_differences() -> None:
    inputs = [value.requires_grad_(True) for value in (random(3, 2, 2), random(2, seed=1), random(2, seed=2))]
    assert torch.autograd.gradcheck(lambda x, w, b: normalise.batch_norm(x, w, b, 1e-5)[0], inputs)


def test_batch_norm_of_inputs_far_from_zero_keeps_its_precision() -> None:
    x = (random(64, 4) + 1e4).float()
    ours = normalise.batch_norm(x, torch.ones(4), torch.zeros(4), 1e-5)[0]
    exact = F.batch_norm(x.double(), None, None, None, None, True, 0.0, 1e-5)
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2e-3)


@pytest.mark.parametrize("axes", [1, 2])
def test_layer_norm_and_its_gradients(axes: int) -> None:
    x = random(3, 4, 5)
    shape = list(x.shape[-axes:])
    inputs = x, random(*shape, seed=1), random(*shape, seed=2)
    found = gradients(lambda x, w, b: normalise.layer_norm(x, axes, w, b, 1e-5), *inputs)
    expected = gradients(lambda x, w, b: F.layer_norm(x, shape, w, b, 1e-5), *inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_rms_norm_and_its_gradients() -> None:
    inputs = random(3, 4, 5), random(5, seed=1)
    found = gradients(lambda x, w: normalise.layer_norm(x, 1, w, None, 1e-6, centred=False), *inputs)
    expected = gradients(lambda x, w: F.rms_norm(x, [5], w, 1e-6), *inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 5, 2)])
def test_group_norm_and_its_gradients(shape: tuple[int, ...]) -> None:
    inputs = random(*shape), random(4, seed=1), random(4, seed=2)
    found = gradients(lambda x, w, b: normalise.group_norm(x, 2, w, b, 1e-5), *inputs)
    expected = gradients(lambda x, w, b: F.group_norm(x, 2, w, b, 1e-5), *inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
