"""What a generated token costs: after absorbing much or little, beside attention over as much, beside eager PyTorch.

*By context*: milliseconds a token after 256 to 16,384 tokens were absorbed, and with as many in the cache. *By engine*:
tokens a second of one text, in eager PyTorch with a cache of keys and values (our decoder, and Llama of `transformers`
in the same shape where that is installed), in the runtime, and from a daemon over its socket. All take turns, one
thread each; medians are reported. Weights are random (a token costs the same).

Example: python benchmarks/text_speed.py --json text_speed.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from serve_overhead import START_S, daemon
from torch import Tensor

from tta_adapters.decoder import Block, Decoder, DecoderConfig
from tta_adapters.stream import AttentionMapper
from tta_edge.client import Client
from tta_exporters.build_text import TextOptions, build_text
from tta_exporters.errors import ExtraMissing
from tta_exporters.sources import load_transformers
from tta_runtime import EngineOptions, TextModel, TextSession

CONTEXTS = (256, 1024, 4096, 16384)
BEGIN = 256
CHUNK = 256
PROMPT = 64
ATTENTION_ROUNDS = 2
"""Turns of what has to read the whole context first: a median of so many tokens needs no more."""
CONFIG = DecoderConfig(
    vocabulary=257, layers=4, width=128, heads=4, kv_heads=4, head_width=32, hidden=344, context=20_000
)

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""(tokens [1, n], cache or None) to logits [1, n, vocabulary] and the cache after them."""


def main() -> None:
    """Parses arguments and runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--rounds", type=int, default=7, help="turns of everything; medians are reported")
    parser.add_argument("--tokens", type=int, default=128, help="generated in a turn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    decoder = Decoder(CONFIG).eval().requires_grad_(False)
    mapper = AttentionMapper(decoder, rank=16).requires_grad_(False)
    for up in mapper.ups.values():
        torch.nn.init.normal_(up, std=0.02)
    with tempfile.TemporaryDirectory(prefix="tta-text-") as work:
        bundle = Path(work) / "bundle"
        build_text(decoder, mapper, TextOptions("speed", chunk=CHUNK, begin=BEGIN), bundle)
        model = TextModel.open(bundle, options=EngineOptions(threads=1))
        result = {
            "by_context": by_context(model, arguments.rounds, arguments.tokens),
            "by_engine": by_engine(decoder, mapper, model, bundle, arguments.rounds, arguments.tokens),
            "parameters": sum(value.numel() for value in decoder.parameters()),
            "rounds": arguments.rounds,
            "tokens": arguments.tokens,
            "host": {"cores": os.cpu_count(), "load": os.getloadavg()[0]},
        }
    for row in result["by_context"]:
        print(
            f"{row['tokens']:6d} tokens: {row['absorbed_ms']:.2f} ms a token absorbed "
            f"({row['session_bytes']:,} bytes), {row['attention_ms']:.2f} with attention ({row['cache_bytes']:,} bytes)"
        )
    for row in result["by_engine"]:
        print(
            f"{row['engine']:20s} {row['tokens_per_s']:7.0f} tokens/s, {row['of_eager']:.2f} of eager PyTorch"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def by_context(model: TextModel, rounds: int, tokens: int) -> list[dict[str, Any]]:
    """A row for each length of context."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, 256, (max(CONTEXTS),), generator=generator).tolist()
    sessions = {size: absorbed(model, text[:size]) for size in CONTEXTS}
    times: dict[tuple[str, int], list[float]] = {}
    for turn in range(rounds + 1):  # the first one warms up
        # What absorbed first, one after the other: attention over much leaves the processor's caches to others.
        for size in CONTEXTS:
            found = ms_per_token(sessions[size], text[:1], tokens)
            if turn:
                times.setdefault(("absorbed", size), []).append(found)
        for size in CONTEXTS if turn <= ATTENTION_ROUNDS else ():
            found = ms_per_token(model.session(), text[:size], tokens)
            if turn:
                times.setdefault(("attention", size), []).append(found)
    return [
        {
            "tokens": size,
            "absorbed_ms": statistics.median(times["absorbed", size]),
            "attention_ms": statistics.median(times["attention", size]),
            "session_bytes": kept_bytes(sessions[size]),
            "cache_bytes": size * model.cache_bytes,
        }
        for size in CONTEXTS
    ]


def absorbed(model: TextModel, text: Sequence[int]) -> TextSession:
    """A session that has taken a text in."""
    session = model.session()
    session.absorb(text)
    return session


