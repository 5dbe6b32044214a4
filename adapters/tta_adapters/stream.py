"""StreamAdapter-style mappers: a decoder's context becomes a low-rank update of fixed size, without gradients.

A context is heard in chunks. Each chunk passes through the frozen network by itself; a *mapper* reads what every block
saw and folds it into a state of constant size; the state is turned into the ``down`` halves of low-rank updates, which
are theta. The ``up`` halves are learned once and start at zero, so an untrained mapper changes nothing::

    state' = mapper.absorb(heard, state)          heard: what the blocks saw of one chunk
    downs = mapper.downs(state')                  theta, one matrix for each updated layer
    y = W x + up (down [x, 1])                    serving, at the same cost however much was heard

Two mappers share this interface. :class:`AttentionMapper` has the structure reported for StreamAdapter (Muhtar et
al., 2024, arXiv 2411.09289: cross attention of learned queries within a chunk, gated recurrence between chunks,
absorption as a low-rank update); widths, gate and training are ours. :class:`DeltaMapper` keeps a matrix under the
delta rule (Schlag et al., Linear Transformers Are Secretly Fast Weight
Programmers, 2021, eq. 24; gated as in Yang et al., Gated Delta Networks, 2024).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tta_adapters.base import State
from tta_adapters.decoder import TARGETS, Block, Decoder, Heard, Target, Update

Downs = dict[tuple[int, Target], Tensor]
"""By block and layer: [batch, rank, inputs + 1]."""


class StreamMapper(nn.Module, ABC):
    """From what a decoder heard to a low-rank update of it.

    Args:
        decoder: the frozen network whose shapes and norms count; nothing of it is kept or trained.
        rank: of every update.
        cap: an update is at most so large beside the matrix that it is added to, in the Frobenius norm.

    Attributes:
        layers: (block, layer) of every update, in the order of theta.

    Raises:
        ValueError: a rank below 1 or a cap that is not positive.
    """

    name: str

    def __init__(self, decoder: Decoder, *, rank: int, cap: float) -> None:
        super().__init__()
        if rank < 1 or not cap > 0:
            raise ValueError(f"rank is {rank} and cap {cap:g}; a rank starts at 1 and a cap above 0")
        config = decoder.config
        self.config, self.rank, self.cap = config, rank, cap
        self.layers: list[tuple[int, Target]] = [
            (block, target) for block in range(config.layers) for target in TARGETS
        ]
        self.ups = nn.ParameterDict(
            {key(*layer): nn.Parameter(torch.zeros(config.width, rank)) for layer in self.layers}
        )
        self.norms = {layer: float(weight_of(decoder, *layer).detach().norm()) for layer in self.layers}

    @abstractmethod
    def initial(self, batch: int) -> State:
        """The state of having heard nothing: zeros, [batch, ...] by name."""

    @abstractmethod
    def absorb(self, heard: Sequence[Heard], state: State) -> State:
        """The state after one more chunk.

        Args:
            heard: of each block, over a chunk of at least two tokens.
            state: before it.
        """

    @abstractmethod
    def raw_downs(self, state: State) -> Downs:
        """What the state says, before it is capped."""

    def downs(self, state: State) -> Downs:
        """Theta by layer: what the state says, no update larger than ``cap`` allows."""
        raw = self.raw_downs(state)
        return {layer: self._capped(down, *layer) for layer, down in raw.items()}

    def updates(self, downs: Downs) -> dict[tuple[int, Target], Update]:
        """Theta as a decoder takes it."""
        return {layer: Update(down, self.ups[key(*layer)]) for layer, down in downs.items()}

    def pack(self, downs: Downs) -> Tensor:
        """[batch, P]: theta as one vector for each sample, in the order of ``layers``."""
        return torch.cat([downs[layer].flatten(1) for layer in self.layers], dim=1)

    def unpack(self, theta: Tensor) -> Downs:
        """The inverse of :meth:`pack`."""
        sizes = [self.rank * self.columns(target) for _, target in self.layers]
        parts = torch.split(theta, sizes, dim=1)
        return {
            layer: part.reshape(-1, self.rank, self.columns(layer[1]))
            for layer, part in zip(self.layers, parts, strict=True)
        }

    def columns(self, target: Target) -> int:
        """Of a layer's ``down``: its inputs and the constant one."""
        return self.config.fan_in(target) + 1

    @property
    def size(self) -> int:
        """P, the length of theta."""
        return sum(self.rank * self.columns(target) for _, target in self.layers)

    def ratio(self, down: Tensor, block: int, target: Target) -> Tensor:
        """[batch]: how large an update is beside its matrix, |up down| / |W| in the Frobenius norm."""
        up = self.ups[key(block, target)]
        # |up down|^2 = <up^T up, down down^T>: both are rank x rank, the product itself is never made.
        squared = ((up.T @ up) * (down @ down.transpose(1, 2))).sum((1, 2))
        return torch.sqrt(torch.relu(squared) + 1e-20) / self.norms[block, target]

    def _capped(self, down: Tensor, block: int, target: Target) -> Tensor:
        allowed = self.cap / self.ratio(down, block, target)
        return down * torch.minimum(allowed, torch.ones_like(allowed))[:, None, None]


