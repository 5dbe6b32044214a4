"""examples/safety: its networks, its digits, and the one command."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from running import PATIENCE_S, REPOSITORY, process_environment
from shared_data import require_shared_data
from tta_exporters.sources import load_network

SAFETY = REPOSITORY / "examples" / "safety"
NETWORKS = {
    "resnet8_bn": 78_042,
    "resnet8_gn": 78_042,
    "resnet26w32_bn": 1_472_554,
    "convvit_ln": 349_450,
    "mnist_bn": 24_058,
}


def network_of(name, weights=None):
    return load_network(f"{SAFETY / 'models.py'}:{name}", weights)


@pytest.fixture
def example(monkeypatch):
    """The example's modules, which import each other as scripts do."""
    monkeypatch.syspath_prepend(str(SAFETY))
    yield
    for name in ("data", "models", "train", "safety"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_the_size_they_are_said_to_have(name):
    network = network_of(name)
    assert sum(each.numel() for each in network.parameters()) == NETWORKS[name]
    shape = (2, 1, 28, 28) if name == "mnist_bn" else (2, 3, 32, 32)
    assert network(torch.rand(shape)).shape == (2, 10)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "mnist_bn"])
def test_networks_take_the_weights_that_are_known(name):
    weights = require_shared_data("weights", f"cifar10_{name}.safetensors")
    with np.load(require_shared_data("dev", "cifar10_train40000_44999.npz")) as archive:
        x, y = archive["x"][:200], archive["y"][:200]
    images = torch.from_numpy(np.moveaxis(x, -1, 1).copy()).float() / 255
    with torch.no_grad():
        right = (network_of(name, weights)(images).argmax(1).numpy() == y).mean()
    assert right > 0.6


def test_the_weights_of_the_example_know_digits_and_stumble_over_others():
    weights = SAFETY / "mnist_bn.safetensors"
    assert weights.stat().st_size < 2e6
    network = network_of("mnist_bn", weights)
    with np.load(require_shared_data("dev", "mnist_test0000_4999.npz")) as archive:
        x, y = archive["x"][:500], archive["y"][:500]
    with torch.no_grad():
        predicted = network(torch.from_numpy(x)[:, None].float() / 255).argmax(1).numpy()
    assert (predicted == y).mean() > 0.97


def test_digits_are_brought_to_size(example):
    import data

    flat = np.full((2, 16, 16, 1), 200, np.uint8)
    assert (data.resized(flat, 28) == 200).all()
    ramp = np.broadcast_to(np.arange(0, 256, 16, dtype=np.uint8)[:, None, None], (1, 16, 16, 1))
    wide = data.resized(ramp, 28)
    assert wide.shape == (1, 28, 28, 1)
    assert (np.diff(wide[0, :, 0, 0].astype(int)) >= 0).all()


def test_training_repeats(example):
    import train

    x = np.random.default_rng(0).integers(0, 256, (256, 28, 28, 1), dtype=np.uint8)
    y = np.arange(256) % 10
    first, again = (train.train("mnist_bn", x, y).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_the_one_command(tmp_path):
    root = require_shared_data()
    command = [
        sys.executable, SAFETY / "safety.py", "--data", root, "--models", "mnist_bn", "--jobs", "2", "-o", tmp_path,
        "--", "--limit", "200", "--methods", "norm,tent",
    ]  # fmt: skip
    for _ in range(2):  # the second time everything is there
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=10 * PATIENCE_S, cwd=REPOSITORY,
            env=process_environment(OMP_NUM_THREADS="1"), check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("$ -m") == 1, "only the suite itself ran again"
    (model,) = json.loads((tmp_path / "quick.json").read_text())["models"]
    names = {stream["name"] for stream in model["streams"]}
    assert {"online/natural", "malicious/20-clean", "sorted/none", "long"} <= names
    norm = next(verdict for verdict in model["verdicts"] if verdict["player"] == "norm")
    natural = next(stream for stream in model["streams"] if stream["name"] == "online/natural")
    assert natural["players"]["norm"]["difference"] < -0.2
    assert all(each["difference"] > 0 for each in norm["malicious"])
    assert norm["forwards_per_sample_long"] == pytest.approx(1, abs=0.05)
