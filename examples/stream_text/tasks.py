"""Two tasks whose answers are known: does absorbing demonstrations do what having them in the context does?

    python examples/stream_text/tasks.py --json tasks.json

*Recall*: a text has a table of 16 keys and 16 values, drawn anew; a demonstration is a question for a key and its
answer. *Regression*: a text has a line y = a x + b, drawn anew; a demonstration is an x and a noisy y. A decoder of
0.1 M parameters learns each task in its context; then it is frozen, and both mappers learn to absorb demonstrations.
Judged is the answer to one more question, after 0 to 256 demonstrations; training has seen at most 64.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pretraining import Phase, fresh, pretrain, told
from torch import Tensor

from tta_adapters.decoder import Decoder, DecoderConfig
from tta_adapters.stream import StreamMapper
from tta_adapters.stream_objective import Weights, absorbed_downs, led, objective
from tta_exporters.train_stream import make_mapper
from tta_exporters.training import Schedule, train

POINTS = 16
"""Keys, or places of x; a question is the token of one."""
ANSWERS = 16
"""Values, or levels of y."""
BEGIN = POINTS + POINTS * ANSWERS
SHOWN = (0, 8, 16, 32, 64, 128, 256)
"""Demonstrations before the judged question; up to TRAINED of them were trained on."""
TRAINED = 64
CHUNK = 16
"""Tokens absorbed at once: eight demonstrations."""
AT_ONCE = 200
"""Texts that are judged together, which takes about a gigabyte of memory with 256 demonstrations each."""
CHUNKS = 72
"""Of one step of a mapper's training, over all its texts."""
NOISE = 0.15
"""Standard deviation of y, whose levels are 2 / 15 apart."""
EMBEDDED = 0.3
"""Standard deviation of embeddings before training: so large that training keeps what they have in common."""
SETTINGS = {"attention": {"rank": 32}, "delta": {"rank": 32, "group": 2}}
"""Of the mappers. A question and what followed it are written before the next: of two that are the same one counts."""
SEED = 0


@dataclass(frozen=True)
class Task:
    """A task in context.

    Attributes:
        name: of it.
        texts: (count, demonstrations, generator) to questions and answers shown, and to the right answer, each
            int64 [count, demonstrations].
        near: answers so far from the right one count.
    """

    name: str
    texts: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor, Tensor]]
    near: int


