"""Max pooling and its gradient without what TensorRT lacks: a MaxPool with indices, a ScatterElements that adds.

On a CPU the indices are the cheaper way, so bundles carry them; this rewrite is what TensorRT is given.

For every position o of the window, in scan order: the strided slice x_o of the padded input is compared with the
maximum; the first equal position wins (torch's and ONNX's rule for ties); its share of the gradient goes back through a
depthwise transposed convolution whose kernel is 1 at o.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from tta_exporters.passes.values import take_place

_LOWEST = np.float32(np.finfo(np.float32).min)


def portable_max_pool(model: ir.Model) -> bool:
    """Rewrites every MaxPool whose indices are read, in place; True if anything changed."""
    modified = False
    for pool in [node for node in model.graph if node.op_type == "MaxPool" and len(node.outputs) == 2]:
        scatter = _scatter_of(pool)
        if scatter is not None:
            _rewrite(model.graph, pool, scatter)
            modified = True
    if modified:
        ir_passes.RemoveUnusedNodesPass()(model)
        model.graph.sort()
    return modified


def _scatter_of(pool: ir.Node) -> ir.Node | None:
    """The ScatterElements that sends gradients to the pool's indices, through a Reshape."""
    for use in pool.outputs[1].uses():
        for inner in use.node.outputs[0].uses() if use.node.op_type == "Reshape" else ():
            if inner.node.op_type == "ScatterElements" and inner.idx == 1:
                return inner.node
    return None


@dataclass
class _Emitter:
    """Inserts nodes before an anchor and names constants."""

    graph: ir.Graph
    anchor: ir.Node
    count: int = 0

    def __call__(self, kind: str, inputs: Sequence[ir.Value], **attributes: object) -> ir.Value:
        node = ir.node(kind, list(inputs), attributes)  # type: ignore[arg-type]
        node.name = f"{self.anchor.name}_{self.count:03d}_{kind}"
        self.count += 1
        self.graph.insert_before(self.anchor, node)
        return node.outputs[0]

    def constant(self, value: np.ndarray) -> ir.Value:
        node = ir.node("Constant", [], {"value": ir.tensor(value)})
        node.name = f"{self.anchor.name}_{self.count:03d}_Constant"
        self.count += 1
        self.graph.insert_before(self.anchor, node)
        return node.outputs[0]

    def ints(self, values: Sequence[int]) -> ir.Value:
        return self.constant(np.array(values, dtype=np.int64))


def _static(shape: ir.Shape) -> list[int]:
    """The axes after the batch."""
    return [axis for axis in list(shape)[1:] if isinstance(axis, int)]


def _rewrite(graph: ir.Graph, pool: ir.Node, scatter: ir.Node) -> None:
    x, y = pool.inputs[0], pool.outputs[0]
    flat_gradient = scatter.inputs[2]
    reshape = flat_gradient.producer() if flat_gradient is not None else None
    finish = next(iter(scatter.outputs[0].uses())).node
    if x is None or x.shape is None or y.shape is None or reshape is None or reshape.inputs[0] is None:
        return
    emit = _Emitter(graph, scatter)
    kernel = list(pool.attributes["kernel_shape"].as_ints())
    step = list(pool.attributes["strides"].as_ints())
    pads = list(pool.attributes["pads"].as_ints())
    channels, *lengths = _static(x.shape)
    _, *outputs = _static(y.shape)
    covered = [(output - 1) * s + k for output, s, k in zip(outputs, step, kernel, strict=True)]
    after = [max(total - length - pad, 0) for total, length, pad in zip(covered, lengths, pads, strict=False)]
    padded = emit(
        "Pad",
        [x, emit.ints([0, 0, pads[0], pads[1], 0, 0, after[0], after[1]]), emit.constant(np.array(_LOWEST))],
    )
    gradient = reshape.inputs[0]
    axes, steps = emit.ints([2, 3]), emit.ints(step)
    free: ir.Value | None = None
    total: ir.Value | None = None
    for row in range(kernel[0]):
        for column in range(kernel[1]):
            starts = [row, column]
            ends = [
                start + (output - 1) * s + 1 for start, output, s in zip(starts, outputs, step, strict=True)
            ]
            candidate = emit("Slice", [padded, emit.ints(starts), emit.ints(ends), axes, steps])
            equal = emit("Equal", [candidate, y])
            chosen = equal if free is None else emit("And", [equal, free])
            other = emit("Not", [equal])
            free = other if free is None else emit("And", [free, other])
            share = emit("Mul", [gradient, emit("Cast", [chosen], to=ir.DataType.FLOAT)])
            one = np.zeros([channels, 1, *kernel], dtype=np.float32)
            one[:, :, row, column] = 1.0
            placed = emit("ConvTranspose", [share, emit.constant(one)], strides=step, group=channels)
            total = placed if total is None else emit("Add", [total, placed])
    if total is None:
        return
    missing = [max(length + pad - size, 0) for length, pad, size in zip(lengths, pads, covered, strict=False)]
    if any(missing):
        total = emit("Pad", [total, emit.ints([0, 0, 0, 0, 0, 0, *missing])])
    ends = [pad + length for pad, length in zip(pads, lengths, strict=False)]
    result = emit("Slice", [total, emit.ints(pads[:2]), emit.ints(ends), axes])
    take_place(result, finish.outputs[0])
    single = ir.node("MaxPool", [x], dict(pool.attributes.items()))
    single.name = pool.name
    graph.insert_before(pool, single)
    take_place(single.outputs[0], y)
