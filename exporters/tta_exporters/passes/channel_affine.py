"""One pass over an activation for ``x * s + b`` with a factor and a shift per channel, and for what follows it.

ONNX Runtime's CPU kernels run Mul, Add and Relu one after the other, each reading and writing the whole activation.
A 1x1 convolution with one group per channel says the same in one operator, and the runtime fuses the activation after
it into the same pass: three times as fast where memory is the limit, which it is in every normalisation layer.

- x * s + b becomes such a convolution; its weights are s, which may be computed at run time.
- The 0/1 gate of a ReLU's gradient, recomputed from the normalisation's input (see relu_masks), becomes the same
  convolution followed by a hard sigmoid so steep that every positive float32 is 1.

Neither changes a bit of the result: one product and one sum for each value, each rounded once.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tta_exporters.passes.values import per_channel, producer, read_only_by, take_place

STEEP = 1e38
"""Slope of the hard sigmoid: 1 from 1e-38 on, the smallest normal float32."""


def channel_affine(model: ir.Model) -> bool:
    """Rewrites every ``x * s + b`` and every recomputed gate over [N, C, H, W], in place; True if anything changed."""
    graph, modified = model.graph, False
    for node in list(graph):
        if node.op_type == "Add":
            modified |= _affine(graph, node)
        elif node.op_type == "Cast":
            modified |= _gate(graph, node)
    return modified


def _affine(graph: ir.Graph, add: ir.Node) -> bool:
    for product, shift in (add.inputs, add.inputs[::-1]):
        mul = product.producer() if product is not None else None
        if mul is None or mul.op_type != "Mul" or shift is None or not read_only_by(mul.outputs[0], add):
            continue
        found = _image_and_scale(mul)
        if found is None or not per_channel(shift):
            continue
        image, scale = found
        nodes = _convolution(image, scale, shift)
        graph.insert_before(add, nodes)
        take_place(nodes[-1].outputs[0], add.outputs[0])
        graph.remove([add, mul], safe=True)
        return True
    return False


def _gate(graph: ir.Graph, cast: ir.Node) -> bool:
    """Cast(x * (-s) < b) as a hard sigmoid of x * s + b."""
    less = producer(cast.inputs[0], "Less")
    mul = producer(less.inputs[0], "Mul") if less is not None else None
    shift = less.inputs[1] if less is not None else None
    if less is None or mul is None or shift is None:
        return False
    if not (read_only_by(mul.outputs[0], less) and read_only_by(less.outputs[0], cast)):
        return False
    found = _image_and_scale(mul)
    negation = producer(found[1], "Neg") if found is not None else None
    scale = negation.inputs[0] if negation is not None else None
    if found is None or scale is None or not per_channel(shift):
        return False
    nodes = _convolution(found[0], scale, shift)
    nodes.append(ir.node("HardSigmoid", [nodes[-1].outputs[0]], {"alpha": STEEP, "beta": 0.0}))
    graph.insert_before(cast, nodes)
    take_place(nodes[-1].outputs[0], cast.outputs[0])
    graph.remove([cast, less, mul], safe=True)
    return True


def _convolution(image: ir.Value, scale: ir.Value, shift: ir.Value) -> list[ir.Node]:
    channels = int(scale.shape[1])  # type: ignore[index,arg-type]
    weight, weight_nodes = _reshaped(scale, [channels, 1, 1, 1])
    bias, bias_nodes = _reshaped(shift, [channels])
    convolution = ir.node("Conv", [image, weight, bias], {"group": channels, "kernel_shape": [1, 1]})
    return [*weight_nodes, *bias_nodes, convolution]


def _reshaped(value: ir.Value, shape: list[int]) -> tuple[ir.Value, list[ir.Node]]:
    """The value in another shape, and the nodes that make it; none where it was reshaped from that shape before."""
    earlier = producer(value, "Reshape")
    origin = earlier.inputs[0] if earlier is not None else None
    if origin is not None and origin.shape is not None and list(origin.shape) == shape:
        return origin, []
    constant = ir.node("Constant", [], {"value": ir.tensor(np.array(shape))})
    node = ir.node("Reshape", [value, constant.outputs[0]])
    return node.outputs[0], [constant, node]


def _image_and_scale(mul: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    for image, scale in (mul.inputs, mul.inputs[::-1]):
        if image is None or scale is None or image.shape is None or len(image.shape) != 4:
            continue
        if per_channel(scale) and scale.shape is not None and image.shape[1] == scale.shape[1] != 1:
            return image, scale
    return None
