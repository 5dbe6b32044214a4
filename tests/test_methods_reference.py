"""Selecting methods beside eager references from equal state, and over a whole corruption."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from eager_methods import Eager, EagerEata, EagerSar, EagerT3a, lame
from networks import group_norm, resnet, vit
from shared_data import require_shared_data
from tta_adapters import Method, NormAdapter, make_method
from tta_adapters.base import Batch, Calibrated, init_state
from tta_adapters.losses import entropy
from tta_exporters.sources import load_network

LR = 1e-3
SHARPNESS = 12.0  # of the random classifiers, so that some predictions are certain and some are not


def sharp(make: Callable[[], nn.Module]) -> nn.Module:
    network = make()
    heads = [module for module in network.modules() if isinstance(module, nn.Linear)]
    heads[-1].weight.data *= SHARPNESS
    return network


NETWORKS = {"resnet": resnet, "group_norm": group_norm, "vit": vit}
FISHER = [torch.rand([16, 3, 16, 16], generator=torch.Generator().manual_seed(k)) for k in range(3)]
"""Stands for source images; the networks take any size."""

Reference = Callable[[nn.Module, float], Eager]
METHODS: dict[str, tuple[dict[str, Any], Reference]] = {
    "eta": ({"redundancy": 0.4}, lambda n, margin: EagerEata(n, lr=LR, margin=margin)),
    "eata": (
        {"redundancy": 0.4, "alpha": 50.0},
        lambda n, margin: EagerEata(n, lr=LR, margin=margin, fisher_images=FISHER, alpha=50.0),
    ),
    "sar": ({"recover_below": 0.0}, lambda n, margin: EagerSar(n, lr=LR, margin=margin, recover_below=0.0)),
    "rdumb": (
        {"redundancy": 0.4, "period": 3.0},
        lambda n, margin: EagerEata(n, lr=LR, margin=margin, reset_every=3),
    ),
}


def halving_margin(network: nn.Module) -> float:
    """A margin that about half of the samples are below."""
    adapter = NormAdapter(network)
    x = torch.from_numpy(batch(99))
    logits = adapter.forward(adapter.unpack(adapter.source_theta()), x, statistics="batch").logits
    return float(entropy(logits).detach().median() / np.log(logits.shape[1]))


def batch(seed: int) -> np.ndarray:
    """Images of different contrast, so that predictions differ in certainty."""
    generator = np.random.default_rng(seed)
    contrast = generator.uniform(0.1, 2.0, size=(12, 1, 1, 1)).astype(np.float32)
    return contrast * generator.random((12, 3, 16, 16), dtype=np.float32)


class Ours:
    """A method of ours stepped on numpy batches."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.theta = method.adapter.source_theta()
        self.state = init_state(method.spec, self.theta)
        self.anchor = method.anchor()
        self.rand = torch.zeros(method.spec.rand)

    def step(self, x: np.ndarray) -> np.ndarray:
        out = self.method.step(
            Batch(torch.from_numpy(x), torch.ones(len(x))),
            self.theta,
            self.state,
            self.anchor,
            self.method.spec.default_hyper(),
            self.rand,
        )
        self.theta, self.state = out.theta, out.state
        self.report = dict(zip(self.method.spec.report, out.report.tolist(), strict=True))
        return out.logits.numpy()


def ours(name: str, network: nn.Module, **options: Any) -> Ours:
    # The references take the learning rate as it is, whatever the batch.
    method = make_method(name, NormAdapter(network), {"lr": LR, "lr_batch": 1.0, **options})
    if name == "eata":
        method.calibrate(FISHER)
    return Ours(method)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", METHODS)
def test_eight_steps_from_equal_state(name: str, network: str) -> None:
    options, make = METHODS[name]
    source = sharp(NETWORKS[network])
    margin = halving_margin(source)
    mine, reference = ours(name, source, margin=margin, **options), make(source, margin)
    trained = mine.method.adapter.trained
    start = reference.theta()
    accepted = []
    for seed in range(8):
        x = batch(seed)
        found, expected = mine.step(x), reference.step(x)
        scale = np.abs(expected).max()
        assert np.abs(found - expected).max() <= 1e-4 * scale, f"logits at step {seed + 1}"
        moved, wanted = mine.theta[:trained].numpy() - start, reference.theta() - start
        assert np.abs(moved - wanted).max() <= 1e-2 * max(np.abs(wanted).max(), 1e-5), (
            f"theta, step {seed + 1}"
        )
        accepted.append(mine.report["accepted"])
    assert np.abs(wanted).max() > 0 or name == "rdumb"
    assert 0 < np.mean(accepted) < 1, "the selection must have something to choose from"


