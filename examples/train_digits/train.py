"""Train the digits network; write its weights and the built-in test set.

    python examples/train_digits/train.py

needs torch and scikit-learn, whose wheel holds the data: nothing is downloaded. It takes about 20 seconds on
one CPU core and is seeded: on one machine it gives the same files each time.

The data are the 1,797 images of the UCI set "Optical Recognition of Handwritten Digits" that scikit-learn
carries. In their given order the first half (898) trains, the second half (899) tests, as in scikit-learn's
own example; the set is grouped by writer, so a random split would flatter the model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from model import digits_cnn
from numpy.typing import NDArray
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "digits.safetensors"
TEST_SET = HERE.parents[1] / "edge" / "tta_edge" / "builtin" / "digits" / "test.npz"
SEED = 0
EPOCHS = 60
BATCH = 64
LEARNING_RATE = 0.01
WEIGHT_DECAY = 5e-4


def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The 1,797 images as uint8 [1797, 8, 8, 1] and their labels; the grey levels 0..16 are stretched to
    0..255.
    """
    raw = load_digits()
    images = np.rint(raw.images * (255.0 / 16.0)).astype(np.uint8)[..., None]
    return images, raw.target.astype(np.int64)


def to_input(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [batch, 8, 8, 1] to float32 [batch, 1, 8, 8] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1))).float() / 255.0


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by -1, 0 or 1 pixel in both directions: the only augmentation."""
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    moves = torch.randint(0, 3, (len(x), 2), generator=generator)
    return torch.stack(
        [image[:, dy : dy + 8, dx : dx + 8] for image, (dy, dx) in zip(padded, moves.tolist(), strict=True)]
    )


def train(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """SGD with momentum and a one-cycle learning rate."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = digits_cnn()
    optimiser = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    steps = EPOCHS * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=10 * LEARNING_RATE, total_steps=steps)
    model.train()
    for _ in range(EPOCHS):
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            loss = nn.functional.cross_entropy(model(shifted(x[chosen], generator)), y[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()


def main() -> None:
    """Train, print the accuracies, write the weights and the test set."""
    parser = argparse.ArgumentParser(description="Train the digits network of the built-in bundle.")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="safetensors file to write")
    parser.add_argument("--test-set", type=Path, default=TEST_SET, help="npz file to write: x uint8 NHWC, y")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    images, labels = digits()
    half = len(images) // 2
    model = train(to_input(images[:half]), torch.from_numpy(labels[:half]), arguments.seed)
    with torch.no_grad():
        for name, part in (("train", slice(0, half)), ("test", slice(half, None))):
            right = model(to_input(images[part])).argmax(dim=1).numpy() == labels[part]
            print(f"{name}: {right.mean():.4f} of {len(right)}")
    for path in (arguments.weights, arguments.test_set):
        path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(model.state_dict()), arguments.weights)
    arguments.weights.chmod(0o644)
    np.savez_compressed(arguments.test_set, x=images[half:], y=labels[half:].astype(np.uint8))


if __name__ == "__main__":
    main()
