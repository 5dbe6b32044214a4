"""Lets the backward pass of ReLU remember one byte, or nothing, per activation instead of the activation itself.

The gradient needs to know where the output was positive. Read from the output, that keeps every ReLU's output alive
from the forward to the backward pass, which doubles the memory of a step.

- After a batch normalisation y = c * s + b, whose centred input c is kept anyway, the mask is computed again: y > 0
  exactly where c * (-s) < b (rounding is symmetric, and a rounded sum is positive exactly where the sum is).
- Elsewhere (after a residual sum) the mask is made in the forward pass, which then uses it too: x * mask. Nothing else
  would make a runtime compute it before the backward pass asks for it.
"""

from __future__ import annotations

import onnx_ir as ir

from tta_exporters.passes.values import is_zero, per_channel, take_place


def relu_masks(model: ir.Model) -> bool:
    """Rewrites every ReLU whose output a backward mask reads, in place; True if anything changed."""
    modified = False
    for relu in [node for node in model.graph if node.op_type == "Relu"]:
        masks = [use.node for use in relu.outputs[0].uses() if use.node.op_type == "Greater" and use.idx == 0]
        for mask in masks:
            if is_zero(mask.inputs[1]):
                _recompute(relu, mask) or _store(relu, mask)
                modified = True
                break
    return modified


def _recompute(relu: ir.Node, mask: ir.Node) -> bool:
    """Y > 0 as c * (-s) < b; False unless the input is a batch normalisation's c * s + b."""
    source = relu.inputs[0]
    add = source.producer() if source is not None else None
    if add is None or add.op_type != "Add":
        return False
    product, bias = add.inputs
    mul = product.producer() if product is not None else None
    if mul is None or mul.op_type != "Mul" or bias is None:
        return False
    centred, scale = mul.inputs
    if centred is None or scale is None or not (per_channel(scale) and per_channel(bias)):
        return False
    if not any(use.node is not mul for use in centred.uses()):
        # The centred input does not outlive the forward pass, so reading it again would save nothing.
        return False
    negated = ir.node("Neg", [scale])
    negated.outputs[0].shape = scale.shape
    again = ir.node("Mul", [centred, negated.outputs[0]])
    less = ir.node("Less", [again.outputs[0], bias])
    _replace(mask, [negated, again, less])
    return True


def _store(relu: ir.Node, mask: ir.Node) -> bool:
    source, zero = relu.inputs[0], mask.inputs[1]
    greater = ir.node("Greater", [source, zero])
    gate = ir.node("Cast", [greater.outputs[0]], {"to": ir.DataType.FLOAT})
    product = ir.node("Mul", [source, gate.outputs[0]])
    graph = relu.graph
    if graph is None:
        return False
    graph.insert_before(relu, [greater, gate, product])
    mask.outputs[0].replace_all_uses_with(greater.outputs[0])
    take_place(product.outputs[0], relu.outputs[0])
    graph.remove([mask, relu], safe=True)
    return True


def _replace(old: ir.Node, new: list[ir.Node]) -> None:
    graph = old.graph
    if graph is None:
        return
    graph.insert_before(old, new)
    old.outputs[0].replace_all_uses_with(new[-1].outputs[0])
    graph.remove(old, safe=True)
