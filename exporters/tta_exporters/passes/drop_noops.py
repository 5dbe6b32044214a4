"""Removes operators that change nothing in a functional graph: alias, detach, clone, a cast to the same dtype."""

from __future__ import annotations

import torch
from torch import fx

_ALWAYS = {torch.ops.aten.alias.default, torch.ops.aten.detach.default, torch.ops.aten.clone.default}


def drop_noops(graph_module: fx.GraphModule) -> bool:
    """Replaces every no-op by its input, in place; True if anything changed."""
    modified = False
    for node in list(graph_module.graph.nodes):
        if node.target is torch.ops.aten.view.default:
            # A view demands strides that a dropped clone guaranteed; ONNX has no strides and one Reshape for both.
            node.target = torch.ops.aten.reshape.default
            modified = True
        if node.op != "call_function" or not (node.target in _ALWAYS or _same_dtype_copy(node)):
            continue
        node.replace_all_uses_with(node.args[0])
        graph_module.graph.erase_node(node)
        modified = True
    if modified:
        graph_module.recompile()
    return modified


def _same_dtype_copy(node: fx.Node) -> bool:
    if node.target is not torch.ops.aten._to_copy.default:
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and source.meta["val"].dtype == node.meta["val"].dtype
