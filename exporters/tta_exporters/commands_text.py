"""tta-export train-stream and build-text: a decoder learns to absorb its context, and becomes a bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tta_exporters import arguments
from tta_exporters.progress import training_bar

DecoderSource = Annotated[
    str, typer.Argument(help="hf:DIR (a Llama- or GPT-2-class model of transformers), or a decoder's file.")
]


def train_stream(
    source: DecoderSource,
    text: Annotated[
        list[Path],
        typer.Option(help="Text file or directory of some; its folders are drawn from evenly. Repeatable."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to make (safetensors), for `build-text`.")],
    mapper: Annotated[str, typer.Option(help="attention or delta.")] = "attention",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="OPTION=VALUE of the mapper, e.g. rank=16. Repeatable.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of the whole run.")] = 1000,
    lr: Annotated[float, typer.Option(help="Learning rate; it falls to 0 over the last half.")] = 3e-3,
    chunk: Annotated[int, typer.Option(help="Tokens absorbed at once.")] = 256,
    chunks: Annotated[int, typer.Option(help="Most chunks of a text, the continued one included.")] = 5,
    texts: Annotated[int, typer.Option(help="Chunks of one step, over all its texts.")] = 24,
    distil: Annotated[float, typer.Option(help="Weight of KL to the network with the whole context.")] = 1.0,
    align: Annotated[float, typer.Option(help="Weight of the difference of the blocks' outputs.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the start and of what is drawn.")] = 0,
    held_out: Annotated[float, typer.Option(help="Share of the documents to judge by.")] = 0.05,
    hold: Annotated[
        list[str] | None, typer.Option(help="Pattern of documents to judge by as well. Repeatable.")
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    as_json: arguments.AsJson = False,
) -> None:
    """Train a mapper that turns a decoder's context into theta, the decoder frozen; run it again to resume.

    Example: tta-export train-stream hf:llama --text documents --mapper delta --steps 2000 -o mapper.safetensors
    """
    from tta_exporters.language_sources import load_language
    from tta_exporters.texts import encoder, load_documents
    from tta_exporters.train_stream import StreamOptions, make_mapper, write_mapper
    from tta_exporters.train_stream import train_stream as train
    from tta_exporters.training import Schedule

    options = StreamOptions(chunk, chunks, texts, distil, align, seed, held_out)
    schedule = Schedule(steps, lr, checkpoint_every=checkpoint_every)
    numbers = arguments.numbers_by_name(settings or [])
    arguments.check_place(out)
    language = load_language(source)
    made = make_mapper(mapper, language.decoder, numbers, seed)
    documents = load_documents(
        text, encoder(language.tokenizer, language.decoder.config.vocabulary), chunks * chunk
    )
    parts = documents.split(held_out, tuple(hold or ()))
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    with training_bar("training", checkpoint) as tell:
        result = train(language.decoder, made, parts, language.begin, options, schedule, checkpoint, tell)
    write_mapper(out, result.mapper, numbers, result.facts)
    checkpoint.unlink(missing_ok=True)
    judged = result.judged
    printed = {
        "file": str(out),
        "mapper": mapper,
        "theta": made.size,
        "documents": len(parts[0]),
        "held_out": len(parts[1]),
        "steps": steps,
        "resumed_from": result.resumed_from,
        "nats_per_token": None
        if judged is None
        else {"nothing": judged.nothing, "absorbed": judged.absorbed, "full": judged.full},
        "gap_closed": None if judged is None else judged.closed,
    }
    if as_json:
        sys.stdout.write(json.dumps(printed, indent=2) + "\n")
        return
    told = (
        ""
        if judged is None
        else f", held-out loss {judged.nothing:.3f} alone, {judged.absorbed:.3f} absorbed, {judged.full:.3f} with "
        f"the whole context ({100 * judged.closed:.0f} % of the gap)"
    )
    _say(f"{out}: mapper {mapper}, theta of {made.size}, {steps} steps{told}")


def build_text(
    source: DecoderSource,
    mapper: Annotated[Path, typer.Option(help="What `tta-export train-stream` made for this decoder.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Bundle directory to make.")],
    context: Annotated[
        int | None, typer.Option(help="Most tokens of a pass; default: what the decoder was trained on.")
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(help="Tokens absorbed at once; default: what the mapper was trained on.")
    ] = None,
    model_id: Annotated[
        str | None, typer.Option("--id", help="Name of the model (default: from SOURCE).")
    ] = None,
    as_json: arguments.AsJson = False,
) -> None:
    """Compile a decoder and its mapper into a bundle.

    Example: tta-export build-text hf:llama --mapper mapper.safetensors -o bundle
    """
    from tta_exporters.build_text import TextOptions
    from tta_exporters.build_text import build_text as build
    from tta_exporters.language_sources import load_language
    from tta_exporters.train_stream import read_mapper

    language = load_language(source)
    made, facts = read_mapper(mapper, language.decoder)
    options = TextOptions(
        model_id=model_id or Path(source.partition("hf:")[2] or source).stem,
        chunk=chunk or int(str(facts["chunk"])),
        context=context,
        begin=language.begin,
        end=language.end,
        tokenizer=language.tokenizer,
        provenance={"mapper": mapper.name, "mapper.facts": json.dumps(dict(facts), sort_keys=True)},
    )
    console = Console(stderr=True)
    sealed = build(
        language.decoder,
        made,
        options,
        out,
        progress=lambda line: console.print(f"  {line}", highlight=False, markup=False),
    )
    printed = {
        "bundle": str(out),
        "theta": sealed.theta.size,
        "chunk": options.chunk,
        "adapter": sealed.adapter,
    }
    if as_json:
        sys.stdout.write(json.dumps(printed, indent=2) + "\n")
        return
    _say(f"{out}: {sealed.adapter}, theta of {sealed.theta.size}, chunks of {options.chunk} tokens")


def _say(line: str) -> None:
    Console().print(line, highlight=False, markup=False, soft_wrap=True)
