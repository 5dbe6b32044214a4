"""A causal language model as one plain function of tokens, past and a low-rank update: what bundles of text run.

One description covers our own small decoders, Llama-class networks (RMSNorm, rotary positions, grouped heads, gated
MLP) and GPT-2-class ones (LayerNorm, learned positions, plain MLP). ``tta_exporters.language_sources`` reads the
weights of both from `transformers` models; here is only arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Target = Literal["o", "down"]
"""A linear layer of a block that may be updated: attention's output projection, the MLP's second matrix."""

TARGETS: tuple[Target, ...] = ("o", "down")
MASKED = -1e30
"""Stands for minus infinity in attention scores; it stays finite in every graph."""


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder.

    Attributes:
        vocabulary: tokens.
        layers: blocks.
        width: of the residual stream.
        heads: of queries.
        kv_heads: of keys and values; a divisor of ``heads``.
        head_width: of one head.
        hidden: inner width of the MLP.
        context: positions that the network was trained on; none beyond it is ever asked for.
        norm: "rms" or "layer".
        positions: "rope" or "learned".
        gated: whether the MLP is act(gate x) * up x, instead of act(up x).
        activation: "silu", "gelu" or "gelu_tanh".
        qkv_bias, out_bias, mlp_bias: whether these linear layers have biases.
        eps: of the normalisation.
        rope_base: of the rotary frequencies.
        tied: whether the output matrix is the embedding.

    Raises:
        ValueError: a combination that is no decoder.
    """

    vocabulary: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    hidden: int
    context: int
    norm: Literal["rms", "layer"] = "rms"
    positions: Literal["rope", "learned"] = "rope"
    gated: bool = True
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    eps: float = 1e-5
    rope_base: float = 10_000.0
    tied: bool = True

    def __post_init__(self) -> None:
        sizes = ("vocabulary", "layers", "width", "heads", "kv_heads", "head_width", "hidden", "context")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it starts at 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads of queries cannot share {self.kv_heads} of keys evenly")
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(f"head_width is {self.head_width}, rotary positions need an even one")

    def fan_in(self, target: Target) -> int:
        """Inputs of one of the linear layers that may be updated."""
        return self.heads * self.head_width if target == "o" else self.hidden


class Update(NamedTuple):
    """A low-rank update of one linear layer and its bias: y + up (down [x, 1]).

    Attributes:
        down: [batch or 1, rank, inputs + 1], what a context is turned into; the last column moves the output whatever
            comes in.
        up: [outputs, rank], learned once.
    """

    down: Tensor
    up: Tensor


Updates = Mapping[tuple[int, Target], Update]
"""By block and layer."""


class Heard(NamedTuple):
    """What a block saw, for a mapper to read.

    Attributes:
        inputs: [batch, tokens, inputs] of each layer that may be updated, by name.
        output: [batch, tokens, width], the residual stream behind the block.
    """

    inputs: dict[Target, Tensor]
    output: Tensor


class Decoded(NamedTuple):
    """What one pass returns.

    Attributes:
        logits: [batch, tokens, vocabulary].
        cache: [layers, 2, batch, kv_heads, past + tokens, head_width], keys (rotated) and values.
        heard: one for each block.
    """

    logits: Tensor
    cache: Tensor
    heard: list[Heard]


