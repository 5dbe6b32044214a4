"""Checking a bundle: a graph that fails is reported and the others are still checked; the bundle is never changed."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bad_bundles import flip_byte, put, reseal
from exported import built
from snapshots import unchanged
from tta_exporters.check import Check, check_bundle, example_batch
from tta_exporters.errors import CheckFailed, ExtraMissing
from tta_exporters.tensorrt import TARGETS, build_plan
from tta_runtime import Bundle
from tta_runtime.errors import BundleError, EngineMissing, FileTampered, ManifestMissing
from tta_runtime.manifest import Graph, InputSpec, Port


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A copy of a good bundle with the methods source and tent."""
    return Path(shutil.copytree(built("mlp").path, tmp_path / "bundle"))


def checks(path: Path, *, tensorrt: bool = False) -> dict[tuple[str, str], Check]:
    """By graph and check; the bundle must be the same afterwards."""
    with unchanged(path):
        found = list(check_bundle(path, tensorrt=TARGETS if tensorrt else ()))
    assert all("\n" not in check.detail and check.detail for check in found)
    return {(check.graph, check.check): check for check in found}


def failing(path: Path, *, tensorrt: bool = False) -> dict[tuple[str, str], str]:
    return {key: check.detail for key, check in checks(path, tensorrt=tensorrt).items() if not check.ok}


CHECKER = ("forward", "onnx checker"), ("step.tent", "onnx checker")
RUNS = ("forward", "runs (source)"), ("step.tent", "runs (tent)")
RT = ("forward", "tensorrt"), ("step.tent", "tensorrt")


def rewrite(path: Path, key: str, change: Callable[[onnx.ModelProto], object]) -> None:
    """Changes one graph and seals the bundle around it."""
    file = path / f"{key}.onnx"
    model = onnx.load(file, load_external_data=False)
    change(model)
    onnx.save(model, file)
    reseal(path)


def intercept(
    output: str, *operators: Callable[[str, str], onnx.NodeProto]
) -> Callable[[onnx.ModelProto], None]:
    """Puts operators between an output and the node that makes it; each is given the names of its in- and output."""

    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            node.output[:] = [f"{name}.0" if name == output else name for name in node.output]
            node.input[:] = [f"{name}.0" if name == output else name for name in node.input]
        for index, operator in enumerate(operators):
            last = index == len(operators) - 1
            model.graph.node.append(
                operator(f"{output}.{index}", output if last else f"{output}.{index + 1}")
            )

    return change


def constant(name: str, value: np.ndarray) -> Callable[[onnx.ModelProto], None]:
    return lambda model: model.graph.initializer.append(numpy_helper.from_array(value, name))


# --- a good bundle ----------------------------------------------------------------------------------


def test_every_graph_of_a_good_bundle_is_checked_and_run(path: Path) -> None:
    found = checks(path)
    assert list(found) == [*CHECKER, *RUNS]
    assert all(check.ok for check in found.values())
    assert "theta moved" in found[RUNS[1]].detail
    assert "theta unchanged" in found[RUNS[0]].detail
    assert found[RUNS[0]].as_dict().keys() == {"graph", "check", "ok", "detail"}


@pytest.mark.parametrize(("dtype", "low", "high"), [("float32", -1.0, 3.0), ("uint8", 0.0, 255.0)])
def test_example_batches_fill_the_declared_range(dtype: str, low: float, high: float) -> None:
    spec = InputSpec(dtype=dtype, shape=["batch", 3, 20, 20], low=low, high=high)
    x = example_batch(spec, 4, seed=1)
    assert (x.shape, x.dtype) == ((4, 3, 20, 20), np.dtype(dtype))
    assert low <= x.min() < low + 0.05 * (high - low)
    assert high - 0.05 * (high - low) < x.max() <= high
    assert np.array_equal(x, example_batch(spec, 4, seed=1))
    assert not np.array_equal(x, example_batch(spec, 4, seed=2))


