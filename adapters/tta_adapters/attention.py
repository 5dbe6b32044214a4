"""Scaled dot-product attention whose backward pass remembers the inputs only.

The probabilities, tokens x tokens for every head, are the largest thing an attention block makes; they are computed
again when the gradient comes, which costs one small product and a softmax.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Attention(torch.autograd.Function):
    """(q, k, v, mask) -> softmax(scale * q k^T + mask) v.

    With p the probabilities and d the gradient of the output: dv = p^T d, ds = p * (dp - sum(dp * p)) for dp = d v^T,
    dq = scale * ds k, dk = ds^T (scale * q).

    Source: Vaswani et al., Attention Is All You Need, NeurIPS 2017, eq. 1, and its derivative; recomputation as in
    Dao et al., FlashAttention, NeurIPS 2022, section 3.1.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        # Three axes from here on: a batched product of a transposed operand is then one node of the graph.
        lead = list(q.shape[:-1])
        count = math.prod(lead[:-1])
        q, k, v = (value.reshape([count, *value.shape[-2:]]) for value in (q, k, v))
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale, ctx.lead = scale, lead
        p = _probabilities(torch.bmm(q, k.transpose(1, 2)) * scale, mask, lead)
        return torch.bmm(p, v).reshape([*lead, v.shape[-1]])

    @staticmethod
    @once_differentiable  # type: ignore[misc, untyped-decorator, unused-ignore]
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, mask = ctx.saved_tensors
        lead = ctx.lead
        d = d.reshape([math.prod(lead[:-1]), *d.shape[-2:]])
        # Scaling the queries instead of the scores serves dk as well, and keeps the exporter from recognising the
        # forward pass's expression, whose result it would then keep alive after all.
        scaled = q * ctx.scale
        p = _probabilities(torch.bmm(scaled, k.transpose(1, 2)), mask, lead)
        dv = torch.bmm(p.transpose(1, 2), d)
        dp = torch.bmm(d, v.transpose(1, 2))
        ds = p * (dp - (dp * p).sum(-1, keepdim=True))
        dq = torch.bmm(ds, k) * ctx.scale
        dk = torch.bmm(ds.transpose(1, 2), scaled)
        heads = lead[:-1]
        return (*(g.reshape([*heads, *g.shape[-2:]]) for g in (dq, dk, dv)), None, None)  # type: ignore[return-value]


def _probabilities(scores: Tensor, mask: Tensor | None, lead: list[int]) -> Tensor:
    """Softmax of [B, L, S] scores; a mask broadcasts against [*lead, S]."""
    if mask is not None:
        scores = (scores.reshape([*lead, scores.shape[-1]]) + mask).reshape(scores.shape)
    return torch.softmax(scores, dim=-1)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Drop-in for torch.nn.functional.scaled_dot_product_attention without dropout.

    Args:
        query: [..., L, E] float.
        key: [..., S, E].
        value: [..., S, V].
        attn_mask: broadcastable to [..., L, S]; bool (True takes part) or float (added to the scores).
        dropout_p: ignored; adapted networks run in evaluation mode.
        is_causal: position i sees positions <= i only.
        scale: factor on the scores; 1 / sqrt(E) by default.

    Returns:
        [..., L, V].
    """
    del dropout_p
    mask = attn_mask
    if is_causal:
        mask = torch.ones([query.shape[-2], key.shape[-2]], dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(mask.logical_not(), -math.inf)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _Attention.apply(query, key, value, mask, factor)  # type: ignore[no-any-return, no-untyped-call]
