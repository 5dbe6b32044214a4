"""What a stream mapper learns from: texts whose beginning it heard must be continued as if it stood before them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tta_adapters.decoder import Decoded, Decoder, Heard, Target
from tta_adapters.stream import Downs, StreamMapper


class Weights(NamedTuple):
    """Weights of the parts of the loss beside the continuation's cross-entropy, which has 1.

    Attributes:
        distil: of KL(with the whole context before it || absorbed).
        align: of the squared difference of the blocks' outputs, relative to their size.
    """

    distil: float = 1.0
    align: float = 0.0


class Loss(NamedTuple):
    """The parts of the loss, scalars in nats a token.

    Attributes:
        total: what is minimised.
        absorbed: cross-entropy with the context absorbed.
        full: with the context before it, the frozen network.
    """

    total: Tensor
    absorbed: Tensor
    full: Tensor


def objective(
    decoder: Decoder, mapper: StreamMapper, tokens: Tensor, begin: int | None, weights: Weights
) -> Loss:
    """The loss over texts of several chunks: each chunk but the first is continued from what was absorbed before it.

    Args:
        decoder: frozen.
        mapper: what learns.
        tokens: [texts, chunks, chunk] int64, at least two chunks.
        begin: the token before a text, or None; then the first token of a chunk is not predicted.
        weights: of the parts.

    Source: context distillation as in Charakorn et al., Doc-to-LoRA, 2026; alignment of states as reported for SADA
    (ACL 2026); cross-entropy of the continuation as in Muhtar et al., 2024.
    """
    texts, chunks, size = tokens.shape
    skipped = 0 if begin is not None else 1
    with torch.no_grad():
        whole = decoder(led(tokens.flatten(1), begin)[:, : chunks * size])
        heard = decoder(led(tokens[:, :-1].flatten(0, 1), begin)).heard
    downs = absorbed_downs(mapper, heard, texts, chunks - 1)
    continued = tokens[:, 1:].flatten(0, 1)
    student = decoder(led(continued, begin)[:, :size], updates=mapper.updates(downs))
    teacher = tail(whole, chunks, size)
    answers = continued[:, skipped:]
    logits = student.logits[:, : size - skipped]
    targets = teacher.logits[:, : size - skipped] if begin is not None else teacher.logits[:, : size - 1]
    log_student, log_teacher = F.log_softmax(logits, -1), F.log_softmax(targets, -1)
    absorbed = F.nll_loss(log_student.flatten(0, 1), answers.flatten())
    full = F.nll_loss(log_teacher.flatten(0, 1), answers.flatten())
    distil = (log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean()
    apart = [
        ((one.output - other.output) ** 2).mean() / (other.output**2).mean()
        for one, other in zip(student.heard, teacher.heard, strict=True)
    ]
    total = absorbed + weights.distil * distil + weights.align * torch.stack(apart).mean()
    return Loss(total, absorbed.detach(), full)


def led(tokens: Tensor, begin: int | None) -> Tensor:
    """[texts, tokens] with the token that stands before a text, if there is one."""
    if begin is None:
        return tokens
    return torch.cat([torch.full_like(tokens[:, :1], begin), tokens], dim=1)


def absorbed_downs(mapper: StreamMapper, heard: list[Heard], texts: int, chunks: int) -> Downs:
    """Theta after each chunk of each text.

    Args:
        mapper: what absorbs.
        heard: of passes over [texts * chunks, tokens].
        texts: how many.
        chunks: of each.

    Returns:
        [texts * chunks, rank, inputs + 1] for each updated layer, of a text's chunks one after the other.
    """
    state, downs = mapper.initial(texts), []
    for index in range(chunks):
        state = mapper.absorb([_part(each, texts, index) for each in heard], state)
        downs.append(mapper.downs(state))
    return {
        layer: torch.stack([each[layer] for each in downs], dim=1).flatten(0, 1) for layer in mapper.layers
    }


def _part(heard: Heard, texts: int, index: int) -> Heard:
    def of_chunk(value: Tensor) -> Tensor:
        return value.reshape(texts, -1, *value.shape[1:])[:, index]

    inputs: dict[Target, Tensor] = {name: of_chunk(value) for name, value in heard.inputs.items()}
    return Heard(inputs, of_chunk(heard.output))


def tail(whole: Decoded, chunks: int, size: int) -> Decoded:
    """The passes over whole texts, cut into their chunks without the first: [texts * (chunks - 1), chunk, ...]."""

    def cut(value: Tensor) -> Tensor:
        return value.reshape(-1, chunks, size, value.shape[-1])[:, 1:].flatten(0, 1)

    heard = [
        Heard({name: cut(value) for name, value in each.inputs.items()}, cut(each.output))
        for each in whole.heard
    ]
    return Decoded(cut(whole.logits), whole.cache, heard)
