"""Whether a bundle's graphs are TensorRT-ready, asked of the TensorRT-RTX parser and builder, which need no GPU."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from tta_exporters.errors import CheckFailed, ExtraMissing, in_one_line
from tta_exporters.passes.portable_affine import portable_affine
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
            f"the TensorRT-RTX builder cannot be loaded ({error})", "Run `pip install 'tta-runtime[rtx]'`"
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
    listener = _listener(trt)
    builder = trt.Builder(listener)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, listener)
    if not parser.parse(_lowered(key, path / graph.file)):
        raise CheckFailed(
            f"graph {key}: TensorRT's parser refuses {_parser_reasons(parser)}",
            "This graph runs on ONNX Runtime only; see docs/tensorrt.md",
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
        reason = _flat(listener.complaints[-1]) if listener.complaints else "it does not say why"
        raise CheckFailed(
            f"graph {key}: TensorRT's builder refuses it: {reason}",
            "This graph runs on ONNX Runtime only; see docs/tensorrt.md",
        )
    return TensorRtResult(key, int(plan.nbytes))


def _listener(trt: Any) -> Any:
    """A logger that is silent and keeps what TensorRT complains of: the builder tells its reasons to nobody else."""

    class Listener(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.complaints: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.complaints.append(message)

    return Listener()


def _lowered(key: str, file: Path) -> bytes:
    """The graph as TensorRT is given it: rewritten where it lacks an operator, weights inside."""
    try:
        model = ir.load(file)
        portable_max_pool(model)
        portable_affine(model)
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
        return bytes(ir.serde.serialize_model(model).SerializeToString())
    except Exception as error:
        # A bundle's graph may hold anything, and the reader has no error of its own.
        raise CheckFailed(
            f"graph {key} cannot be read: {in_one_line(error)}", "Build the bundle again"
        ) from error


def _parser_reasons(parser: Any) -> str:
    reasons = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = f"node {error.node_name() or 'without a name'} ({error.node_operator()})"
        # For an operator it does not know, the parser quotes the literal of its own assertion.
        why = "this operator is not supported" if error.desc() == "false" else _flat(error.desc())
        reasons.append(f"{where if error.node_operator() else 'the graph'}: {why}")
    return "; ".join(reasons[:3]) or "the graph"


def _flat(message: str) -> str:
    return " ".join(message.split())
