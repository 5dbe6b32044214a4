"""Auto: its aligned pass beside a reference with hooks, when nothing moves, what it refuses, and its compiled step."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from networks import group_norm, resnet, rms, vit
from tta_adapters import NormAdapter, check_method, make_method
from tta_adapters.base import Batch, Step
from tta_adapters.methods.auto import ANCHORS, Auto
from tta_adapters.network import NetworkAdapter
from tta_adapters.options import UnknownOptionError
from tta_adapters.select import SelectionError
from tta_adapters.testing import small_networks
from tta_exporters.build import BuildOptions, Built, InputOptions, build
from tta_exporters.check import check_bundle, example_batch, example_target
from tta_exporters.errors import OptionError, ParityError
from tta_exporters.parity import parity, reference
from tta_runtime import Model
from tta_runtime.errors import InputError

FLOOR, LIMIT, OUTLIER = 1e-5, 6.0, 25.0
SIZE = 8
NORMS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(seed: int, n: int) -> Tensor:
    """[n, 3, 8, 8] float64, some of them brighter, some of more contrast, each channel by itself."""
    generator = noise(seed)
    x = torch.rand([n, 3, SIZE, SIZE], generator=generator, dtype=torch.float64)
    scale = 0.5 + torch.rand([n, 3, 1, 1], generator=generator, dtype=torch.float64)
    return scale * x + 0.3 * torch.rand([n, 3, 1, 1], generator=generator, dtype=torch.float64)


def shifted(x: Tensor) -> Tensor:
    """Another contrast and brightness in each channel."""
    scale = torch.tensor([0.4, 0.6, 1.2], dtype=x.dtype).reshape(3, 1, 1)
    return scale * x + torch.tensor([0.5, -0.3, 0.1], dtype=x.dtype).reshape(3, 1, 1)


def spread(make: Callable[[], nn.Module]) -> nn.Module:
    """Its predictions are of all classes, and some of them certain."""
    network = make().eval()
    head = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        logits = network(images(1, 48).float())
        factor = 2 / logits.std(0)
        head.weight *= factor[:, None]
        head.bias.copy_((head.bias - logits.mean(0)) * factor)
    return network


def small(name: str) -> Callable[[], nn.Module]:
    return lambda: small_networks()[name]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: spread(resnet),
    "layer": lambda: spread(vit),
    "group": lambda: spread(group_norm),
    "small batch": lambda: spread(small("batch")),
    "small layer": lambda: spread(small("layer")),  # moments of each element
}


def settled(network: nn.Module, x: Tensor) -> nn.Module:
    """The running statistics of its BatchNorms are those of these images."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches: of this one
    network.train()
    network(x.float())
    return spread(lambda: network)


# --- the contract ---------------------------------------------------------------------------------


def test_it_keeps_the_contract_on_batch_group_and_layer_norm() -> None:
    accepted: list[set[str]] = []

    def make(adapter: NetworkAdapter) -> Auto:
        # The contract's images are all of one kind: with doubts, nothing has to move.
        method = Auto(adapter, caution=0.0)
        accepted.append({type(module).__name__ for module in adapter.module.modules()})
        return method

    check_method(make)
    assert sorted(name for kinds in accepted for name in kinds if "Norm" in name) == [
        "BatchNorm2d",
        "GroupNorm",
        "LayerNorm",
    ]


# --- the reference --------------------------------------------------------------------------------


