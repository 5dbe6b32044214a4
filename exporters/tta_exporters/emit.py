"""From a traced graph to an ONNX graph in memory, with names, a symbolic batch and nothing superfluous."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence

import onnx_ir as ir
import torch
from onnx_ir.passes import common as ir_passes
from onnxscript.optimizer import fold_constants as fold_onnx_constants
from torch import fx, nn
from torch.onnx._internal.exporter._errors import ConversionError

from tta_exporters.errors import OperatorNotSupported
from tta_exporters.operators import translations
from tta_exporters.passes.channel_affine import channel_affine
from tta_exporters.passes.drop_noops import drop_noops
from tta_exporters.passes.fold_constants import fold_constants
from tta_exporters.passes.merge_constants import merge_constants
from tta_exporters.passes.pool_first import pool_first
from tta_exporters.passes.relu_masks import relu_masks
from tta_exporters.trace import Argument

OPSET = 20
"""The first opset with Gelu as one operator; ONNX Runtime reads it since 1.17."""


def emit(
    graph_module: fx.GraphModule,
    arguments: Sequence[Argument],
    outputs: Sequence[str],
    network: nn.Module,
) -> ir.Model:
    """Translates a traced graph to ONNX.

    Args:
        graph_module: what :func:`tta_exporters.trace.trace` returned; changed in place.
        arguments: the inputs it was traced with.
        outputs: names of its outputs, in order.
        network: gives constants the names of the parameters they are.

    Raises:
        OperatorNotSupported: an operator has no ONNX translation.
    """
    drop_noops(graph_module)
    fold_constants(graph_module)
    graph_module.eval()
    names = {name for argument in arguments for name in argument.axes.values()}
    sizes = {name: torch.export.Dim(name, min=1, max=65536) for name in names}
    try:
        with _quiet():
            program = torch.onnx.export(
                graph_module,
                tuple(argument.example for argument in arguments),
                dynamo=True,
                dynamic_shapes=tuple(
                    {axis: sizes[name] for axis, name in argument.axes.items()} or None
                    for argument in arguments
                ),
                input_names=[argument.name for argument in arguments],
                output_names=list(outputs),
                opset_version=OPSET,
                custom_translation_table=translations(),
                verbose=False,
                optimize=False,
            )
    except ConversionError as error:
        raise OperatorNotSupported("unknown", "", _cause(error)) from error
    if program is None:
        raise OperatorNotSupported("unknown", "", "the exporter returned nothing")
    model = program.model
    _clean(model)
    _name_constants(model, graph_module, network)
    return model


def _clean(model: ir.Model) -> None:
    """Folds small constants, merges equal expressions, drops what nobody reads and all debugging text."""
    fold_onnx_constants(model)
    ir_passes.IdentityEliminationPass()(model)
    merge_constants(model)
    before: tuple[ir.passes.PassBase, ...] = (
        ir_passes.CommonSubexpressionEliminationPass(),
        ir_passes.RemoveUnusedNodesPass(),
    )
    for step in before:
        step(model)
    # After common subexpressions are merged: this pass repeats small computations on purpose.
    pool_first(model)
    relu_masks(model)
    channel_affine(model)
    after: tuple[ir.passes.PassBase, ...] = (
        ir_passes.RemoveUnusedNodesPass(),
        ir_passes.RemoveUnusedOpsetsPass(),
        ir_passes.ClearMetadataAndDocStringPass(),
        ir_passes.TopologicalSortPass(),
    )
    for step in after:
        step(model)
    model.functions.clear()
    for index, node in enumerate(model.graph):
        node.name = f"{index:04d}_{node.op_type}"


def _name_constants(model: ir.Model, graph_module: fx.GraphModule, network: nn.Module) -> None:
    """Names initializers after the parameters they hold; derived ones keep the tracer's name."""
    owners = {tensor.data_ptr(): name for name, tensor in network.state_dict().items() if tensor.numel() > 1}
    for name in list(model.graph.initializers):
        value = model.graph.initializers[name]
        tensor = getattr(graph_module, name, None)
        owner = owners.get(tensor.data_ptr()) if isinstance(tensor, torch.Tensor) else None
        if owner is not None and f"frozen.{owner}" not in model.graph.initializers:
            value.name = f"frozen.{owner}"


def _cause(error: BaseException) -> str:
    """The innermost reason the exporter gives, one line."""
    reason: BaseException = error
    while reason.__cause__ is not None:
        reason = reason.__cause__
    lines = [line for line in str(reason).splitlines() if line.strip()]
    return lines[0] if lines else type(reason).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's advice to its own developers away from users."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
