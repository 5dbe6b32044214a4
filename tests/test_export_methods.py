"""Every method compiles: parity with float64 over 20 steps; source images where a method needs them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from exported import options
from networks import NETWORKS
from tta_adapters import METHODS
from tta_adapters.methods import ADAPTER_OF
from tta_exporters.build import BuildOptions, InputOptions, build
from tta_exporters.check import example_batch, example_target
from tta_exporters.errors import OptionError
from tta_exporters.parity import parity, reference
from tta_exporters.preprocess import Preprocess
from tta_exporters.source_images import load_source_images
from tta_runtime import Model

NEW = [name for name in METHODS if name not in ("source", "norm", "tent")]  # those: test_export_parity.py
STEPS = 20
IMAGES = torch.rand([96, 3, 16, 16], generator=torch.Generator().manual_seed(4))
SETTINGS = {
    "cotta": {"views": "1"},
    "lame": {"iterations": "10"},
    "vida": {"views": "2", "threshold": "0.05"},
}


def sharp(name: str) -> nn.Module:
    """A network some of whose predictions are certain, so that selections select."""
    network = NETWORKS[name]()
    heads = [module for module in network.modules() if isinstance(module, nn.Linear)]
    heads[-1].weight.data *= 12
    return network


def chosen(name: str, adapter: str) -> BuildOptions:
    """All of NEW that take an adapter, in one bundle: their forward pass is compiled once."""
    methods = tuple(method for method in NEW if ADAPTER_OF.get(method, "norm") == adapter)
    settings = {method: SETTINGS[method] for method in methods if method in SETTINGS}
    return dataclasses.replace(
        options(name, methods, **settings),
        source_images=IMAGES,
        adapter=adapter,
        adapter_settings={"high": 4.0} if adapter == "vida" else {},
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """By network and adapter."""

    @functools.cache
    def made(name: str, adapter: str) -> Path:
        out = tmp_path_factory.mktemp(name) / adapter
        build(sharp(name), chosen(name, adapter), out)
        return out

    return made


def compare(name: str, method: str, bundle: Callable[[str, str], Path]) -> dict[str, float]:
    adapter = ADAPTER_OF.get(method, "norm")
    model = Model.open(bundle(name, adapter), method=method)
    batches = [example_batch(model.manifest.input, 8, seed) for seed in range(STEPS)]
    report = parity(model, reference(sharp(name), chosen(name, adapter), method), batches)
    report.require()
    assert report.steps == STEPS
    return dict(model.step(batches[0], target=example_target(model, 8, 0)).report)


@pytest.mark.parametrize("method", NEW)
def test_twenty_steps_on_batch_norm(method: str, bundle: Callable[[str, str], Path]) -> None:
    report = compare("resnet", method, bundle)
    assert report["accepted"] > 0, "nothing was selected: the comparison shows nothing"


@pytest.mark.slow
@pytest.mark.parametrize("method", NEW)
@pytest.mark.parametrize("network", ["group_norm", "vit"])
def test_twenty_steps_on_other_networks(
    network: str, method: str, bundle: Callable[[str, str], Path]
) -> None:
    compare(network, method, bundle)


def test_a_teacher_serves_between_steps(bundle: Callable[[str, str], Path]) -> None:
    model = Model.open(bundle("resnet", "norm"), method="cotta", hyper={"lr": 0.1, "decay": 0.5})
    assert model.spec.serve_vector == "state:teacher"
    x = example_batch(model.manifest.input, 8, 0)
    before = model.predict(x).logits
    for _ in range(3):
        model.adapt(x)
    assert np.abs(model.predict(x).logits - before).max() > 1e-3


@pytest.mark.parametrize("method", ["eata", "zoa"])
def test_a_method_that_needs_source_images_is_refused_without(method: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"{method} needs unlabelled images"):
        build(sharp("resnet"), options("resnet", (method,)), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_source_images_of_another_shape_are_refused(tmp_path: Path) -> None:
    wanted = dataclasses.replace(options("resnet", ("eata",)), source_images=torch.zeros(4, 3, 8, 8))
    with pytest.raises(OptionError, match=r"\[3, 8, 8\], the input is \[3, 16, 16\]"):
        build(sharp("resnet"), wanted, tmp_path / "bundle")


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_source_images_arrive_as_users_send_theirs(dtype: str, channels_last: bool, tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 6), dtype=np.uint8)
    np.savez(tmp_path / "source.npz", x=x.transpose(0, 2, 3, 1) if channels_last else x)
    high = 255.0 if dtype == "uint8" else 1.0
    users = InputOptions((3, 8, 6), dtype, Preprocess(high=high))
    found = load_source_images(tmp_path / "source.npz", users, 4)
    expected = x[:4] if dtype == "uint8" else x[:4].astype(np.float32) / 255
    torch.testing.assert_close(found, torch.from_numpy(expected))


BAD_IMAGES = {
    "missing": (lambda f: None, "no source images"),
    "no npz": (lambda f: f.write_bytes(b"hello"), "no source images"),
    "no x": (lambda f: np.savez(f, y=np.zeros(3)), "no source images"),
    "pickled": (lambda f: np.savez(f, x=np.array([{}], dtype=object)), "no source images"),
    "empty": (lambda f: np.savez(f, x=np.zeros((0, 3, 8, 8), np.uint8)), "uint8"),
    "floats": (lambda f: np.savez(f, x=np.zeros((2, 3, 8, 8))), "float64"),
    "another shape": (lambda f: np.savez(f, x=np.zeros((2, 3, 9, 8), np.uint8)), "9, 8"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_source_images_are_refused(name: str, tmp_path: Path) -> None:
    write, says = BAD_IMAGES[name]
    write(tmp_path / "source.npz")
    with pytest.raises(OptionError, match=says):
        load_source_images(tmp_path / "source.npz", InputOptions((3, 8, 8)), 100)
