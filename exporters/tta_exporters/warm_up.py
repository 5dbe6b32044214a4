"""Warm-up: an adapter's tensors learn from labelled source data before deployment, the network frozen.

Adapters that start as nothing (LoRA, ViDA) or closed (side) have directions to learn in that mean nothing yet. ViDA's
authors train theirs on the source first and did not publish how; this is our recipe: cross-entropy, Adam, a cosine
schedule, no augmentation, normalisation by the network's own running statistics.

A run is a function of its options and data: batches are drawn from the seed and the number of the step alone, so a run
that was interrupted and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tta_adapters.base import State, gradient, initial
from tta_adapters.network import NetworkAdapter
from tta_adapters.optim import Adam
from tta_exporters.adapter_file import network_digest
from tta_exporters.checkpoint import read_checkpoint, write_checkpoint
from tta_exporters.errors import Diverged, OptionError
from tta_exporters.labelled import Labelled

FORMAT = "tta-warm-up"
EVALUATION_BATCH = 256


@dataclass(frozen=True)
class WarmUpOptions:
    """How to train.

    Attributes:
        epochs: passes over the training part of the data.
        batch: samples of a step.
        lr: learning rate of the first step; it falls to 0 along half a cosine.
        seed: of the split and the order.
        held_out: share of the data that is not trained on but judged by.
        checkpoint_every: steps between two checkpoints.

    Raises:
        OptionError: a value out of its range.
    """

    epochs: int = 3
    batch: int = 64
    lr: float = 1e-3
    seed: int = 0
    held_out: float = 0.1
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}", "Give a whole number from 1")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise OptionError(f"lr is {self.lr:g}", "Give a number above 0")
        if not 0 <= self.held_out < 1:
            raise OptionError(f"held_out is {self.held_out:g}", "Give a share from 0, below 1")


@dataclass(frozen=True)
class Judgement:
    """How well the held-out part is classified (None where nothing is held out)."""

    loss: float | None
    accuracy: float | None


@dataclass(frozen=True)
class WarmedUp:
    """What came of it.

    Attributes:
        tensors: the trained tensors by name.
        steps: of the whole run.
        resumed_from: the step at which this run took up a checkpoint; 0 for none.
        before: of the adapter's start.
        after: of the result.
    """

    tensors: Mapping[str, Tensor]
    steps: int
    resumed_from: int
    before: Judgement
    after: Judgement


Progress = Callable[[int, int, float], None]
"""Told (step, all steps, loss) after each step."""


def fingerprint(adapter: NetworkAdapter, network: nn.Module, data: Labelled, options: WarmUpOptions) -> str:
    """What a checkpoint must agree on with the run that takes it up."""
    facts = {
        "network": network_digest(network),
        "adapter": adapter.name,
        "tensors": [[entry.name, list(entry.shape)] for entry in adapter.tensors],
        "start": hashlib.sha256(adapter.source_theta().numpy().tobytes()).hexdigest(),
        "data": data.digest(),
        "input": repr(data.options),
        **{key: value for key, value in asdict(options).items() if key != "checkpoint_every"},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def warm_up(
    adapter: NetworkAdapter,
    network: nn.Module,
    data: Labelled,
    options: WarmUpOptions,
    checkpoint: Path,
    progress: Progress = lambda step, steps, loss: None,
) -> WarmedUp:
    """Trains an adapter, taking up the checkpoint where there is one.

    Args:
        adapter: whose trained tensors learn, from where they start.
        network: it was made of.
        data: of the source.
        options: how.
        checkpoint: a safetensors file, written as the run goes and when it is interrupted; removed by the caller.
        progress: told after each step.

    Raises:
        OptionError: fewer training samples than one batch.
        CheckpointMismatch: the checkpoint belongs to another run.
        Diverged: the loss is not finite; the last checkpoint stays.
        OutputUnwritable: the checkpoint cannot be written.
    """
    kept, held = _split(len(data), options)
    if len(kept) < options.batch:
        raise OptionError(
            f"{len(kept)} training samples for batches of {options.batch}",
            "Give more data or a smaller --batch",
        )
    per_epoch = len(kept) // options.batch
    steps = per_epoch * options.epochs
    optimiser, mark = Adam(), fingerprint(adapter, network, data, options)
    theta = adapter.source_theta()
    before = _judge(adapter, theta, data, held)
    state = initial(optimiser.init(adapter.trained), theta)
    first = 0
    if checkpoint.exists():
        found, first = read_checkpoint(checkpoint, FORMAT, mark, {"theta": theta, **state})
        theta, state = found["theta"], {name: found[name] for name in state}
    step = first

    def save() -> None:
        write_checkpoint(checkpoint, FORMAT, mark, {"theta": theta, **state}, step)

    try:
        while step < steps:
            chosen = kept[_order(len(kept), step // per_epoch, options.seed)]
            place = (step % per_epoch) * options.batch
            x, y = data.batch(chosen[place : place + options.batch])
            setting = _setting(optimiser, options.lr * 0.5 * (1 + math.cos(math.pi * step / steps)))
            loss, moved, state_after = _step(adapter, optimiser, theta, state, x, y, setting)
            if not (math.isfinite(loss) and bool(torch.isfinite(moved).all())):
                raise Diverged(f"the loss is {loss:g} at step {step + 1} of {steps}", "Lower --lr")
            theta, state, step = moved, state_after, step + 1
            if step % options.checkpoint_every == 0:
                save()
            progress(step, steps, loss)
    except KeyboardInterrupt:
        save()
        raise
    named = adapter.unpack(theta)
    tensors = {entry.name: named[entry.name].detach() for entry in adapter.tensors if entry.trained}
    return WarmedUp(tensors, steps, first, before, _judge(adapter, theta, data, held))


def _split(count: int, options: WarmUpOptions) -> tuple[Tensor, Tensor]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(options.seed))
    held = int(count * options.held_out)
    return order[held:], order[:held]


def _order(count: int, epoch: int, seed: int) -> Tensor:
    # Seed and epoch alone: a run that resumes in the middle of an epoch draws the same order.
    return torch.randperm(count, generator=torch.Generator().manual_seed(1_000_003 * (epoch + 1) + seed))


def _setting(optimiser: Adam, lr: float) -> dict[str, Tensor]:
    return {entry.name: torch.tensor(entry.default) for entry in optimiser.hyper(lr)}


def _step(
    adapter: NetworkAdapter,
    optimiser: Adam,
    theta: Tensor,
    state: State,
    x: Tensor,
    y: Tensor,
    setting: Mapping[str, Tensor],
) -> tuple[float, Tensor, State]:
    tensors = adapter.unpack(theta)
    loss = nn.functional.cross_entropy(adapter.forward(tensors, x).logits, y)
    delta, state = optimiser.update(gradient(loss, adapter, tensors), state, setting)
    trained = theta[: adapter.trained] + delta
    return float(loss.detach()), torch.cat([trained, theta[adapter.trained :]]), state


def _judge(adapter: NetworkAdapter, theta: Tensor, data: Labelled, held: Tensor) -> Judgement:
    if not len(held):
        return Judgement(None, None)
    tensors = adapter.unpack(theta)
    loss, right = 0.0, 0
    with torch.no_grad():
        for indices in torch.split(held, EVALUATION_BATCH):
            x, y = data.batch(indices)
            logits = adapter.forward(tensors, x).logits
            loss += float(nn.functional.cross_entropy(logits, y, reduction="sum"))
            right += int((logits.argmax(1) == y).sum())
    return Judgement(loss / len(held), right / len(held))
