"""Bits per byte of texts whose beginning was absorbed, beside no context, a short window and the whole context.

    python examples/stream_text/run.py --json text.json
    python examples/stream_text/run.py --text FILE --json text.json

Without ``--text`` the texts are messages of this machine's programs that the decoder was not trained on. PyTorch is
used to make the bundles; what is measured runs as it does in the daemon.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import curve
import numpy as np
from corpus import HELD_OUT, LEARNED, LOCALE, UNKNOWN, documents
from numpy.typing import NDArray

from tta_runtime import TextModel, TextSession
from tta_runtime.sampling import Sampling

HERE = Path(__file__).resolve().parent
CONTEXTS = (256, 1024, 4096)
"""Bytes before what is predicted."""
PIECE = 128
"""Bytes predicted."""
TIMED_TOKENS = 32
SEED = 0
RESAMPLED = 2000
FLOAT = 4
"""Bytes of a number in theta, state and caches."""

CONDITIONS = ("no_context", "window", "delta_window", "stream", "delta_rule", "full_context")


@dataclass(frozen=True)
class Row:
    """Means over all pieces, in bits per byte.

    Attributes:
        texts: where they come from.
        context_bytes: before what is predicted.
        no_context_bpb: with nothing before it.
        window_bpb: with as many of the last bytes as take the memory of `stream` in a cache.
        stream_bpb: absorbed, by the attention mapper.
        delta_window_bpb: like `window_bpb`, with the memory of the delta rule's session.
        delta_rule_bpb: absorbed, by the delta-rule mapper.
        full_context_bpb: with all of it before it.
        gap_closed: by `stream`, of what the whole context gains over none; None where it gains nothing for certain.
        delta_gap_closed: by the delta rule.
        window_bytes, delta_window_bytes: of the windows.
        ms_per_token: to generate a token after absorbing.
        full_ms_per_token: with the whole context in the cache.
        intervals: 95 %, by name of the columns above; documents are resampled.
        pieces, documents: how many.
    """

    texts: str
    context_bytes: int
    no_context_bpb: float
    window_bpb: float
    stream_bpb: float
    delta_window_bpb: float
    delta_rule_bpb: float
    full_context_bpb: float
    gap_closed: float | None
    delta_gap_closed: float | None
    window_bytes: int
    delta_window_bytes: int
    ms_per_token: float
    full_ms_per_token: float
    intervals: dict[str, tuple[float, float]]
    pieces: int
    documents: int


def main() -> None:
    """Builds, measures, prints, draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--text", type=Path, action="append", help="a text to measure on; repeatable")
    parser.add_argument("--out", type=Path, default=Path("out/stream_text"), help="directory of the bundles")
    parser.add_argument("--weights", type=Path, default=HERE, help="directory of what train.py made")
    parser.add_argument("--pieces", type=int, default=96, help="predicted pieces of each set of texts")
    parser.add_argument("--locale", type=Path, default=LOCALE, help="directory of message catalogues")
    parser.add_argument("--figure", type=Path, help="draw the rows as an SVG file")
    arguments = parser.parse_args()
    models = {
        mapper: TextModel.open(build(arguments.weights, mapper, arguments.out))
        for mapper in ("attention", "delta")
    }
    sets = (
        {"given": {str(path): path.read_bytes() for path in arguments.text}}
        if arguments.text
        else machine_texts(arguments.locale)
    )
    rows: list[Row] = []
    for name, texts in sets.items():
        pieces = cut(texts, arguments.pieces, max(CONTEXTS))
        for context in (size for size in CONTEXTS if any(len(p.before) >= size for p in pieces)):
            rows.append(measure(name, models, [p for p in pieces if len(p.before) >= context], context))
            sys.stdout.write(line_of(rows[-1]) + "\n")
            sys.stdout.flush()
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    if arguments.figure:
        arguments.figure.write_text(curve.drawn([asdict(row) for row in rows]))


def build(weights: Path, mapper: str, out: Path) -> Path:
    """The bundle of the decoder and a mapper, made where it is missing."""
    bundle = out / mapper
    if not bundle.exists():
        out.mkdir(parents=True, exist_ok=True)
        words = [
            *("-m", "tta_exporters.cli", "build-text", weights / "decoder.safetensors"),
            *("--mapper", weights / f"{mapper}.safetensors", "-o", bundle),
        ]
        subprocess.run([sys.executable, *map(str, words)], check=True)
    return bundle


@dataclass(frozen=True)
class Piece:
    """What is predicted, and what stands before it.

    Attributes:
        document: whose.
        before: at least the shortest context.
        text: PIECE bytes.
    """

    document: str
    before: bytes
    text: bytes


def machine_texts(locale: Path) -> dict[str, dict[str, bytes]]:
    """Messages of held-out programs in languages that the decoder knows, and of all in languages that it does not.

    Raises:
        SystemExit: there are none.
    """
    sets: dict[str, dict[str, bytes]] = {"unseen programs": {}, "unknown languages": {}}
    for language, program, text in documents(locale):
        if language in LEARNED and program in HELD_OUT:
            sets["unseen programs"][f"{language}/{program}"] = text
        if language in UNKNOWN:
            sets["unknown languages"][f"{language}/{program}"] = text
    found = {name: texts for name, texts in sets.items() if texts}
    if not found:
        sys.exit(f"no message catalogues below {locale}: give texts of your own by --text FILE")
    return found


