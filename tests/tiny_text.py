"""A small real text bundle: a decoder of random weights and a mapper whose updates are not zero, exported by torch."""

from __future__ import annotations

import functools
import logging
import math
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tta_adapters.decoder import Decoder, DecoderConfig
from tta_adapters.stream import AttentionMapper, StreamMapper
from tta_runtime import bundle, theta
from tta_runtime.manifest import Graph, InputSpec, Manifest, MethodSpec, Port, StateSpec, TextSpec

BEGIN = 256
CHUNK = 16
CONTEXT = 96
VOCABULARY = 257
CONFIG = DecoderConfig(
    vocabulary=VOCABULARY, layers=2, width=32, heads=4, kv_heads=2, head_width=8, hidden=64, context=CONTEXT
)


@functools.cache
def networks(seed: int = 0) -> tuple[Decoder, StreamMapper]:
    """The decoder and the mapper of a seed; in evaluation mode."""
    torch.manual_seed(seed)
    decoder = Decoder(CONFIG)
    mapper = AttentionMapper(decoder, rank=4, cap=0.5, heads=2, key_width=8, width=16)
    with torch.no_grad():
        decoder.embedding.weight.mul_(0.5)
        for up in mapper.ups.values():  # a new mapper changes nothing
            up.normal_(std=0.5)
    return decoder.eval().requires_grad_(False), mapper.eval().requires_grad_(False)


