"""The method vida beside its eager reference, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eager_vida import EagerVida
from networks import group_norm, resnet, vit
from tta_adapters import NormAdapter, make_adapter, make_method
from tta_adapters.augment import COTTA, PARAMETERS, augment, normal_field
from tta_adapters.base import Batch, Step, init_state
from tta_adapters.options import UnknownOptionError
from tta_adapters.select import SelectionError
from tta_adapters.vida import VidaAdapter

SHAPE = (3, 16, 16)
NETWORKS = {"resnet": resnet, "group_norm": group_norm, "vit": vit}
THRESHOLDS = {"resnet": 0.7, "group_norm": 8e-4, "vit": 0.14}
"""The uncertainties of each network's samples lie on both sides."""


def sharp(network: nn.Module) -> nn.Module:
    heads = [module for module in network.modules() if isinstance(module, nn.Linear)]
    heads[-1].weight.data *= 8
    return network


def adapted(network: nn.Module) -> VidaAdapter:
    """An adapter away from its start, as after a warm-up: else both branches say nothing."""
    adapter = make_adapter("vida", network, {"low": 1.0, "high": 4.0}, input_shape=SHAPE)
    assert isinstance(adapter, VidaAdapter)
    named = adapter.unpack(adapter.source_theta())
    generator = torch.Generator().manual_seed(2)
    adapter.start_from(
        {
            entry.name: named[entry.name].detach() + 0.1 * torch.randn(entry.shape, generator=generator)
            for entry in adapter.tensors
            if entry.trained
        }
    )
    return adapter


def batch(seed: int, size: int = 6) -> Tensor:
    return torch.rand([size, *SHAPE], generator=torch.Generator().manual_seed(seed))


def branches(adapter: VidaAdapter, theta: Tensor) -> Tensor:
    """The trained part in the order of the reference."""
    return theta[: adapter.trained]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("views", [0, 3])
@pytest.mark.parametrize("network", NETWORKS)
def test_vida_beside_its_reference(network: str, views: int, symmetric: bool) -> None:
    # float64: a ReLU that changes sides between two ways to sum in float32 would move everything after it.
    source = sharp(NETWORKS[network]()).double()
    adapter = adapted(source)
    threshold = THRESHOLDS[network]
    settings = {"decay": 0.9, "lr": 3e-3, "threshold": threshold, "spread": 0.3}
    method = make_method(
        "vida",
        adapter,
        {
            "views": float(views),
            "loss": "sce" if symmetric else "ce",
            "optimizer": "sgd",
            "nesterov": False,
            **settings,
        },
    )
    start = adapter.unpack(adapter.source_theta().double())
    reference = EagerVida(
        source,
        [item.name for item in adapter.selection],
        start,
        lr=3e-3,
        decay=0.9,
        threshold=threshold,
        spread=0.3,
        symmetric=symmetric,
    )
    theta = adapter.source_theta().double()
    state = {name: value.double() for name, value in init_state(method.spec, theta).items()}
    noise = 0.03 * torch.randn(adapter.trained, generator=torch.Generator().manual_seed(9)).double()
    state["teacher"] = theta + torch.cat([noise, torch.zeros(adapter.size - adapter.trained).double()])
    reference.shift_teacher(noise)
    before, sides = branches(adapter, theta), set()
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x, rand = batch(seed).double(), torch.rand(method.spec.rand, generator=generator).double()
        field = (
            normal_field(rand[views * PARAMETERS :], SHAPE)
            if views
            else torch.zeros(SHAPE, dtype=torch.float64)
        )
        reference.views = [
            lambda x, k=k, rand=rand, field=field: augment(  # type: ignore[misc]
                x, rand[k * PARAMETERS : (k + 1) * PARAMETERS], COTTA, field.roll((3 * k, 7 * k), dims=(1, 2))
            )
            for k in range(views)
        ]
        out: Step = method.step(
            Batch(x, torch.ones(len(x)).double()),
            theta,
            state,
            {},
            method.spec.default_hyper().double(),
            rand,
        )
        expected = reference.step(x)
        sides |= set(reference.unsure)
        torch.testing.assert_close(out.logits, expected, rtol=1e-6, atol=1e-7 * float(expected.abs().max()))
        theta, state = out.theta, out.state
        for found, wanted in (
            (branches(adapter, theta) - before, reference.theta() - before),
            (state["teacher"][: adapter.trained] - before, reference.theta(reference.teacher) - before),
        ):
            assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    if views:
        assert sides == {True, False}, "all samples on one side of the threshold show half of the rule"
    assert (branches(adapter, theta) - before).abs().max() > 1e-4


def test_ce_learns_nothing_where_student_and_teacher_agree() -> None:
    adapter = adapted(sharp(vit()))
    method = make_method("vida", adapter, {"views": 0.0, "loss": "ce", "optimizer": "sgd", "lr": 1.0})
    theta = adapter.source_theta()
    out = method.step(
        Batch(batch(0), torch.ones(6)),
        theta,
        init_state(method.spec, theta),
        {},
        method.spec.default_hyper(),
        torch.zeros(0),
    )
    torch.testing.assert_close(out.theta, theta, rtol=0, atol=1e-5)


def test_the_report_tells_how_unsure_the_teacher_is() -> None:
    adapter = adapted(sharp(vit()))
    method = make_method("vida", adapter, {"views": 2.0, "threshold": 0.0})
    theta = adapter.source_theta()
    out = method.step(
        Batch(batch(0), torch.ones(6)),
        theta,
        init_state(method.spec, theta),
        {},
        method.spec.default_hyper(),
        torch.rand(method.spec.rand),
    )
    named = dict(zip(method.spec.report, out.report.tolist(), strict=True))
    assert named["uncertainty"] > 0
    assert named["unsure"] == 1.0


def test_another_adapter_is_refused() -> None:
    with pytest.raises(SelectionError, match="works on the adapter vida, this one is norm"):
        make_method("vida", NormAdapter(resnet()))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"views": "1"}, "vida.views is 1"),
        ({"views": "2.5"}, "vida.views"),
        ({"views": "-2"}, "vida.views"),
        ({"loss": "mse"}, "vida.loss is 'mse'"),
        ({"statistics": "none"}, "choose"),
    ],
)
def test_bad_options_are_refused(options: dict[str, str], says: str) -> None:
    with pytest.raises(UnknownOptionError, match=says):
        make_method("vida", adapted(vit()), options)


def test_views_of_what_is_no_image_are_refused() -> None:
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    adapter = make_adapter("vida", network, input_shape=(6,))
    with pytest.raises(UnknownOptionError, match="needs images"):
        make_method("vida", adapter)
    assert make_method("vida", adapter, {"views": 0.0}).spec.rand == 0
