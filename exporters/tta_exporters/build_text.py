"""Building a bundle of text: a decoder that serves under a low-rank update, and a mapper that makes it of context."""

from __future__ import annotations

import logging
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from tta_adapters.base import State
from tta_adapters.decoder import Decoder
from tta_adapters.stream import StreamMapper, key
from tta_adapters.stream_objective import led
from tta_exporters.errors import OptionError, SourceError
from tta_exporters.finite import check_finite
from tta_exporters.graphs import write_graph
from tta_exporters.staging import check_free, staged
from tta_exporters.trace import Argument
from tta_exporters.weights import WeightsWriter
from tta_runtime import __version__, bundle, manifest
from tta_runtime.manifest_check import BYTES
from tta_runtime.theta import make_layout

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]

ABSORB = "absorb"
STREAM = "stream"
TOKENIZER = "tokenizer.json"
EXAMPLE_TOKENS, EXAMPLE_PAST = 7, 11
"""Lengths to trace with; neither is 1, on which torch would specialise, nor a common width."""


@dataclass(frozen=True)
class TextOptions:
    """What to build.

    Attributes:
        model_id: a name for people.
        chunk: tokens that are absorbed at once.
        context: most tokens of a pass; None: what the decoder was trained on.
        begin: the token before a text, or None.
        end: the token that ends what is generated, or None.
        tokenizer: a file of the package `tokenizers`, or None: tokens are bytes.
        provenance: facts recorded in the manifest.
    """

    model_id: str
    chunk: int = 256
    context: int | None = None
    begin: int | None = None
    end: int | None = None
    tokenizer: Path | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)


def build_text(
    decoder: Decoder,
    mapper: StreamMapper,
    options: TextOptions,
    out: Path,
    *,
    progress: Progress = logger.info,
) -> manifest.Manifest:
    """Compiles a decoder and its mapper into a bundle directory, which appears complete or not at all.

    Args:
        decoder: frozen.
        mapper: made for it.
        options: what to build.
        out: the directory to make; it must not exist or be empty.
        progress: told what is being done, one line each.

    Raises:
        OptionError: a chunk, context or token that does not fit the decoder.
        NetworkRefused: weights that are not finite.
        SourceError: the tokenizer's file is not there or cannot be read.
        OutputExists, OutputUnwritable: see :func:`tta_exporters.staging.staged`.
        TraceFailed, OperatorNotSupported: the decoder or the mapper cannot be a graph.
    """
    check_free(out)
    context = _check(decoder, mapper, options)
    with staged(out) as work:
        graphs = {}
        with WeightsWriter(work) as weights:
            progress("forward: tracing and lowering")
            graphs[manifest.FORWARD] = _forward(decoder, mapper, work, weights)
            progress("absorb: tracing and lowering")
            graphs[ABSORB] = _absorb(decoder, mapper, options, work, weights)
        progress("theta, anchor, manifest")
        return _seal(decoder, mapper, options, context, graphs, work)


def _check(decoder: Decoder, mapper: StreamMapper, options: TextOptions) -> int:
    config = decoder.config
    context = options.context or config.context
    if not 2 <= options.chunk < context <= config.context:
        raise OptionError(
            f"chunk is {options.chunk} and context {context}, the decoder knows {config.context} positions",
            "Give a chunk from 2 that is smaller than the context, and a context that the decoder knows",
        )
    for name, token in (("begin", options.begin), ("end", options.end)):
        if token is not None and not 0 <= token < config.vocabulary:
            raise OptionError(
                f"{name} is token {token}, the vocabulary has {config.vocabulary}", "Give a token of it"
            )
    if options.tokenizer is None and config.vocabulary < 256:
        raise OptionError(
            f"without a tokenizer tokens are bytes, and the vocabulary has {config.vocabulary}",
            "Give --tokenizer",
        )
    if options.tokenizer is not None and not options.tokenizer.is_file():
        raise SourceError(f"there is no file {options.tokenizer}", "Check --tokenizer")
    check_finite({**decoder.state_dict(), **mapper.state_dict()})
    return context