class AttentionMapper(StreamMapper):
    """Learned queries summarise each chunk; a gate blends the summary into what was kept.

    In every block, for each of ``rank`` rows and ``heads`` heads, a learned query attends to the pairs (this token,
    the token after it) by what the block made of both, and collects the inputs of an updated layer at this token: what
    comes next chooses the row, where it came chooses its content. A row of theta so answers inputs like those that
    were followed by its kind of token.

    Args:
        decoder, rank, cap: see :class:`StreamMapper`.
        heads: of the cross attention.
        key_width: of one head's queries and keys.
        width: of a row of the state; a multiple of ``heads``.

    Source: the structure of Muhtar et al., 2024; pairs of tokens, gate and widths are ours.
    """

    name = "attention"

    def __init__(
        self,
        decoder: Decoder,
        *,
        rank: int = 32,
        cap: float = 1.0,
        heads: int = 4,
        key_width: int = 32,
        width: int = 128,
    ) -> None:
        super().__init__(decoder, rank=rank, cap=cap)
        if width % heads:
            raise ValueError(f"a state of width {width} does not divide among {heads} heads")
        config = self.config
        self.heads, self.key_width, self.width = heads, key_width, width
        pair = 2 * config.width
        self.keys = nn.ModuleList(
            nn.Linear(pair, heads * key_width, bias=False) for _ in range(config.layers)
        )
        self.queries = nn.ParameterDict()
        self.values, self.gates, self.expand = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for layer in self.layers:
            name, inputs = key(*layer), config.fan_in(layer[1])
            self.queries[name] = nn.Parameter(torch.randn(heads, rank, key_width))
            self.values[name] = nn.Linear(inputs, width, bias=False)
            self.expand[name] = nn.Linear(width, self.columns(layer[1]), bias=False)
            gate = nn.Linear(2 * width, width)
            nn.init.zeros_(gate.weight)
            nn.init.constant_(gate.bias, GATE_START)
            self.gates[name] = gate

    def initial(self, batch: int) -> State:
        """``NAME``: zeros [batch, rank, width] for each updated layer."""
        return {key(*layer): torch.zeros(batch, self.rank, self.width) for layer in self.layers}

    def absorb(self, heard: Sequence[Heard], state: State) -> State:
        """See :meth:`StreamMapper.absorb`."""
        after: State = {}
        for block, found in enumerate(heard):
            pairs = pairs_of(found.output)
            batch, count, _ = pairs.shape
            keys = self.keys[block](pairs).reshape(batch, count, self.heads, self.key_width)
            for target in TARGETS:
                name = key(block, target)
                scores = torch.einsum("hrk,bchk->bhrc", self.queries[name], keys) / self.key_width**0.5
                values = self.values[name](scaled(found.inputs[target][:, :-1]))
                values = values.reshape(batch, count, self.heads, -1).transpose(1, 2)
                summary = torch.softmax(scores, dim=-1) @ values
                summary = scaled(summary.transpose(1, 2).reshape(batch, self.rank, self.width))
                before = state[name]
                keep = torch.sigmoid(self.gates[name](torch.cat([summary, before], dim=-1)))
                after[name] = keep * before + (1 - keep) * summary
        return after

    def raw_downs(self, state: State) -> Downs:
        """Rows of the state, expanded to the inputs of their layer and the constant one."""
        return {layer: self.expand[key(*layer)](state[key(*layer)]) for layer in self.layers}


