"""Graph rewrites: each changes what it should, says so, and leaves the numbers alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir.passes import common as ir_passes
from torch import fx

from tta_exporters.passes.channel_affine import channel_affine
from tta_exporters.passes.drop_noops import drop_noops
from tta_exporters.passes.fold_constants import fold_constants
from tta_exporters.passes.merge_constants import merge_constants
from tta_exporters.passes.pool_first import pool_first
from tta_exporters.passes.portable_affine import portable_affine
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


RECOMPUTED = """
<ir_version: 8, opset_import: ["" : 20]>
agraph (float[N,4,3,3] x, float[1,4,1,1] s, float[4] b, float[N,4,3,3] dy)
    => (float[N,4,3,3] y, float[N,4,3,3] dx)
{
  spread = Constant <value = int64[4] {1, 4, 1, 1}> ()
  shift = Reshape (b, spread)
  scaled = Mul (x, s)
  affine = Add (shift, scaled)
  y = Relu (affine)
  negated = Neg (s)
  again = Mul (x, negated)
  mask = Less (again, shift)
  gate = Cast <to = 1> (mask)
  dx = Mul (dy, gate)
}
"""


def affine_feed() -> dict[str, np.ndarray]:
    """Values whose sum is sometimes exactly zero, a negative and a zero scale, magnitudes far apart."""
    generator = np.random.default_rng(2)
    x, dy = (generator.standard_normal((2, 4, 3, 3)).astype(np.float32) for _ in range(2))
    s = np.array([-1.5, 0.0, 1e-20, 3.0], dtype=np.float32).reshape(1, 4, 1, 1)
    b = np.array([0.25, 0.0, 0.0, 0.5], dtype=np.float32)
    x[0, 3, 0, 0] = -0.5 / 3.0
    x[0, 0, 0, 0] = 0.25 / 1.5
    return {"x": x, "s": s, "b": b, "dy": dy}


def test_scale_and_shift_become_one_convolution_of_the_same_bits() -> None:
    feed = affine_feed()
    before, model = run(load(RECOMPUTED), feed), load(RECOMPUTED)
    assert channel_affine(model)
    names = operators(model)
    assert names.count("Conv") == 2
    assert not {"Add", "Less", "Cast"} & set(names)
    for ours, theirs in zip(run(model, feed), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not channel_affine(model)


def test_the_shift_is_taken_from_where_it_was_flat_already() -> None:
    model = load(RECOMPUTED)
    channel_affine(model)
    b = next(value for value in model.graph.inputs if value.name == "b")
    assert [use.node.op_type for use in b.uses() if use.node.op_type == "Conv"] == ["Conv", "Conv"]


@pytest.mark.parametrize(
    "change",
    [
        ("float[1,4,1,1] s", "float[N,4,3,3] s"),
        ("affine = Add (shift, scaled)", "other = Neg (scaled)\n  affine = Add (shift, other)"),
    ],
)
def test_other_products_and_sums_stay(change: tuple[str, str]) -> None:
    text = RECOMPUTED.replace(*change)
    assert text != RECOMPUTED
    model = load(text)
    channel_affine(model)
    assert "Add" in operators(model)


def test_portable_affine_undoes_it() -> None:
    feed = affine_feed()
    model = load(RECOMPUTED)
    before = run(model, feed)
    channel_affine(model)
    assert portable_affine(model)
    assert not {"Conv", "HardSigmoid"} & set(operators(model))
    for ours, theirs in zip(run(model, feed), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not portable_affine(model)


CONSTANT_CONVOLUTION = """
<ir_version: 8, opset_import: ["" : 20]>
agraph (float[N,2,3,3] x) => (float[N,2,3,3] y)
<float[2,1,1,1] w = {1.0, 2.0}, float[2] b = {0.0, 1.0}>
{ y = Conv <group = 2, kernel_shape = [1, 1]> (x, w, b) }
"""


def test_portable_affine_leaves_a_convolution_of_the_network() -> None:
    model = load(CONSTANT_CONVOLUTION)
    assert not portable_affine(model)
    assert operators(model) == ["Conv"]


STEM = """
<ir_version: 8, opset_import: ["" : 20]>
agraph (float[N,3,LENGTH,9] c, float[1,3,1,1] s, float[1,3,1,1] b, float[N,3,OUT,5] dy)
    => (float[N,3,OUT,5] y, float[1,3,1,1] mean, float[1,3,1,1] mean_dot)
{
  zero = Constant <value = float {0.0}> ()
  flat = Constant <value = int64[1] {-1}> ()
  axes = Constant <value = int64[3] {0, 2, 3}> ()
  shape = Shape (c)
  size = Size (c)
  one = Constant <value = int64[1] {1}> ()
  length = Reshape (size, one)
  zeros = Expand (zero, length)
  scaled = Mul (c, s)
  affine = Add (scaled, b)
  relu = Relu (affine)
  y, indices = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1], ceil_mode = CEIL> (relu)
  i = Reshape (indices, flat)
  g = Reshape (dy, flat)
  scattered = ScatterElements <axis = 0, reduction = "add"> (zeros, i, g)
  full = Reshape (scattered, shape)
  mask = Greater (relu, zero)
  gate = Cast <to = 1> (mask)
  gated = Mul (full, gate)
  mean = ReduceMean <keepdims = 1> (gated, axes)
  dot = Mul (gated, c)
  mean_dot = ReduceMean <keepdims = 1> (dot, axes)
}
"""


def stem(length: int, outputs: int, ceil: int) -> str:
    return STEM.replace("LENGTH", str(length)).replace("OUT", str(outputs)).replace("CEIL", str(ceil))


@pytest.mark.parametrize(("length", "outputs", "ceil"), [(8, 4, 0), (9, 5, 0), (8, 5, 1)])
def test_pooling_first_gives_the_same_values_and_sums(length: int, outputs: int, ceil: int) -> None:
    text = stem(length, outputs, ceil)
    generator = np.random.default_rng(5)
    feed = {
        "c": generator.standard_normal((2, 3, length, 9)).astype(np.float32),
        "s": np.array([2.0, -1.5, 0.5], dtype=np.float32).reshape(1, 3, 1, 1),
        "b": np.array([-0.5, 0.3, -2.0], dtype=np.float32).reshape(1, 3, 1, 1),
        "dy": generator.standard_normal((2, 3, outputs, 5)).astype(np.float32),
    }
    # Equal maxima in overlapping windows: whichever is taken, the sums are the same.
    feed["c"][0, :, 2:5, 2:5] = 3.0
    before, model = run(load(text), feed), load(text)
    assert pool_first(model)
    assert not {"ScatterElements"} & {node.op_type for node in _alive(model)}
    assert all(len(node.outputs) == 1 for node in _alive(model))
    for ours, theirs in zip(run(model, feed), before, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    assert not pool_first(model)


def _alive(model: ir.Model) -> list[ir.Node]:
    ir_passes.RemoveUnusedNodesPass()(model)
    return list(model.graph)


@pytest.mark.parametrize(
    "change",
    [
        # The full-size gradient is wanted by somebody: it goes on to the network's input.
        ("float[1,3,1,1] mean_dot)", "float[1,3,1,1] mean_dot, float[N,3,8,9] gated)"),
        # The ReLU's output is wanted by somebody.
        ("float[1,3,1,1] mean_dot)", "float[1,3,1,1] mean_dot, float[N,3,8,9] relu)"),
        # Not a ReLU.
        ("relu = Relu (affine)", "relu = Neg (affine)"),
    ],
)
def test_pooling_stays_where_the_whole_gradient_is_wanted(change: tuple[str, str]) -> None:
    text = stem(8, 4, 0).replace(*change)
    assert text != stem(8, 4, 0)
    assert not pool_first(load(text))


TWINS = """
<ir_version: 8, opset_import: ["" : 20]>
agraph (float[N,3] x) => (float[N,1] y, float[N,1] z, float[N,3] w)
{
  a = Constant <value = int64[1] {1}> ()
  b = Constant <value = int64[1] {1}> ()
  c = Constant <value = float[1] {1.0}> ()
  y = ReduceMean (x, a)
  z = ReduceMean (x, b)
  w = Add (x, c)
}
"""


def test_equal_constants_become_one() -> None:
    feed = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
    before, model = run(load(TWINS), feed), load(TWINS)
    assert merge_constants(model)
    constants = [node for node in model.graph if node.op_type == "Constant"]
    assert len(constants) == 2
    for ours, theirs in zip(run(model, feed), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not merge_constants(model)
