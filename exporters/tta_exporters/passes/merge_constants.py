"""Lets equal small constants be one, so that the expressions that read them are seen to be equal too."""

from __future__ import annotations

import onnx_ir as ir


def merge_constants(model: ir.Model) -> bool:
    """Replaces every Constant of the same type, shape and bytes by the first, in place; True if anything changed."""
    first: dict[tuple[ir.DataType, tuple[object, ...], bytes], ir.Value] = {}
    modified = False
    for node in list(model.graph):
        if node.op_type != "Constant" or "value" not in node.attributes:
            continue
        tensor = node.attributes["value"].as_tensor()
        key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
        kept = first.setdefault(key, node.outputs[0])
        if kept is node.outputs[0] or node.outputs[0].is_graph_output():
            continue
        node.outputs[0].replace_all_uses_with(kept)
        model.graph.remove(node, safe=True)
        modified = True
    return modified
