"""Graphs as TensorRT is given them, and whether its parser and builder take them; neither needs a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from tta_exporters.errors import CheckFailed, ExtraMissing, OptionError, in_one_line
from tta_exporters.passes.portable_affine import portable_affine
from tta_exporters.passes.portable_max_pool import portable_max_pool
from tta_runtime import plan_build, trt_library
from tta_runtime.errors import EngineMissing, PlanRefused
from tta_runtime.manifest import Graph
from tta_runtime.plan_build import Capability, Request
from tta_runtime.trt_library import RTX, TrtLibrary

TARGETS: tuple[Capability, ...] = ((8, 6), (8, 9), (12, 0))
"""Compute capabilities that graphs are built for unless others are named: RTX 30, 40 and 50, and workstation kin."""


@dataclass(frozen=True)
class TensorRtResult:
    """A graph that was built: the size of its plan for all targets together."""

    graph: str
    plan_bytes: int


def load_builder() -> TrtLibrary:
    """TensorRT for RTX, whose builder needs no GPU.

    Raises:
        ExtraMissing: it is not installed, too old, or its libraries cannot be loaded.
    """
    try:
        return trt_library.load([RTX])
    except EngineMissing as error:
        raise ExtraMissing(
            f"the TensorRT-RTX builder cannot be used: {error.cause}", "Run `pip install 'tta-runtime[rtx]'`"
        ) from error


def parse_targets(text: str, library: TrtLibrary) -> tuple[Capability, ...]:
    """Compute capabilities from e.g. "8.6,8.9".

    Raises:
        OptionError: one is not of that form, or the builder does not know it.
    """
    known = library.capabilities()
    names = {f"{major}.{minor}": (major, minor) for major, minor in known}
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    if strangers := [part for part in wanted if part not in names]:
        raise OptionError(
            f"compute capability {strangers[0]!r} is not one that {library.name} builds for",
            f"Choose from {','.join(names)}",
        )
    if not wanted:
        raise OptionError("no compute capability is named", f"Choose from {','.join(names)}")
    return tuple(names[part] for part in wanted)


def build_plan(path: Path, key: str, graph: Graph, targets: Sequence[Capability] = TARGETS) -> TensorRtResult:
    """Parses and builds one graph of a bundle, in its TensorRT variant if there is one; the plan is thrown away.

    Args:
        path: the bundle directory (external weights are resolved against it).
        key: the graph's key in the manifest.
        graph: its file and ports.
        targets: compute capabilities that the plan must be good for.

    Raises:
        ExtraMissing: see :func:`load_builder`.
        CheckFailed: the parser or builder refuses the graph; names the node.
    """
    source = _rewritten(key, path / graph.file) if graph.tensorrt is None else path / graph.tensorrt
    try:
        plan, _ = plan_build.build_plan(load_builder(), Request(key, source, graph, capabilities=targets))
    except PlanRefused as error:
        raise CheckFailed(error.cause, error.fix) from error
    return TensorRtResult(key, len(plan))


def rewrite(model: ir.Model) -> None:
    """Replaces what TensorRT lacks, in place; inputs, outputs and weights stay."""
    portable_max_pool(model)
    portable_affine(model)


def _rewritten(key: str, file: Path) -> bytes:
    """The graph as TensorRT is given it, weights inside."""
    try:
        model = ir.load(file)
        rewrite(model)
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
        return bytes(ir.serde.serialize_model(model).SerializeToString())
    except Exception as error:
        # A bundle's graph may hold anything, and the reader has no error of its own.
        raise CheckFailed(
            f"graph {key} cannot be read: {in_one_line(error)}", "Build the bundle again"
        ) from error
