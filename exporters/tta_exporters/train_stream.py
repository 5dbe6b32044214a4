"""Training a stream mapper: what a frozen decoder's context has to become so that it can be left out.

Each step draws texts of some chunks, more of them or fewer, so that no single length is learned. A run is a function of
its options and data; see :mod:`tta_exporters.training`.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tta_adapters.decoder import Decoder
from tta_adapters.stream import MAPPERS, StreamMapper
from tta_adapters.stream_objective import Loss, Weights, objective
from tta_exporters.adapter_file import network_digest, read_tensors, write_tensors
from tta_exporters.errors import OptionError, SourceError, WeightsDoNotFit
from tta_exporters.texts import Documents
from tta_exporters.training import Progress, Schedule, train

FORMAT = "tta-mapper"
DRAW = 1_000_003
"""Apart from each other are the seeds of two runs, so that no step of one draws what a step of the other drew."""


@dataclass(frozen=True)
class StreamOptions:
    """How to train.

    Attributes:
        chunk: tokens absorbed at once.
        chunks: most chunks of a text, the one that is continued included.
        texts: chunks of one step, over all its texts.
        distil: weight of a part of the loss, see :class:`tta_adapters.stream_objective.Weights`.
        align: of another.
        seed: of the mapper's start and of what is drawn.
        held_out: share of the documents that is not trained on but judged by.
        judged: pieces of held-out text that judge.

    Raises:
        OptionError: a value out of its range.
    """

    chunk: int = 256
    chunks: int = 5
    texts: int = 24
    distil: float = 1.0
    align: float = 0.0
    seed: int = 0
    held_out: float = 0.05
    judged: int = 16

    def __post_init__(self) -> None:
        if self.chunk < 2 or self.chunks < 2 or self.texts < self.chunks:
            raise OptionError(
                f"chunk is {self.chunk}, chunks {self.chunks}, texts {self.texts}",
                "Give a chunk from 2, at least 2 chunks, and texts for at least one text of all chunks",
            )
        if not (0 <= self.distil < 1e6 and 0 <= self.align < 1e6):
            raise OptionError(f"distil is {self.distil:g} and align {self.align:g}", "Give numbers from 0")
        if not 0 <= self.held_out < 1:
            raise OptionError(f"held_out is {self.held_out:g}", "Give a share from 0, below 1")


@dataclass(frozen=True)
class Judged:
    """Mean loss over held-out text in nats a token: nothing absorbed, absorbed, the whole context before it."""

    nothing: float
    absorbed: float
    full: float

    @property
    def closed(self) -> float:
        """The share of the gap between nothing and the whole context that absorbing closes."""
        gap = self.nothing - self.full
        return (self.nothing - self.absorbed) / gap if gap > 0 else 0.0


@dataclass(frozen=True)
class TrainedMapper:
    """What came of it.

    Attributes:
        mapper: trained, frozen.
        resumed_from: the step at which this run took up a checkpoint; 0 for none.
        judged: of the result; None where nothing is held out.
        facts: how it was trained, for provenance.
    """

    mapper: StreamMapper
    resumed_from: int
    judged: Judged | None
    facts: Mapping[str, object] = field(default_factory=dict)


def make_mapper(kind: str, decoder: Decoder, settings: Mapping[str, float], seed: int) -> StreamMapper:
    """An untrained mapper, the same for the same seed.

    Raises:
        OptionError: an unknown kind, or settings that it does not take.
    """
    make = MAPPERS.get(kind)
    if make is None:
        raise OptionError(f"the mapper is {kind!r}", f"Choose one of {', '.join(MAPPERS)}")
    numbers = {name: value if name == "cap" else int(value) for name, value in settings.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return make(decoder, **numbers)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise OptionError(f"mapper {kind}: {error}", "See docs/adapters.md for its options") from error


def train_stream(
    decoder: Decoder,
    mapper: StreamMapper,
    documents: tuple[Documents, Documents],
    begin: int | None,
    options: StreamOptions,
    schedule: Schedule,
    checkpoint: Path,
    progress: Progress = lambda step, steps, loss: None,
) -> TrainedMapper:
    """Trains a mapper, taking up the checkpoint where there is one.

    Args:
        decoder: frozen.
        mapper: what learns, in place.
        documents: those to train on, those held out.
        begin: the token before a text, or None.
        options: how.
        schedule: how long and how fast.
        checkpoint: see :func:`tta_exporters.training.train`.
        progress: told after each step.

    Raises:
        OptionError: no document has so many chunks.
        CheckpointMismatch, Diverged, OutputUnwritable: see :func:`tta_exporters.training.train`.
    """
    kept, held = documents
    kept.draw(1, options.chunks * options.chunk, 0)
    facts: dict[str, object] = {
        "decoder": network_digest(decoder),
        "mapper": mapper.name,
        "shapes": {name: list(value.shape) for name, value in mapper.named_parameters()},
        "data": kept.digest(),
        "begin": begin,
        **asdict(options),
        **{key: value for key, value in asdict(schedule).items() if key != "checkpoint_every"},
    }
    mark = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    weights = Weights(options.distil, options.align)

    def loss_of(step: int) -> Tensor:
        return objective(decoder, mapper, draw(kept, options, step), begin, weights).total

    mapper.requires_grad_(True)
    resumed = train(mapper, loss_of, schedule, mark, checkpoint, progress)
    mapper.requires_grad_(False)
    return TrainedMapper(mapper, resumed, judge(decoder, mapper, held, begin, options), facts)


def draw(documents: Documents, options: StreamOptions, step: int) -> Tensor:
    """[texts, chunks, chunk]: the texts of a step, of a number of chunks that the step draws."""
    seed = DRAW * (options.seed + 1) + step
    generator = torch.Generator().manual_seed(seed)
    chunks = int(torch.randint(2, options.chunks + 1, (1,), generator=generator))
    count = options.texts // chunks
    return documents.draw(count, chunks * options.chunk, seed).reshape(count, chunks, options.chunk)


def judge(
    decoder: Decoder, mapper: StreamMapper, held: Documents, begin: int | None, options: StreamOptions
) -> Judged | None:
    """How well the chunks of held-out texts are continued, each behind those before it; None without such texts."""
    try:
        tokens = held.draw(options.judged, options.chunks * options.chunk, options.seed)
    except OptionError:
        return None
    tokens = tokens.reshape(options.judged, options.chunks, options.chunk)
    silent = _silenced(mapper)
    with torch.no_grad():
        found = _means(lambda part: objective(decoder, mapper, part, begin, Weights(0.0, 0.0)), tokens)
        nothing = _means(lambda part: objective(decoder, silent, part, begin, Weights(0.0, 0.0)), tokens)
    return Judged(nothing[0], found[0], found[1])


def _silenced(mapper: StreamMapper) -> StreamMapper:
    """The same mapper whose updates are zero."""
    silent = copy.deepcopy(mapper)
    for value in silent.ups.values():
        value.data.zero_()
    return silent


def _means(loss: Callable[[Tensor], Loss], tokens: Tensor) -> tuple[float, float]:
    """Mean losses over texts one by one, which takes little memory."""
    parts = [loss(tokens[index : index + 1]) for index in range(len(tokens))]
    return (
        sum(float(part.absorbed) for part in parts) / len(parts),
        sum(float(part.full) for part in parts) / len(parts),
    )


# --------------------------------------------------------------------------------------------------- files


def write_mapper(
    file: Path, mapper: StreamMapper, settings: Mapping[str, float], facts: Mapping[str, object]
) -> None:
    """Writes a mapper, in float16.

    Raises:
        OutputUnwritable: it cannot be written there.
    """
    write_tensors(
        file,
        {name: value.detach().to(torch.float16) for name, value in mapper.state_dict().items()},
        {
            "format": FORMAT,
            "mapper": mapper.name,
            "settings": json.dumps(dict(settings), sort_keys=True),
            "facts": json.dumps(dict(facts), sort_keys=True),
        },
    )


def read_mapper(file: Path, decoder: Decoder) -> tuple[StreamMapper, Mapping[str, object]]:
    """Reads a mapper for the decoder that it was trained on, with the facts of its training.

    Raises:
        SourceError: the file cannot be read, or is no mapper.
        WeightsDoNotFit: it belongs to another decoder.
    """
    tensors, facts = read_tensors(file)
    if facts.get("format") != FORMAT:
        raise SourceError(f"{file.name} is no mapper", "Give the file that `tta-export train-stream` wrote")
    try:
        settings, trained = json.loads(facts["settings"]), json.loads(facts["facts"])
        mapper = make_mapper(facts["mapper"], decoder, settings, 0)
    except (KeyError, TypeError, ValueError, OptionError) as error:
        raise SourceError(f"the description of {file.name} is damaged: {error}", "Train it again") from error
    found = network_digest(decoder)
    if trained.get("decoder") != found:
        raise WeightsDoNotFit(
            f"{file.name} was trained on decoder {str(trained.get('decoder'))[:12]}, this one is {found[:12]}",
            "Give the decoder that it was trained on, or train again",
        )
    own = mapper.state_dict()
    if {n: v.shape for n, v in own.items()} != {n: v.shape for n, v in tensors.items()}:
        raise WeightsDoNotFit(f"{file.name} has other tensors than its description", "Train it again")
    mapper.load_state_dict({name: value.float() for name, value in tensors.items()})
    return mapper.requires_grad_(False), trained
