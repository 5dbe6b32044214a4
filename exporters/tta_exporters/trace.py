"""Tracing: a pure torch function, whatever it differentiates inside, becomes one flat graph of ATen operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.onnx._internal.exporter._registration import ONNXRegistry

from tta_exporters.errors import OperatorNotSupported, TraceFailed
from tta_exporters.lower import decompositions
from tta_exporters.operators import translations

BATCH: Mapping[int, str] = {0: "batch"}
"""The symbolic axes of an input whose first axis is the batch."""
EXAMPLE_BATCH = 5
"""Batch size of the example inputs; not 1 (torch would specialise on it) and no common number of channels."""


@dataclass(frozen=True)
class Argument:
    """One input of the traced function.

    Attributes:
        name: its name in the ONNX graph.
        example: a tensor of its dtype and shape.
        axes: those that stay symbolic, with their names; axes of one name are equally long.
    """

    name: str
    example: Tensor
    axes: Mapping[int, str] = field(default_factory=dict)


def trace(
    function: Callable[..., tuple[Tensor, ...]], arguments: Sequence[Argument], network: nn.Module
) -> fx.GraphModule:
    """Traces ``function`` with symbolic axes into core-ATen operators our lowering and ONNX have words for.

    Args:
        function: takes the arguments in order, returns a flat tuple of tensors. It may call torch.autograd.grad.
        arguments: its inputs.
        network: the module whose submodule paths name the origin of operators (``node.meta["module_path"]``).

    Raises:
        TraceFailed: the function cannot be traced: control flow that depends on data, or an operator torch cannot
            run without data; names the module being run.
    """
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    fakes = [
        mode.from_tensor(
            argument.example,
            symbolic_context=StatelessSymbolicContext(
                dynamic_sizes=[
                    DimDynamic.DYNAMIC if axis in argument.axes else DimDynamic.STATIC
                    for axis in range(argument.example.dim())
                ]
            ),
            source=ConstantSource(argument.name),
        )
        for argument in arguments
    ]
    paths = _ModulePaths(network)
    try:
        with paths, sdpa_kernel(SDPBackend.MATH):
            graph_module = make_fx(function, tracing_mode="fake", decomposition_table=decompositions())(
                *fakes
            )
    except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError, IndexError) as error:
        raise TraceFailed(paths.current, _first_line(error)) from error
    _check_batch_is_free(shapes)
    paths.annotate(graph_module)
    check_operators(graph_module)
    # In-place operators (relu_, add_) become functional in a second pass: functionalisation is a functorch
    # transform, and the first pass differentiates, which such a transform does not allow inside.
    return make_fx(
        torch.func.functionalize(graph_module, remove="mutations"),
        tracing_mode="fake",
        decomposition_table=decompositions(),
    )(*fakes)


def check_operators(graph_module: fx.GraphModule) -> None:
    """Refuses operators that the ONNX exporter has no translation for.

    Raises:
        OperatorNotSupported: names the first one and the module it came from.
    """
    registry = ONNXRegistry.from_torchlib()
    known = {*decompositions(), *torch.export.default_decompositions(), *translations()}
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        functional = _functional(node.target)
        if registry.is_registered(functional) or functional in known:
            continue
        raise OperatorNotSupported(
            str(node.target), node.meta.get("module_path", ""), "the ONNX exporter has no translation for it"
        )


def _functional(operator: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """The out-of-place twin of an in-place operator, else the operator itself."""
    name = operator._schema.name.split("::")[1]
    if not name.endswith("_") or not operator._schema.is_mutable:
        return operator
    packet = getattr(torch.ops.aten, name[:-1], None)
    return getattr(packet, operator._overloadname, operator) if packet is not None else operator


def _check_batch_is_free(shapes: ShapeEnv) -> None:
    """Refuses a graph that torch silently specialised to the example's sizes."""
    pinned = [str(value) for value in shapes.replacements.values() if value.is_number]
    if pinned:
        raise TraceFailed("", f"the batch size was fixed to {pinned[0]} by an operation of the model")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


class _ModulePaths:
    """Remembers which submodule was running when each node of the graph was recorded."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._stack: list[str] = []
        self._spans: list[tuple[int, int, str]] = []
        self._starts: list[int] = []
        self._hooks: list[Any] = []
        self.current = ""

    def __enter__(self) -> _ModulePaths:
        for path, module in self._network.named_modules():
            if path:
                self._hooks.append(module.register_forward_pre_hook(self._entering(path)))
                self._hooks.append(module.register_forward_hook(self._leaving))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _entering(self, path: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            self._stack.append(path)
            self.current = path
            self._starts.append(_recorded_nodes())

        return hook

    def _leaving(self, *_: object) -> None:
        path = self._stack.pop()
        self._spans.append((self._starts.pop(), _recorded_nodes(), path))
        self.current = self._stack[-1] if self._stack else ""

    def annotate(self, graph_module: fx.GraphModule) -> None:
        # Inner modules finish first, so the first span that covers a node is the deepest.
        for index, node in enumerate(graph_module.graph.nodes):
            for start, stop, path in self._spans:
                if start <= index < stop:
                    node.meta["module_path"] = path
                    break


def _recorded_nodes() -> int:
    mode = get_proxy_mode()
    return len(mode.tracer.graph.nodes) if mode is not None else 0
