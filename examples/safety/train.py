"""Train a network of the safety suite.

    python examples/safety/train.py mnist_bn --data DATA -o mnist_bn.safetensors

A one-cycle learning rate and label smoothing; colour images are cropped and flipped at random. Seeded: on one machine
with one number of threads it gives the same file each time. On one core of an Intel Xeon server processor `mnist_bn`
takes two minutes; from the time of a step: `resnet8_bn` and `resnet8_gn` 40 minutes, `convvit_ln` two hours,
`resnet26w32_bn` four.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import data
import models
import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn

SEED = 0
BATCH = 128
SMOOTHING = 0.1
PADDING = 4


@dataclass(frozen=True)
class Recipe:
    """How long and how fast.

    Attributes:
        epochs: passes over the training images.
        lr: highest learning rate.
        weight_decay: of all parameters.
        adam: AdamW instead of SGD.
    """

    epochs: int
    lr: float
    weight_decay: float = 5e-4
    adam: bool = False


RECIPES = {
    "mnist_bn": Recipe(6, 0.2),
    "resnet8_bn": Recipe(30, 0.2),
    "resnet8_gn": Recipe(30, 0.1),
    "resnet26w32_bn": Recipe(20, 0.2),
    "convvit_ln": Recipe(40, 1e-3, 0.05, adam=True),
}


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Colour images flipped by chance and cut out of their padded selves; grey ones (digits) as they are."""
    if x.shape[1] == 1:
        return x
    flip = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    side = x.shape[2]
    padded = nn.functional.pad(x, (PADDING,) * 4)
    moves = torch.randint(0, 2 * PADDING + 1, (len(x), 2), generator=generator).tolist()
    return torch.stack(
        [each[:, dy : dy + side, dx : dx + side] for each, (dy, dx) in zip(padded, moves, strict=True)]
    )


def batches(x: NDArray[np.uint8], y: NDArray[np.int64], epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(images [batch, channels, height, width] in 0..1, labels), in an order drawn for each epoch."""
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator).numpy()
        for start in range(0, len(x) - BATCH + 1, BATCH):
            part = order[start : start + BATCH]
            images = torch.from_numpy(np.ascontiguousarray(np.moveaxis(x[part], -1, 1))).float() / 255
            yield augmented(images, generator), torch.from_numpy(y[part])


def train(name: str, x: NDArray[np.uint8], y: NDArray[np.int64]) -> nn.Module:
    """The trained network, in eval mode.

    Args:
        name: of a factory in models.py.
        x: uint8 [n, height, width, channels].
        y: [n].
    """
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    recipe = RECIPES[name]
    network: nn.Module = getattr(models, name)()
    network.train()
    kind = torch.optim.AdamW if recipe.adam else torch.optim.SGD
    momentum = {} if recipe.adam else {"momentum": 0.9, "nesterov": True}
    optimiser = kind(network.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, **momentum)
    steps = recipe.epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.lr, total_steps=steps)
    for images, labels in track(batches(x, y, recipe.epochs), f"training {name}", total=steps):
        loss = nn.functional.cross_entropy(network(images), labels, label_smoothing=SMOOTHING)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return network.eval()


def accuracy(network: nn.Module, x: NDArray[np.uint8], y: NDArray[np.int64]) -> float:
    """Share of right predictions."""
    right = 0
    with torch.no_grad():
        for start in range(0, len(x), BATCH):
            images = torch.from_numpy(np.ascontiguousarray(np.moveaxis(x[start : start + BATCH], -1, 1)))
            right += int((network(images.float() / 255).argmax(1).numpy() == y[start : start + BATCH]).sum())
    return right / len(x)


def main() -> None:
    """Train, judge, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--data", type=Path, required=True, help="directory as README.md describes it")
    parser.add_argument("-o", "--out", type=Path, required=True, help="safetensors file to write")
    arguments = parser.parse_args()
    digits = arguments.name == "mnist_bn"
    pool: Path = arguments.data
    x, y = data.labelled(pool / "train_pool" / "mnist_train60000.npz") if digits else data.cifar_train(pool)
    test = pool / "dev" / ("mnist_test0000_4999.npz" if digits else "cifar10_train40000_44999.npz")
    network = train(arguments.name, x, y)
    print(f"accuracy on {test.name}: {accuracy(network, *data.labelled(test)):.4f}")
    part = arguments.out.with_suffix(".part")
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, part)
    part.replace(arguments.out)


if __name__ == "__main__":
    main()
