"""Graph rewrites: each changes what it should, says so, and leaves the numbers alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import fx

from tta_exporters.passes.drop_noops import drop_noops
from tta_exporters.passes.fold_constants import fold_constants
from tta_exporters.passes.portable_max_pool import portable_max_pool
from tta_exporters.passes.relu_masks import relu_masks

AFTER_BATCH_NORM = """
<ir_version: 8, opset_import: ["" : 18]>
agraph (float[N,4,3,3] x, float[1,4,1,1] s, float[1,4,1,1] b, float[N,4,3,3] dy)
    => (float[N,4,3,3] y, float[N,4,3,3] dx, float[N,4,3,3] kept)
{
  zero = Constant <value = float {0.0}> ()
  half = Constant <value = float {0.5}> ()
  c = Sub (x, half)
  scaled = Mul (c, s)
  affine = Add (scaled, b)
  y = Relu (affine)
  mask = Greater (y, zero)
  gate = Cast <to = 1> (mask)
  dx = Mul (dy, gate)
  kept = Mul (dx, c)
}
"""

AFTER_A_SUM = """
<ir_version: 8, opset_import: ["" : 18]>
agraph (float[N,4,3,3] x, float[N,4,3,3] r, float[N,4,3,3] dy) => (float[N,4,3,3] y, float[N,4,3,3] dx)
{
  zero = Constant <value = float {0.0}> ()
  sum = Add (x, r)
  y = Relu (sum)
  mask = Greater (y, zero)
  gate = Cast <to = 1> (mask)
  dx = Mul (dy, gate)
}
"""

INFERENCE_ONLY = """
<ir_version: 8, opset_import: ["" : 18]>
agraph (float[N] x) => (float[N] y) { y = Relu (x) }
"""


def load(text: str) -> ir.Model:
    model = onnx.parser.parse_model(text)
    onnx.checker.check_model(model, full_check=True)
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model))


def operators(model: ir.Model) -> list[str]:
    return sorted(node.op_type for node in model.graph if node.op_type != "Constant")


def run(model: ir.Model, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, feed))


@pytest.mark.parametrize(
    ("text", "inputs", "expected"),
    [
        (AFTER_BATCH_NORM, {"x": 4, "s": 0, "b": 0, "dy": 4}, ["Neg", "Less"]),
        (AFTER_A_SUM, {"x": 4, "r": 4, "dy": 4}, ["Greater", "Cast"]),
    ],
)
def test_relu_masks_give_the_same_numbers(text: str, inputs: dict[str, int], expected: list[str]) -> None:
    generator = np.random.default_rng(1)
    feed = {
        name: generator.standard_normal((2, 4, 3, 3) if kind else (1, 4, 1, 1)).astype(np.float32).round(1)
        for name, kind in inputs.items()
    }
    if "s" in feed:
        # A negative and a zero scale, and outputs that are exactly zero: where a recomputed sign could slip.
        feed["s"][0, :2] = [[[-1.5]], [[0.0]]]
        feed["b"][0, 1] = 0.0
        feed["b"][0, 2] = (feed["s"] * (0.5 - feed["x"]))[0, 2, 0, 0]
    before, model = run(load(text), feed), load(text)
    assert relu_masks(model)
    names = operators(model)
    assert all(name in names for name in expected)
    model.graph.sort()
    for ours, theirs in zip(run(model, feed), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_no_mask_reads_the_relu_output_any_more() -> None:
    for text in (AFTER_BATCH_NORM, AFTER_A_SUM):
        model = load(text)
        relu_masks(model)
        y = model.graph.outputs[0]
        assert not any(use.node.op_type == "Greater" for use in y.uses())


def test_relu_without_a_backward_pass_stays() -> None:
    model = load(INFERENCE_ONLY)
    assert not relu_masks(model)
    assert operators(model) == ["Relu"]


class _Constant(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.mul.Tensor(x, torch.ops.aten.flip.default(self.kernel, [0]))


def _with_values(module: torch.nn.Module, example: torch.Tensor) -> fx.GraphModule:
    traced = fx.symbolic_trace(module)
    for node in traced.graph.nodes:
        node.meta["val"] = example
    return traced


def test_constants_are_folded_and_the_result_kept() -> None:
    x = torch.rand(2, 3)
    traced = _with_values(_Constant(), x)
    assert fold_constants(traced)
    targets = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    assert targets == ["aten.mul.Tensor"]
    torch.testing.assert_close(traced(x), x * torch.arange(6.0).reshape(2, 3).flip(0))
    assert not fold_constants(traced)


class _NoOps(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.ops.aten.clone.default(torch.ops.aten.alias.default(x))
        x = torch.ops.aten._to_copy.default(x, dtype=torch.float32)
        return torch.ops.aten.add.Tensor(x, 1)


def test_operators_without_effect_are_dropped() -> None:
    x = torch.rand(3)
    traced = _with_values(_NoOps(), x)
    assert drop_noops(traced)
    assert [str(node.target) for node in traced.graph.nodes if node.op == "call_function"] == [
        "aten.add.Tensor"
    ]
    torch.testing.assert_close(traced(x), x + 1)
    assert not drop_noops(traced)


POOL = """
<ir_version: 8, opset_import: ["" : 20]>
agraph (float[N,3,LENGTH,9] x, float[N,3,OUT,5] dy) => (float[N,3,OUT,5] y, float[N,3,LENGTH,9] dx)
{
  zero = Constant <value = float {0.0}> ()
  flat = Constant <value = int64[1] {-1}> ()
  shape = Shape (x)
  size = Size (x)
  one = Constant <value = int64[1] {1}> ()
  length = Reshape (size, one)
  zeros = Expand (zero, length)
  y, indices = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1], ceil_mode = CEIL> (x)
  i = Reshape (indices, flat)
  g = Reshape (dy, flat)
  scattered = ScatterElements <axis = 0, reduction = "add"> (zeros, i, g)
  dx = Reshape (scattered, shape)
}
"""


@pytest.mark.parametrize(("length", "outputs", "ceil"), [(8, 4, 0), (9, 5, 0), (8, 5, 1)])
@pytest.mark.parametrize("ties", [False, True])
def test_portable_max_pool_gives_the_same_numbers(length: int, outputs: int, ceil: int, ties: bool) -> None:
    text = POOL.replace("LENGTH", str(length)).replace("OUT", str(outputs)).replace("CEIL", str(ceil))
    generator = np.random.default_rng(4)
    x = generator.standard_normal((2, 3, length, 9)).astype(np.float32)
    feed = {
        "x": x.round() if ties else x,
        "dy": generator.standard_normal((2, 3, outputs, 5)).astype(np.float32),
    }
    before, model = run(load(text), feed), load(text)
    assert portable_max_pool(model)
    assert all(len(node.outputs) == 1 for node in model.graph)
    assert "ScatterElements" not in operators(model)
    for ours, theirs in zip(run(model, feed), before, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    assert not portable_max_pool(model)
