"""Max pooling right after the first normalisation: pool first, then normalise a quarter of the values.

Scale, shift and ReLU rise or fall monotonically with the centred activation c, one direction per channel, so

    maxpool(relu(c * s + b)) = relu(p * s + b)   with   p = sign(s) * maxpool(sign(s) * c).

And where no gradient goes on to the network's input, the backward pass wants two sums over each channel, of the
gradient and of its product with c. Each window sends its gradient to one position, whose c is p: the sums need neither
indices nor the gradient in full size. That spares MaxPool's slow kernel with indices, the scatter that adds, and all
element-wise work on the largest activation of an image network; c need not live until the backward pass either.

Where s is exactly 0, every position of a window ties, and p is the largest c where torch takes the first: both are
subgradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from tta_exporters.passes.values import is_zero, per_channel, producer, read_only_by, take_place


def pool_first(model: ir.Model) -> bool:
    """Rewrites every such pooling, in place; True if anything changed."""
    modified = False
    for pool in [node for node in model.graph if node.op_type == "MaxPool" and len(node.outputs) == 2]:
        found = _match(pool)
        if found is not None:
            _rewrite(model.graph, found)
            modified = True
    return modified


@dataclass(frozen=True)
class _Match:
    """The pieces of one normalisation, ReLU and pooling, with its backward pass.

    Attributes:
        pool: the MaxPool node.
        centred: [N, C, H, W].
        scale: [1, C, 1, 1].
        shift: [1, C, 1, 1].
        gradient: of the pooled values, [N, C, h, w].
        mean: the node that averages the full-size gradient over all axes but the channel.
        mean_dot: the node that averages its product with ``centred``.
        share: windows for each position: h * w / (H * W).
    """

    pool: ir.Node
    centred: ir.Value
    scale: ir.Value
    shift: ir.Value
    gradient: ir.Value
    mean: ir.Node
    mean_dot: ir.Node
    share: float


def _match(pool: ir.Node) -> _Match | None:
    relu = producer(pool.inputs[0], "Relu")
    add = producer(relu.inputs[0], "Add") if relu is not None else None
    mul = producer(add.inputs[0], "Mul") if add is not None else None
    if relu is None or add is None or mul is None:
        return None
    (centred, scale), shift = mul.inputs, add.inputs[1]
    if centred is None or scale is None or shift is None or not (per_channel(scale) and per_channel(shift)):
        return None
    # Backward: indices -> Reshape -> ScatterElements(flat gradient) -> Reshape -> times the ReLU's gate.
    scatter = _next(_next(pool.outputs[1], "Reshape"), "ScatterElements")
    flat = scatter.inputs[2] if scatter is not None else None
    flattened = producer(flat, "Reshape")
    full = _next(scatter.outputs[0], "Reshape") if scatter is not None else None
    gated = _next(full.outputs[0], "Mul") if full is not None else None
    gradient = flattened.inputs[0] if flattened is not None else None
    if full is None or gated is None or gradient is None:
        return None
    gate = next((value for value in gated.inputs if value is not full.outputs[0]), None)
    mask = producer(_input_of(gate, "Cast"), "Greater")
    if mask is None or mask.inputs[0] is not relu.outputs[0] or not is_zero(mask.inputs[1]):
        return None
    dot = next((use.node for use in gated.outputs[0].uses() if use.node.op_type == "Mul"), None)
    mean = next((use.node for use in gated.outputs[0].uses() if use.node.op_type == "ReduceMean"), None)
    mean_dot = _next(dot.outputs[0], "ReduceMean") if dot is not None else None
    if dot is None or mean is None or mean_dot is None or centred not in dot.inputs:
        return None
    if not (read_only_by(relu.outputs[0], pool, mask) and read_only_by(gated.outputs[0], mean, dot)):
        return None
    sizes = [
        [axis for axis in list(value.shape)[2:] if isinstance(axis, int)] if value.shape is not None else []
        for value in (centred, pool.outputs[0])
    ]
    if any(len(size) != 2 for size in sizes):
        return None
    share = float(np.prod(sizes[1]) / np.prod(sizes[0]))
    return _Match(pool, centred, scale, shift, gradient, mean, mean_dot, share)


def _rewrite(graph: ir.Graph, match: _Match) -> None:
    pool, backward = match.pool, match.mean

    def node(kind: str, *inputs: ir.Value, like: ir.Value | None = None, **attributes: object) -> ir.Node:
        made = ir.node(kind, list(inputs), attributes)  # type: ignore[arg-type]
        if like is not None:
            made.outputs[0].shape, made.outputs[0].type = like.shape, like.type
        return made

    def number(value: float) -> ir.Node:
        return node("Constant", value=ir.tensor(np.float32(value)))

    def after(anchor: ir.Node, *made: ir.Node) -> None:
        graph.insert_before(anchor, list(made))

    zero, one, minus = number(0.0), number(1.0), number(-1.0)
    falls = node("Less", match.scale, zero.outputs[0])
    sign = node("Where", falls.outputs[0], minus.outputs[0], one.outputs[0], like=match.scale)
    rising = node("Mul", match.centred, sign.outputs[0], like=match.centred)
    pooled = node("MaxPool", rising.outputs[0], like=pool.outputs[0])
    pooled.attributes.update(pool.attributes)
    centred = node("Mul", pooled.outputs[0], sign.outputs[0], like=pool.outputs[0])
    product = node("Mul", centred.outputs[0], match.scale, like=pool.outputs[0])
    total = node("Add", product.outputs[0], match.shift, like=pool.outputs[0])
    relu = node("Relu", total.outputs[0])
    after(pool, zero, one, minus, falls, sign, rising, pooled, centred, product, total, relu)
    take_place(relu.outputs[0], pool.outputs[0])

    mask = node("Greater", relu.outputs[0], zero.outputs[0], like=None)
    gate = node("Cast", mask.outputs[0], to=ir.DataType.FLOAT)
    gated = node("Mul", match.gradient, gate.outputs[0], like=match.gradient)
    dot = node("Mul", gated.outputs[0], centred.outputs[0], like=match.gradient)
    share = number(match.share)
    after(backward, mask, gate, gated, dot, share)
    for old, source in ((match.mean, gated), (match.mean_dot, dot)):
        mean = node("ReduceMean", source.outputs[0], *[v for v in old.inputs[1:] if v is not None], like=None)
        mean.attributes.update(old.attributes)
        scaled = node("Mul", mean.outputs[0], share.outputs[0])
        after(backward if old is match.mean else old, mean, scaled)
        take_place(scaled.outputs[0], old.outputs[0])


def _next(value: ir.Value | ir.Node | None, kind: str) -> ir.Node | None:
    """The only reader of a value (of a node's first output), if it is of that kind."""
    value = value.outputs[0] if isinstance(value, ir.Node) else value
    readers = {use.node for use in value.uses()} if value is not None else set()
    node = next(iter(readers), None)
    alone = value is not None and node is not None and node.op_type == kind and read_only_by(value, node)
    return node if alone else None


def _input_of(value: ir.Value | None, kind: str) -> ir.Value | None:
    """The first input of the node of that kind that makes the value."""
    node = producer(value, kind)
    return node.inputs[0] if node is not None else None