class Norm(nn.Module):
    """RMSNorm, or LayerNorm with its bias."""

    def __init__(self, width: int, kind: Literal["rms", "layer"], eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if kind == "layer" else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        # Written out: fused normalisation operators come back from tracing with outputs that TensorRT refuses.
        if self.bias is not None:
            x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight
        return x if self.bias is None else x + self.bias


class Attention(nn.Module):
    """Causal attention with grouped heads over past and present."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        queries, keys = config.heads * config.head_width, config.kv_heads * config.head_width
        self.q = nn.Linear(config.width, queries, bias=config.qkv_bias)
        self.k = nn.Linear(config.width, keys, bias=config.qkv_bias)
        self.v = nn.Linear(config.width, keys, bias=config.qkv_bias)
        self.o = nn.Linear(queries, config.width, bias=config.out_bias)

    def mixed(
        self, x: Tensor, past: Tensor | None, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """What the output projection takes, and the cache.

        Args:
            x: [batch, tokens, width].
            past: [2, batch, kv_heads, past, head_width] or None.
            rotation: cosines and sines [tokens, head_width], or None.

        Returns:
            [batch, tokens, heads * head_width] and [2, batch, kv_heads, past + tokens, head_width].
        """
        c = self.config
        batch, tokens, _ = x.shape
        q = self.q(x).reshape(batch, tokens, c.heads, c.head_width).transpose(1, 2)
        k = self.k(x).reshape(batch, tokens, c.kv_heads, c.head_width).transpose(1, 2)
        v = self.v(x).reshape(batch, tokens, c.kv_heads, c.head_width).transpose(1, 2)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        cache = torch.stack([k, v])
        if c.kv_heads != c.heads:
            k = k.repeat_interleave(c.heads // c.kv_heads, dim=1)
            v = v.repeat_interleave(c.heads // c.kv_heads, dim=1)
        if past is None:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            length = k.shape[2]
            scores = q @ k.transpose(-1, -2) / math.sqrt(c.head_width)
            seen = torch.arange(length)[None, :] <= torch.arange(tokens)[:, None] + (length - tokens)
            mixed = torch.softmax(scores + torch.where(seen, 0.0, MASKED), dim=-1) @ v
        return mixed.transpose(1, 2).reshape(batch, tokens, c.heads * c.head_width), cache


class Mlp(nn.Module):
    """Two matrices with an activation between them, or three with a gate."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.up = nn.Linear(config.width, config.hidden, bias=config.mlp_bias)
        self.gate = nn.Linear(config.width, config.hidden, bias=config.mlp_bias) if config.gated else None
        self.down = nn.Linear(config.hidden, config.width, bias=config.mlp_bias)

    def inner(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., hidden], what the second matrix takes."""
        inner: Tensor = self.up(x)
        return self._act(inner) if self.gate is None else self._act(self.gate(x)) * inner

    def _act(self, x: Tensor) -> Tensor:
        if self.activation == "silu":
            return F.silu(x)
        return F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")


class Block(nn.Module):
    """Attention and MLP, each behind a normalisation and beside the residual stream."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.norm1 = Norm(config.width, config.norm, config.eps)
        self.attention = Attention(config)
        self.norm2 = Norm(config.width, config.norm, config.eps)
        self.mlp = Mlp(config)

    def forward(
        self,
        x: Tensor,
        past: Tensor | None,
        rotation: tuple[Tensor, Tensor] | None,
        updates: Mapping[Target, Update],
    ) -> tuple[Tensor, Tensor, dict[Target, Tensor]]:
        """The residual stream behind the block, the cache, the inputs of the layers that may be updated."""
        mixed, cache = self.attention.mixed(self.norm1(x), past, rotation)
        x = x + updated(self.attention.o(mixed), mixed, updates.get("o"))
        inner = self.mlp.inner(self.norm2(x))
        x = x + updated(self.mlp.down(inner), inner, updates.get("down"))
        return x, cache, {"o": mixed, "down": inner}


class Decoder(nn.Module):
    """Tokens to logits; a pure function of tokens, past and updates."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.context, config.width) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = Norm(config.width, config.norm, config.eps)
        self.head = None if config.tied else nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor, past: Tensor | None = None, updates: Updates | None = None) -> Decoded:
        """One pass.

        Args:
            tokens: [batch, tokens] int64.
            past: [layers, 2, batch, kv_heads, past, head_width] of a pass before, or None.
            updates: of the linear layers; a layer without one is the network's own.
        """
        config, updates = self.config, updates or {}
        before = 0 if past is None else past.shape[4]
        count = tokens.shape[1]
        x = self.embedding(tokens)
        where = torch.arange(count) + before
        if self.position is not None:
            x = x + self.position(where)
        rotation = rotations(where, config) if config.positions == "rope" else None
        caches, heard = [], []
        for index, block in enumerate(self.blocks):
            own: dict[Target, Update] = {
                target: updates[index, target] for target in TARGETS if (index, target) in updates
            }
            x, cache, inputs = block(x, None if past is None else past[index], rotation, own)
            caches.append(cache)
            heard.append(Heard(inputs, x))
        x = self.norm(x)
        logits = F.linear(x, self.embedding.weight) if self.head is None else self.head(x)
        return Decoded(logits, torch.stack(caches), heard)


def updated(y: Tensor, x: Tensor, update: Update | None) -> Tensor:
    """A linear layer's output with its low-rank update: y + up (down [x, 1]).

    Args:
        y: [batch, tokens, outputs], the layer's own output.
        x: [batch, tokens, inputs], its input.
        update: see :class:`Update`, or None.
    """
    if update is None:
        return y
    turned = update.down.transpose(-1, -2)
    return y + F.linear(x @ turned[..., :-1, :] + turned[..., -1:, :], update.up)


def rotations(where: Tensor, config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines [tokens, head_width] of the rotary positions ``where`` [tokens].

    Source: Su et al., RoFormer, 2021, eq. 34; the two halves of a head are the pairs, as in Llama.
    """
    half = torch.arange(0, config.head_width, 2, dtype=torch.float32) / config.head_width
    frequencies = torch.exp(-math.log(config.rope_base) * half)
    angles = where.to(torch.float32)[:, None] * frequencies[None, :]
    angles = torch.cat([angles, angles], dim=-1)
    return torch.cos(angles), torch.sin(angles)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """[batch, heads, tokens, head_width] turned by its position."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cosines + turned * sines