class DeltaMapper(StreamMapper):
    """A matrix for each updated layer learns to answer an input with what came next, by the delta rule.

    S <- keep S + sum over a group of tokens of beta (v - S k) k^T: k is the layer's input at a token, projected and of
    length 1, v what the block made of the token after it. Tokens of one group are written together, from the S before
    the group.

    Args:
        decoder, rank, cap: see :class:`StreamMapper`.
        group: tokens written at once.

    Source: Schlag et al., 2021, eq. 24; groups as the mini-batches of Sun et al., Learning to (Learn at Test Time),
    2024.
    """

    name = "delta"

    def __init__(self, decoder: Decoder, *, rank: int = 32, cap: float = 1.0, group: int = 16) -> None:
        super().__init__(decoder, rank=rank, cap=cap)
        if group < 1:
            raise ValueError(f"group is {group}, it starts at 1")
        config = self.config
        self.group = group
        self.keys, self.values, self.writes = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.reads = nn.ParameterDict()
        for layer in self.layers:
            name, inputs = key(*layer), config.fan_in(layer[1])
            keys = nn.Linear(inputs, rank, bias=False)
            self.keys[name] = keys
            # What is written under a layer's input is read by it; the constant one reads nothing at first.
            self.reads[name] = nn.Parameter(F.pad(keys.weight.detach(), (0, 1)))
            self.values[name] = nn.Linear(2 * config.width, rank, bias=False)
            writes = nn.Linear(2 * config.width, 2)
            nn.init.zeros_(writes.weight)
            # beta = 0.2 at first, and a group of tokens forgets a fiftieth.
            writes.bias.data.copy_(torch.tensor([-1.4, 4.0]))
            self.writes[name] = writes

    def initial(self, batch: int) -> State:
        """``NAME``: zeros [batch, rank, rank] for each updated layer."""
        return {key(*layer): torch.zeros(batch, self.rank, self.rank) for layer in self.layers}

    def absorb(self, heard: Sequence[Heard], state: State) -> State:
        """See :meth:`StreamMapper.absorb`."""
        names = [key(*layer) for layer in self.layers]
        keys, values, betas, keeps = [], [], [], []
        for block, found in enumerate(heard):
            pairs = pairs_of(found.output)
            for target in TARGETS:
                name = key(block, target)
                keys.append(unit(self.keys[name](scaled(found.inputs[target][:, :-1]))))
                values.append(self.values[name](pairs))
                writes = torch.sigmoid(self.writes[name](pairs))
                betas.append(writes[..., :1])
                keeps.append(writes[..., 1:])
        # All layers at once: [batch, layers, tokens, ...].
        k, v, beta, keep = (torch.stack(part, dim=1) for part in (keys, values, betas, keeps))
        s = torch.stack([state[name] for name in names], dim=1)
        for first in range(0, k.shape[2], self.group):
            part = slice(first, first + self.group)
            error = v[:, :, part] - k[:, :, part] @ s.transpose(-1, -2)
            kept = keep[:, :, part].mean(dim=2, keepdim=True)
            s = kept * s + (beta[:, :, part] * error).transpose(-1, -2) @ k[:, :, part]
        return {name: s[:, index] for index, name in enumerate(names)}

    def raw_downs(self, state: State) -> Downs:
        """S read through a projection of the layer's input and the constant one."""
        return {layer: state[key(*layer)] @ self.reads[key(*layer)] for layer in self.layers}


GATE_START = 1.5
"""sigmoid of it is kept of what was heard before a chunk, at first."""

MAPPERS = {mapper.name: mapper for mapper in (AttentionMapper, DeltaMapper)}
"""By name."""


def key(block: int, target: Target) -> str:
    """The name of an updated layer in states and theta."""
    return f"{block}_{target}"


def weight_of(decoder: Decoder, block: int, target: Target) -> Tensor:
    """The matrix [outputs, inputs] that an update is added to."""
    module = cast("Block", decoder.blocks[block])
    return module.attention.o.weight if target == "o" else module.mlp.down.weight


def pairs_of(output: Tensor) -> Tensor:
    """[batch, tokens, width] -> [batch, tokens - 1, 2 width]: each token and the one after it, both scaled."""
    output = scaled(output)
    return torch.cat([output[:, :-1], output[:, 1:]], dim=-1)


def scaled(x: Tensor) -> Tensor:
    """Divided by its root mean square along the last axis; zeros stay zeros."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def unit(x: Tensor) -> Tensor:
    """Of length 1 along the last axis; zeros stay zeros."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
