"""A small real text bundle, as the exporter makes it: a decoder of random weights, a mapper that changes it."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from tta_adapters.decoder import Decoder, DecoderConfig
from tta_adapters.stream import AttentionMapper, StreamMapper
from tta_exporters.build_text import TextOptions, build_text
from tta_runtime import bundle
from tta_runtime.manifest import MANIFEST, Manifest, TextSpec, decode

BEGIN = 256
CHUNK = 16
CONTEXT = 96
VOCABULARY = 257
LONG = 1 << 14
"""Context of a bundle that can write for a long time."""
TEXT = "The quick brown fox jumps over the lazy dog, again and again and again."
OTHER = "Sphinx of black quartz"
CONFIG = DecoderConfig(
    vocabulary=VOCABULARY,
    layers=1,
    width=32,
    heads=4,
    kv_heads=2,
    head_width=8,
    hidden=64,
    context=CONTEXT,
    tied=False,  # tied random weights say every token again
)


@functools.cache
def networks(seed: int = 0) -> tuple[Decoder, StreamMapper]:
    """The decoder and the mapper of a seed; in evaluation mode."""
    torch.manual_seed(seed)
    decoder = Decoder(CONFIG)
    mapper = AttentionMapper(decoder, rank=4, cap=0.5, heads=2, key_width=8, width=16)
    with torch.no_grad():
        for up in mapper.ups.values():  # a new mapper changes nothing
            up.normal_(std=0.5)
    return decoder.eval().requires_grad_(False), mapper.eval().requires_grad_(False)


def build(path: Path, *, seed: int = 0, **changes: Any) -> Manifest:
    """Write the bundle into the new directory `path`; the graphs of a seed are made once in a process.

    Args:
        path: the directory to make.
        seed: of the networks.
        changes: other values of the manifest's `text`.
    """
    shutil.copytree(_built(seed), path)
    made = decode((path / MANIFEST).read_bytes())
    if not changes:
        return made
    (path / MANIFEST).unlink()
    text = msgspec.structs.replace(made.text or TextSpec(chunk=CHUNK, context=CONTEXT, cache=[]), **changes)
    return bundle.seal(path, msgspec.structs.replace(made, text=text))


@functools.cache
def _built(seed: int) -> Path:
    path = Path(tempfile.mkdtemp(prefix="tiny-text-")) / "bundle"
    build_text(*networks(seed), TextOptions("tiny-text", chunk=CHUNK, context=CONTEXT, begin=BEGIN), path)
    return path


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
