"""The example's own CIFAR-10 networks: their size, and that trained weights fit and are as good as they should be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shared_data import require_shared_data
from tta_exporters.sources import load_network

MODELS = Path(__file__).resolve().parent.parent / "examples" / "cifar10" / "models.py"


@pytest.mark.parametrize(("name", "parameters"), [("resnet8", 78_042), ("resnet26w32", 1_472_554)])
def test_size_and_logits(name: str, parameters: int) -> None:
    network = load_network(f"{MODELS}:{name}")
    assert sum(value.numel() for value in network.parameters()) == parameters
    with torch.no_grad():
        assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(("name", "low", "high"), [("resnet8", 0.83, 0.89), ("resnet26w32", 0.87, 0.92)])
def test_trained_weights_give_the_known_accuracy(name: str, low: float, high: float) -> None:
    """Known on 5,000 images: 85.8 and 89.6 %; the first 1,000 of them decide here."""
    weights = require_shared_data("weights", f"cifar10_{name}_bn.safetensors")
    network = load_network(f"{MODELS}:{name}", weights)
    data = np.load(require_shared_data("dev", "cifar10_train40000_44999.npz"))
    x = torch.from_numpy(data["x"][:1000].transpose(0, 3, 1, 2).astype(np.float32) / 255)
    with torch.no_grad():
        accuracy = (network(x).argmax(1).numpy() == data["y"][:1000]).mean()
    assert low < accuracy < high
