"""How far a step goes: the learning rate and the batch that it is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from networks import group_norm, resnet
from tta_adapters import NormAdapter, make_method
from tta_adapters.base import Batch, init_state
from tta_adapters.methods import UnknownOptionError

SCALED = ("tent", "eta", "sar", "rdumb")


def moved(name: str, network: Any, size: int, **options: Any) -> Tensor:
    """What one step on a batch of equal images adds to the trained part: the gradient does not depend on the size."""
    adapter = NormAdapter(network())
    method = make_method(name, adapter, {"lr": 0.1, **options})
    theta = adapter.source_theta()
    x = torch.rand([1, 3, 16, 16], generator=torch.Generator().manual_seed(0)).repeat(size, 1, 1, 1)
    hyper = {entry.name: entry.default for entry in method.spec.hyper}
    hyper |= {"margin": 1.0} if "margin" in hyper else {}
    values = torch.tensor([hyper[entry.name] for entry in method.spec.hyper])
    out = method.step(
        Batch(x, torch.ones(size)),
        theta,
        init_state(method.spec, theta),
        method.anchor(),
        values,
        torch.zeros(0),
    )
    return out.theta[: adapter.trained] - theta[: adapter.trained]


@pytest.mark.parametrize("name", SCALED)
def test_without_batch_norm_a_small_batch_steps_less(name: str) -> None:
    whole = moved(name, group_norm, 64)
    assert float(whole.abs().max()) > 1e-4
    for size in (32, 16, 1):
        torch.testing.assert_close(moved(name, group_norm, size), whole * size / 64, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(moved(name, group_norm, 96), whole, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("name", SCALED)
def test_it_can_be_turned_off_and_set(name: str) -> None:
    whole = moved(name, group_norm, 64)
    torch.testing.assert_close(moved(name, group_norm, 8, lr_batch=1.0), whole, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(moved(name, group_norm, 8, lr_batch=16.0), whole / 2, rtol=1e-2, atol=1e-6)


def defaults(name: str, network: Any, **options: Any) -> dict[str, float]:
    spec = make_method(name, NormAdapter(network(), input_shape=(3, 16, 16)), options).spec
    return {entry.name: entry.default for entry in spec.hyper}


@pytest.mark.parametrize("name", SCALED)
def test_with_batch_norm_the_rate_is_what_it_is(name: str) -> None:
    assert defaults(name, resnet)["lr_batch"] == 1
    assert defaults(name, group_norm)["lr_batch"] == 64


def test_what_nobody_scales_has_no_such_setting() -> None:
    assert "lr_batch" not in defaults("tent", group_norm, optimizer="adam")
    for name in ("roid", "cotta", "rotta"):
        assert "lr_batch" not in defaults(name, group_norm)


@pytest.mark.parametrize("value", [-1.0, 0.5, float("nan")])
def test_a_batch_of_less_than_one_is_refused(value: float) -> None:
    with pytest.raises(UnknownOptionError, match="lr_batch"):
        make_method("tent", NormAdapter(resnet()), {"lr_batch": value})