def cut(texts: dict[str, bytes], count: int, longest: int) -> list[Piece]:
    """Pieces at random places, documents drawn evenly, as much before each as there is, at most ``longest``.

    Raises:
        SystemExit: no text is long enough for the shortest context.
    """
    least = min(CONTEXTS) + PIECE
    names = sorted(name for name, text in texts.items() if len(text) >= least)
    if not names:
        sys.exit(f"the texts are too short: one of {least} bytes is needed at least")
    generator = np.random.default_rng(SEED)
    order = [names[index % len(names)] for index in range(max(count, 1))]
    if count < len(names):
        order = [names[index] for index in sorted(generator.permutation(len(names))[:count])]
    pieces = []
    for name in order:
        text = texts[name]
        # Where a text is long enough, every piece has the longest context before it: rows differ by context alone.
        first = min(longest, len(text) - PIECE)
        place = int(generator.integers(first, len(text) - PIECE + 1))
        pieces.append(Piece(name, text[max(0, place - longest) : place], text[place : place + PIECE]))
    return pieces


def measure(name: str, models: dict[str, TextModel], pieces: Sequence[Piece], context: int) -> Row:
    """One row."""
    windows = {mapper: window_of(model) for mapper, model in models.items()}
    bits: dict[str, list[float]] = {condition: [] for condition in CONDITIONS}
    attention, delta = models["attention"], models["delta"]
    for piece in pieces:
        text, before = list(piece.text), list(piece.before[-context:])
        fresh = attention.session()
        bits["no_context"].append(fresh.score(text).bits)
        bits["window"].append(fresh.score(text, before[-windows["attention"] :]).bits)
        bits["delta_window"].append(fresh.score(text, before[-windows["delta"] :]).bits)
        bits["full_context"].append(fresh.score(text, before).bits)
        for condition, model in (("stream", attention), ("delta_rule", delta)):
            session = model.session()
            session.absorb(before)
            bits[condition].append(session.score(text).bits)
    table = np.array([bits[condition] for condition in CONDITIONS]).T / PIECE
    names = [piece.document for piece in pieces]
    means = dict(zip(CONDITIONS, table.mean(axis=0).tolist(), strict=True))
    found = intervals(table, names)
    gap = (
        means["no_context"] - means["full_context"]
        if found["no_context_bpb - full_context_bpb"][0] > 0
        else None
    )
    last = list(pieces[-1].before[-context:])
    absorbed = attention.session()
    absorbed.absorb(last)
    return Row(
        texts=name,
        context_bytes=context,
        **{f"{condition}_bpb": value for condition, value in means.items()},
        gap_closed=None if gap is None else (means["no_context"] - means["stream"]) / gap,
        delta_gap_closed=None if gap is None else (means["no_context"] - means["delta_rule"]) / gap,
        window_bytes=windows["attention"],
        delta_window_bytes=windows["delta"],
        ms_per_token=ms_per_token(absorbed, []),
        full_ms_per_token=ms_per_token(attention.session(), last),
        intervals=found,
        pieces=len(pieces),
        documents=len(set(names)),
    )


def window_of(model: TextModel) -> int:
    """Tokens whose keys and values take the memory that a session's theta and state take."""
    checkpoint = model.source
    numbers = checkpoint.theta.size + sum(value.size for value in checkpoint.state.values())
    return max(1, round(FLOAT * numbers / model.cache_bytes))


def intervals(table: NDArray[np.float64], documents: Sequence[str]) -> dict[str, tuple[float, float]]:
    """95 % intervals of the means and of the gap that is closed: whole documents are drawn again.

    Args:
        table: [pieces, conditions].
        documents: of each piece.
    """
    names = sorted(set(documents))
    of = np.array([names.index(document) for document in documents])
    sums = np.array([table[of == index].sum(axis=0) for index in range(len(names))])
    counts = np.bincount(of)
    generator = np.random.default_rng(SEED)
    drawn = generator.integers(0, len(names), (RESAMPLED, len(names)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)[:, None]
    columns = {f"{condition}_bpb": means[:, index] for index, condition in enumerate(CONDITIONS)}
    none, full = columns["no_context_bpb"], columns["full_context_bpb"]
    for column, condition in (("gap_closed", "stream_bpb"), ("delta_gap_closed", "delta_rule_bpb")):
        columns[column] = (none - columns[condition]) / (none - full)
    columns["no_context_bpb - full_context_bpb"] = none - full
    columns["window_bpb - stream_bpb"] = columns["window_bpb"] - columns["stream_bpb"]
    columns["delta_window_bpb - delta_rule_bpb"] = columns["delta_window_bpb"] - columns["delta_rule_bpb"]
    return {
        name: (float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975)))
        for name, values in columns.items()
    }


def ms_per_token(session: TextSession, prompt: Sequence[int]) -> float:
    """Median time of a generated token behind the first, in milliseconds."""
    times, before = [], 0.0
    for index, _ in enumerate(
        session.generate(prompt, max_tokens=TIMED_TOKENS, sampling=Sampling(temperature=1.0, seed=SEED))
    ):
        now = time.perf_counter()
        if index > 1:
            times.append(1e3 * (now - before))
        before = now
    return statistics.median(times)


def line_of(row: Row) -> str:
    """One line for people."""
    low, high = row.intervals["gap_closed"]
    closed = (
        "the whole context gains nothing for certain"
        if row.gap_closed is None
        else f"{100 * row.gap_closed:.0f} % of the gap ({100 * low:.0f} to {100 * high:.0f})"
    )
    return (
        f"{row.texts}, {row.context_bytes:5d} bytes: nothing {row.no_context_bpb:.3f}, window of {row.window_bytes} "
        f"{row.window_bpb:.3f}, absorbed {row.stream_bpb:.3f}, delta rule {row.delta_rule_bpb:.3f}, all "
        f"{row.full_context_bpb:.3f} bits per byte; {closed}; {row.ms_per_token:.2f} ms a token, "
        f"{row.full_ms_per_token:.2f} with the whole context"
    )


if __name__ == "__main__":
    main()