def recall(count: int, shown: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A table for each text; keys are asked for at random."""
    table = torch.randint(0, ANSWERS, (count, POINTS), generator=generator)
    asked = torch.randint(0, POINTS, (count, shown), generator=generator)
    answers = torch.gather(table, 1, asked)
    return asked, answers, answers


def regression(count: int, shown: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A line for each text: slope and height in [-0.5, 0.5], x in [-1, 1], y shown with noise."""
    line = torch.rand(2, count, 1, generator=generator) - 0.5
    asked = torch.randint(0, POINTS, (count, shown), generator=generator)
    y = line[0] * place(asked) + line[1]
    noisy = y + NOISE * torch.randn(count, shown, generator=generator)
    return asked, level(noisy), level(y)


def place(asked: Tensor) -> Tensor:
    """The x in [-1, 1] that a question asks for."""
    return asked * (2 / (POINTS - 1)) - 1


def level(y: Tensor) -> Tensor:
    """The nearest of ANSWERS levels to y in [-1, 1]."""
    return ((y.clamp(-1, 1) + 1) * ((ANSWERS - 1) / 2)).round().long()


TASKS = (Task("recall", recall, 0), Task("regression", regression, 1))


def tokens_of(asked: Tensor, answers: Tensor) -> Tensor:
    """[count, 2 * shown]: a question's token, then a token that holds question and answer.

    That a demonstration's token holds both its sides makes a look-up one step of attention, as in von Oswald et al.,
    Transformers learn in-context by gradient descent, 2023.
    """
    return torch.stack([asked, POINTS + asked * ANSWERS + answers], dim=2).flatten(1)


def main() -> None:
    """Trains, judges, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--steps", type=int, default=450, help="of a decoder's training")
    parser.add_argument("--mapper-steps", type=int, default=3000, help="of each mapper's training")
    parser.add_argument("--texts", type=int, default=2000, help="that judge")
    parser.add_argument("--tasks", default="recall,regression", help="comma list")
    arguments = parser.parse_args()
    rows = []
    for task in TASKS:
        if task.name in arguments.tasks.split(","):
            rows += run(task, arguments.steps, arguments.mapper_steps, arguments.texts)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "trained": TRAINED}, indent=2) + "\n")


def run(task: Task, steps: int, mapper_steps: int, texts: int) -> list[dict[str, object]]:
    """The table of a task."""
    config = DecoderConfig(BEGIN + 1, 2, 64, 4, 4, 16, 172, 2 * max(SHOWN) + 2)
    decoder = composed(fresh(config, SEED))

    def draw(phase: Phase, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_000 + step)
        asked, answers, _ = task.texts(phase.texts, phase.length // 2, generator)
        return tokens_of(asked, answers)

    phases = [Phase(64, TRAINED, steps * 2 // 3), Phase(24, 2 * TRAINED + CHUNK, steps - steps * 2 // 3)]
    # Questions count as well, though nobody can know them: a decoder that was never told so would guess them by the
    # context, and mappers would learn to imitate its guesses.
    pretrain(decoder, draw, BEGIN, phases, progress=told(f"{task.name}: decoder"))
    mappers = {kind: trained(task, decoder, kind, mapper_steps) for kind in ("attention", "delta")}
    rows: list[dict[str, object]] = []
    for shown in SHOWN:
        row = {"task": task.name, "demonstrations": shown, **judged(task, decoder, mappers, shown, texts)}
        rows.append(row)
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
    return rows


@torch.no_grad()
def composed(decoder: Decoder) -> Decoder:
    """A decoder to whom a demonstration is, to begin with, its question and its answer: the sum of a vector for each.

    256 vectors that have nothing in common would be learned as well, but then as 256 answers; what a mapper has to add
    for an answer would depend on the question.
    """
    generator = torch.Generator().manual_seed(SEED)
    vectors = EMBEDDED * torch.randn(POINTS + ANSWERS, decoder.config.width, generator=generator)
    questions, answers = vectors.split((POINTS, ANSWERS))
    decoder.embedding.weight[:POINTS] = questions
    decoder.embedding.weight[POINTS:BEGIN] = (questions[:, None] + answers).flatten(0, 1)
    return decoder


def trained(task: Task, decoder: Decoder, kind: str, steps: int) -> StreamMapper:
    """A mapper that learned to absorb demonstrations of a task."""
    mapper = make_mapper(kind, decoder, SETTINGS[kind], SEED)

    def loss_of(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(2_000_000 + step)
        chunks = int(torch.randint(2, 2 * TRAINED // CHUNK + 2, (1,), generator=generator))
        count = CHUNKS // chunks
        asked, answers, _ = task.texts(count, chunks * CHUNK // 2, generator)
        pieces = tokens_of(asked, answers).reshape(count, chunks, CHUNK)
        return objective(decoder, mapper, pieces, BEGIN, Weights(1.0, 0.0)).total

    with tempfile.TemporaryDirectory() as work:
        tell = told(f"{task.name}: {kind}")
        train(mapper, loss_of, Schedule(steps, 3e-3), kind, Path(work) / "checkpoint", tell)
    return mapper.requires_grad_(False)


def judged(
    task: Task, decoder: Decoder, mappers: dict[str, StreamMapper], shown: int, texts: int
) -> dict[str, float]:
    """Shares of right answers to the question after ``shown`` demonstrations, by who answers."""
    generator = torch.Generator().manual_seed(3_000_000)
    asked, answers, right = task.texts(texts, shown + 1, generator)
    wanted = right[:, -1]
    parts = [
        answered(decoder, mappers, part_asked, part_answers)
        for part_asked, part_answers in zip(asked.split(AT_ONCE), answers.split(AT_ONCE), strict=True)
    ]
    result = {}
    for name in parts[0]:
        found = torch.cat([part[name] for part in parts])
        result[name] = float(((found - wanted).abs() <= task.near).float().mean())
    if task.near:
        result["least_squares"] = share_of_least_squares(asked, answers, wanted, task.near)
    return result


@torch.no_grad()
def answered(
    decoder: Decoder, mappers: dict[str, StreamMapper], asked: Tensor, answers: Tensor
) -> dict[str, Tensor]:
    """The answers to each text's last question, int64 [texts], by who answers."""
    texts, shown = asked.shape[0], asked.shape[1] - 1
    tokens = tokens_of(asked, answers)
    question = led(tokens[:, -2:-1], BEGIN)

    def likeliest(logits: Tensor) -> Tensor:
        # Of the tokens of this question's answers: every answer names its question.
        first = POINTS + asked[:, -1:] * ANSWERS
        return torch.gather(logits, 1, first + torch.arange(ANSWERS)).argmax(1)

    result = {
        "no_context": likeliest(decoder(question).logits[:, -1]),
        "in_context": likeliest(decoder(led(tokens[:, :-1], BEGIN)).logits[:, -1]),
    }
    for kind, mapper in mappers.items():
        if not shown:
            result[kind] = result["no_context"]
            continue
        chunks = 2 * shown // CHUNK
        heard = decoder(led(tokens[:, : chunks * CHUNK].reshape(-1, CHUNK), BEGIN)).heard
        downs = absorbed_downs(mapper, heard, texts, chunks)
        last = {layer: down[chunks - 1 :: chunks] for layer, down in downs.items()}
        result[kind] = likeliest(decoder(question, updates=mapper.updates(last)).logits[:, -1])
    return result


def share_of_least_squares(asked: Tensor, answers: Tensor, wanted: Tensor, near: int) -> float:
    """What the line of least squares through the demonstrations reaches; nothing without two of them."""
    x = place(asked[:, :-1]).double()
    if x.shape[1] < 2:
        return 0.0
    y = (answers[:, :-1] * (2 / (ANSWERS - 1)) - 1).double()
    design = torch.stack([x, torch.ones_like(x)], dim=2)
    line = torch.linalg.lstsq(design, y[..., None], driver="gelsd").solution[..., 0]
    found = level((line[:, 0] * place(asked[:, -1]) + line[:, 1]).float())
    return float(((found - wanted).abs() <= near).float().mean())


if __name__ == "__main__":
    main()