class EagerAuto:
    """The formulas with forward hooks, samples and channels in loops where that is bearable; float64.

    Args:
        network: left as it is.
        source: [n, ...], what the moments are taken from.
        caution: see the method.
        even: see the method.
        wrong: a mistake to make, for the companion test.
    """

    def __init__(
        self,
        network: nn.Module,
        source: Tensor,
        *,
        caution: float = 1.0,
        even: float = 0.025,
        wrong: str = "",
    ) -> None:
        self.network = copy.deepcopy(network).double().eval()
        self.norms = {n: m for n, m in self.network.named_modules() if isinstance(m, NORMS)}
        self.caution, self.even = caution, even
        self.wrong = wrong
        self.sign = {key: -1.0 if key == wrong else 1.0 for key in WRONG}
        self.own: dict[str, list[Tensor]] = {name: [] for name in self.norms}
        self.square: dict[str, list[Tensor]] = {name: [] for name in self.norms}

        def note(name: str, values: Tensor) -> None:
            self.own[name] = [sample.mean(1) for sample in values]
            self.square[name] = [(sample**2).mean(1) for sample in values]

        with torch.no_grad():
            p = self._run(source, lambda name, module, values: note(name, values)).softmax(1)
        self.prior = p.mean(0)
        self.mean, self.var, self.mean_spread, self.var_spread = {}, {}, {}, {}
        self.class_mean, self.class_square = {}, {}
        for name, module in self.norms.items():
            own, square = torch.stack(self.own[name]), torch.stack(self.square[name])
            if isinstance(module, nn.BatchNorm2d):
                mean, var = module.running_mean, module.running_var
            else:
                mean = own.mean(0)
                var = square.mean(0) - mean**2
            assert mean is not None
            assert var is not None
            about = square - 2 * mean * own + mean**2
            self.mean[name], self.var[name] = mean, var
            self.mean_spread[name] = ((own - own.mean(0)) ** 2).mean(0) + FLOOR
            self.var_spread[name] = ((about - about.mean(0)) ** 2).mean(0) / (var + FLOOR) ** 2 + FLOOR
            columns = [p[:, c] / (p[:, c].sum() + 1e-6) for c in range(p.shape[1])]
            self.class_mean[name] = torch.stack(
                [sum((w[i] * own[i] for i in range(len(w))), torch.zeros(())) for w in columns]
            )
            self.class_square[name] = torch.stack(
                [sum((w[i] * square[i] for i in range(len(w))), torch.zeros(())) for w in columns]
            )

        self.apart: dict[str, float] = {}
        for name in self.norms:
            m0, v0 = self.mean[name], self.var[name]
            alone = [self._mixed(name, one) for one in torch.eye(p.shape[1], dtype=p.dtype)]
            self.apart[name] = max(
                self._distance(name, mean - m0, torch.log((var + FLOOR) / (v0 + FLOOR)).clamp(-LIMIT, LIMIT))
                for mean, var in alone
            )

    def _run(self, x: Tensor, answer: Callable[[str, nn.Module, Tensor], Any]) -> Tensor:
        """Logits; `answer` sees the values [n, E, positions] that a layer normalises, and may give (scale, offset)."""
        handles = []
        for name, module in self.norms.items():

            def hook(
                module: nn.Module, inputs: tuple[Tensor], output: Tensor, name: str = name
            ) -> Tensor | None:
                y = inputs[0]
                if isinstance(module, nn.LayerNorm):
                    y = nn.functional.layer_norm(y, module.normalized_shape, eps=module.eps)
                    elements = math.prod(module.normalized_shape)
                    flat = torch.stack([sample.reshape(-1, elements).T for sample in y])
                else:
                    if isinstance(module, nn.GroupNorm):
                        y = nn.functional.group_norm(y, module.num_groups, eps=module.eps)
                    flat = y.flatten(2)
                found = answer(name, module, flat)
                if found is None:
                    return None
                shape = module.normalized_shape if isinstance(module, nn.LayerNorm) else (-1, 1, 1)
                result: Tensor = y * found[0].reshape(shape) + found[1].reshape(shape)
                return result

            handles.append(module.register_forward_hook(hook))
        try:
            logits: Tensor = self.network(x)
            return logits
        finally:
            for handle in handles:
                handle.remove()

    def _mixed(self, name: str, pi: Tensor) -> tuple[Tensor, Tensor]:
        mean = (pi[:, None] * self.class_mean[name]).sum(0)
        return mean, ((pi[:, None] * self.class_square[name]).sum(0) - mean**2).clamp(min=0)

    def _distance(self, name: str, offset: Tensor, change: Tensor) -> float:
        total = 0.0
        for o, c, mean_spread, var_spread in zip(
            offset.tolist(),
            change.tolist(),
            self.mean_spread[name].tolist(),
            self.var_spread[name].tolist(),
            strict=True,
        ):
            total += (min(o * o / mean_spread, OUTLIER) + min(c * c / var_spread, OUTLIER)) / 2
        return total / len(offset)

    def step(
        self, x: Tensor, target: Tensor, weight: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor], float, float]:
        """Logits, what theta becomes by name, mean squared distance and mean share."""
        counted = [i for i in range(len(x)) if weight is None or weight[i] > 0]
        n = len(counted)
        pi = target.softmax(1)[counted].mean(0)
        kl = float(sum(a * math.log(a / b) for a, b in zip(pi.tolist(), self.prior.tolist(), strict=True)))
        uneven = kl / math.log(len(pi))
        if uneven <= self.even:
            pi, uneven = self.prior, 0.0
        self.uneven = uneven
        self.trusts: list[float] = []
        theta: dict[str, Tensor] = {}
        distances: list[float] = []
        shares: list[float] = []

        def align(name: str, module: nn.Module, flat: Tensor) -> tuple[Tensor, Tensor]:
            seen = torch.cat([flat[i] for i in counted], 1)  # [E, positions of all]
            m, v = seen.mean(1), seen.var(1, correction=0)
            (mean_here, var_here), (mean_usual, var_usual) = (
                self._mixed(name, pi),
                self._mixed(name, self.prior),
            )
            explained = torch.log((var_usual + FLOOR) / (var_here + FLOOR)).clamp(-LIMIT, LIMIT)
            m0, v0 = self.mean[name], self.var[name]
            change = torch.log((v + FLOOR) / (v0 + FLOOR))
            plain = self._distance(name, m - m0, change.clamp(-LIMIT, LIMIT))
            trust = min(1.0, self.apart[name] / plain)
            if self.wrong == "trust":
                trust = 1.0
            self.trusts.append(trust)
            m = m + self.sign["class mean"] * trust * (mean_usual - mean_here)
            change = (change + self.sign["class variance"] * trust * explained).clamp(-LIMIT, LIMIT)
            distance = self._distance(name, m - m0, change)
            chance = 1 / n + self.caution * uneven * self.apart[name]
            share = max(0.0, 1 - self.sign["chance"] * chance / distance)
            distances.append(distance)
            shares.append(share)
            m = m0 + self.sign["mean"] * share * (m - m0)
            ratio = torch.exp(self.sign["variance"] * share * change)
            weight, bias = module.weight.reshape(-1), module.bias.reshape(-1)  # type: ignore[operator]
            if isinstance(module, nn.BatchNorm2d):
                v = ((v0 + FLOOR) * ratio - FLOOR).clamp(min=0)
                theta[f"{name}.running_mean"], theta[f"{name}.running_var"] = m, v
                scale = weight / (v + module.eps).sqrt()
                return scale, bias - m * scale
            # What stood m from 0 and had `ratio` times the variance shall stand m0 from it, with the source's.
            scale = weight / ratio.sqrt()
            theta[f"{name}.weight"], theta[f"{name}.bias"] = scale, bias + weight * m0 - scale * m
            return theta[f"{name}.weight"], theta[f"{name}.bias"]

        with torch.no_grad():
            logits = self._run(x, align)
        return logits, theta, sum(distances) / len(distances), sum(shares) / len(shares)

    def anchor(self) -> dict[str, Tensor]:
        """As the method has it: BatchNorms in theta's order."""
        return {
            **{
                f"auto.{key}": torch.cat([getattr(self, key)[name] for name in self.norms], -1)
                for key in ANCHORS
                if key not in ("prior", "apart")
            },
            "auto.prior": self.prior,
            "auto.apart": torch.tensor([self.apart[name] for name in self.norms]),
        }


