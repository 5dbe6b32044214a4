"""The CEMA student: its objective by hand, its steps beside eager torch, and a step's third input refused and taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from exported import options
from networks import CLASSES, group_norm, resnet
from snapshots import unchanged
from test_statistics import Renormalisation, warm, with_norms
from tta_adapters import NormAdapter, make_method
from tta_adapters.base import Batch, Step, init_state
from tta_edge.config import BundleConfig, Config
from tta_edge.hosting import load
from tta_exporters.build import build
from tta_exporters.check import check_bundle, example_batch
from tta_runtime import Model, errors
from tta_runtime.manifest import decode, encode
from tta_runtime.manifest_check import check

LR = 0.05  # steps far above the rounding of theta


def images(seed: int, count: int = 8) -> Tensor:
    return torch.rand([count, 3, 16, 16], generator=torch.Generator().manual_seed(seed))


def teacher(seed: int, count: int = 8) -> Tensor:
    return 3 * torch.randn([count, CLASSES], generator=torch.Generator().manual_seed(100 + seed))


class Ours:
    def __init__(self, network: nn.Module, **more: Any) -> None:
        self.method = make_method("distill", NormAdapter(network), more)
        self.theta = self.method.adapter.source_theta()
        self.state = init_state(self.method.spec, self.theta)

    def step(self, x: Tensor, target: Tensor | None, weight: Tensor | None = None) -> Step:
        weight = torch.ones(len(x)) if weight is None else weight
        hyper = self.method.spec.default_hyper()
        out = self.method.step(Batch(x, weight, target), self.theta, self.state, {}, hyper, torch.zeros(0))
        self.theta, self.state = out.theta, out.state
        self.report = dict(zip(self.method.spec.report, out.report.tolist(), strict=True))
        return out


class Eager:
    """Eq. 6 on a network with batch renormalisation, torch's own losses and optimiser."""

    def __init__(self, network: nn.Module, *, temperature: float = 1.0) -> None:
        self.network = with_norms(network, Renormalisation).eval().requires_grad_(False)
        self.heat = temperature
        self.parameters: list[nn.Parameter] = []
        for module in self.network.modules():
            if isinstance(module, (Renormalisation, nn.GroupNorm)):
                module.requires_grad_(True)
                self.parameters += [module.weight, module.bias]
        self.optimizer = torch.optim.SGD(self.parameters, lr=LR, momentum=0.9)

    def theta(self) -> Tensor:
        return torch.cat([value.detach().reshape(-1) for value in self.parameters])

    def step(self, x: Tensor, target: Tensor) -> Tensor:
        logits = self.network(x)
        bound = 0.4 * np.log(CLASSES)
        mine = torch.distributions.Categorical(logits=logits).entropy()
        theirs = torch.distributions.Categorical(logits=target).entropy()
        apart = nn.functional.kl_div(
            (logits / self.heat).log_softmax(1),
            (target / self.heat).log_softmax(1),
            reduction="none",
            log_target=True,
        ).sum(1)
        label = nn.functional.cross_entropy(logits, target.argmax(1), reduction="none")
        weight = torch.exp(bound - theirs)
        loss = (
            3 * (torch.exp(bound - mine.detach()) * mine).mean()
            + 3 * (weight * apart * self.heat**2).mean()
            + (weight * label).mean()
        )
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss = float(loss.detach())
        return logits.detach()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("make", [warm, group_norm])
def test_steps_beside_the_reference(make: Callable[[], nn.Module], temperature: float) -> None:
    # The reference's statistics follow at the rate of tests/test_statistics.py.
    mine = Ours(make(), lr=LR, ema=0.05, temperature=temperature)
    theirs = Eager(make(), temperature=temperature)
    trained, start = mine.method.adapter.trained, theirs.theta()
    for seed in range(6):
        x, target = images(seed), teacher(seed)
        found, expected = mine.step(x, target).logits, theirs.step(x, target)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        moved, wanted = mine.theta[:trained] - start, theirs.theta() - start
        assert float((moved - wanted).abs().max()) <= 1e-2 * float(wanted.abs().max()), f"step {seed + 1}"
        assert mine.report["loss"] == pytest.approx(theirs.loss, rel=1e-3)
    assert float(wanted.abs().max()) > 0.01


@pytest.mark.parametrize(
    "option", [{"alpha": 0.0}, {"beta": 2.5}, {"gamma": 0.5}, {"margin": 0.5}, {"statistics": "batch"}]
)
def test_the_comparison_objects_to_another_objective(option: dict[str, Any]) -> None:
    mine, theirs = Ours(warm(), **{"lr": LR, "ema": 0.05, **option}), Eager(warm())
    trained, start = mine.method.adapter.trained, theirs.theta()
    mine.step(images(0), teacher(0))
    theirs.step(images(0), teacher(0))
    moved, wanted = mine.theta[:trained] - start, theirs.theta() - start
    assert float((moved - wanted).abs().max()) > 2e-2 * float(wanted.abs().max())