class Forward(nn.Module):
    """tokens, theta, cache -> logits, cache."""

    def __init__(self, decoder: Decoder, mapper: StreamMapper) -> None:
        super().__init__()
        self.decoder, self.mapper = decoder, mapper

    def forward(self, x: Tensor, theta: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        done = self.decoder(x, cache, self.mapper.updates(self.mapper.unpack(theta[None])))
        return done.logits, done.cache


class Absorb(nn.Module):
    """A chunk and the state -> theta, the state, the report."""

    def __init__(self, decoder: Decoder, mapper: StreamMapper) -> None:
        super().__init__()
        self.decoder, self.mapper, self.names = decoder, mapper, list(mapper.initial(1))

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        begin = torch.full((1, 1), BEGIN, dtype=torch.int64)
        heard = self.decoder(torch.cat([begin, x], dim=1)).heard
        after = self.mapper.absorb(heard, dict(zip(self.names, state, strict=True)))
        downs = self.mapper.downs(after)
        ratio = torch.stack([self.mapper.ratio(down, *layer)[0] for layer, down in downs.items()]).max()
        return self.mapper.pack(downs)[0], *(after[name] for name in self.names), ratio[None]


def build(path: Path, *, seed: int = 0, **changes: Any) -> Manifest:
    """Write the bundle into the new directory `path`; the graphs of a seed are made once in a process.

    Args:
        path: the directory to make.
        seed: of the networks.
        changes: other values of the manifest's `text`.
    """
    shutil.copytree(_graphs(seed), path)
    _, mapper = networks(seed)
    layout, vector = theta.make_layout(
        [
            (f"{block}.{target}.down", torch.zeros(mapper.rank, CONFIG.fan_in(target)).numpy(), "down", False)
            for block, target in mapper.layers
        ]
    )
    bundle.write_tensors(path / "theta.safetensors", theta.unpack(layout, vector))
    bundle.write_tensors(path / "anchor.safetensors", {})
    text = {"chunk": CHUNK, "context": CONTEXT, "begin": BEGIN, "cache": [2, 2, 2, 8], **changes}
    tokens = Port(name="x", dtype="int64", shape=[1, "tokens"], bind="batch", key="x")
    states = {name: list(value.shape) for name, value in mapper.initial(1).items()}
    forward = Graph(
        file="forward.onnx",
        role="serve",
        inputs=[
            tokens,
            Port(name="theta", dtype="float32", shape=[layout.size], bind="theta"),
            Port(name="cache", dtype="float32", shape=[2, 2, 1, 2, "past", 8], bind="cache"),
        ],
        outputs=[
            Port(name="logits", dtype="float32", shape=[1, "tokens", VOCABULARY], bind="logits"),
            Port(name="cache_out", dtype="float32", shape=[2, 2, 1, 2, "total", 8], bind="cache"),
        ],
    )
    absorb = Graph(
        file="absorb.onnx",
        role="absorb",
        inputs=[
            Port(name="x", dtype="int64", shape=[1, CHUNK], bind="batch", key="x"),
            *(_state("state", name, shape) for name, shape in states.items()),
        ],
        outputs=[
            Port(name="theta_out", dtype="float32", shape=[layout.size], bind="theta"),
            *(_state("state_out", name, shape) for name, shape in states.items()),
            Port(name="report", dtype="float32", shape=[1], bind="report"),
        ],
    )
    manifest = Manifest(
        model_id="tiny-text",
        task="text",
        input=InputSpec(dtype="int64", shape=[1, "tokens"], low=0, high=VOCABULARY - 1, layout="tokens"),
        classes=VOCABULARY,
        text=TextSpec(**text),
        adapter="stream",
        theta=layout,
        graphs={"forward": forward, "absorb": absorb},
        methods={
            "source": MethodSpec(doc="The decoder as it is.", step=None, logits="before"),
            "stream": MethodSpec(
                doc="Context becomes theta.",
                step="absorb",
                logits="after",
                state=[
                    StateSpec(name=name, dtype="float32", shape=shape, init="zeros")
                    for name, shape in states.items()
                ],
                report=["ratio"],
                forwards=1.0,
                backwards=0.0,
            ),
        },
        default_method="stream",
        provenance={"made_by": "tests/tiny_text.py"},
    )
    return bundle.seal(path, manifest)


def _state(side: str, name: str, shape: list[int]) -> Port:
    return Port(name=f"{side}.{name}", dtype="float32", shape=list(shape), bind="state", key=name)


@functools.cache
def _graphs(seed: int) -> Path:
    """A directory with the two graphs."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-text-"))
    decoder, mapper = networks(seed)
    tokens, past = torch.export.Dim("tokens", min=1, max=4096), torch.export.Dim("past", min=0, max=4096)
    _export(
        Forward(decoder, mapper),
        (torch.ones(1, 3, dtype=torch.int64), torch.zeros(mapper.size), torch.zeros(2, 2, 1, 2, 5, 8)),
        folder / "forward.onnx",
        ["x", "theta", "cache"],
        ["logits", "cache_out"],
        ({1: tokens}, None, {4: past}),
    )
    initial = mapper.initial(1)
    _export(
        Absorb(decoder, mapper),
        (torch.ones(1, CHUNK, dtype=torch.int64), *initial.values()),
        folder / "absorb.onnx",
        ["x", *(f"state.{name}" for name in initial)],
        ["theta_out", *(f"state_out.{name}" for name in initial), "report"],
        None,
    )
    return folder


def _export(
    module: nn.Module,
    given: tuple[Tensor, ...],
    file: Path,
    inputs: list[str],
    outputs: list[str],
    shapes: Any,
) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(), given, dynamo=True, verbose=False, input_names=inputs, output_names=outputs,
            dynamic_shapes=shapes, opset_version=20,
        )  # fmt: skip
    program.save(str(file))


# --- eager torch -------------------------------------------------------------------------------------


@torch.no_grad()
def eager_absorb(tokens: Sequence[int], seed: int = 0) -> Tensor:
    """Theta [P] after the whole chunks of some tokens."""
    decoder, mapper = networks(seed)
    state, downs = mapper.initial(1), None
    for first in range(0, len(tokens) - CHUNK + 1, CHUNK):
        chunk = torch.tensor([[BEGIN, *tokens[first : first + CHUNK]]])
        state = mapper.absorb(decoder(chunk).heard, state)
        downs = mapper.downs(state)
    return torch.zeros(mapper.size) if downs is None else mapper.pack(downs)[0]


@torch.no_grad()
def eager_logits(tokens: Sequence[int], vector: Tensor, seed: int = 0) -> Tensor:
    """Logits [tokens, vocabulary] of one pass without a cache."""
    decoder, mapper = networks(seed)
    return decoder(torch.tensor([list(tokens)]), None, mapper.updates(mapper.unpack(vector[None]))).logits[0]


def bits_per_token(log_probabilities: Sequence[float]) -> float:
    """From natural logarithms."""
    return -sum(log_probabilities) / math.log(2) / len(log_probabilities)
