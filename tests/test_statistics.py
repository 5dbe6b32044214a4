"""BatchNorm statistics of a learner beside modules in eager torch that have them from the papers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from exported import options
from networks import group_norm, resnet
from tta_adapters import NormAdapter, make_method
from tta_adapters.base import Batch, gradient, init_state
from tta_adapters.learner import Learner
from tta_adapters.losses import entropy
from tta_exporters.build import build
from tta_exporters.check import example_batch
from tta_exporters.parity import parity, reference
from tta_runtime import Model

RATE = 0.05


class EagerStatistics(nn.BatchNorm2d):
    """A BatchNorm whose forward pass a test writes with torch's own operators and automatic derivatives."""

    following = True

    def forward(self, x: Tensor) -> Tensor:
        axes = [0, 2, 3]
        mean, var = x.mean(axes), x.var(axes, unbiased=False)
        assert self.running_mean is not None
        assert self.running_var is not None
        used_mean, used_var = self.used(mean, var)
        y = self.normalised(x, mean, var, used_mean, used_var)
        with torch.no_grad():
            self.running_mean += RATE * (mean - self.running_mean)
            self.running_var += RATE * (var - self.running_var)
        return y * self.weight[None, :, None, None] + self.bias[None, :, None, None]

    def used(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def normalised(self, x: Tensor, mean: Tensor, var: Tensor, used_mean: Tensor, used_var: Tensor) -> Tensor:
        std = torch.sqrt(used_var + self.eps)
        return (x - used_mean[None, :, None, None]) / std[None, :, None, None]


class RobustBatchNorm(EagerStatistics):
    """RoTTA: normalise by what the running statistics will be, the batch's part with its gradient."""

    def used(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        return (
            (1 - RATE) * self.running_mean.clone() + RATE * mean,
            (1 - RATE) * self.running_var.clone() + RATE * var,
        )


class Renormalisation(EagerStatistics):
    """CEMA and DELTA: (x - batch mean) / batch std * r + d with constants r and d."""

    def used(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        return self.running_mean.clone(), self.running_var.clone()

    def normalised(self, x: Tensor, mean: Tensor, var: Tensor, used_mean: Tensor, used_var: Tensor) -> Tensor:
        std, used_std = torch.sqrt(var + self.eps), torch.sqrt(used_var + self.eps)
        r, d = (std / used_std).detach(), ((mean - used_mean) / used_std).detach()
        y = (x - mean[None, :, None, None]) / std[None, :, None, None]
        return y * r[None, :, None, None] + d[None, :, None, None]


MODES = {"ema": RobustBatchNorm, "renorm": Renormalisation}


def warm() -> nn.Module:
    """A network whose running statistics are those of a source, not the initial ones."""
    network = resnet()
    generator = torch.Generator().manual_seed(5)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = 0.3 * torch.randn(module.num_features, generator=generator)
            module.running_var = 0.5 + torch.rand(module.num_features, generator=generator)
            module.weight.data = 0.5 + torch.rand(module.num_features, generator=generator)
    return network


def with_norms(network: nn.Module, kind: type[EagerStatistics]) -> nn.Module:
    """The network with every BatchNorm2d replaced."""
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                new = kind(child.num_features, eps=child.eps).to(child.weight.dtype)
                new.load_state_dict(child.state_dict())
                setattr(parent, name, new)
    return network


def images(seed: int, count: int = 6) -> Tensor:
    return torch.rand([count, 3, 16, 16], generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", MODES)
def test_values_gradients_and_statistics_are_those_of_the_reference(mode: str) -> None:
    network = warm().double()
    adapter = NormAdapter(network)
    learner = Learner("test", adapter, optimizer="sgd", nesterov=False, statistics=mode)
    theirs = with_norms(network, MODES[mode]).eval()
    setting = {"ema": torch.tensor(RATE, dtype=torch.float64)}
    x = images(1).double()
    tensors, out = learner.forward(adapter.source_theta().double(), x, setting)
    found = gradient(entropy(out.logits).mean(), adapter, tensors)
    logits = theirs(x)
    torch.testing.assert_close(out.logits, logits, rtol=1e-9, atol=1e-9)
    entropy(logits).mean().backward()
    named = dict(theirs.named_parameters())
    wanted = torch.cat([named[e.name].grad.reshape(-1) for e in adapter.tensors if e.trained])
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10)
    assert float(wanted.abs().max()) > 1e-3
    observed = adapter.batch_statistics(out.statistics)
    followed = (1 - RATE) * adapter.source_theta()[adapter.trained :].double() + RATE * observed
    buffers = dict(theirs.named_buffers())
    wanted = torch.cat([buffers[e.name].reshape(-1) for e in adapter.tensors if not e.trained])
    torch.testing.assert_close(followed, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_without_a_gradient_the_values_are_the_same(mode: str) -> None:
    adapter = NormAdapter(warm())
    learner = Learner("test", adapter, optimizer="sgd", nesterov=False, statistics=mode)
    setting = {"ema": torch.tensor(RATE)}
    _, learning = learner.forward(adapter.source_theta(), images(1), setting)
    with torch.no_grad():
        _, looking = learner.forward(adapter.source_theta(), images(1), setting)
    torch.testing.assert_close(looking.logits, learning.logits, rtol=1e-4, atol=1e-5)


def test_renorm_answers_as_the_serving_graph_does() -> None:
    adapter = NormAdapter(warm())
    tensors = adapter.unpack(adapter.source_theta())
    serving = adapter.forward(tensors, images(2)).logits
    torch.testing.assert_close(
        adapter.forward(tensors, images(2), statistics="renorm").logits, serving, rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(adapter.forward(tensors, images(2), statistics="batch").logits, serving)


def test_a_step_under_ema_answers_as_the_theta_that_it_leaves_would() -> None:
    """With a learning rate of 0 only statistics move: what the step saw is what serves from then on."""
    adapter = NormAdapter(warm())
    method = make_method("tent", adapter, {"statistics": "ema", "lr": 0.0})
    theta = adapter.source_theta()
    x = images(3)
    out = method.step(
        Batch(x, torch.ones(6)),
        theta,
        init_state(method.spec, theta),
        {},
        method.spec.default_hyper(),
        torch.zeros(0),
    )
    after = adapter.forward(adapter.unpack(out.theta), x).logits
    torch.testing.assert_close(out.logits, after, rtol=1e-4, atol=1e-5)
    assert not torch.equal(out.theta, theta)


@pytest.mark.parametrize("mode", MODES)
def test_one_image_is_a_batch(mode: str) -> None:
    adapter = NormAdapter(warm())
    method = make_method("tent", adapter, {"statistics": mode})
    assert method.spec.min_batch == 1
    assert make_method("tent", adapter).spec.min_batch == 2
    theta = adapter.source_theta()
    state = init_state(method.spec, theta)
    out = method.step(
        Batch(images(4, 1), torch.ones(1)),
        theta,
        state,
        {},
        method.spec.default_hyper(),
        torch.zeros(0),
    )
    assert torch.isfinite(out.theta).all()


@pytest.mark.parametrize("mode", ["batch", "running", *MODES])
def test_a_network_without_running_statistics_does_not_care(mode: str) -> None:
    def step(statistics: str) -> Tensor:
        adapter = NormAdapter(group_norm())
        method = make_method("tent", adapter, {"statistics": statistics})
        assert "ema" not in {entry.name for entry in method.spec.hyper}
        theta = adapter.source_theta()
        return method.step(
            Batch(images(5), torch.ones(6)),
            theta,
            init_state(method.spec, theta),
            {},
            method.spec.default_hyper(),
            torch.zeros(0),
        ).theta

    assert torch.equal(step(mode), step("running"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spoil", ["variance", "share"])
def test_the_comparison_objects_to_other_statistics(mode: str, spoil: str) -> None:
    """The companion: a rate that is off, or an unbiased variance, is found by the same comparison of values."""
    network = warm().double()
    adapter = NormAdapter(network)
    learner = Learner("test", adapter, optimizer="sgd", nesterov=False, statistics=mode)
    theirs = with_norms(network, MODES[mode]).eval()
    x = images(1).double()
    rate = RATE * (1.1 if spoil == "share" else 1.0)
    _, out = learner.forward(
        adapter.source_theta().double(), x, {"ema": torch.tensor(rate, dtype=torch.float64)}
    )
    observed = adapter.batch_statistics(out.statistics)
    if spoil == "variance":
        half = len(observed) // 2
        observed = torch.cat([observed[:half], observed[half:] * 6 / 5])
    followed = (1 - rate) * adapter.source_theta()[adapter.trained :].double() + rate * observed
    theirs(x)
    buffers = dict(theirs.named_buffers())
    wanted = torch.cat([buffers[e.name].reshape(-1) for e in adapter.tensors if not e.trained])
    assert not torch.allclose(followed, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("statistics", MODES)
def test_twenty_compiled_steps(statistics: str, tmp_path: Path) -> None:
    wanted = options("resnet", ("tent",), tent={"statistics": statistics})
    build(resnet(), wanted, tmp_path / "bundle")
    model = Model.open(tmp_path / "bundle")
    batches = [example_batch(model.manifest.input, 8, seed) for seed in range(20)]
    parity(model, reference(resnet(), wanted, "tent"), batches).require()
    assert model.distance > 0
    model.adapt(batches[0][:1])