# --- a bundle that is none --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (flip_byte, FileTampered),
        (lambda path: flip_byte(path, "step.tent.onnx"), FileTampered),
        (lambda path: (path / "manifest.json").unlink(), ManifestMissing),
        (put("classes", value=1000), BundleError),
    ],
)
@pytest.mark.parametrize("tensorrt", [False, True])
def test_what_is_no_bundle_is_refused_before_any_check(
    path: Path, spoil: Callable[[Path], object], error: type[BundleError], tensorrt: bool
) -> None:
    spoil(path)
    with unchanged(path), pytest.raises(error):
        next(check_bundle(path, tensorrt=TARGETS if tensorrt else ()))


# --- a graph that fails -----------------------------------------------------------------------------


def spoil_with_nan(output: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        constant("nan", np.array(np.nan, np.float32))(model)
        intercept(output, lambda x, y: helper.make_node("Add", [x, "nan"], [y]))(model)

    return change


@pytest.mark.parametrize(
    ("key", "output", "failed", "says"),
    [
        ("forward", "logits", RUNS, "logits with which .* serves a batch of 4 are not finite"),
        ("step.tent", "logits", RUNS[1:], "logits with which tent steps a batch of 4 are not finite"),
        ("step.tent", "theta_out", RUNS[1:], "theta"),
        ("step.tent", "state_out.momentum", RUNS[1:], "momentum"),
    ],
)
def test_nan_in_an_output_is_found(
    path: Path, key: str, output: str, failed: tuple[tuple[str, str], ...], says: str
) -> None:
    rewrite(path, key, spoil_with_nan(output))
    found = failing(path)
    assert tuple(found) == failed
    for detail in found.values():
        assert re.search(says, detail), detail


def remove_an_initializer(model: onnx.ModelProto) -> None:
    del model.graph.initializer[0]


def unknown_operator(model: onnx.ModelProto) -> None:
    intercept("logits", lambda x, y: helper.make_node("Improve", [x], [y], name="better"))(model)


def wrong_rank(model: onnx.ModelProto) -> None:
    constant("axes", np.array([0], np.int64))(model)
    intercept("logits", lambda x, y: helper.make_node("Unsqueeze", [x, "axes"], [y]))(model)


def fixed_batch(model: onnx.ModelProto) -> None:
    constant("shape", np.array([4, 7], np.int64))(model)
    intercept("logits", lambda x, y: helper.make_node("Reshape", [x, "shape"], [y]))(model)


def secretly_fixed_batch(model: onnx.ModelProto) -> None:
    """The same, by way of a shape that nobody can know before the graph runs."""
    constant("shape", np.array([4, 7], np.int64))(model)
    constant("zero", np.array(0.0, np.float32))(model)
    model.graph.node.extend(
        [
            helper.make_node("ReduceMax", ["theta"], ["largest"], keepdims=0, name="largest_value"),
            helper.make_node("Mul", ["largest", "zero"], ["nothing"], name="nothing"),
            helper.make_node("Cast", ["nothing"], ["no_offset"], to=TensorProto.INT64, name="no_offset"),
            helper.make_node("Add", ["shape", "no_offset"], ["same_shape"], name="same_shape"),
        ]
    )
    intercept("logits", lambda x, y: helper.make_node("Reshape", [x, "same_shape"], [y]))(model)


def other_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))


@pytest.mark.parametrize(
    ("change", "failed", "says"),
    [
        (remove_an_initializer, (CHECKER[1], RUNS[1]), "is not output of any previous nodes"),
        (unknown_operator, (CHECKER[1], RUNS[1]), "Improve"),
        (wrong_rank, (CHECKER[1], RUNS[1]), "logits|rank"),
        (fixed_batch, (RUNS[1],), r"\[4, 7\], the manifest says float32 \['batch', 7\]"),
        (secretly_fixed_batch, (RUNS[1],), "graph `step.tent` failed"),
        (other_input, (RUNS[1],), r"inputs \[.*'more'"),
    ],
)
def test_a_broken_graph_fails_and_the_others_are_still_checked(
    path: Path,
    change: Callable[[onnx.ModelProto], None],
    failed: tuple[tuple[str, str], ...],
    says: str,
) -> None:
    rewrite(path, "step.tent", change)
    found = checks(path)
    assert list(found) == [*CHECKER, *RUNS]
    assert tuple(key for key, check in found.items() if not check.ok) == failed
    assert re.search(says, found[failed[0]].detail), found[failed[0]].detail


