"""The inverse of channel_affine, for TensorRT: Mul and Add fuse there by themselves, and in half precision the steep
hard sigmoid would overflow.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tta_exporters.passes.channel_affine import STEEP
from tta_exporters.passes.values import take_place


def portable_affine(model: ir.Model) -> bool:
    """Rewrites every convolution that is a scale and shift per channel, and every gate; True if anything changed."""
    graph, modified = model.graph, False
    for node in list(graph):
        if node.op_type == "HardSigmoid" and node.attributes["alpha"].as_float() >= STEEP / 2:
            _gate(graph, node)
            modified = True
        elif node.op_type == "Conv" and len(node.inputs) == 3:
            modified |= _affine(graph, node)
    return modified


def _affine(graph: ir.Graph, convolution: ir.Node) -> bool:
    image, weight, bias = convolution.inputs
    channels = convolution.attributes["group"].as_int() if "group" in convolution.attributes else 1
    # Weights of the network are initializers; a scale is computed, or a piece of theta in another shape.
    if weight is None or weight.producer() is None or channels == 1:
        return False
    if list(convolution.attributes["kernel_shape"].as_ints()) != [1, 1]:
        return False
    axes = ir.node("Constant", [], {"value": ir.tensor(np.array([1, channels, 1, 1], dtype=np.int64))})
    scale = ir.node("Reshape", [weight, axes.outputs[0]])
    shift = ir.node("Reshape", [bias, axes.outputs[0]])
    product = ir.node("Mul", [image, scale.outputs[0]])
    total = ir.node("Add", [product.outputs[0], shift.outputs[0]])
    _replace(graph, convolution, [axes, scale, shift, product, total])
    return True


def _gate(graph: ir.Graph, sigmoid: ir.Node) -> None:
    source = sigmoid.inputs[0]
    zero = ir.node("Constant", [], {"value": ir.tensor(np.float32(0.0))})
    positive = ir.node("Greater", [source, zero.outputs[0]])
    gate = ir.node("Cast", [positive.outputs[0]], {"to": ir.DataType.FLOAT})
    _replace(graph, sigmoid, [zero, positive, gate])


def _replace(graph: ir.Graph, old: ir.Node, new: list[ir.Node]) -> None:
    for index, node in enumerate(new):
        node.name = f"{old.name}_{index}_{node.op_type}"
    graph.insert_before(old, new)
    take_place(new[-1].outputs[0], old.outputs[0])
    graph.remove(old, safe=True)
