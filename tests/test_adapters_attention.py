"""Attention against torch's own, values and gradients, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tta_adapters.attention import attention


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = [(2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 7)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(True) for shape in shapes
    ]


MASKS = {
    "none": None,
    "bool": torch.rand(5, 6, generator=torch.Generator().manual_seed(1)) > 0.3,
    "float": torch.randn(2, 1, 5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_torch(mask: str, scale: float | None) -> None:
    ours, theirs = tensors(), tensors()
    y = attention(*ours, attn_mask=MASKS[mask], scale=scale)
    expected = F.scaled_dot_product_attention(*theirs, attn_mask=MASKS[mask], scale=scale)
    torch.testing.assert_close(y, expected)
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    for a, b in zip(
        torch.autograd.grad((y * seed).sum(), ours),
        torch.autograd.grad((expected * seed).sum(), theirs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_causal() -> None:
    q, k, v = tensors()
    k, v = k[..., :5, :], v[..., :5, :]
    torch.testing.assert_close(
        attention(q, k, v, is_causal=True), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    )