def _forward(decoder: Decoder, mapper: StreamMapper, work: Path, weights: WeightsWriter) -> manifest.Graph:
    config = decoder.config

    def forward(x: Tensor, theta: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            out = decoder(x, cache, mapper.updates(mapper.unpack(theta[None])))
        return out.logits, out.cache

    past = torch.zeros(config.layers, 2, 1, config.kv_heads, EXAMPLE_PAST, config.head_width)
    arguments = [
        Argument("x", torch.zeros(1, EXAMPLE_TOKENS, dtype=torch.int64), {1: "tokens"}),
        Argument("theta", torch.zeros(mapper.size)),
        Argument("cache", past, {4: "past"}),
    ]
    binds = [("batch", "x"), ("theta", ""), ("cache", ""), ("logits", ""), ("cache", "")]
    return write_graph(
        manifest.FORWARD, "serve", forward, arguments, ["logits", "cache_out"], binds, decoder, work, weights
    )


def _absorb(
    decoder: Decoder, mapper: StreamMapper, options: TextOptions, work: Path, weights: WeightsWriter
) -> manifest.Graph:
    state = mapper.initial(1)

    def absorb(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return absorb_once(decoder, mapper, options.begin, x, dict(zip(state, values, strict=True)))

    arguments = [
        Argument("x", torch.zeros(1, options.chunk, dtype=torch.int64)),
        *(Argument(f"state.{name}", value[0]) for name, value in state.items()),
    ]
    outputs = ["theta_out", *(f"state_out.{name}" for name in state), "report"]
    states = [("state", name) for name in state]
    binds = [("batch", "x"), *states, ("theta", ""), *states, ("report", "")]
    return write_graph(ABSORB, ABSORB, absorb, arguments, outputs, binds, decoder, work, weights)


def absorb_once(
    decoder: Decoder, mapper: StreamMapper, begin: int | None, x: Tensor, state: State
) -> tuple[Tensor, ...]:
    """What the absorb graph computes: theta [P], the state behind it, the report [largest ratio].

    Args:
        decoder: of the bundle.
        mapper: made for it.
        begin: the token before a text, or None.
        x: [1, chunk] int64.
        state: without the batch, as it is stored.
    """
    heard = decoder(led(x, begin)).heard
    after = mapper.absorb(heard, {name: value[None] for name, value in state.items()})
    downs = mapper.downs(after)
    ratios = torch.stack([mapper.ratio(down, *layer)[0] for layer, down in downs.items()])
    return (mapper.pack(downs)[0], *(after[name][0] for name in state), ratios.amax(0, keepdim=True))


def _seal(
    decoder: Decoder,
    mapper: StreamMapper,
    options: TextOptions,
    context: int,
    graphs: dict[str, manifest.Graph],
    work: Path,
) -> manifest.Manifest:
    config = decoder.config
    zeros = {
        f"{key(*layer)}.down": np.zeros((mapper.rank, mapper.columns(layer[1])), np.float32)
        for layer in mapper.layers
    }
    layout, _ = make_layout([(name, value, "down", True) for name, value in zeros.items()])
    bundle.write_tensors(work / manifest.THETA, zeros)
    bundle.write_tensors(work / manifest.ANCHOR, {})
    if options.tokenizer is not None:
        try:
            shutil.copyfile(options.tokenizer, work / TOKENIZER)
        except OSError as error:
            raise SourceError(
                f"{options.tokenizer} cannot be read: {error.strerror}", "Check --tokenizer"
            ) from error
    state = [
        manifest.StateSpec(name=name, dtype="float32", shape=list(value.shape[1:]), init="zeros")
        for name, value in mapper.initial(1).items()
    ]
    unsealed = manifest.Manifest(
        model_id=options.model_id,
        task="text",
        input=manifest.InputSpec(
            dtype="int64", shape=[1, "tokens"], low=0.0, high=config.vocabulary - 1.0, layout="tokens"
        ),
        classes=config.vocabulary,
        text=manifest.TextSpec(
            tokenizer=BYTES if options.tokenizer is None else TOKENIZER,
            chunk=options.chunk,
            context=context,
            begin=options.begin,
            end=options.end,
            cache=[config.layers, 2, config.kv_heads, config.head_width],
        ),
        adapter=f"stream-{mapper.name}",
        theta=layout,
        graphs=graphs,
        methods={
            "source": manifest.MethodSpec(doc="The network alone.", step=None, logits="before"),
            STREAM: manifest.MethodSpec(
                doc="Absorbs context into a low-rank update, without gradients.",
                step=ABSORB,
                logits="after",
                state=state,
                report=["ratio"],
            ),
        },
        default_method=STREAM,
        provenance={
            "tta-runtime": __version__,
            "torch": str(torch.__version__),
            "onnx": onnx.__version__,
            "python": platform.python_version(),
            **options.provenance,
        },
    )
    return bundle.seal(work, unsealed)
