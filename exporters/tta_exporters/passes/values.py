"""What several graph rewrites need: one value taking another's place, a shape or a constant recognised."""

from __future__ import annotations

import onnx_ir as ir


def take_place(new: ir.Value, old: ir.Value) -> None:
    """Lets ``new`` stand wherever ``old`` stood, graph outputs included, under its name, shape and type."""
    new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    name, old.name = old.name, None
    new.name = name


def per_channel(value: ir.Value) -> bool:
    """Whether it is a [1, C, 1, ...] tensor: small beside an activation."""
    shape = value.shape
    return shape is not None and len(shape) > 1 and shape[0] == 1 and all(axis == 1 for axis in shape[2:])


def producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node that makes the value, if it is of that kind."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind else None


def is_zero(value: ir.Value | None) -> bool:
    """Whether it is the constant 0."""
    tensor = None if value is None else value.const_value
    if tensor is None:
        constant = producer(value, "Constant")
        if constant is not None and "value" in constant.attributes:
            tensor = constant.attributes["value"].as_tensor()
    return tensor is not None and tensor.size == 1 and float(tensor.numpy().reshape(-1)[0]) == 0.0


def read_only_by(value: ir.Value, *nodes: ir.Node) -> bool:
    """Whether these nodes, and nobody else, read the value; a graph's output is read by the caller as well."""
    return not value.is_graph_output() and {use.node for use in value.uses()} == set(nodes)
