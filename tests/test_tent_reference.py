"""An eager-torch TENT written for this test alone, beside the compiled one: from equal state, and over a whole stream.

The reference follows the authors' configuration (network in training mode, running statistics removed, dropout off)
and shares no code with tta_adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from exported import built
from networks import NETWORKS
from shared_data import require_shared_data
from tta_exporters.build import BuildOptions, InputOptions, build
from tta_exporters.sources import load_network
from tta_runtime import Model

LR = 1e-3


class EagerTent:
    """Wang et al., ICLR 2021: entropy of the batch's predictions, one step on the affine parameters of norm layers."""

    def __init__(self, network: nn.Module, *, adam: bool) -> None:
        self.network = copy.deepcopy(network).train().requires_grad_(False)
        self.parameters: list[nn.Parameter] = []
        for module in self.network.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.track_running_stats = False
                module.running_mean = module.running_var = None
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
                module.requires_grad_(True)
                self.parameters += [module.weight, module.bias]
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(self.parameters, lr=LR)
            if adam
            else torch.optim.SGD(self.parameters, lr=LR, momentum=0.9, nesterov=True)
        )

    def step(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        logits = self.network(torch.from_numpy(x))
        probabilities = logits.softmax(1)
        loss = -(probabilities * logits.log_softmax(1)).sum(1).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return logits.detach().numpy()

    def theta(self) -> NDArray[np.float32]:
        return torch.cat([value.detach().reshape(-1) for value in self.parameters]).numpy()


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "group_norm", "vit", "mlp"])
def test_one_step_from_equal_state(name: str) -> None:
    model = Model.open(built(name).path, method="tent", hyper={"lr_batch": 1.0})
    reference = EagerTent(NETWORKS[name](), adam=False)
    start = reference.theta()
    trained = model.manifest.theta.trained
    np.testing.assert_array_equal(model.theta[:trained], start)
    x = np.random.default_rng(3).random((9, 3, 16, 16), dtype=np.float32)
    found, expected = model.step(x), reference.step(x)
    scale = np.abs(expected).max()
    assert np.abs(found.logits - expected).max() <= 1e-4 * scale
    moved, wanted = found.theta[:trained] - start, reference.theta() - start
    assert np.abs(moved - wanted).max() <= 1e-4 * np.abs(start).max()
    # theta moves by thousandths; compare the movement itself as well, at the precision float32 leaves it.
    assert np.abs(moved - wanted).max() <= 1e-2 * np.abs(wanted).max()
    mean_entropy = float(np.mean(-(_softmax(expected) * np.log(_softmax(expected))).sum(1)))
    assert found.report["loss"] == pytest.approx(mean_entropy, rel=1e-4)


def test_the_comparison_objects_to_another_learning_rate() -> None:
    """The companion: the same comparison fails where the two really differ."""
    model = Model.open(built("resnet").path, method="tent", hyper={"lr": 1.1 * LR})
    reference = EagerTent(NETWORKS["resnet"](), adam=False)
    start, trained = reference.theta(), model.manifest.theta.trained
    x = np.random.default_rng(3).random((9, 3, 16, 16), dtype=np.float32)
    found = model.step(x).theta[:trained] - start
    reference.step(x)
    wanted = reference.theta() - start
    assert np.abs(found - wanted).max() > 1e-2 * np.abs(wanted).max()


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    result: NDArray[np.float32] = shifted / shifted.sum(1, keepdims=True)
    return result


def gaussian_noise(count: int) -> Iterator[NDArray[np.float32]]:
    """Batches of 200 of the development stream under strong noise."""
    from tta_edge.streams.shifts import corrupt

    data = np.load(require_shared_data("dev", "cifar10_train40000_44999.npz"))
    images = corrupt(data["x"][:count], "gaussian_noise", 5, 0)
    for start in range(0, count, 200):
        yield np.ascontiguousarray(images[start : start + 200].transpose(0, 3, 1, 2), dtype=np.float32) / 255


@pytest.mark.slow
@pytest.mark.parametrize("adam", [True, False])
def test_over_a_whole_corruption_the_predictions_agree(
    adam: bool, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    source = f"{require_shared_data('weights', 'models.py')}:resnet8_bn"
    network = load_network(source, require_shared_data("weights", "cifar10_resnet8_bn.safetensors"))
    options = BuildOptions(
        "resnet8_bn",
        InputOptions((3, 32, 32)),
        10,
        ["tent"],
        settings={"tent": {"optimizer": "adam" if adam else "sgd", "lr": LR}},
    )
    model = Model.open(build(network, options, tmp_path / "bundle").path, method="tent")
    reference = EagerTent(network, adam=adam)
    disagree = total = 0
    for x in gaussian_noise(5000):
        ours, theirs = model.adapt(x).logits.argmax(1), reference.step(x).argmax(1)
        disagree += int((ours != theirs).sum())
        total += len(x)
    assert total == 5000
    record_property("predictions that differ", disagree)
    assert disagree / total < 1e-3, f"{disagree} of {total} predictions differ"