@pytest.mark.parametrize("name", METHODS)
def test_the_comparison_objects_to_another_learning_rate(name: str) -> None:
    options, make = METHODS[name]
    source = sharp(resnet)
    margin = halving_margin(source)
    mine = ours(name, source, margin=margin, **{**options, "lr": 1.1 * LR})
    reference = make(source, margin)
    start = reference.theta()
    x = batch(0)
    mine.step(x)
    reference.step(x)
    moved = mine.theta[: mine.method.adapter.trained].numpy() - start
    wanted = reference.theta() - start
    assert np.abs(moved - wanted).max() > 2e-2 * np.abs(wanted).max()


def test_sar_recovers_where_the_reference_does() -> None:
    source = sharp(group_norm)
    mine = ours("sar", source, lr=0.05, margin=1.0, recover_below=0.3)
    reference = EagerSar(source, lr=0.05, margin=1.0, recover_below=0.3)
    recovered = []
    for seed in range(12):
        x = batch(seed)
        mine.step(x)
        before = reference.recoveries
        reference.step(x)
        recovered.append((mine.report["recovered"], float(reference.recoveries - before)))
    assert all(a == b for a, b in recovered)
    assert any(a for a, _ in recovered), "the recovery was never reached"


def test_a_pattern_leaves_tensors_out() -> None:
    adapter = NormAdapter(sharp(resnet))
    names = [entry.name for entry in adapter.tensors if entry.trained]
    left_out = names[-1].rsplit(".", 1)[0] + ".*"
    method = make_method("sar", adapter, {"skip": left_out, "margin": 1.0})
    mine = Ours(method)
    start = mine.theta.clone()
    for seed in range(3):
        mine.step(batch(seed))
    moved = {
        entry.name
        for entry in adapter.tensors
        if entry.trained
        and not torch.equal(
            mine.theta[entry.offset : entry.offset + entry.size],
            start[entry.offset : entry.offset + entry.size],
        )
    }
    assert moved
    assert not any(name.startswith(left_out[:-1]) for name in moved)
    with pytest.raises(ValueError, match="leaves none"):
        make_method("sar", adapter, {"skip": "*"})


# --- methods without a gradient -------------------------------------------------------------------


