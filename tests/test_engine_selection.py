"""Which engine runs what: `auto` takes the best that works and says what it missed, another is taken at its word."""

from __future__ import annotations

import json
import logging
import types
from pathlib import Path

import numpy as np
import pytest

import gpu_stand_ins as stand_ins
import tiny_bundle
from running import run_cli, running
from tta_edge import doctor_gpu, hosting
from tta_edge.client import Client
from tta_edge.config import BundleConfig, Config
from tta_edge.doctor_bundle import engine as engine_check
from tta_runtime import Bundle, Engines, Model, OrtEngine, errors
from tta_runtime.checks import Verdict
from tta_runtime.cuda_driver import CudaDriver
from tta_runtime.engine import EngineOptions
from tta_runtime.engine_ort import placement
from tta_runtime.engine_trt import TrtEngine, TrtLoader
from tta_runtime.selection import Selector

OK, WARN, FAIL = Verdict.OK, Verdict.WARN, Verdict.FAIL


@pytest.fixture(autouse=True)
def no_cuda() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has the CUDA provider; see test_gpu.py")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return stand_ins.tensorrt_bundle(tmp_path / "bundle")


def nothing() -> CudaDriver:
    """The driver of a machine without a GPU, whatever this machine has."""
    return CudaDriver("libcuda.so.of.no.machine")


def plans(**arguments: object) -> TrtLoader:
    return TrtLoader(library=stand_ins.library(), **arguments)


def load(bundle: Bundle, select: Selector) -> Engines:
    return Engines.load(bundle, methods=["tent"], loader=select)


# --- selection --------------------------------------------------------------------------------------


def test_an_unknown_engine_is_refused():
    with pytest.raises(errors.BadValue, match="did you mean `tensorrt`"):
        Selector("tensort")


def test_auto_takes_the_cpu_without_a_word_where_there_is_no_gpu(bundle, caplog):
    caplog.set_level(logging.INFO)
    select = Selector("auto", driver=nothing)
    assert set(load(bundle, select).providers.values()) == {"cpu"}
    assert not select.fallbacks
    assert not caplog.records


def test_auto_takes_tensorrt_where_gpu_library_and_graphs_are_there(bundle, tmp_path, caplog):
    select = Selector("auto", driver=stand_ins.driver, plans=plans, plan_cache=tmp_path / "plans")
    engines = load(bundle, select)
    assert all(isinstance(engines[key], TrtEngine) for key in ("forward", "step.tent"))
    assert not select.fallbacks
    assert not caplog.records


def test_auto_falls_back_loudly_where_a_gpu_is_there_and_not_used(tmp_path, caplog):
    path = tmp_path / "plain"
    tiny_bundle.build(path)
    select = Selector("auto", driver=stand_ins.driver, plans=plans, plan_cache=tmp_path / "plans")
    assert load(Bundle.open(path), select).providers == {"forward": "cpu", "step.tent": "cpu"}
    assert [(each.graph, each.wanted, each.used) for each in select.fallbacks] == [
        ("forward", "cuda", "cpu"),
        ("step.tent", "cuda", "cpu"),
    ]
    assert "CUDAExecutionProvider" in select.fallbacks[0].reason
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "forward runs on cpu and not on cuda" in caplog.text
    assert "tta-runtime[gpu]" in caplog.text
    assert not (tmp_path / "plans").exists()  # without graphs for it TensorRT is not even looked for


def test_one_graph_that_tensorrt_refuses_runs_elsewhere_and_the_model_works(
    bundle, tmp_path, monkeypatch, caplog
):
    real = stand_ins.Builder.build_serialized_network

    def picky(self, network, config):
        return real(self, network, config) if len(network.model.graph.output) == 2 else None

    monkeypatch.setattr(stand_ins.Builder, "build_serialized_network", picky)
    select = Selector("auto", driver=stand_ins.driver, plans=plans, plan_cache=tmp_path / "plans")
    engines = load(bundle, select)
    assert isinstance(engines["forward"], TrtEngine)
    assert isinstance(engines["step.tent"], OrtEngine)
    (fallback,) = select.fallbacks
    assert (fallback.graph, fallback.wanted, fallback.used) == ("step.tent", "tensorrt", "cpu")
    assert "builder refuses it" in fallback.reason
    plain, mixed = Model.open(bundle.path, method="tent"), Model(engines, "tent")
    for seed in range(3):
        x = tiny_bundle.samples(6, seed=seed, shift=0.4)[0]
        np.testing.assert_array_equal(mixed.adapt(x).logits, plain.adapt(x).logits)
        np.testing.assert_array_equal(mixed.predict(x).logits, plain.predict(x).logits)
    with pytest.raises(errors.PlanRefused, match=r"step\.tent"):
        load(
            bundle, Selector("tensorrt", driver=stand_ins.driver, plans=plans, plan_cache=tmp_path / "plans")
        )