@pytest.mark.parametrize("data", [b"", b"no graph at all" * 9, b"\x08\x09"])
def test_a_file_that_is_no_graph_fails(path: Path, data: bytes) -> None:
    (path / "step.tent.onnx").write_bytes(data)
    reseal(path)
    assert tuple(failing(path)) == (CHECKER[1], RUNS[1])


def test_cut_weights_fail_every_graph_that_reads_them(path: Path) -> None:
    weights = path / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:100])
    reseal(path)
    assert {*RUNS} <= set(failing(path))


def test_a_missing_engine_is_no_fault_of_the_bundle(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with unchanged(path), pytest.raises(EngineMissing):
        list(check_bundle(path))


# --- TensorRT ---------------------------------------------------------------------------------------


@pytest.fixture
def builder() -> None:
    pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")


@pytest.mark.usefixtures("builder")
@pytest.mark.parametrize("name", ["mlp", "vit", "group_norm", "convnext"])
def test_tensorrt_builds_the_serve_and_the_tent_step(name: str) -> None:
    found = checks(built(name).path, tensorrt=True)
    assert list(found)[-2:] == [*RT]
    for key in RT:
        assert found[key].ok, found[key].detail
        assert re.fullmatch(r"plan of \d+ bytes for compute capability 8.6, 8.9, 12.0", found[key].detail)


def data_dependent(model: onnx.ModelProto) -> None:
    """Adds 0 to the logits, by way of a node that TensorRT does not know and ONNX Runtime does."""
    constant("zero", np.array(0.0, np.float32))(model)
    model.graph.node.extend(
        [
            helper.make_node("Unique", ["theta"], ["unique"], name="only_values"),
            helper.make_node("ReduceMax", ["unique"], ["largest"], keepdims=0, name="largest_value"),
            helper.make_node("Mul", ["largest", "zero"], ["nothing"], name="nothing"),
        ]
    )
    intercept("logits", lambda x, y: helper.make_node("Add", [x, "nothing"], [y], name="same"))(model)


@pytest.mark.usefixtures("builder")
def test_a_node_that_tensorrt_refuses_is_named(path: Path) -> None:
    rewrite(path, "step.tent", data_dependent)
    found = failing(path, tensorrt=True)
    assert tuple(found) == (RT[1],)
    assert "graph step.tent: TensorRT's parser refuses node only_values (Unique)" in found[RT[1]]
    assert "this operator is not supported" in found[RT[1]]


@pytest.mark.usefixtures("builder")
def test_a_file_that_is_no_graph_fails_tensorrt_too(path: Path) -> None:
    (path / "forward.onnx").write_bytes(b"no graph at all" * 9)
    reseal(path)
    found = failing(path, tensorrt=True)
    assert {CHECKER[0], *RUNS, RT[0]} == set(found)
    assert "cannot be read" in found[RT[0]]


REFUSED_BY_THE_BUILDER = """
<ir_version: 8, opset_import: ["" : 20]>
g (float[N,4] x) => (float[N,4] y)
{
  start = Constant <value = int64[1] {7}> ()
  end = Constant <value = int64[1] {9}> ()
  axis = Constant <value = int64[1] {0}> ()
  two = Slice (x, start, end, axis)
  [add_two_rows_to_all] y = Add (two, x)
}
"""


@pytest.mark.usefixtures("builder")
def test_what_only_the_builder_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(REFUSED_BY_THE_BUILDER), tmp_path / "g.onnx")
    x, y = (Port(name=name, dtype="float32", shape=["batch", 4], bind="batch", key="x") for name in "xy")
    graph = Graph(file="g.onnx", role="serve", inputs=[x], outputs=[y])
    with unchanged(tmp_path), pytest.raises(CheckFailed, match=r"builder refuses it: .*add_two_rows_to_all"):
        build_plan(tmp_path, "forward", graph)


def test_a_missing_builder_is_no_fault_of_the_bundle(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with unchanged(path), pytest.raises(ExtraMissing, match=r"tta-runtime\[rtx\]"):
        next(check_bundle(path, tensorrt=TARGETS))
    assert Bundle.open(path).manifest.default_method == "tent"
