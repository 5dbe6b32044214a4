"""Make the weights of this example: a decoder of bytes from nothing, then the two mappers that absorb for it.

    python examples/stream_text/train.py -o out/stream_text

What is in the output directory already is not made again, and a mapper's training goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from corpus import HELD_OUT, LOCALE
from pretraining import Draw, Phase, fresh, pretrain, told
from torch import Tensor

from tta_adapters.decoder import DecoderConfig
from tta_exporters.language_sources import write_decoder
from tta_exporters.texts import Documents, encoder, load_documents

HERE = Path(__file__).resolve().parent
BEGIN = 256
CONFIG = DecoderConfig(
    vocabulary=257, layers=4, width=96, heads=4, kv_heads=4, head_width=24, hidden=256, context=8192
)
PHASES = (Phase(8, 256, 2000), Phase(4, 640, 500), Phase(2, 1280, 700), Phase(1, 4352, 100))
LENGTHEN = (Phase(1, 4352, 240), Phase(2, 1280, 60))
"""A second course: at the end of the first, steps are too small to learn what is far away."""
LENGTHEN_PEAK = 0.3
CHUNK, CHUNKS, TEXTS = 128, 9, 20
SETTINGS = {"attention": ("rank=4", "width=32"), "delta": ("rank=4",)}
STEPS = 1200
"""Of each mapper."""
SEED = 0
FIRST_DRAWS = (10_000, 20_000)
"""Of the two courses, apart from the seeds that mappers draw with."""


def main() -> None:
    """Makes what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--locale", type=Path, default=LOCALE, help="directory of message catalogues")
    arguments = parser.parse_args()
    corpus, decoder = arguments.out / "corpus", arguments.out / "decoder.safetensors"
    if not corpus.exists():
        arguments.out.mkdir(parents=True, exist_ok=True)
        run(HERE / "corpus.py", corpus, "--locale", arguments.locale)
    if not decoder.exists():
        train_decoder(corpus / "learned", decoder)
    held = [word for program in HELD_OUT for word in ("--hold", f"*/{program}.txt")]
    for mapper, settings in SETTINGS.items():
        file = arguments.out / f"{mapper}.safetensors"
        if file.exists():
            continue
        options = [word for setting in settings for word in ("--set", setting)]
        sizes = ["--chunk", CHUNK, "--chunks", CHUNKS, "--texts", TEXTS, "--steps", STEPS]
        words = ["--text", corpus / "learned", "--held-out", 0, *held, "--mapper", mapper, *options, *sizes]
        run("-m", "tta_exporters.cli", "train-stream", decoder, *words, "-o", file)


def train_decoder(corpus: Path, file: Path) -> None:
    """A decoder of the documents that are not held out."""
    torch.set_num_threads(1)
    documents = load_documents([corpus], encoder(None, CONFIG.vocabulary), 1 + max(p.length for p in PHASES))
    kept, _ = documents.split(0.0, tuple(f"*/{program}.txt" for program in HELD_OUT))
    decoder = fresh(CONFIG, SEED)
    pretrain(decoder, drawing(kept, FIRST_DRAWS[0]), BEGIN, PHASES, progress=told("decoder"))
    longer, tell = drawing(kept, FIRST_DRAWS[1]), told("decoder, longer texts")
    pretrain(decoder, longer, BEGIN, LENGTHEN, peak=LENGTHEN_PEAK, progress=tell)
    write_decoder(file, decoder, BEGIN)


def drawing(documents: Documents, first: int) -> Draw:
    """Pieces of documents by the number of a step."""

    def draw(phase: Phase, step: int) -> Tensor:
        return documents.draw(phase.texts, phase.length, first + step)

    return draw


def run(*words: object) -> None:
    """One command of the project, in a process of its own."""
    command = [sys.executable, *map(str, words)]
    sys.stderr.write(f"$ {' '.join(command[1:])}\n")
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