def test_the_objective_by_hand() -> None:
    """One image, probabilities that divide evenly: every term is a number that can be written down."""
    adapter = NormAdapter(resnet())
    x = images(1, 1)
    logits = adapter.forward(adapter.unpack(adapter.source_theta()), x).logits.detach()
    p = logits.softmax(1)[0].double().numpy()
    q = np.array([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.015625])
    mine = Ours(resnet(), lr=0.0)
    mine.step(x, torch.from_numpy(np.log(q))[None].float())
    bound, own = 0.4 * np.log(7), -(p * np.log(p)).sum()
    theirs = (0.5 + 0.5 + 0.375 + 0.25 + 5 / 32 + 6 / 64 + 6 / 64) * np.log(2)
    weight = np.exp(bound - theirs)
    expected = 3 * np.exp(bound - own) * own + 3 * weight * (q * np.log(q / p)).sum() + weight * -np.log(p[0])
    assert mine.report["loss"] == pytest.approx(expected, rel=1e-4)
    assert mine.report["divergence"] == pytest.approx((q * np.log(q / p)).sum(), rel=1e-4)
    assert mine.report["agreement"] == float(p.argmax() == 0)


def test_a_student_that_learns_comes_nearer_to_its_teacher() -> None:
    mine = Ours(warm(), lr=0.01)
    x, target = images(0), teacher(0)
    apart = []
    for _ in range(30):
        mine.step(x, target)
        apart.append(mine.report["divergence"])
    assert apart[-1] < 0.9 * apart[0]


def test_a_refused_sample_teaches_nothing() -> None:
    weight = torch.ones(8)
    weight[3] = 0
    one, other = Ours(warm()), Ours(warm())
    target = teacher(0)
    one.step(images(0), target, weight)
    target[3] = -target[3]
    other.step(images(0), target, weight)
    assert torch.equal(one.theta, other.theta)


def test_without_a_teacher_there_is_no_step() -> None:
    with pytest.raises(ValueError, match="give the batch a target"):
        Ours(warm()).step(images(0), None)


# --- the third input of a step ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distill") / "bundle"
    build(resnet(), options("resnet", ("distill", "tent")), path)
    return path


def test_a_bundle_says_who_needs_a_teacher(bundle: Path) -> None:
    student, tent = Model.open(bundle, method="distill"), Model.open(bundle)
    assert (student.takes_target, tent.takes_target) == (True, False)
    assert tent.method == "tent", "what cannot adapt by itself is no default"
    ports = {(p.bind, p.key): p.shape for p in student.manifest.graphs["step.distill"].inputs}
    assert ports["batch", "target"] == ["batch", CLASSES]


def test_the_check_finds_it_in_order(bundle: Path) -> None:
    assert all(entry.ok for entry in check_bundle(bundle))


def test_a_student_alone_is_a_bundle(tmp_path: Path) -> None:
    build(resnet(), options("resnet", ("distill",)), tmp_path / "bundle")
    model = Model.open(tmp_path / "bundle")
    x = example_batch(model.manifest.input, 3, 0)
    model.adapt(x, target=np.zeros((3, CLASSES), np.float32))
    assert model.distance > 0


GOOD = np.zeros((4, CLASSES), np.float32)
BAD: dict[str, tuple[Any, type[errors.TtaError], str]] = {
    "none": (None, errors.TargetMissing, "none were given"),
    "too few rows": (GOOD[:3], errors.BadTarget, r"\[3, 7\], expected float32 \[4, 7\]"),
    "too few classes": (GOOD[:, :5], errors.BadTarget, r"\[4, 5\]"),
    "labels": (np.zeros(4, np.int64), errors.BadTarget, r"int64 \[4\]"),
    "doubles": (GOOD.astype(np.float64), errors.BadTarget, "float64"),
    "a list": (GOOD.tolist(), errors.BadTarget, "list"),
    "NaN": (np.full_like(GOOD, np.nan), errors.BadTarget, "first in sample 0"),
    "Inf": (
        np.where(np.arange(4)[:, None] == 2, np.inf, GOOD).astype(np.float32),
        errors.BadTarget,
        "sample 2",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_target_is_refused_and_changes_nothing(bundle: Path, name: str) -> None:
    target, error, says = BAD[name]
    model = Model.open(bundle, method="distill")
    x = example_batch(model.manifest.input, 4, 0)
    with unchanged(bundle, model), pytest.raises(error, match=says):
        model.adapt(x, target=target)


def test_a_method_without_a_teacher_refuses_one(bundle: Path) -> None:
    for method in ("tent",):
        model = Model.open(bundle, method=method)
        x = example_batch(model.manifest.input, 4, 0)
        with unchanged(bundle, model), pytest.raises(errors.TargetUnsupported, match="4 samples"):
            model.adapt(x, target=GOOD)


def test_a_daemon_has_no_teacher_and_says_so_before_it_serves(bundle: Path) -> None:
    with unchanged(bundle), pytest.raises(errors.MethodNeedsTeacher, match="adapts by itself: tent"):
        load("default", BundleConfig(path=str(bundle), method="distill"), Config())
    assert load("default", BundleConfig(path=str(bundle)), Config()).method == "tent"


def test_methods_that_adapt_by_themselves_can_be_told_apart(bundle: Path) -> None:
    known = Model.open(bundle).manifest
    assert {name: known.needs_teacher(name) for name in known.methods} == {"distill": True, "tent": False}


@pytest.mark.parametrize("shape", [["batch"], ["batch", CLASSES + 1], [CLASSES, "batch"]])
def test_a_manifest_whose_target_does_not_fit_is_refused(bundle: Path, shape: list[Any]) -> None:
    good = decode((bundle / "manifest.json").read_bytes())
    port = '"target"'
    text = encode(good).decode()
    assert port in text
    for entry in good.graphs["step.distill"].inputs:
        if entry.key == "target":
            entry.shape[:] = shape
    with pytest.raises(errors.GraphMismatch, match="target"):
        check(good)
