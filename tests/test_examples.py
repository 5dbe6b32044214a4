"""The examples do what their READMEs say."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from documents import blocks, run_block, workplace
from running import PATIENCE_S, REPOSITORY, process_environment
from shared_data import require_shared_data
from tta_adapters import NormAdapter, check_method
from tta_adapters.testing import MethodContractError
from tta_exporters.errors import WeightsDoNotFit
from tta_exporters.sources import load_network
from tta_runtime import Model

EXAMPLES = REPOSITORY / "examples"
MODELS = EXAMPLES / "cifar10" / "models.py"
PARAMETERS = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85}  # millions, He et al., table 6


def run_example(*arguments):
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=5 * PATIENCE_S,
        cwd=REPOSITORY,
        env=process_environment(OMP_NUM_THREADS="2"),
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def load_example(path):
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- export your own --------------------------------------------------------------------------------


def test_export_your_own_recovers_accuracy_and_leaves_a_bundle_and_weights(tmp_path):
    script, exported = (
        block for block in blocks(EXAMPLES / "export_your_own" / "README.md") if block.mark == "example"
    )
    folder = workplace(tmp_path)
    result = run_block(script, folder)
    assert result.returncode == 0, result.stderr
    accuracy = dict(re.findall(r"^(\w+) +(\d\.\d+)", result.stdout, re.M))
    assert float(accuracy["clean"]) > 0.7
    assert float(accuracy["source"]) < 0.5
    assert float(accuracy["adapted"]) > float(accuracy["source"]) + 0.3

    by_command_line = run_block(exported, folder)
    assert by_command_line.returncode == 0, by_command_line.stderr
    ours, theirs = (Model.open(folder / "out" / name) for name in ("export_your_own/bundle", "small_net"))
    assert ours.digest == theirs.digest


def test_export_your_own_is_about_forty_lines():
    source = (EXAMPLES / "export_your_own" / "export_your_own.py").read_text()
    body = source.split("\ndef ", 1)[1]
    code = [line for line in body.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(code) <= 45


# --- write your own method --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def method():
    return load_example(EXAMPLES / "write_your_own_method" / "robust_pseudo_label.py")


def test_the_method_of_the_example_keeps_the_contract():
    said = run_example(EXAMPLES / "write_your_own_method" / "robust_pseudo_label.py")
    assert "keeps the contract" in said


def test_the_contract_objects_to_the_change_that_the_readme_suggests(method):
    class Careless(method.RobustPseudoLabel):
        def step(self, batch, theta, state, anchor, hyper, rand):
            out = super().step(batch, theta, state, anchor, hyper, rand)
            alive = super().step(batch._replace(weight=batch.weight + 1), theta, state, anchor, hyper, rand)
            return out._replace(state=alive.state)

    with pytest.raises(MethodContractError, match="refused"):
        check_method(Careless)


def test_its_loss_is_the_formula(method):
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.1, 0.0]], dtype=torch.float64)
    found = method.generalised_cross_entropy(logits, torch.tensor(0.8))
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(axis=1, keepdims=True)
    assert np.allclose(found.numpy(), (1 - p.max(axis=1) ** 0.8) / 0.8)
    nearly_cross_entropy = method.generalised_cross_entropy(logits, torch.tensor(1e-4)).numpy()
    assert np.allclose(nearly_cross_entropy, -np.log(p.max(axis=1)), rtol=1e-3)


def test_it_refuses_a_network_it_is_not_written_for(method):
    layer_norms_only = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    with pytest.raises(ValueError, match="BatchNorm"):
        method.RobustPseudoLabel(NormAdapter(layer_norms_only))


# --- the networks of CIFAR-10 -----------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "millions"), PARAMETERS.items())
def test_the_networks_have_the_papers_depth_and_size(depth, millions):
    network = load_network(f"{MODELS}:resnet{depth}")
    weighted = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(weighted) == depth
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("depth", PARAMETERS)
def test_the_networks_take_the_published_weights(depth):
    weights = require_shared_data("weights", f"cifar10_resnet{depth}.safetensors")
    network = load_network(f"{MODELS}:resnet{depth}", weights)
    published = load_file(weights)
    assert set(network.state_dict()) == set(published)
    assert all(torch.equal(value, published[name]) for name, value in network.state_dict().items())


def test_weights_of_another_depth_are_refused():
    weights = require_shared_data("weights", "cifar10_resnet20.safetensors")
    with pytest.raises(WeightsDoNotFit, match="missing"):
        load_network(f"{MODELS}:resnet32", weights)


@pytest.mark.parametrize(("depth", "low", "high"), [(20, 0.90, 0.92), (56, 0.91, 0.95)])
def test_the_published_weights_have_their_accuracy(depth, low, high):
    weights = require_shared_data("weights", f"cifar10_resnet{depth}.safetensors")
    images = np.load(require_shared_data("dev", "cifar10_test000_499.npz"))
    network = load_network(f"{MODELS}:resnet{depth}", weights)
    x = torch.from_numpy(images["x"].transpose(0, 3, 1, 2)).float() / 255
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        right = network((x - mean) / std).argmax(dim=1).numpy() == images["y"]
    assert low <= right.mean() <= high
