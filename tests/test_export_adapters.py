"""Every adapter compiles: tent on it against float64 over 20 steps, any batch size, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from exported import options
from networks import NETWORKS
from snapshots import unchanged
from test_export_methods import sharp
from tta_exporters.build import BuildOptions, build
from tta_exporters.check import check_bundle, example_batch
from tta_exporters.errors import NetworkRefused, OptionError
from tta_exporters.parity import eager, parity, reference
from tta_exporters.tensorrt import TARGETS
from tta_runtime import Model

STEPS = 20
SMALL = {"lora": {"rank": "2"}, "vida": {"high": "4"}, "side": {"width": "8"}, "full": {}}


def chosen(network: str, adapter: str) -> BuildOptions:
    return dataclasses.replace(
        options(network, ("tent",), tent={"lr": "0.01"}), adapter=adapter, adapter_settings=SMALL[adapter]
    )


def compare(network: str, adapter: str, out: Path) -> Model:
    wanted = chosen(network, adapter)
    built = build(sharp(network), wanted, out)
    model = Model.open(out, method="tent")
    batches = [example_batch(model.manifest.input, 8, seed) for seed in range(STEPS)]
    report = parity(
        model,
        reference(sharp(network), wanted, "tent"),
        batches,
        eager(sharp(network), wanted, "tent"),
    )
    report.require()
    assert report.steps == STEPS
    start, count = built.adapter.source_theta().numpy(), built.adapter.trained
    assert np.abs(model.theta[:count] - start[:count]).max() > 1e-4, "nothing was trained: it shows nothing"
    return model


@pytest.mark.parametrize(("network", "adapter"), [("resnet", "lora"), ("vit", "side"), ("mobilenet", "full")])
def test_twenty_steps(network: str, adapter: str, tmp_path: Path) -> None:
    model = compare(network, adapter, tmp_path / "bundle")
    assert model.manifest.adapter == adapter
    for key, value in SMALL[adapter].items():
        assert model.manifest.provenance[f"adapter.{key}"] == value
    for size in (1, 3, 11):
        x = example_batch(model.manifest.input, size, size)
        assert model.predict(x).logits.shape[0] == size
        if size > 1:
            model.step(x)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", SMALL)
@pytest.mark.parametrize("network", ["resnet", "mobilenet", "group_norm", "convnext", "vit", "mlp"])
def test_twenty_steps_of_every_adapter_on_every_kind_of_network(
    network: str, adapter: str, tmp_path: Path
) -> None:
    compare(network, adapter, tmp_path / "bundle")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "adapter"), [("resnet", "lora"), ("vit", "lora"), ("resnet", "side"), ("mobilenet", "full")]
)
def test_tensorrt_builds_weight_gradients(network: str, adapter: str, tmp_path: Path) -> None:
    build(sharp(network), chosen(network, adapter), tmp_path / "bundle")
    results = list(check_bundle(tmp_path / "bundle", tensorrt=TARGETS))
    assert all(result.ok for result in results), [result.detail for result in results if not result.ok]


@pytest.mark.parametrize("adapter", SMALL)
def test_unadapted_bundles_serve_what_the_network_says(adapter: str, tmp_path: Path) -> None:
    network = NETWORKS["convnext"]()
    build(
        network,
        dataclasses.replace(chosen("convnext", adapter), methods=("source",), settings={}),
        tmp_path / "b",
    )
    model = Model.open(tmp_path / "b")
    x = example_batch(model.manifest.input, 4, 0)
    with torch.no_grad():
        np.testing.assert_allclose(
            model.predict(x).logits, network(torch.from_numpy(x)).numpy(), rtol=1e-4, atol=1e-6
        )


REFUSED = {
    "unknown adapter": ({"adapter": "loar"}, OptionError, "did you mean 'lora'"),
    "unknown option": ({"adapter_settings": {"rnk": "2"}}, OptionError, "did you mean 'rank'"),
    "bad value": ({"adapter_settings": {"rank": "x"}}, OptionError, "not a number"),
    "no layer": ({"include": ["decoder*"]}, NetworkRefused, "no module selected"),
    "vida on lora": ({"methods": ("vida",), "settings": {}}, OptionError, "works on the adapter vida"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_leaves_nothing(case: str, tmp_path: Path) -> None:
    change, error, says = REFUSED[case]
    with unchanged(tmp_path), pytest.raises(error, match=says):
        build(sharp("vit"), dataclasses.replace(chosen("vit", "lora"), **change), tmp_path / "bundle")