def outputs(adapter: NormAdapter, x: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        out = adapter.forward(adapter.unpack(adapter.source_theta()), torch.from_numpy(x))
    return out.logits, out.features


@pytest.mark.parametrize("network", NETWORKS)
def test_lame_settles_where_the_published_iteration_stops(network: str) -> None:
    adapter = NormAdapter(sharp(NETWORKS[network]))
    mine = Ours(make_method("lame", adapter))
    changed = 0.0
    for seed in range(4):
        logits, features = outputs(adapter, batch(seed))
        expected = lame(logits.numpy(), features.numpy())
        found = torch.from_numpy(mine.step(batch(seed))).softmax(1).numpy()
        np.testing.assert_allclose(found, expected, atol=2e-3)
        changed = max(changed, float(np.abs(found - logits.softmax(1).numpy()).max()))
    assert torch.equal(mine.theta, adapter.source_theta())
    assert changed > 0.1, "no prediction was adjusted: the comparison shows nothing"


def test_a_refused_sample_has_no_say_in_lame() -> None:
    adapter = NormAdapter(sharp(resnet))
    method = make_method("lame", adapter)
    theta, hyper = adapter.source_theta(), method.spec.default_hyper()
    x = torch.from_numpy(batch(1))
    weight = torch.ones(12)
    weight[0] = 0
    whole = method.step(Batch(x, weight), theta, {}, {}, hyper, torch.zeros(0)).logits
    x[0] = x[1]  # what the refused sample shows does not matter to the others, but for the width
    other = method.step(Batch(x, weight), theta, {}, {}, hyper, torch.zeros(0)).logits
    assert (whole[1:].argmax(1) == other[1:].argmax(1)).all()


@pytest.mark.parametrize("supports", [1, 3, 20])
@pytest.mark.parametrize("network", NETWORKS)
def test_t3a_keeps_the_supports_that_a_growing_list_keeps(network: str, supports: int) -> None:
    adapter = NormAdapter(sharp(NETWORKS[network]))
    head = adapter.head_weight()
    assert head is not None
    mine = Ours(make_method("t3a", adapter, {"supports": float(supports)}))
    reference = EagerT3a(head[0].detach(), head[1].detach(), supports)
    for seed in range(6):
        logits, features = outputs(adapter, batch(seed))
        expected = reference.step(features, logits).numpy()
        found = mine.step(batch(seed))
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert float(mine.state["known"]) == 1.0


def test_zoa_takes_the_slope_along_one_direction() -> None:
    """By hand: two losses, their difference over c, divided by the direction."""
    adapter = NormAdapter(sharp(group_norm))
    method = make_method("zoa", adapter, {"lr": 0.01, "discrepancy": 0.0})
    assert isinstance(method, Calibrated)
    method.calibrate(FISHER)
    theta, x = adapter.source_theta(), torch.from_numpy(batch(3))
    rand = torch.rand(method.spec.rand, generator=torch.Generator().manual_seed(1))
    state = init_state(method.spec, theta)
    out = method.step(
        Batch(x, torch.ones(12)), theta, state, method.anchor(), method.spec.default_hyper(), rand
    )

    def loss(vector: torch.Tensor) -> float:
        with torch.no_grad():
            return float(
                entropy(adapter.forward(adapter.unpack(vector), x, statistics="batch").logits).mean()
            )

    direction = torch.where(rand < 0.5, -(0.5 + rand), rand)
    assert float(direction.abs().min()) >= 0.5
    assert float(direction.abs().max()) <= 1.0
    aside = theta.clone()
    aside[: adapter.trained] += 0.02 * direction
    expected = -0.01 * (loss(aside) - loss(theta)) / 0.02 / direction
    moved = out.theta[: adapter.trained] - theta[: adapter.trained]
    torch.testing.assert_close(moved, expected, rtol=2e-2, atol=1e-7)


def test_zoa_goes_down_on_average() -> None:
    adapter = NormAdapter(sharp(resnet))
    method = make_method("zoa", adapter, {"lr": 2e-4, "discrepancy": 0.0})
    assert isinstance(method, Calibrated)
    method.calibrate(FISHER)
    mine = Ours(method)
    losses = []
    for seed in range(300):
        mine.rand = torch.rand(method.spec.rand, generator=torch.Generator().manual_seed(seed))
        mine.step(batch(0))
        losses.append(mine.report["loss"])
    assert np.mean(losses[-20:]) < np.mean(losses[:20])


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_over_a_whole_corruption_the_predictions_agree(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    """5,000 images of gaussian noise at severity 5, batch 64, resnet8_bn: fewer than 0.1 % differ."""
    from tta_edge.streams.shifts import corrupt

    options, make = METHODS[name]
    source = load_network(
        f"{require_shared_data('weights', 'models.py')}:resnet8_bn",
        require_shared_data("weights", "cifar10_resnet8_bn.safetensors"),
    )
    data = np.load(require_shared_data("dev", "cifar10_train40000_44999.npz"))
    images = corrupt(data["x"][:5000], "gaussian_noise", 5, 0)
    mine, reference = ours(name, source, **options), make(source, 0.4)
    differ = total = 0
    for begin in range(0, len(images), 64):
        x = np.ascontiguousarray(images[begin : begin + 64].transpose(0, 3, 1, 2), dtype=np.float32) / 255
        differ += int((mine.step(x).argmax(1) != reference.step(x).argmax(1)).sum())
        total += len(x)
    assert total == 5000
    record_property("predictions that differ", differ)
    assert differ / total < 1e-3, f"{differ} of {total} predictions differ"