@pytest.mark.parametrize(
    ("engine", "driver", "error"),
    [
        ("cuda", stand_ins.driver, errors.EngineMissing),
        ("tensorrt", nothing, errors.DriverMissing),
    ],
)
def test_an_engine_that_was_asked_for_is_not_replaced(engine, driver, error, bundle, tmp_path):
    select = Selector(engine, driver=driver, plan_cache=tmp_path / "plans")
    with pytest.raises(error):
        load(bundle, select)
    assert not select.fallbacks
    assert not (tmp_path / "plans").exists()


def test_tensorrt_without_its_library(bundle, tmp_path, monkeypatch):
    import sys

    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(errors.LibraryMissing):
        load(bundle, Selector("tensorrt", driver=stand_ins.driver, plan_cache=tmp_path / "plans"))


def test_cpu_looks_at_no_gpu(bundle):
    def never() -> CudaDriver:
        raise AssertionError("asked")

    assert set(load(bundle, Selector("cpu", driver=never)).providers.values()) == {"cpu"}


def test_what_runs_elsewhere_within_a_graph_is_counted(bundle):
    def part(name: str, count: int) -> object:
        return types.SimpleNamespace(ep_name=name, get_nodes=lambda: [None] * count)

    def session(*parts: object) -> object:
        return types.SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)

    cuda, cpu = part("CUDAExecutionProvider", 338), part("CPUExecutionProvider", 2)
    assert placement("cuda", session(cuda)) == "cuda"
    assert placement("cuda", session(cuda, cpu)) == "cuda (2 of 340 nodes on cpu)"
    assert placement("cuda", object()) == "cuda"  # an onnxruntime that cannot tell


def test_placement_reads_what_this_onnxruntime_tells(bundle):
    import onnxruntime as ort

    if not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
        pytest.skip("this onnxruntime cannot tell")
    settings = ort.SessionOptions()
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(str(bundle.file("forward")), settings, providers=["CPUExecutionProvider"])
    count = sum(len(part.get_nodes()) for part in session.get_provider_graph_assignment_info())
    assert count > 0
    assert placement("cuda", session) == f"cuda ({count} of {count} nodes on cpu)"
    assert OrtEngine(bundle, "forward", EngineOptions()).provider == "cpu"


# --- the daemon -------------------------------------------------------------------------------------


