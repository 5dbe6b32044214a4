"""Every method's step through TensorRT's parser and builder, on a network with BatchNorm and one with LayerNorm.

What is refused stands in docs/gpu.md, and nothing else may be.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from exported import options
from networks import NETWORKS
from tta_adapters import METHODS
from tta_exporters.build import Built, build
from tta_exporters.check import check_bundle, example_batch
from tta_exporters.errors import CheckFailed, ExtraMissing, OptionError
from tta_exporters.tensorrt import TARGETS, build_plan, load_builder, parse_targets
from tta_runtime import Bundle, plan_build
from tta_runtime.plan_build import Batches, Request

REFUSED: dict[tuple[str, str], str] = {}
"""(method, network): operator."""

SETTINGS = {"cotta": {"views": "1"}, "lame": {"iterations": "10"}, "vida": {"views": "2"}}
"""Fewer repetitions of the same nodes."""

PAGE = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"


def test_the_page_lists_what_is_refused() -> None:
    text = PAGE.read_text()
    if not REFUSED:
        assert "Methods whose step is refused: none." in text
    for (method, network), operator in REFUSED.items():
        assert f"| `{method}` | {network} | `{operator}` |" in text


@pytest.fixture
def builder() -> None:
    pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")


@pytest.fixture(scope="module")
def with_variants(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A small network with BatchNorm and linear layers, built for TensorRT as well."""
    pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")
    wanted = dataclasses.replace(options("mlp", ("source", "tent")), tensorrt=TARGETS)
    return build(NETWORKS["mlp"](), wanted, tmp_path_factory.mktemp("variants") / "bundle")


def test_a_bundle_for_tensorrt_has_each_graph_twice_and_the_weights_once(with_variants: Built) -> None:
    path, manifest = with_variants.path, with_variants.manifest
    assert {key: graph.tensorrt for key, graph in manifest.graphs.items()} == {
        "forward": "forward.tensorrt.onnx",
        "step.tent": "step.tent.tensorrt.onnx",
    }
    assert [name for name in manifest.files if name.endswith(".bin")] == ["weights.bin"]
    assert (path / "step.tent.tensorrt.onnx").stat().st_size < 2 * (path / "step.tent.onnx").stat().st_size
    checks = list(check_bundle(path, tensorrt=TARGETS))
    assert all(check.ok for check in checks), checks
    assert [check.graph for check in checks if check.check == "tensorrt"] == ["forward", "step.tent"]


def test_the_variant_computes_the_same(with_variants: Built) -> None:
    bundle = Bundle.open(with_variants.path)
    graph = bundle.manifest.graphs["step.tent"]
    x = example_batch(bundle.manifest.input, 6, seed=1)
    given = {"x": x, "weight": np.ones(6, np.float32), "theta": bundle.theta0}
    method = bundle.manifest.methods["tent"]
    given |= {f"state.{state.name}": np.zeros(state.shape, np.float32) for state in method.state}
    given["hyper"] = np.array([hyper.default for hyper in method.hyper], np.float32)
    given = {port.name: given[port.name] for port in graph.inputs}
    plain, variant = (
        ort.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, given)
        for file in (bundle.file("step.tent"), bundle.tensorrt_file("step.tent"))
    )
    for port, a, b in zip(graph.outputs, plain, variant, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6, err_msg=port.name)


@pytest.mark.usefixtures("builder")
def test_the_plan_that_an_edge_would_build_is_built_from_the_bundle_alone(with_variants: Built) -> None:
    """With weights beside the graph, without onnx and without a rewrite."""
    bundle = Bundle.open(with_variants.path)
    for key, graph in bundle.manifest.graphs.items():
        request = Request(key, bundle.tensorrt_file(key), graph, Batches(1, 8, 32), TARGETS)
        assert len(plan_build.build_plan(load_builder(), request)[0]) > 1000


@pytest.mark.usefixtures("builder")
@pytest.mark.parametrize(
    ("text", "says"), [("9.9", "'9.9'"), ("8.6,x", "'x'"), ("", "no compute capability")]
)
def test_targets_that_the_builder_does_not_know_are_refused(text: str, says: str) -> None:
    with pytest.raises(OptionError, match=says) as refusal:
        parse_targets(text, load_builder())
    assert "8.6,8.9" in refusal.value.fix


@pytest.mark.usefixtures("builder")
def test_targets_are_read_in_their_order() -> None:
    assert parse_targets(" 8.9, 12.0 ", load_builder()) == ((8, 9), (12, 0))


def test_without_the_builder_nothing_is_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    wanted = dataclasses.replace(options("mlp", ("source",)), tensorrt=TARGETS)
    with pytest.raises(ExtraMissing, match=r"tta-runtime\[rtx\]"):
        build(NETWORKS["mlp"](), wanted, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("builder")
def test_a_graph_that_tensorrt_refuses_makes_no_bundle(tmp_path: Path) -> None:
    """Turing has no float32 products, so nothing is left of a build for it."""
    wanted = dataclasses.replace(options("mlp", ("source",)), tensorrt=((7, 5),))
    with pytest.raises(CheckFailed, match=r"graph forward: TensorRT's builder refuses it"):
        build(NETWORKS["mlp"](), wanted, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("builder")
@pytest.mark.parametrize("network", ["resnet", "vit"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "source"])
def test_every_step_builds(method: str, network: str, tmp_path: Path) -> None:
    if network == "vit" and method == "norm":
        pytest.skip("norm needs BatchNorm")
    if (method, network) in REFUSED:
        pytest.skip(f"refused for its {REFUSED[method, network]}")
    images = torch.rand([96, 3, 16, 16], generator=torch.Generator().manual_seed(4))
    settings = {method: SETTINGS[method]} if method in SETTINGS else {}
    wanted = dataclasses.replace(
        options(network, (method,), **settings),
        source_images=images,
        adapter="vida" if method == "vida" else "norm",
    )
    built = build(NETWORKS[network](), wanted, tmp_path / "bundle")
    for key, graph in built.manifest.graphs.items():
        assert build_plan(built.path, key, graph).plan_bytes > 0
