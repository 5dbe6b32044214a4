"""Whether a bundle's graphs are TensorRT-ready, asked of the TensorRT-RTX parser and builder, which need no GPU."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from tta_exporters.errors import CheckFailed, ExtraMissing
from tta_exporters.passes.portable_max_pool import portable_max_pool
from tta_runtime.manifest import Graph

logger = logging.getLogger(__name__)

TARGET_SM = (8, 9)
"""Compute capability the plan is built for; the builder never sees a device."""
_BATCHES = (1, 16, 64)


@dataclass(frozen=True)
class TensorRtResult:
    """Outcome for one graph: plan size in bytes, or the reason why not."""

    graph: str
    plan_bytes: int
    reason: str = ""


def load_builder() -> Any:
    """The tensorrt_rtx module.

    Raises:
        ExtraMissing: it is not installed or its libraries cannot be loaded.
    """
    try:
        return importlib.import_module("tensorrt_rtx")
    except (ImportError, OSError) as error:
        raise ExtraMissing(
            f"the TensorRT-RTX builder cannot be loaded ({error})", "pip install 'tta-runtime[rtx]'"
        ) from error


def build_plan(path: Path, key: str, graph: Graph) -> TensorRtResult:
    """Parses and builds one graph of a bundle.

    Args:
        path: the bundle directory (external weights are resolved against it).
        key: the graph's key in the manifest.
        graph: its ports, for the optimisation profile of the dynamic batch.

    Raises:
        ExtraMissing: see :func:`load_builder`.
        CheckFailed: the parser or builder refuses the graph; names the node.
    """
    trt = load_builder()
    builder = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.INTERNAL_ERROR))
    if not parser.parse(_lowered(path / graph.file)):
        raise CheckFailed(
            f"graph {key}: TensorRT's parser refuses {_parser_reasons(parser)}",
            "this graph runs on ONNX Runtime only; see docs/tensorrt.md",
        )
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{TARGET_SM[0]}{TARGET_SM[1]}"), 0)
    profile = builder.create_optimization_profile()
    for port in graph.inputs:
        if "batch" in port.shape:
            profile.set_shape(
                port.name,
                *[[batch if axis == "batch" else axis for axis in port.shape] for batch in _BATCHES],
            )
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise CheckFailed(
            f"graph {key}: TensorRT parsed it but its builder failed",
            "run with --log-level debug for its messages",
        )
    return TensorRtResult(key, int(plan.nbytes))


def _lowered(file: Path) -> bytes:
    """The graph as TensorRT is given it: rewritten where it lacks an operator, weights inside."""
    model = ir.load(file)
    portable_max_pool(model)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    return bytes(ir.serde.serialize_model(model).SerializeToString())


def _parser_reasons(parser: Any) -> str:
    reasons = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = f"node {error.node_name()} ({error.node_operator()})" if error.node_name() else "the graph"
        reasons.append(f"{node}: {error.desc()}")
    return "; ".join(reasons[:3]) or "the graph"
