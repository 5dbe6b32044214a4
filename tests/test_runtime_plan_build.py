"""From a graph to a plan, with the real parser and builder of TensorRT for RTX: what is built and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import gpu_stand_ins as stand_ins
from bad_bundles import reseal
from snapshots import unchanged
from tta_runtime import Bundle, errors, trt_library
from tta_runtime.manifest import Graph, Port
from tta_runtime.plan_build import Batches, Request, build_plan, profile, resident_outputs
from tta_runtime.trt_library import TrtLibrary

TARGETS = ((8, 6), (8, 9), (12, 0))


@pytest.fixture(scope="module")
def library() -> TrtLibrary:
    pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")
    return trt_library.load(["tensorrt_rtx"])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return stand_ins.tensorrt_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


def request(bundle: Bundle, key: str, targets: object = TARGETS, **changes: object) -> Request:
    made = Request(key, bundle.tensorrt_file(key), bundle.manifest.graphs[key], Batches(1, 4, 16), targets)
    return made if not changes else Request(**{**vars(made), **changes})


@pytest.mark.parametrize("key", ["forward", "step.tent", "step.teacher"])
def test_every_graph_of_the_tiny_bundle_builds_for_all_targets(key, library, bundle):
    with unchanged(bundle.path):
        plan, timing = build_plan(library, request(bundle, key))
    assert len(plan) > 1000
    assert timing == b""


@pytest.mark.parametrize("target", [*TARGETS, (8, 0), (12, 1)])
def test_a_forward_builds_for_each_target_alone(target, library, bundle):
    assert target in library.capabilities()
    assert build_plan(library, request(bundle, "forward", (target,)))[0]


def test_turing_has_no_float32_products_in_tensorrt_for_rtx(library, bundle):
    assert (7, 5) in library.capabilities()
    with pytest.raises(errors.PlanRefused, match=r"FP32 GEMM is not supported"):
        build_plan(library, request(bundle, "forward", ((7, 5),)))


def test_a_fixed_batch_and_bytes_build(library, tmp_path):
    for name, arguments in (("fixed", {"fixed_batch": 32}), ("bytes", {"dtype": "uint8"})):
        bundle = stand_ins.tensorrt_bundle(tmp_path / name, **arguments)
        assert build_plan(library, request(bundle, "step.tent"))[0]


def test_the_profile_bounds_the_batch_of_every_input_that_has_one(bundle):
    shapes = profile(request(bundle, "step.tent"))
    assert shapes["x"] == ([1, 8], [4, 8], [16, 8])
    assert shapes["weight"] == ([1], [4], [16])
    assert "theta" not in shapes


def test_a_free_dimension_other_than_the_batch_has_no_bounds(library, bundle):
    graph = bundle.manifest.graphs["forward"]
    inputs = [msgspec.structs.replace(port, shape=["batch", "height"]) for port in graph.inputs]
    with pytest.raises(errors.PlanRefused, match=r"free dimension `height`"):
        build_plan(library, request(bundle, "forward", graph=msgspec.structs.replace(graph, inputs=inputs)))


def test_each_float_output_that_stays_on_the_device_has_a_sum(bundle):
    assert resident_outputs(bundle.manifest.graphs["forward"]) == {}
    step = bundle.manifest.graphs["step.tent"]
    kept = [port.name for port in step.outputs if port.bind in ("theta", "state")]
    assert list(resident_outputs(step)) == kept


COUNTS = """
<ir_version: 8, opset_import: ["" : 20]>
g (float[batch,4] x, float s, float[4] v) => (float[batch,4] y, float t, float[4] w)
{
  one = Constant <value = float {1}> ()
  moved = Add (x, s)
  y = Add (moved, v)
  t = Add (s, one)
  w = Add (v, s)
}
"""


def test_a_state_that_is_a_scalar_builds_without_a_sum(library, tmp_path):
    onnx.save(onnx.parser.parse_model(COUNTS), tmp_path / "g.onnx")

    def port(name: str, shape: list[int | str], bind: str, key: str = "") -> Port:
        return Port(name=name, dtype="float32", shape=shape, bind=bind, key=key)

    graph = Graph(
        file="g.onnx",
        role="step",
        inputs=[port("x", ["batch", 4], "batch", "x"), port("s", [], "state", "s"), port("v", [4], "theta")],
        outputs=[port("y", ["batch", 4], "logits"), port("t", [], "state", "s"), port("w", [4], "theta")],
    )
    assert list(resident_outputs(graph)) == ["w"]
    assert build_plan(library, Request("step", tmp_path / "g.onnx", graph, capabilities=TARGETS))[0]


def external(location: str, file: Path) -> None:
    """A graph that adds a weight which lies at a location."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    entry = weight.external_data.add()
    entry.key, entry.value = "location", location
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    file.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString()
    )


ADDS = Graph(
    file="g.onnx",
    role="serve",
    inputs=[Port(name="x", dtype="float32", shape=["batch", 4], bind="batch", key="x")],
    outputs=[Port(name="y", dtype="float32", shape=["batch", 4], bind="logits")],
)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("where", ["parent", "absolute"])
def test_weights_outside_of_the_directory_are_not_read(where, inside, library, tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "w.bin").write_bytes(np.ones(4, np.float32).tobytes())
    shutil.copy(folder / "w.bin", tmp_path / "secret.bin")
    outside = {"parent": "../secret.bin", "absolute": str(tmp_path / "secret.bin")}[where]
    external("w.bin" if inside else outside, folder / "g.onnx")
    wanted = Request("forward", folder / "g.onnx", ADDS, capabilities=((8, 9),))
    if inside:
        assert build_plan(library, wanted)[0]
    else:
        with pytest.raises(errors.PlanRefused, match="parser refuses"):
            build_plan(library, wanted)


def test_an_operator_that_tensorrt_lacks_is_named(library, bundle, tmp_path):
    model = onnx.load(bundle.tensorrt_file("forward"))
    model.graph.node.append(helper.make_node("Unique", ["theta"], ["values"], name="unknown_to_tensorrt"))
    model.graph.output.append(helper.make_tensor_value_info("values", TensorProto.FLOAT, ["n"]))
    with pytest.raises(errors.PlanRefused, match=r"unknown_to_tensorrt \(Unique\)") as refusal:
        build_plan(library, request(bundle, "forward", source=model.SerializeToString()))
    assert "docs/gpu.md" in refusal.value.fix


@pytest.mark.parametrize("damage", [b"", b"no graph" * 20])
def test_a_file_that_is_no_graph_is_refused(damage, library, bundle, tmp_path):
    (tmp_path / "g.onnx").write_bytes(damage)
    with pytest.raises(errors.PlanRefused):
        build_plan(library, request(bundle, "forward", source=tmp_path / "g.onnx"))


def test_a_variant_that_the_manifest_does_not_list_is_refused(tmp_path):
    bundle = stand_ins.tensorrt_bundle(tmp_path / "b")
    (bundle.path / "forward.tensorrt.onnx").unlink()
    reseal(bundle.path)
    with pytest.raises(errors.ManifestInconsistent, match=r"forward\.tensorrt\.onnx"):
        Bundle.open(bundle.path)