def kept_bytes(session: TextSession) -> int:
    """Of theta, state and pending tokens."""
    checkpoint = session.checkpoint
    return (
        checkpoint.theta.nbytes
        + sum(value.nbytes for value in checkpoint.state.values())
        + 8 * len(session.pending)
    )


def ms_per_token(session: TextSession, prompt: Sequence[int], tokens: int) -> float:
    """Median time between two tokens."""
    moments = []
    for _ in session.generate(prompt, max_tokens=tokens):
        moments.append(time.perf_counter())
    return statistics.median(1e3 * (after - before) for before, after in itertools.pairwise(moments))


def by_engine(
    decoder: Decoder, mapper: AttentionMapper, model: TextModel, bundle: Path, rounds: int, tokens: int
) -> list[dict[str, Any]]:
    """A row for each engine."""
    prompt = list(range(48, 48 + PROMPT))
    session = model.session()
    engines: dict[str, Callable[[], list[int]]] = {
        "eager": lambda: greedy(eager(decoder, mapper), prompt, tokens),
        "runtime": lambda: list(session.generate(prompt, max_tokens=tokens)),
    }
    try:
        same = llama(decoder)
        engines["eager transformers"] = lambda: greedy(same, prompt, tokens)
    except (ExtraMissing, ImportError) as error:
        print(f"without transformers: {error}", file=sys.stderr)
    expected = engines["eager"]()
    for name, run in engines.items():
        if run() != expected:
            raise RuntimeError(f"{name} gives another text than eager PyTorch: {run()[:9]}, {expected[:9]}")
    with daemon(bundle, "--threads", "1") as endpoint, Client(endpoint, timeout_s=START_S) as client:

        def served() -> list[int]:
            for _ in client.generate(bytes(prompt), max_tokens=tokens, temperature=0):
                pass
            return expected

        engines["daemon"] = served
        speeds: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(rounds + 1):
            for name, run in engines.items():
                start = time.perf_counter()
                run()
                if turn:
                    speeds[name].append(tokens / (time.perf_counter() - start))
    middle = {name: statistics.median(values) for name, values in speeds.items()}
    return [
        {"engine": name, "tokens_per_s": value, "of_eager": value / middle["eager"]}
        for name, value in middle.items()
    ]


@torch.no_grad()
def greedy(step: Step, prompt: Sequence[int], tokens: int) -> list[int]:
    """The likeliest tokens behind a prompt, one after the other."""
    logits, cache = step(torch.tensor([[BEGIN, *prompt]]), None)
    found = [int(logits[0, -1].argmax())]
    while len(found) < tokens:
        logits, cache = step(torch.tensor([[found[-1]]]), cache)
        found.append(int(logits[0, -1].argmax()))
    return found


def eager(decoder: Decoder, mapper: AttentionMapper) -> Step:
    """Our decoder, theta added as the graph adds it."""
    updates = mapper.updates(mapper.unpack(torch.zeros(1, mapper.size)))

    def step(tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        decoded = decoder(tokens, cache, updates)
        return decoded.logits, decoded.cache

    return step


def llama(decoder: Decoder) -> Step:
    """The same network as `transformers` runs it."""
    transformers = load_transformers()
    config = transformers.LlamaConfig(
        vocab_size=CONFIG.vocabulary,
        hidden_size=CONFIG.width,
        intermediate_size=CONFIG.hidden,
        num_hidden_layers=CONFIG.layers,
        num_attention_heads=CONFIG.heads,
        num_key_value_heads=CONFIG.kv_heads,
        max_position_embeddings=CONFIG.context,
        rms_norm_eps=CONFIG.eps,
        tie_word_embeddings=True,
    )
    network: Any = transformers.LlamaForCausalLM(config)
    network.eval().requires_grad_(False)
    network.model.embed_tokens.weight.copy_(decoder.embedding.weight)
    network.model.norm.weight.copy_(decoder.norm.weight)
    for block, theirs in zip(decoder.blocks, network.model.layers, strict=True):
        ours = cast("Block", block)
        theirs.input_layernorm.weight.copy_(ours.norm1.weight)
        theirs.post_attention_layernorm.weight.copy_(ours.norm2.weight)
        for name in ("q", "k", "v", "o"):
            getattr(theirs.self_attn, f"{name}_proj").weight.copy_(getattr(ours.attention, name).weight)
        for name in ("up", "gate", "down"):
            getattr(theirs.mlp, f"{name}_proj").weight.copy_(getattr(ours.mlp, name).weight)

    def step(tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        out = network(tokens, past_key_values=cache, use_cache=True)
        return out.logits, out.past_key_values

    return step


if __name__ == "__main__":
    main()
