"""Every method's step through TensorRT's parser and builder, on a network with BatchNorm and one with LayerNorm.

What is refused stands in docs/gpu.md, and nothing else may be.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from exported import options
from networks import NETWORKS
from tta_adapters import METHODS
from tta_exporters.build import build
from tta_exporters.tensorrt import build_plan

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


@pytest.mark.slow
@pytest.mark.parametrize("network", ["resnet", "vit"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "source"])
def test_every_step_builds(method: str, network: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")
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
