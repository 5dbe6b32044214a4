"""Your own network: train it, compile it into a bundle, adapt it without PyTorch.

Run it with `python examples/export_your_own/export_your_own.py [OUT_DIRECTORY]`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from tta_edge.builtin import builtin_digits
from tta_exporters.build import BuildOptions, InputOptions, build
from tta_runtime import Model


def small_net() -> nn.Module:
    """Yours goes here: any torch classifier with BatchNorm, LayerNorm, GroupNorm or RMSNorm layers."""

    def stage(before: int, after: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, stride, padding=1), nn.BatchNorm2d(after), nn.ReLU()]

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(*stage(1, 16, 1), *stage(16, 32, 2), *stage(32, 32, 1), *head)


def main(out: Path) -> None:
    """Trains, exports and adapts; writes ``out/small_net.safetensors`` and ``out/bundle``."""
    torch.manual_seed(0)
    digits = np.load(builtin_digits())
    images = (digits["x"].transpose(0, 3, 1, 2) / 255).astype(np.float32)
    train_x, train_y = torch.from_numpy(images[:451]), torch.from_numpy(digits["y"][:451]).long()
    network = small_net().train()
    optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(20):
        for chosen in torch.randperm(len(train_x)).split(50):
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(train_x[chosen]), train_y[chosen]).backward()
            optimiser.step()
    out.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), out / "small_net.safetensors")

    # Compile: the forward pass and, per method, the whole step with its backward pass become ONNX graphs.
    methods = ["source", "norm", "tent"]
    options = BuildOptions("small_net", InputOptions((1, 8, 8)), classes=10, methods=methods)
    shutil.rmtree(out / "bundle", ignore_errors=True)  # of an earlier run: build never overwrites
    build(network, options, out / "bundle")

    # From here on nothing needs torch: this is what an edge runs. The shift: low contrast, haze and noise.
    clean, labels = images[451:], digits["y"][451:]
    noise = np.random.default_rng(0).normal(0, 0.05, clean.shape)
    shifted = np.clip(0.5 * clean + 0.3 + noise, 0, 1).astype(np.float32)
    model = Model.open(out / "bundle", method="tent", hyper={"lr": 0.01})
    source = model.predict(shifted, source=True).logits.argmax(axis=1)
    adapted = [model.adapt(shifted[i : i + 64]).logits.argmax(axis=1) for i in range(0, len(shifted), 64)]
    print(f"clean   {(model.predict(clean, source=True).logits.argmax(axis=1) == labels).mean():.3f}")
    print(f"source  {(source == labels).mean():.3f}")
    print(f"adapted {(np.concatenate(adapted) == labels).mean():.3f} after {model.steps} steps")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/export_your_own"))