WRONG = ("class mean", "class variance", "chance", "mean", "variance", "trust")


class Ours:
    """The method on a network in float64, calibrated."""

    def __init__(self, network: nn.Module, source: Tensor, **settings: Any) -> None:
        self.adapter = NormAdapter(copy.deepcopy(network).double())
        self.method = Auto(self.adapter, **settings)
        self.method.calibrate([source[:20], source[20:]])
        self.theta = self.adapter.source_theta().double()
        self.anchor = {key: value.double() for key, value in self.method.anchor().items()}

    def step(self, x: Tensor, target: Tensor, weight: Tensor | None = None, **hyper: float) -> Step:
        values = [hyper.get(entry.name, entry.default) for entry in self.method.spec.hyper]
        weight = torch.ones(len(x)) if weight is None else weight
        return self.method.step(
            Batch(x, weight.double(), target.double()),
            self.theta,
            {},
            self.anchor,
            torch.tensor(values, dtype=torch.float64),
            torch.zeros(0),
        )

    def logits(self, x: Tensor, theta: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            tensors = self.adapter.unpack(self.theta if theta is None else theta)
            return self.adapter.forward(tensors, x).logits

    def named(self, out: Step) -> dict[str, Tensor]:
        return {key: value.detach().reshape(-1) for key, value in self.adapter.unpack(out.theta).items()}

    def report(self, out: Step) -> dict[str, float]:
        return dict(zip(self.method.spec.report, out.report.tolist(), strict=True))


def far(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Largest difference of a tensor over the largest value in it."""
    return max(float((found[k] - w).abs().max() / w.abs().max().clamp(min=1e-3)) for k, w in wanted.items())


def uneven_target(n: int, classes: int) -> Tensor:
    """Logits that see one class in a third of the samples more than they would."""
    target = 3 * torch.randn([n, classes], generator=noise(9), dtype=torch.float64)
    target[: n // 3, 1] += 6
    return target


@pytest.mark.parametrize("name", NETWORKS)
def test_the_sources_moments_are_those_of_the_reference(name: str) -> None:
    network, source = NETWORKS[name](), images(1, 48)
    mine, wanted = Ours(network, source), EagerAuto(network, source).anchor()
    assert set(mine.anchor) == {"theta0", *wanted}
    torch.testing.assert_close(mine.anchor["theta0"], mine.theta)
    assert far(mine.anchor, wanted) < 1e-5  # anchors are float32


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("look", ["uneven", "even", "some refused", "little shift"])
def test_an_aligned_pass_is_that_of_the_reference(name: str, look: str) -> None:
    network, source = NETWORKS[name](), images(1, 48)
    mine, reference = Ours(network, source), EagerAuto(network, source)
    x = images(2, 24) if look == "little shift" else shifted(images(2, 24))
    target = mine.logits(source)[:24] if look == "even" else uneven_target(24, mine.adapter.classes)
    if look == "even":
        reference.even = 1.0
    weight = torch.arange(24) % 3 if look == "some refused" else torch.ones(24)
    out = mine.step(x, target, weight, even=reference.even)
    logits, theta, distance, share = reference.step(x, target, weight)
    assert (reference.uneven == 0) == (look == "even")
    assert far({"logits": out.logits}, {"logits": logits}) < 1e-5
    named = mine.named(out)
    assert far(named, theta) < 1e-5
    before = mine.adapter.unpack(mine.theta)
    assert all(torch.equal(named[key], before[key].reshape(-1)) for key in set(named) - set(theta))
    report = mine.report(out)
    assert report["shift"] == pytest.approx(distance, rel=1e-5)
    assert report["share"] == pytest.approx(share, rel=1e-5, abs=1e-9)
    assert report["accepted"] == pytest.approx(float((weight > 0).double().mean()))
    moved = torch.linalg.vector_norm(out.theta - mine.theta)
    assert report["update_norm"] == pytest.approx(float(moved))
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    assert report["entropy"] == pytest.approx(float(entropy), rel=1e-4)
    if look == "uneven":
        assert min(reference.trusts) < 1, "no layer was farther off than its classes"
    if look == "little shift" and name != "small batch":  # whose running statistics are of nothing
        assert max(reference.trusts) == 1
    if look != "little shift":
        assert share > 0.1, "hardly anything was aligned: the comparison shows little"
    # What serves from now on is what the step has seen.
    assert far({"logits": mine.logits(x, out.theta)}, {"logits": logits}) < 1e-5


@pytest.mark.parametrize("name", ["batch", "layer"])
@pytest.mark.parametrize("wrong", WRONG)
def test_the_comparison_objects_to_a_mistake(name: str, wrong: str) -> None:
    network, source = NETWORKS[name](), images(1, 48)
    mine, reference = Ours(network, source), EagerAuto(network, source, wrong=wrong)
    x, target = shifted(images(2, 24)), uneven_target(24, mine.adapter.classes)
    out = mine.step(x, target)
    logits, theta, _, _ = reference.step(x, target)
    assert far(mine.named(out), theta) > 1e-3
    assert far({"logits": out.logits}, {"logits": logits}) > 1e-4


@pytest.mark.parametrize(("caution", "even"), [(0.0, 0.025), (0.3, 0.0), (1.0, 0.9)])
def test_hyper_values_have_their_place_in_the_formulas(caution: float, even: float) -> None:
    network, source = NETWORKS["layer"](), images(1, 48)
    mine, reference = Ours(network, source), EagerAuto(network, source, caution=caution, even=even)
    x, target = shifted(images(2, 24)), uneven_target(24, mine.adapter.classes)
    out = mine.step(x, target, caution=caution, even=even)
    assert far(mine.named(out), reference.step(x, target)[1]) < 1e-5
    assert far(mine.named(out), mine.named(mine.step(x, target))) > 1e-3, "the defaults would do as well"


# --- what it is for -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batch", "small batch", "group", "small layer"])
@pytest.mark.parametrize("shift", [lambda x: 0.4 * x + 0.3, shifted])
def test_a_good_part_of_a_shift_of_contrast_and_brightness_is_undone(
    name: str, shift: Callable[[Tensor], Tensor]
) -> None:
    source = images(1, 96)
    network = settled(NETWORKS[name](), source)
    mine = Ours(network, source)
    wanted = mine.logits(source)
    before = (mine.logits(shift(source)) - wanted).abs().mean()
    after = (mine.step(shift(source), wanted).logits - wanted).abs().mean()
    assert after < 0.65 * before


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_moves_on_the_sources_own_images(name: str) -> None:
    source = images(1, 48)
    network = settled(NETWORKS[name](), source)
    mine = Ours(network, source)
    out = mine.step(source, mine.logits(source))
    report = mine.report(out)
    assert report["share"] == 0
    assert report["shift"] < 1 / 48
    torch.testing.assert_close(out.theta, mine.theta, rtol=0, atol=1e-6)
    torch.testing.assert_close(out.logits, mine.logits(source), rtol=0, atol=1e-4)
    moved = mine.report(mine.step(shifted(source), mine.logits(source)))
    assert moved["share"] > 0.25
    assert moved["shift"] > 1 / 48


def test_steps_do_not_add_up() -> None:
    """What is aligned is told by the source and the window alone, wherever theta stands."""
    mine = Ours(NETWORKS["layer"](), images(1, 48))
    x, target = shifted(images(2, 24)), uneven_target(24, mine.adapter.classes)
    first = mine.step(x, target)
    mine.theta = first.theta
    torch.testing.assert_close(mine.step(x, target).theta, first.theta)


# --- samples, classes -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batch", "layer", "group"])
def test_refused_samples_change_nothing_for_the_others(name: str) -> None:
    mine = Ours(NETWORKS[name](), images(1, 48))
    x, target = shifted(images(2, 16)), uneven_target(16, mine.adapter.classes)
    alone = mine.step(x, target)
    junk = 50 * torch.randn([8, 3, SIZE, SIZE], generator=noise(4), dtype=torch.float64)
    of_one_class = torch.zeros(8, mine.adapter.classes, dtype=torch.float64)
    of_one_class[:, 4] = 100
    weight = torch.cat([torch.ones(16), torch.zeros(8)])
    mixed = mine.step(torch.cat([x, junk]), torch.cat([target, of_one_class]), weight)
    torch.testing.assert_close(mixed.theta, alone.theta)
    torch.testing.assert_close(mixed.logits[:16], alone.logits)
    assert mine.report(mixed)["share"] == pytest.approx(mine.report(alone)["share"])
    counted = mine.step(torch.cat([x, junk]), torch.cat([target, of_one_class]))
    assert (counted.theta - alone.theta).abs().max() > 1e-2, "junk that counts does not show"


def test_where_all_are_refused_theta_stays_as_it_is() -> None:
    mine = Ours(NETWORKS["batch"](), images(1, 48))
    mine.theta = mine.theta + 0.01
    out = mine.step(shifted(images(2, 16)), uneven_target(16, mine.adapter.classes), torch.zeros(16))
    assert torch.equal(out.theta, mine.theta)
    assert torch.isfinite(out.logits).all()
    assert (mine.report(out)["accepted"], mine.report(out)["update_norm"]) == (0, 0)


@pytest.mark.parametrize("name", ["batch", "layer"])
def test_classes_are_looked_at_only_where_they_are_uneven_enough(name: str) -> None:
    mine = Ours(NETWORKS[name](), images(1, 48))
    x = shifted(images(2, 24))
    like = torch.log(mine.anchor["auto.prior"]).expand(24, -1)
    uneven = uneven_target(24, mine.adapter.classes)
    at_prior = mine.step(x, like).theta
    torch.testing.assert_close(mine.step(x, uneven, even=1e3).theta, at_prior)
    torch.testing.assert_close(mine.step(x, like + 0.2 * uneven / uneven.abs().max()).theta, at_prior)
    assert (mine.step(x, uneven).theta - at_prior).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["batch", "layer"])
def test_the_more_caution_the_less_an_uneven_window_moves_and_an_even_one_does_not_care(name: str) -> None:
    mine = Ours(NETWORKS[name](), images(1, 48))
    x, target = shifted(images(2, 24)), uneven_target(24, mine.adapter.classes)
    shares = [mine.report(mine.step(x, target, caution=c))["share"] for c in (0.0, 0.5, 2.0, 1e6)]
    assert shares == sorted(shares, reverse=True)
    assert len(set(shares)) == 4
    assert shares[-1] == 0
    still = mine.step(x, target, caution=1e6)
    torch.testing.assert_close(still.theta, mine.theta, rtol=0, atol=1e-6)
    like = torch.log(mine.anchor["auto.prior"]).expand(24, -1)
    assert torch.equal(mine.step(x, like, caution=1e6).theta, mine.step(x, like, caution=0.0).theta)


def test_fewer_samples_are_believed_less() -> None:
    mine = Ours(NETWORKS["layer"](), images(1, 48))
    x, like = images(2, 24).repeat(4, 1, 1, 1), torch.log(mine.anchor["auto.prior"]).expand(96, -1)
    x = x + 0.05
    shares = [mine.report(mine.step(x, like, (torch.arange(96) < n).float()))["share"] for n in (24, 48, 96)]
    assert shares[0] < shares[1] < shares[2], "the same samples more often"


# --- refusals -------------------------------------------------------------------------------------


def test_without_source_images_there_is_no_anchor() -> None:
    method = Auto(NormAdapter(resnet()))
    with pytest.raises(ValueError, match="source images"):
        method.anchor()
    with pytest.raises(ValueError, match="source images"):
        method.calibrate([])
    with pytest.raises(ValueError, match="source images"):
        method.calibrate(iter(()))
    with pytest.raises(ValueError, match="source images"):
        method.anchor()


def test_a_step_without_a_target_is_refused() -> None:
    mine = Ours(resnet(), images(1, 48))
    batch = Batch(images(2, 8), torch.ones(8))
    with pytest.raises(ValueError, match="target"):
        mine.method.step(batch, mine.theta, {}, mine.anchor, mine.method.spec.default_hyper(), torch.zeros(0))


@pytest.mark.parametrize("window", [-3.0, 0.0, 15.0, 15.99, 16.5, 127.999])
def test_a_window_of_no_whole_number_from_16_is_refused(window: float) -> None:
    with pytest.raises(ValueError, match=r"auto\.window is .*from 16"):
        Auto(NormAdapter(resnet()), window=window)
    with pytest.raises(UnknownOptionError, match=r"auto\.window"):
        make_method("auto", NormAdapter(resnet()), {"window": str(window)})


@pytest.mark.parametrize("window", [16.0, 128.0, 4096.0])
def test_a_window_is_in_the_spec(window: float) -> None:
    spec = Auto(NormAdapter(resnet()), window=window).spec
    assert (spec.window, spec.target, spec.logits) == (int(window), True, "after")
    assert spec.state == ()


class NoBias(nn.Module):
    """A LayerNorm that scales and cannot shift."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x))
        return logits


@pytest.mark.parametrize("make", [rms, NoBias])
def test_a_network_without_anything_to_align_is_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(SelectionError, match="neither running statistics nor weight and bias"):
        Auto(NormAdapter(make()))


def test_layers_that_are_not_selected_stay_as_they_are() -> None:
    source = images(1, 48)
    adapter = NormAdapter(copy.deepcopy(NETWORKS["layer"]()).double(), include=["norm"])
    method = Auto(adapter)
    method.calibrate([source])
    assert [entry.name for entry in adapter.tensors] == ["norm.weight", "norm.bias"]
    assert method.anchor()["auto.mean"].shape == (16,)


# --- compiled -------------------------------------------------------------------------------------


SOURCE = images(5, 96).float()


def wanted(methods: tuple[str, ...], **settings: str) -> BuildOptions:
    return BuildOptions(
        "small",
        InputOptions((3, SIZE, SIZE)),
        5,
        methods,
        settings={"auto": settings} if settings else {},
        source_images=SOURCE,
    )


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Built:
    path = tmp_path_factory.mktemp("auto") / "bundle"
    return build(NETWORKS["small batch"](), wanted(("source", "tent", "auto"), window="32"), path)


def test_the_manifest_says_that_the_host_keeps_a_window_and_no_teacher_is_needed(packed: Built) -> None:
    manifest = packed.manifest
    assert manifest.methods["auto"].window == 32
    assert {name: spec.window for name, spec in manifest.methods.items() if name != "auto"} == {
        "source": 0,
        "tent": 0,
    }
    assert manifest.takes_target("auto")
    assert not manifest.needs_teacher("auto")
    assert manifest.methods["auto"].state == []
    assert [entry.name for entry in manifest.methods["auto"].hyper] == ["caution", "even"]
    assert all(check.ok for check in check_bundle(packed.path))


def test_where_auto_is_packed_it_is_the_default(packed: Built) -> None:
    assert list(packed.manifest.methods) == ["source", "tent", "auto"]
    assert packed.manifest.default_method == "auto"


def compare(path: Path, name: str, chosen: BuildOptions) -> None:
    model = Model.open(path, method="auto")
    batches = [example_batch(model.manifest.input, n, n) for n in (8, 8, 32, 9, 64, 2)]
    report = parity(model, reference(NETWORKS[name](), chosen, "auto"), batches)
    report.require()
    assert report.worst.worst < 1e-3
    target = example_target(model, 32, 0)
    assert model.step(batches[2], target=target).report["share"] > 0, (
        "nothing was aligned: this shows nothing"
    )


def test_compiled_steps_on_batch_norm_are_those_of_torch(packed: Built) -> None:
    compare(packed.path, "small batch", packed.options)


def test_compiled_steps_on_layer_norm_are_those_of_torch_and_another_default_may_be_named(
    tmp_path: Path,
) -> None:
    chosen = dataclasses.replace(wanted(("auto", "source")), default_method="source")
    made = build(NETWORKS["small layer"](), chosen, tmp_path / "bundle")
    assert made.manifest.default_method == "source"
    compare(made.path, "small layer", chosen)


def test_the_parity_of_another_caution_is_objected_to(packed: Built) -> None:
    model = Model.open(packed.path, method="auto")
    oracle = reference(NETWORKS["small batch"](), packed.options, "auto")
    batches = [example_batch(model.manifest.input, 16, seed) for seed in range(3)]

    class Bold(Auto):
        def step(self, batch: Batch, *args: Any) -> Step:
            theta, state, anchor, hyper, rand = args
            return super().step(batch, theta, state, anchor, 0.9 * hyper, rand)

    with pytest.raises(ParityError, match="deviates"):
        parity(model, Bold(oracle.adapter), batches).require()  # type: ignore[arg-type]


def test_refused_samples_change_nothing_in_the_compiled_step(packed: Built) -> None:
    model = Model.open(packed.path, method="auto")
    x, target = example_batch(model.manifest.input, 24, 0), example_target(model, 24, 0)
    assert target is not None
    weight = (np.arange(24) < 16).astype(np.float32)
    some = model.step(x, weight, target)
    x[16:], target[16:] = 0.9 * x[16:].max(), 5.0
    again = model.step(x, weight, target)
    np.testing.assert_allclose(again.theta, some.theta, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(again.theta, model.step(x[:16], None, target[:16]).theta, rtol=1e-5, atol=1e-6)
    none = model.step(x, np.zeros(24, np.float32), target)
    np.testing.assert_array_equal(none.theta, model.theta)


@pytest.mark.parametrize("spoil", ["missing", "too few", "not finite", "one sample"])
def test_a_compiled_step_refuses_what_it_cannot_step_on_and_changes_nothing(
    packed: Built, spoil: str
) -> None:
    model = Model.open(packed.path, method="auto")
    before = model.theta.copy()
    x, target = example_batch(model.manifest.input, 8, 0), example_target(model, 8, 0)
    assert target is not None
    if spoil == "not finite":
        target[3, 2] = np.nan
    arguments = {
        "missing": (x, None, None),
        "too few": (x, None, target[:7]),
        "not finite": (x, None, target),
        "one sample": (x[:1], None, target[:1]),
    }
    with pytest.raises(InputError):
        model.step(*arguments[spoil])
    np.testing.assert_array_equal(model.theta, before)
    assert model.steps == 0


BAD_BUILDS: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "no source images": ({"source_images": None}, {}, "auto needs unlabelled images"),
    "images of another shape": ({"source_images": torch.zeros(4, 3, 9, 8)}, {}, r"\[3, 9, 8\]"),
    "window": ({}, {"window": "8"}, r"auto\.window is 8"),
    "caution": ({}, {"caution": "-1"}, r"auto\.caution is -1"),
    "even": ({}, {"even": "-0.1"}, r"auto\.even is -0\.1"),
    "a misspelt option": ({}, {"windw": "32"}, "did you mean 'window'"),
}


@pytest.mark.parametrize("name", BAD_BUILDS)
def test_a_build_that_cannot_be_is_refused_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    changes, settings, says = BAD_BUILDS[name]
    chosen = dataclasses.replace(wanted(("auto",), **settings), **changes)
    with pytest.raises(OptionError, match=says):
        build(NETWORKS["small batch"](), chosen, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_network_without_anything_to_align_is_not_built(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="neither running statistics"):
        build(small("rms")(), wanted(("auto",)), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
