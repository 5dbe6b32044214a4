"""Real architectures at their real sizes: each exports, agrees with float64 over 20 steps, runs at any batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared_data import shared_data
from tta_exporters.build import BuildOptions, InputOptions, build
from tta_exporters.check import check_bundle, example_batch
from tta_exporters.parity import eager, parity, reference
from tta_exporters.sources import load_network
from tta_exporters.tensorrt import TARGETS
from tta_runtime import Model

ROOT = Path(__file__).resolve().parent.parent
CIFAR = f"{ROOT}/examples/cifar10/models.py"

ZOO = {
    "resnet20": (f"{CIFAR}:resnet20", 32, 10),
    "resnet56": (f"{CIFAR}:resnet56", 32, 10),
    "resnet18": ("torchvision:resnet18", 224, 1000),
    "resnet50": ("torchvision:resnet50", 224, 1000),
    "mobilenet_v2": ("torchvision:mobilenet_v2", 224, 1000),
    "vit_tiny": ("timm:vit_tiny_patch16_224", 224, 1000),
    "convnext_atto": ("timm:convnext_atto", 224, 1000),
    "resnet50_gn": ("timm:resnet50_gn", 224, 1000),
}
DATA_ZOO = {
    "resnet8_bn": "cifar10_resnet8_bn",
    "resnet8_gn": "cifar10_resnet8_gn",
    "convvit_ln": "cifar10_convvit_ln",
    "resnet26w32_bn": "cifar10_resnet26w32_bn",
}
BATCH = 2


def exports(source: str, size: int, classes: int, weights: Path | None, out: Path) -> None:
    network = load_network(source, weights)
    options = BuildOptions("zoo", InputOptions((3, size, size)), classes, ["source", "tent"])
    built = build(network, options, out)
    model = Model.open(out, method="tent")
    # Random weights at 224 pixels: the batch of a step is small, for float64 on a CPU is slow.
    batches = [example_batch(built.manifest.input, 4 if size == 32 else BATCH, seed) for seed in range(20)]
    oracle, yardstick = reference(network, options, "tent"), eager(network, options, "tent")
    report = parity(model, oracle, batches, yardstick)
    print(f"{source.rsplit('/', 1)[-1]}: worst {report.worst}", flush=True)
    report.require()
    failed = [check for check in check_bundle(out) if not check.ok]
    assert not failed


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_architecture(name: str, tmp_path: Path) -> None:
    source, size, classes = ZOO[name]
    exports(source, size, classes, None, tmp_path / "bundle")


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA_ZOO)
def test_trained_weights(name: str, tmp_path: Path) -> None:
    root = shared_data()
    if root is None:
        pytest.skip("no shared data: set TTA_SHARED_DATA or provide ../shared/data")
    weights = root / "weights" / f"{DATA_ZOO[name]}.safetensors"
    exports(f"{root}/weights/models.py:{name}", 32, 10, weights, tmp_path / "bundle")


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_tensorrt_builds_serve_and_tent_step(name: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")
    source, size, classes = ZOO[name]
    options = BuildOptions(name, InputOptions((3, size, size)), classes, ["source", "tent"])
    path = build(load_network(source), options, tmp_path / "bundle").path
    results = [check for check in check_bundle(path, tensorrt=TARGETS) if check.check == "tensorrt"]
    assert [check.graph for check in results] == ["forward", "step.tent"]
    assert all(check.ok for check in results), results
