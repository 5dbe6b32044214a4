"""Compiled steps against float64 torch over 20 steps, and the companion: a flipped sign must be objected to."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from torch import Tensor

from exported import built, options
from networks import NETWORKS
from tta_adapters.base import State
from tta_adapters.methods.tent import Tent
from tta_adapters.optim import Sgd
from tta_exporters.build import build
from tta_exporters.check import example_batch
from tta_exporters.errors import ParityError
from tta_exporters.parity import (
    MEDIAN_TOLERANCE,
    Deviation,
    ParityReport,
    eager,
    parity,
    reference,
    relative_error,
)
from tta_runtime import Model, bundle

STEPS = 20


def compare(path: Path, name: str, method: str, *, steps: int = STEPS) -> ParityReport:
    model = Model.open(path, method=method)
    batches = [example_batch(model.manifest.input, 6, seed) for seed in range(steps)]
    network, chosen = NETWORKS[name](), built(name).options
    return parity(model, reference(network, chosen, method), batches, eager(network, chosen, method))


@pytest.mark.parametrize("name", NETWORKS)
def test_twenty_tent_steps(name: str) -> None:
    report = compare(built(name).path, name, "tent")
    report.require()
    assert report.steps == STEPS
    assert report.worst.median <= MEDIAN_TOLERANCE
    assert {entry.output for entry in report.deviations} >= {"logits", "state.momentum", "report.loss"}


@pytest.mark.parametrize(
    ("methods", "settings"),
    [
        (("norm",), {}),
        (("norm",), {"norm": {"blend": "0.3", "ema": "0.2"}}),
        (("tent",), {"tent": {"optimizer": "adam", "lr": "0.01"}}),
        (("tent",), {"tent": {"statistics": "running"}}),
        (("tent",), {"tent": {"nesterov": "false"}}),
    ],
)
def test_twenty_steps_of_every_variant(
    methods: tuple[str, ...], settings: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    chosen = options("resnet", methods, **settings)
    path = build(NETWORKS["resnet"](), chosen, tmp_path / "bundle").path
    model = Model.open(path, method=methods[0])
    batches = [example_batch(model.manifest.input, 6, seed) for seed in range(STEPS)]
    parity(model, reference(NETWORKS["resnet"](), chosen, methods[0]), batches).require()


@pytest.mark.parametrize(
    ("median", "worst", "eager_worst", "ok"),
    [
        (9e-5, 1e-2, 0.0, True),
        (2e-3, 4e-3, 0.0, False),
        (2e-3, 4e-3, 1e-3, False),
        (2e-3, 4e-3, 3e-3, True),
        (6e-2, 6e-2, 1e-1, False),
        (2e-3, 6e-2, 3e-3, False),
        (float("nan"), float("nan"), 1.0, False),
    ],
)
def test_the_median_may_stray_as_far_as_eager_torch_does_and_no_further(
    median: float, worst: float, eager_worst: float, ok: bool
) -> None:
    assert Deviation("logits", median, worst, 1, eager_worst).ok is ok


def test_the_yardstick_is_measured() -> None:
    report = compare(built("resnet").path, "resnet", "tent", steps=2)
    assert all(0 < entry.eager_worst < 1e-2 for entry in report.deviations if entry.output == "logits")


def flip_a_sign(path: Path, *, node: int) -> str:
    """Exchanges the operands of one subtraction of the tent step and seals the bundle again."""
    file = path / "step.tent.onnx"
    model = onnx.load(file, load_external_data=False)
    subtractions = [entry for entry in model.graph.node if entry.op_type == "Sub"]
    chosen = subtractions[node]
    chosen.input[:] = [chosen.input[1], chosen.input[0]]
    onnx.save(model, file)
    manifest = bundle.Bundle.open(path, verify=False).manifest
    bundle.seal(path, msgspec.structs.replace(manifest, files={}))
    return str(chosen.name)


@pytest.mark.parametrize("node", [0, 3, -4, -8])
def test_a_flipped_sign_is_objected_to(node: int, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(built("resnet").path, path)
    flip_a_sign(path, node=node)
    report = compare(path, "resnet", "tent", steps=3)
    assert not report.ok
    with pytest.raises(ParityError, match=r"deviates by .* in the median of 3 steps"):
        report.require()


def test_a_deviation_of_one_percent_is_objected_to() -> None:
    """Not only a wrong sign: a learning rate 1 % off, on one side alone."""
    model = Model.open(built("resnet").path, method="tent", hyper={"lr": 0.1})
    oracle = reference(NETWORKS["resnet"](), built("resnet").options, "tent")
    batches = [example_batch(model.manifest.input, 6, seed) for seed in range(3)]
    assert parity(model, oracle, batches).ok
    off = Tent(oracle.adapter, lr=0.1)  # the oracle's hyper values come from the model: spoil what it adds
    off._learner._optimiser = _Faster(nesterov=True)
    assert not parity(Model.open(built("resnet").path, method="tent", hyper={"lr": 0.1}), off, batches).ok


class _Faster(Sgd):
    def update(self, grad: Tensor, state: State, hyper: Mapping[str, Tensor]) -> tuple[Tensor, State]:
        delta, state = super().update(grad, state, hyper)
        return 1.01 * delta, state


def test_relative_error_counts_nan_as_disagreement() -> None:
    one = np.ones(3)
    assert relative_error(one, one) == 0.0
    assert np.isnan(relative_error(np.array([1.0, np.nan, 1.0]), one))
