"""A training run that can be interrupted: the same bits whether it was or not.

What a step learns from is a function of its number alone, so a checkpoint holds weights, the optimiser's moments and
the number of the step, and nothing else is needed to go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tta_exporters.checkpoint import read_checkpoint, write_checkpoint
from tta_exporters.errors import Diverged, OptionError

FORMAT = "tta-training"
CLIP = 1.0
"""Largest norm of a gradient."""

Progress = Callable[[int, int, float], None]
"""Told (step, all steps, loss) after each step."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: of the whole run.
        lr: learning rate behind the warm-up; over the last half of the run it falls to 0 along a line.
        warm: steps over which it rises from 0.
        checkpoint_every: steps between two checkpoints.

    Raises:
        OptionError: a value out of its range.
    """

    steps: int
    lr: float = 3e-3
    warm: int = 20
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "warm", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}", "Give a whole number from 1")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise OptionError(f"lr is {self.lr:g}", "Give a number above 0")

    def rate(self, step: int) -> float:
        """Learning rate of a step, from 0."""
        return self.lr * min(1.0, (step + 1) / self.warm) * min(1.0, 2 * (self.steps - step) / self.steps)


def train(
    module: nn.Module,
    loss_of: Callable[[int], Tensor],
    schedule: Schedule,
    mark: str,
    checkpoint: Path,
    progress: Progress = lambda step, steps, loss: None,
) -> int:
    """Trains what of a module requires gradients, in place, with AdamW; takes up the checkpoint where there is one.

    Args:
        module: what learns.
        loss_of: the loss of a step, by its number.
        schedule: how.
        mark: what a checkpoint must agree on with the run that takes it up.
        checkpoint: a safetensors file, written as the run goes and when it is interrupted; removed by the caller.
        progress: told after each step.

    Returns:
        The step at which this run took up a checkpoint; 0 for none.

    Raises:
        CheckpointMismatch: the checkpoint belongs to another run.
        Diverged: the loss is not finite; the last checkpoint stays.
        OutputUnwritable: the checkpoint cannot be written.
    """
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    moments = {
        f"{kind}.{name}": torch.zeros_like(value)
        for kind in ("mean", "square")
        for name, value in trained.items()
    }
    first = _resume(checkpoint, mark, trained, moments) if checkpoint.exists() else 0
    step = first

    def save() -> None:
        values = {f"value.{name}": value.detach() for name, value in trained.items()}
        write_checkpoint(checkpoint, FORMAT, mark, {**values, **moments}, step)

    try:
        while step < schedule.steps:
            loss = loss_of(step)
            gradients = dict(
                zip(
                    trained,
                    torch.autograd.grad(loss, list(trained.values()), materialize_grads=True),
                    strict=True,
                )
            )
            norm = torch.sqrt(torch.stack([(g * g).sum() for g in gradients.values()]).sum())
            if not (math.isfinite(float(loss.detach())) and math.isfinite(float(norm))):
                raise Diverged(
                    f"the loss is {float(loss.detach()):g} and its gradient's norm {float(norm):g} at step {step + 1} "
                    f"of {schedule.steps}",
                    "Lower --lr",
                )
            scale = min(1.0, CLIP / (float(norm) + 1e-12))
            _adam(trained, gradients, moments, scale, schedule.rate(step), step + 1)
            step += 1
            if step % schedule.checkpoint_every == 0:
                save()
            progress(step, schedule.steps, float(loss.detach()))
    except KeyboardInterrupt:
        save()
        raise
    return first


def _adam(
    trained: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    scale: float,
    lr: float,
    count: int,
) -> None:
    """One update, in place. Kingma and Ba, Adam, 2015, algorithm 1, with beta_2 = 0.95 as language models use it."""
    beta, beta2, eps = 0.9, 0.95, 1e-8
    with torch.no_grad():
        for name, value in trained.items():
            gradient = gradients[name] * scale
            mean, square = moments[f"mean.{name}"], moments[f"square.{name}"]
            mean.mul_(beta).add_(gradient, alpha=1 - beta)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            spread = (square / (1 - beta2**count)).sqrt_().add_(eps)
            value.addcdiv_(mean, spread, value=-lr / (1 - beta**count))


def _resume(checkpoint: Path, mark: str, trained: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> int:
    wanted = {**{f"value.{name}": value for name, value in trained.items()}, **moments}
    found, step = read_checkpoint(checkpoint, FORMAT, mark, wanted)
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(found[name])
    return step
