"""One graph of a bundle: traced, lowered, written, and described for the manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir
from torch import Tensor, nn

from tta_exporters.emit import emit
from tta_exporters.errors import NetworkRefused
from tta_exporters.trace import Argument, trace
from tta_exporters.weights import WeightsWriter
from tta_runtime import manifest

_DTYPES = {ir.DataType.FLOAT: "float32", ir.DataType.UINT8: "uint8", ir.DataType.INT64: "int64"}


def write_graph(
    key: str,
    role: str,
    function: Callable[..., tuple[Tensor, ...]],
    arguments: Sequence[Argument],
    outputs: Sequence[str],
    binds: Sequence[tuple[str, str]],
    network: nn.Module,
    work: Path,
    weights: WeightsWriter,
) -> manifest.Graph:
    """Traces, lowers and writes one graph.

    Args:
        key: its key in the manifest, and the stem of its file.
        role: see the manifest.
        function: what becomes the graph.
        arguments: its inputs.
        outputs: names of its outputs.
        binds: (bind, key) of the inputs, then of the outputs.
        network: names constants and the origin of operators.
        work: the bundle's directory.
        weights: takes the large constants.

    Raises:
        TraceFailed, OperatorNotSupported, NetworkRefused: the function cannot be a graph.
    """
    model = emit(trace(function, arguments, network), arguments, outputs, network)
    weights.externalise(model)
    file = f"{key}.onnx"
    ir.save(model, work / file)
    values = [*model.graph.inputs, *model.graph.outputs]
    bound = dict(zip([*(argument.name for argument in arguments), *outputs], binds, strict=True))
    ports = [_port(value, *bound[str(value.name)]) for value in values]
    count = len(model.graph.inputs)
    return manifest.Graph(file=file, role=role, inputs=ports[:count], outputs=ports[count:])


def _port(value: ir.Value, bind: str, key: str) -> manifest.Port:
    shape = value.shape
    if shape is None or value.dtype not in _DTYPES:
        raise NetworkRefused(
            f"graph value {value.name} has dtype {value.dtype} and shape {shape}",
            "Report this, with the network",
        )
    return manifest.Port(
        name=str(value.name),
        dtype=_DTYPES[value.dtype],
        shape=[axis if isinstance(axis, int) else str(axis.value or "free") for axis in shape],
        bind=bind,
        key=key,
    )