def fallen_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU and without anything that could use it."""
    monkeypatch.setattr(hosting, "Selector", lambda *a, **k: Selector(*a, **k, driver=stand_ins.driver))


def test_a_daemon_shows_that_it_fell_back(tmp_path, monkeypatch):
    fallen_back(monkeypatch)
    tiny_bundle.build(tmp_path / "b")
    with running(tmp_path / "b", method="tent") as server, Client(server.endpoint) as client:
        (status,) = client.status().bundles
        assert status.provider == "cpu"
        assert [text.partition(":")[0] for text in status.fallbacks] == [
            "forward runs on cpu and not on cuda",
            "step.tent runs on cpu and not on cuda",
        ]
        assert b'tta_engine_fallback_graphs{bundle="default"} 2' in server.exposition()
        client.reload("default")
        assert len(client.status().bundles[0].fallbacks) == 2


def test_a_daemon_without_a_gpu_has_nothing_to_show(tmp_path):
    tiny_bundle.build(tmp_path / "b")
    with running(tmp_path / "b", engine="cpu") as server, Client(server.endpoint) as client:
        assert client.status().bundles[0].fallbacks == []
        assert b'tta_engine_fallback_graphs{bundle="default"} 0' in server.exposition()


def test_the_command_refuses_an_engine_that_is_not_there():
    done = run_cli("serve", "--bind", "tcp://127.0.0.1:0", "--engine", "cuda")
    assert done.returncode == 3
    assert "CUDAExecutionProvider" in done.stderr
    assert "tta-runtime[gpu]" in done.stderr


def test_doctor_on_a_machine_without_a_gpu():
    done = run_cli("doctor", "--json", "--no-measure", "--bind", "tcp://127.0.0.1:0", TTA_ENGINE="tensorrt")
    found = {each["name"]: each for each in json.loads(done.stdout)["checks"]}
    if found["gpu"]["verdict"] == "ok":
        pytest.skip("this machine has a GPU")
    assert done.returncode == 1
    assert found["gpu"]["text"].startswith("engine tensorrt: ")
    assert "cpu" in found["gpu"]["fix"]
    assert found["engine default"]["text"].startswith("driver-missing: ")


def test_plans_take_what_a_step_of_the_method_needs(tmp_path):
    bundle = stand_ins.tensorrt_bundle(tmp_path / "b")
    batches = hosting.plan_batches(bundle, "tent", Config(plan_max_batch=32, step_batch=64))
    assert (batches.least, batches.usual, batches.most) == (1, 32, 32)


# --- doctor -----------------------------------------------------------------------------------------


def look(monkeypatch: pytest.MonkeyPatch, capability: str, **settings: object) -> dict[str, object]:
    monkeypatch.setenv("STUB_CAPABILITY", capability)
    load = settings.pop("load", None)
    more = {} if load is None else {"load": load}
    return {each.name: each for each in doctor_gpu.checks(Config(**settings), stand_ins.driver, **more)}


def absent(_: str) -> object:
    raise ImportError("No module of that name")


def test_doctor_says_nothing_is_wrong_where_no_gpu_is_asked_for():
    for engine in ("auto", "cpu"):
        (check,) = doctor_gpu.checks(Config(engine=engine), nothing)
        assert check.verdict is OK
        assert check.text.startswith(f"none: engine {engine} runs on the CPU")
    for engine in ("cuda", "tensorrt"):
        (check,) = doctor_gpu.checks(Config(engine=engine), nothing)
        assert check.verdict is FAIL


def test_doctor_counts_gpus(monkeypatch):
    (check,) = look(monkeypatch, "89", gpu=2).values()
    assert check.verdict is FAIL
    assert "there is no GPU 2, the driver finds 1" in check.text


@pytest.mark.parametrize(
    ("capability", "kind", "package"),
    [("89", "desktop", "[rtx]"), ("120", "desktop", "[rtx]"), ("90", "data centre", "[tensorrt]")],
)
def test_doctor_names_the_package_that_fits(capability, kind, package, monkeypatch):
    found = look(monkeypatch, capability, engine="tensorrt", load=absent)
    assert found["gpu"].text.endswith(f"a {kind} machine")
    assert found["cuda"].verdict is WARN
    assert "tta-runtime[gpu]" in found["cuda"].fix
    assert found["tensorrt"].verdict is FAIL
    assert package in found["tensorrt"].fix


def test_doctor_knows_a_jetson_by_its_board(tmp_path, monkeypatch):
    board = tmp_path / "model"
    board.write_bytes(b"NVIDIA Jetson AGX Orin Developer Kit\0")
    gpu = stand_ins.driver().gpu()
    assert doctor_gpu.machine_of(gpu, board) == "jetson"
    assert doctor_gpu.machine_of(gpu, tmp_path / "none", "x86_64") == "desktop"
    checks = doctor_gpu.checks(Config(engine="cuda"), stand_ins.driver, absent, lambda _: "jetson")
    found = {each.name: each for each in checks}
    assert found["cuda"].verdict is FAIL
    assert "Jetson AI Lab" in found["cuda"].fix
    assert "python3-libnvinfer" in found["tensorrt"].text


def test_doctor_tells_an_onnxruntime_without_cuda(monkeypatch):
    found = look(monkeypatch, "89", engine="cuda")
    assert found["cuda"].verdict is FAIL
    assert "was built without its CUDA provider" in found["cuda"].text
    assert look(monkeypatch, "89")["cuda"].verdict is WARN


def test_doctor_tells_which_library_of_the_provider_is_missing(monkeypatch, tmp_path):
    """As the GPU build of ONNX Runtime is found without CUDA: the provider is offered and cannot be loaded."""
    (tmp_path / "capi").mkdir()
    ort = types.SimpleNamespace(
        __version__="1.31.1", __file__=str(tmp_path / "__init__.py"),
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )  # fmt: skip
    found = look(
        monkeypatch, "89", engine="cuda", load=lambda name: ort if name == "onnxruntime" else absent(name)
    )
    assert found["cuda"].verdict is FAIL
    assert "cannot open shared object file" in found["cuda"].text
    assert "onnxruntime-gpu[cuda,cudnn]" in found["cuda"].fix


def test_doctor_names_the_tensorrt_that_is_used_and_where_plans_are(monkeypatch, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    directory = tmp_path / "plans"
    check = look(monkeypatch, "89", engine="tensorrt", plan_cache=str(directory))["tensorrt"]
    assert check.verdict is OK
    assert check.text.startswith("tensorrt")
    assert str(directory) in check.text
    assert not directory.exists()
    directory.mkdir(mode=0o777)
    directory.chmod(0o777)
    assert look(monkeypatch, "89", engine="tensorrt", plan_cache=str(directory))["tensorrt"].verdict is FAIL


def test_doctor_warns_where_a_graph_fell_back(tmp_path, monkeypatch):
    fallen_back(monkeypatch)
    tiny_bundle.build(tmp_path / "b")
    host = hosting.load("default", BundleConfig(path=str(tmp_path / "b"), method="tent"), Config())
    check = engine_check("default", host)
    assert check.verdict is WARN
    assert "step.tent runs on cpu" in check.text
    assert "not on cuda" in check.text
