"""Training a small decoder from nothing: Muon for its matrices, AdamW for the rest.

What a step learns from is a function of its number, so a run repeats itself on one machine.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tta_adapters.decoder import Decoder, DecoderConfig
from tta_adapters.stream_objective import led

MUON_LR, ADAM_LR = 0.02, 3e-3
WARM = 30
"""Steps over which the learning rates rise."""
FALL = 0.6
"""Share of the steps, at the end, over which they fall to FLOOR of what they were."""
FLOOR = 0.02


@dataclass(frozen=True)
class Phase:
    """Steps that learn from texts of one length: longer texts come later, when short ones are known.

    Attributes:
        texts: of a step.
        length: tokens of each.
        steps: how many.
    """

    texts: int
    length: int
    steps: int


Draw = Callable[[Phase, int], Tensor]
"""The texts of a step by its number: int64 [texts, length]."""


def fresh(config: DecoderConfig, seed: int) -> Decoder:
    """A decoder before training: matrices of variance 1 / inputs, those that write to the residual stream smaller."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder(config)
        for name, value in decoder.named_parameters():
            if value.dim() != 2:
                continue
            inputs = value.shape[1]
            last = name.endswith(("o.weight", "mlp.down.weight"))
            std = 0.02 if "embedding" in name else inputs**-0.5 * (0.35 if last else 1.0)
            nn.init.normal_(value, 0.0, std)
    return decoder


def pretrain(
    decoder: Decoder,
    draw: Draw,
    begin: int,
    phases: Sequence[Phase],
    *,
    peak: float = 1.0,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> None:
    """Trains in place, in bfloat16 arithmetic on float32 weights, and freezes the decoder.

    Args:
        decoder: from :func:`fresh`.
        draw: what to learn from.
        begin: the token before a text.
        phases: how long, one after the other.
        peak: what the learning rates are multiplied with.
        progress: told (step, all steps, loss in bits a token) after each step.
    """
    decoder.requires_grad_(True)
    matrices = [p for name, p in decoder.named_parameters() if p.dim() == 2 and "embedding" not in name]
    others = [p for name, p in decoder.named_parameters() if p.dim() != 2 or "embedding" in name]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.Muon(matrices, lr=MUON_LR, momentum=0.95, weight_decay=0.01), MUON_LR),
        (torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0), ADAM_LR),
    ]
    steps, step = sum(phase.steps for phase in phases), 0
    for phase in phases:
        for _ in range(phase.steps):
            for optimizer, lr in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = peak * lr * rate(step, steps)
            tokens = draw(phase, step)
            with torch.autocast("cpu", torch.bfloat16):
                logits = decoder(led(tokens, begin)[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer, _ in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            progress(step, steps, float(loss.detach()) / math.log(2))
    decoder.requires_grad_(False)


def rate(step: int, steps: int) -> float:
    """What the learning rates are multiplied with at a step, from 0."""
    return min(1.0, (step + 1) / WARM) * min(1.0, max(FLOOR, (steps - step) / (FALL * steps)))


def told(what: str, every: int = 50) -> Callable[[int, int, float], None]:
    """Says on stderr how far a run is."""
    start = time.monotonic()

    def tell(step: int, steps: int, loss: float) -> None:
        if step % every == 0 or step == steps:
            sys.stderr.write(f"{what} {step}/{steps}: loss {loss:.3f}, {time.monotonic() - start:.0f} s\n")
            sys.stderr.flush()

    return tell
