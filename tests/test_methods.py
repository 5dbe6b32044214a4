"""Every method through the public contract, and the contract against methods that break it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from networks import group_norm, resnet
from tta_adapters import METHODS, NormAdapter, check_method, make_adapter, make_method
from tta_adapters.base import Batch, Calibrated, State, Step, init_state
from tta_adapters.losses import entropy, weighted_mean
from tta_adapters.methods import ADAPTER_OF, UnknownMethodError, options_of
from tta_adapters.methods.norm import Norm
from tta_adapters.methods.tent import Tent
from tta_adapters.optim import Adam, Sgd
from tta_adapters.options import UnknownOptionError
from tta_adapters.select import SelectionError
from tta_adapters.testing import MethodContractError

COST_BATCH = 6

VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    **{name: (name, {}) for name in METHODS},
    # The contract's batches are those that it was calibrated on: with caution there would be nothing to undo.
    "auto": ("auto", {"caution": "0"}),
    "tent adam": ("tent", {"optimizer": "adam"}),
    "tent plain momentum": ("tent", {"nesterov": "false"}),
    "tent running": ("tent", {"statistics": "running"}),
    "tent ema": ("tent", {"statistics": "ema"}),
    "eta renorm": ("eta", {"statistics": "renorm"}),
    "norm alpha": ("norm", {"blend": "0.1", "ema": "0.05"}),
    "eta adam": ("eta", {"optimizer": "adam"}),
    "sar running": ("sar", {"statistics": "running", "margin": "1"}),
    "cotta": ("cotta", {"views": "2"}),
    "cotta without views": ("cotta", {"views": "0", "loss": "sce"}),
    "rotta of six": ("rotta", {"memory": "6"}),
    "t3a of one support": ("t3a", {"supports": "1"}),
    "vida": ("vida", {"views": "2", "optimizer": "sgd"}),
    "vida without views": ("vida", {"views": "0", "loss": "ce", "optimizer": "adam"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_method_keeps_the_contract(variant: str) -> None:
    name, options = VARIANTS[variant]
    check_method(lambda adapter: make_method(name, adapter, options), adapter=ADAPTER_OF.get(name, "norm"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_method_costs_what_its_spec_and_its_docstring_say(variant: str) -> None:
    name, options = VARIANTS[variant]
    adapter = make_adapter(ADAPTER_OF.get(name, "norm"), resnet(), input_shape=(3, 16, 16))
    method = make_method(name, adapter, options)
    # What a memory costs is said of batches as large as it is.
    size = next((entry.shape[0] for entry in method.spec.state if entry.name == "memory_filled"), COST_BATCH)
    x = torch.rand(size, 3, 16, 16)
    if isinstance(method, Calibrated):
        method.calibrate([x])
    theta, seen = adapter.source_theta(), 0

    def count(_: object, inputs: tuple[Tensor, ...]) -> None:
        nonlocal seen
        seen += len(inputs[0])

    spec = method.spec
    batch, state = Batch(x, torch.ones(len(x))), init_state(spec, theta)
    anchor, rand = method.anchor(), torch.rand(spec.rand)
    handle = adapter.module.register_forward_pre_hook(count)
    if spec.target:
        batch = batch._replace(target=torch.randn(len(x), 7))
    method.step(batch, theta, state, anchor, spec.default_hyper(), rand)
    handle.remove()
    if spec.steps:
        assert seen == spec.forwards * len(x)
    if not options:
        text = " ".join((METHODS[name].__doc__ or "").split())
        text = text.replace("3 + ``views``", "35").replace("2 + ``views``", "12")
        assert f"Forwards / backwards per sample: {spec.forwards:g} / {spec.backwards:g}." in text


class Broken(Tent):
    """A Tent whose result a test spoils."""

    def step(
        self,
        batch: Batch,
        theta: Tensor,
        state: State,
        anchor: Mapping[str, Tensor],
        hyper: Tensor,
        rand: Tensor,
    ) -> Step:
        return self.spoil(super().step(batch, theta, state, anchor, hyper, rand), batch, theta)

    def spoil(self, out: Step, batch: Batch, theta: Tensor) -> Step:
        raise AssertionError("overridden")


class Impure(Broken):
    def spoil(self, out: Step, batch: Batch, theta: Tensor) -> Step:
        return out._replace(theta=out.theta + 1e-6 * torch.rand(()))


class InPlace(Broken):
    def spoil(self, out: Step, batch: Batch, theta: Tensor) -> Step:
        theta += 0.1
        return out


class IgnoresWeights(Broken):
    def spoil(self, out: Step, batch: Batch, theta: Tensor) -> Step:
        return out._replace(theta=out.theta + 1e-3)


class ForgetsState(Broken):
    def spoil(self, out: Step, batch: Batch, theta: Tensor) -> Step:
        return out._replace(state={})


class AfterTheStep(Broken):
    def spoil(self, out: Step, batch: Batch, theta: Tensor) -> Step:
        with torch.no_grad():
            tensors = self.adapter.unpack(out.theta)
            return out._replace(logits=self.adapter.forward(tensors, batch.x, statistics="batch").logits)


class NotFinite(Broken):
    def spoil(self, out: Step, batch: Batch, theta: Tensor) -> Step:
        return out._replace(report=out.report / 0)


@pytest.mark.parametrize(
    ("method", "complaint"),
    [
        (Impure, "two equal calls differ"),
        (InPlace, "two equal calls differ|changed in place"),
        (IgnoresWeights, "refused samples"),
        (ForgetsState, "state"),
        (AfterTheStep, "learning rate"),
        (NotFinite, "not finite"),
    ],
)
def test_the_contract_names_what_a_broken_method_does(method: type[Broken], complaint: str) -> None:
    with pytest.raises(MethodContractError, match=complaint):
        check_method(method)


def test_norm_with_full_blend_is_bn_1() -> None:
    network = resnet()
    adapter = NormAdapter(network)
    method = Norm(adapter)
    x = torch.rand(6, 3, 16, 16)
    out = method.step(Batch(x, torch.ones(6)), adapter.source_theta(), {}, {}, method.spec.default_hyper(), x)
    with torch.no_grad():
        torch.testing.assert_close(out.logits, network.train()(x), rtol=1e-5, atol=1e-6)


def test_norm_statistics_reach_the_batchs_own_with_ema_1() -> None:
    adapter = NormAdapter(resnet())
    method = Norm(adapter, ema=1.0)
    x = torch.rand(6, 3, 16, 16)
    theta = adapter.source_theta()
    out = method.step(Batch(x, torch.ones(6)), theta, {}, {}, method.spec.default_hyper(), x)
    recorded = adapter.forward(adapter.unpack(theta), x, statistics="batch").statistics
    torch.testing.assert_close(out.theta[adapter.trained :], adapter.batch_statistics(recorded))
    assert torch.equal(out.theta[: adapter.trained], theta[: adapter.trained])


def test_a_stream_of_one_domain_brings_serving_and_stepping_together() -> None:
    """The running statistics in theta approach what the step normalises by: the two no longer disagree."""
    adapter = NormAdapter(resnet())
    method = Tent(adapter, lr=0.0, ema=0.3)
    theta, state = adapter.source_theta(), init_state(method.spec, adapter.source_theta())
    x = 0.3 * torch.rand(64, 3, 16, 16)
    gaps = []
    for _ in range(20):
        out = method.step(
            Batch(x, torch.ones(64)), theta, state, {}, method.spec.default_hyper(), torch.zeros(0)
        )
        theta, state = out.theta, out.state
        gaps.append(float(out.report[method.spec.report.index("statistics_gap")]))
    assert gaps[-1] < 0.01 * gaps[0]


def test_norm_refuses_a_network_without_running_statistics() -> None:
    with pytest.raises(SelectionError, match="BatchNorm"):
        Norm(NormAdapter(group_norm()))


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_equals_torch(nesterov: bool) -> None:
    optimiser = Sgd(nesterov=nesterov)
    reference = torch.zeros(5, requires_grad=True)
    theirs = torch.optim.SGD([reference], lr=0.1, momentum=0.9, nesterov=nesterov)
    ours, state = torch.zeros(5), {"momentum": torch.zeros(5)}
    hyper = {entry.name: torch.tensor(entry.default) for entry in optimiser.hyper(0.1)}
    for seed in range(6):
        grad = torch.randn(5, generator=torch.Generator().manual_seed(seed))
        reference.grad = grad
        theirs.step()
        delta, state = optimiser.update(grad, state, hyper)
        ours = ours + delta
        torch.testing.assert_close(ours, reference.detach())


def test_adam_equals_torch() -> None:
    optimiser = Adam()
    reference = torch.zeros(5, requires_grad=True)
    theirs = torch.optim.Adam([reference], lr=0.1)
    ours = torch.zeros(5)
    state = {
        entry.name: torch.ones(entry.shape) if entry.init == "ones" else torch.zeros(entry.shape)
        for entry in optimiser.init(5)
    }
    hyper = {entry.name: torch.tensor(entry.default) for entry in optimiser.hyper(0.1)}
    for seed in range(6):
        grad = torch.randn(5, generator=torch.Generator().manual_seed(seed))
        reference.grad = grad
        theirs.step()
        delta, state = optimiser.update(grad, state, hyper)
        ours = ours + delta
        torch.testing.assert_close(ours, reference.detach(), rtol=1e-5, atol=1e-6)


def test_entropy_and_weighted_mean() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [100.0, 0.0, 0.0]])
    torch.testing.assert_close(entropy(logits), torch.tensor([torch.log(torch.tensor(3.0)), 0.0]))
    values = torch.tensor([1.0, 3.0])
    assert float(weighted_mean(values, torch.tensor([1.0, 0.0]))) == 1.0
    assert float(weighted_mean(values, torch.zeros(2))) == 0.0


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownMethodError, match="did you mean 'tent'"):
        make_method("tnet", NormAdapter(resnet()))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"lrr": "0.1"}, "did you mean 'lr'"),
        ({"lr": "fast"}, "not a number"),
        ({"nesterov": "maybe"}, "not true or false"),
        ({"optimizer": "rmsprop"}, "choose sgd or adam"),
        ({"statistics": "none"}, "choose batch, running, ema, renorm"),
    ],
)
def test_a_bad_option_is_refused_with_its_value(options: dict[str, str], complaint: str) -> None:
    with pytest.raises(UnknownOptionError, match=complaint):
        make_method("tent", NormAdapter(resnet()), options)


def test_options_are_listed_with_defaults() -> None:
    assert options_of("norm") == {"blend": 1.0, "ema": 0.1}
