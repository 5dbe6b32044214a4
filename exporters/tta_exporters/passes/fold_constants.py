"""Computes at build time what depends on constants alone, e.g. the flipped kernels of the backward pass.

ONNX-level folding has a size limit and would leave the kernels of a large network to be flipped on every step.
"""

from __future__ import annotations

import torch
from torch import fx


def fold_constants(graph_module: fx.GraphModule) -> bool:
    """Replaces operators whose every tensor input is a constant of the graph, in place; True if anything changed."""
    constants: dict[fx.Node, torch.Tensor] = {}
    folded: list[fx.Node] = []
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            value = getattr(graph_module, str(node.target))
            if isinstance(value, torch.Tensor):
                constants[node] = value.detach()
        elif node.op == "call_function" and _foldable(node, constants):
            with torch.no_grad():
                constants[node] = node.target(
                    *fx.map_arg(node.args, constants.__getitem__),
                    **fx.map_arg(node.kwargs, constants.__getitem__),
                )
            folded.append(node)
    needed = [node for node in folded if any(user not in constants for user in node.users)]
    for index, node in enumerate(needed):
        name = f"_folded_{index}"
        graph_module.register_buffer(name, constants[node].contiguous())
        with graph_module.graph.inserting_before(node):
            replacement = graph_module.graph.get_attr(name)
        replacement.meta = dict(node.meta)
        node.replace_all_uses_with(replacement)
    if needed:
        graph_module.graph.eliminate_dead_code()
        graph_module.recompile()
    return bool(needed)


def _foldable(node: fx.Node, constants: dict[fx.Node, torch.Tensor]) -> bool:
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and bool(node.all_input_nodes)
        and all(source in constants for source in node.all_input_nodes)
        and isinstance(node.meta.get("val"), torch.Tensor)
    )
