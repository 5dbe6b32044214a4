"""The TensorRT engine: its driver, its errors, and its data flow against stand-ins for both (see gpu_stand_ins.py).

What a real GPU answers is in test_gpu.py.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import logging
import sys
from pathlib import Path

import numpy as np
import pytest

import gpu_stand_ins as stand_ins
import tiny_bundle
from agreement import check_answers_beside_steps, check_refused, check_steps
from snapshots import unchanged
from tta_runtime import Bundle, EngineOptions, Engines, Model, OrtEngine, errors, trt_library
from tta_runtime.cuda_driver import CudaDevice, CudaDriver
from tta_runtime.engine_trt import TrtLoader, TrtResident
from tta_runtime.held import unfetched
from tta_runtime.plan_build import Batches

BATCHES = Batches(1, 4, 16)
STEPS = 20


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return stand_ins.tensorrt_bundle(tmp_path / "bundle")


@pytest.fixture
def loader(tmp_path: Path) -> TrtLoader:
    return TrtLoader(stand_ins.library(), stand_ins.driver(), cache=tmp_path / "plans", batches=BATCHES)


def samples(n: int, seed: int = 0) -> np.ndarray:
    return tiny_bundle.samples(n, seed=seed, shift=0.4)[0]


def models(bundle: Bundle, loader: TrtLoader, method: str, seed: int = 3) -> tuple[Model, Model]:
    """One on ONNX Runtime, one on plans."""
    plain = Engines.load(bundle, methods=[method])
    there = Engines.load(bundle, methods=[method], loader=loader)
    return Model(plain, method, seed=seed), Model(there, method, seed=seed)


# --- data flow --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tent", "teacher"])
def test_twenty_steps_agree_with_onnx_runtime(method, bundle, loader):
    plain, there = models(bundle, loader, method)
    check_steps(plain, there, (samples(5 + seed % 3, seed) for seed in range(STEPS)))
    assert set(there.engines.providers.values()) == {"tensorrt 10.13.2.6"}


def test_theta_and_state_stay_and_their_buffers_rotate(bundle, loader):
    _, model = models(bundle, loader, "tent")
    engine = model._step
    for _ in range(4):
        model.adapt(samples(8))
    addresses = [unfetched(model.checkpoint, "theta").buffer.pointer]
    before = dataclasses.replace(engine.traffic)
    taken = stand_ins.allocated()
    for seed in range(12):
        step = model.adapt(samples(8, seed))
        addresses.append(unfetched(model.checkpoint, "theta").buffer.pointer)
    del step
    gc.collect()
    sums = 4 * (1 + len(model.spec.state))
    assert engine.traffic.to_host - before.to_host == 12 * (8 * 3 * 4 + 4 * len(model.spec.report) + sums)
    assert engine.traffic.to_device - before.to_device == 12 * (8 * 8 * 4 + 8 * 4)  # samples and weights
    assert all(old != new for old, new in itertools.pairwise(addresses))  # never written over while it serves
    assert stand_ins.allocated() == taken  # what was let go is used again


def test_nothing_stays_on_the_gpu_when_nobody_holds_it(bundle, tmp_path):
    gc.collect()
    before = stand_ins.allocated()
    loader = TrtLoader(stand_ins.library(), stand_ins.driver(), cache=tmp_path / "plans", batches=BATCHES)
    _, model = models(bundle, loader, "tent")
    for n in (4, 9, 16):
        step = model.adapt(samples(n))
        model.predict(samples(n))
    checkpoint = model.checkpoint
    expected = np.array(model.theta)
    del loader, model, step
    gc.collect()
    assert stand_ins.allocated() > before
    np.testing.assert_array_equal(checkpoint.theta, expected)  # held by itself
    del checkpoint
    gc.collect()
    assert stand_ins.allocated() == before


def test_a_rollback_gives_the_old_buffer_back_untouched(bundle, loader):
    plain, there = models(bundle, loader, "tent")
    for model in (plain, there):
        model.adapt(samples(6, 1))
    kept = there.checkpoint
    for seed in range(2, 9):
        there.adapt(samples(6, seed))
    there.restore(kept)
    assert unfetched(there.checkpoint, "theta") is unfetched(kept, "theta")
    np.testing.assert_array_equal(there.theta, plain.theta)
    np.testing.assert_array_equal(there.adapt(samples(6, 9)).logits, plain.adapt(samples(6, 9)).logits)


def test_a_theta_that_is_not_finite_is_refused_by_its_sum(bundle, loader):
    _, model = models(bundle, loader, "tent")
    start = np.array(model.theta)
    start[0] = np.inf
    spoilt = model.step(samples(6), start=start)
    active, before = model.checkpoint, model._step.traffic.to_host
    with pytest.raises(errors.NonFiniteTheta):
        model.commit(spoilt)
    assert model.checkpoint is active
    good = model.step(samples(6))
    fetched = model._step.traffic.to_host
    model.commit(good)
    assert model._step.traffic.to_host == fetched > before  # asked nothing: the sums came with the report


def test_a_forward_takes_any_batch_in_parts_and_a_step_does_not(bundle, loader):
    plain, there = models(bundle, loader, "tent")
    x = samples(3 * BATCHES.most + 5)
    np.testing.assert_array_equal(there.predict(x).logits, plain.predict(x).logits)
    assert there.predict(x).features.shape == plain.predict(x).features.shape
    active = there.checkpoint
    with pytest.raises(errors.BatchTooLarge, match=r"53 samples, the plan of .* takes 16 at once") as refusal:
        there.step(x)
    assert "plan_max_batch" in refusal.value.fix
    assert there.checkpoint is active
    there.adapt(x[:16])


def test_a_fixed_batch_needs_no_profile(tmp_path, loader):
    bundle = stand_ins.tensorrt_bundle(tmp_path / "fixed", fixed_batch=32)  # more than a free batch may have
    plain, there = models(bundle, loader, "tent")
    np.testing.assert_array_equal(there.adapt(samples(32)).logits, plain.adapt(samples(32)).logits)


def test_bytes_go_in_as_bytes(tmp_path, loader):
    bundle = stand_ins.tensorrt_bundle(tmp_path / "bytes", dtype="uint8")
    plain, there = models(bundle, loader, "tent")
    x = np.random.default_rng(0).integers(0, 256, (6, 8), dtype=np.uint8)
    np.testing.assert_array_equal(there.adapt(x).logits, plain.adapt(x).logits)


def test_answers_beside_steps_are_of_one_theta(bundle, loader):
    _, model = models(bundle, loader, "tent")
    _, replay = models(bundle, loader, "tent")
    check_answers_beside_steps(model, replay, [samples(8, seed) for seed in range(40)], probe=samples(7, 99))


def test_an_engine_of_onnx_runtime_takes_what_a_plan_left_on_the_gpu(bundle, loader):
    _, model = models(bundle, loader, "tent")
    model.adapt(samples(6))
    theta = unfetched(model.checkpoint, "theta")
    assert isinstance(theta, TrtResident)
    expected = model.predict(samples(4)).logits
    here = OrtEngine(bundle, "forward").run({"x": samples(4), "theta": theta})
    np.testing.assert_array_equal(here["logits"], expected)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.pop("theta"), "theta"),
        (lambda f: f.update(extra=np.zeros(1, np.float32)), "extra"),
        (lambda f: f.update(theta=np.zeros(23, np.float32)), "23"),
        (lambda f: f.update(theta=np.zeros(24)), "float64"),
        (lambda f: f.update(x=np.zeros((2, 9), np.float32)), "9"),
        (lambda f: f.update(x="text"), "x"),
        (lambda f: f.update(x=None), "x"),
    ],
)
def test_wrong_inputs_are_refused_and_the_next_run_works(change, says, bundle, loader):
    check_refused(bundle, loader(bundle, "forward", EngineOptions()), samples(4), change, says)


def test_inputs_of_different_lengths_are_refused(bundle, loader):
    _, model = models(bundle, loader, "tent")
    feed = {
        "x": samples(4), "weight": np.ones(5, np.float32), "theta": bundle.theta0,
        "state.momentum": model.state["momentum"], "hyper": np.zeros(len(model.spec.hyper), np.float32),
    }  # fmt: skip
    with pytest.raises(errors.EngineFailed, match=r"\[4, 5\] samples"):
        model._step.run(feed)


# --- a device that fails ----------------------------------------------------------------------------


def test_a_gpu_without_room_for_a_batch_says_so_and_goes_on(bundle, loader, monkeypatch):
    _, model = models(bundle, loader, "tent")
    expected = model.adapt(samples(4)).logits
    model.reset()
    active = model.checkpoint
    monkeypatch.setenv("STUB_MEMORY", str(stand_ins.allocated()))
    with pytest.raises(errors.OutOfDeviceMemory, match="CUDA_ERROR_OUT_OF_MEMORY") as refusal:
        model.step(samples(16))
    assert "smaller batches" in refusal.value.fix
    assert model.checkpoint is active
    monkeypatch.delenv("STUB_MEMORY")
    np.testing.assert_array_equal(model.step(samples(4)).logits, expected)


def test_buffers_that_nobody_uses_make_room(monkeypatch):
    device = CudaDevice(stand_ins.driver())
    device.use()
    kept = device.take(1000)
    free = device.take(100_000)
    del free
    gc.collect()
    monkeypatch.setenv("STUB_MEMORY", str(stand_ins.allocated()))
    again = device.take(50_000)
    assert again.nbytes >= 50_000
    with pytest.raises(errors.OutOfDeviceMemory):
        device.take(200_000)
    assert kept.nbytes >= 1000


@pytest.mark.parametrize("nbytes", [0, 1, 4, 256, 257, 1000, 4096, 5000, 65_537, 10_000_001])
def test_buffers_are_large_enough_and_not_much_larger(nbytes):
    device = CudaDevice(stand_ins.driver())
    device.use()
    assert nbytes <= device.take(nbytes).nbytes <= max(256, 1.25 * nbytes + 256)


def test_an_error_while_it_runs_is_told_and_leaves_theta(bundle, loader, monkeypatch):
    _, model = models(bundle, loader, "tent")
    model.adapt(samples(4))
    active = model.checkpoint
    monkeypatch.setenv("STUB_SYNC", "700")
    with pytest.raises(errors.EngineFailed, match=r"cuStreamSynchronize.*700"):
        model.adapt(samples(4))
    assert model.checkpoint is active


def test_a_plan_that_does_not_load_is_refused_with_tensorrts_reason(bundle, loader, monkeypatch):
    monkeypatch.setattr(stand_ins.Builder, "build_serialized_network", lambda *_: b"no plan")
    with pytest.raises(errors.PlanRefused, match="the plan is for another GPU"):
        loader(bundle, "forward", EngineOptions())


# --- what is missing --------------------------------------------------------------------------------


def have_gpu() -> bool:
    try:
        return CudaDriver().count > 0
    except errors.DriverMissing:
        return False


def test_a_machine_without_a_driver_says_so(tmp_path):
    if have_gpu():
        pytest.skip("this machine has a GPU")
    with pytest.raises(errors.DriverMissing, match=r"libcuda\.so\.1|does not start|no GPU") as refusal:
        TrtLoader(cache=tmp_path / "plans")
    assert "engine `cpu`" in refusal.value.fix
    assert not (tmp_path / "plans").exists()


def test_a_library_that_is_no_driver_is_refused():
    with pytest.raises(errors.DriverMissing, match="cuInit"):
        CudaDriver("libm.so.6")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("STUB_INIT", "100", "CUDA_ERROR_NO_DEVICE"),
        ("STUB_INIT", "803", "803"),
        ("STUB_COUNT", "0", "finds no GPU"),
    ],
)
def test_a_driver_that_finds_nothing_says_so(name, value, says, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(errors.DriverMissing, match=says) as refusal:
        stand_ins.driver()
    assert "nvidia-smi" in refusal.value.fix


def test_a_gpu_that_is_not_there(tmp_path):
    with pytest.raises(errors.BadValue, match="there is no GPU 3, the driver finds 1"):
        TrtLoader(stand_ins.library(), stand_ins.driver(), device=3, cache=tmp_path / "plans")


def test_what_the_driver_says_of_a_gpu(monkeypatch):
    monkeypatch.setenv("STUB_NAME", "NVIDIA Thing 4")
    monkeypatch.setenv("STUB_CAPABILITY", "121")
    (gpu,) = stand_ins.driver().gpus()
    assert (gpu.name, gpu.capability, gpu.memory_bytes) == ("NVIDIA Thing 4", (12, 1), 8 << 30)
    assert "CUDA 13.0" in gpu.driver


def test_a_gpu_that_tensorrt_does_not_know(monkeypatch, tmp_path):
    monkeypatch.setenv("STUB_CAPABILITY", "61")
    with pytest.raises(errors.GpuUnsupported, match=r"compute capability 6\.1.*7\.5"):
        TrtLoader(stand_ins.library(), stand_ins.driver(), cache=tmp_path / "plans")
    assert not (tmp_path / "plans").exists()


@pytest.mark.parametrize(("capability", "known"), [("89", True), ("120", True), ("90", False), ("87", False)])
def test_tensorrt_for_rtx_knows_desktop_gpus_only(capability, known, monkeypatch, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    monkeypatch.setenv("STUB_CAPABILITY", capability)
    library, driver = trt_library.load(["tensorrt_rtx"]), stand_ins.driver()
    if known:
        assert TrtLoader(library, driver, cache=tmp_path / "plans").library.is_rtx
    else:
        with pytest.raises(errors.GpuUnsupported, match="pip install tensorrt"):
            TrtLoader(library, driver, cache=tmp_path / "plans")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs modules that say or do what the text says; without text, as if there were none."""
    monkeypatch.syspath_prepend(tmp_path)

    def put(**modules: str) -> None:
        for name in ("tensorrt", "tensorrt_rtx"):
            if name in modules:
                monkeypatch.delitem(sys.modules, name, raising=False)
                (tmp_path / f"{name}.py").write_text(modules[name])
            else:
                monkeypatch.setitem(sys.modules, name, None)

    return put


def test_without_any_tensorrt(install):
    install()
    with pytest.raises(errors.LibraryMissing, match=r"tensorrt: .*; tensorrt_rtx: ") as refusal:
        trt_library.load()
    assert "tta-edge doctor" in refusal.value.fix


def test_a_tensorrt_that_is_too_old(install):
    install(tensorrt="__version__ = '8.6.1'")
    with pytest.raises(errors.LibraryUnsuitable, match=r"tensorrt is 8\.6\.1, needed is 10\.3 or later"):
        trt_library.load()


def test_a_tensorrt_whose_libraries_do_not_load_is_named(install):
    install(tensorrt="raise OSError('libnvinfer.so.10: cannot open shared object file')")
    with pytest.raises(errors.LibraryMissing, match=r"libnvinfer\.so\.10: cannot open"):
        trt_library.load()


def test_the_other_one_is_taken_where_one_does_not_load(install):
    install(tensorrt="raise ImportError('no')", tensorrt_rtx="__version__ = '1.7.1.116'")
    assert trt_library.load().name == "tensorrt-rtx 1.7.1.116"


def test_a_bundle_without_graphs_for_tensorrt(tmp_path, loader):
    tiny_bundle.build(tmp_path / "plain")
    with (
        unchanged(tmp_path / "plain"),
        pytest.raises(errors.GraphsMissing, match="tta-export build --tensorrt"),
    ):
        loader(Bundle.open(tmp_path / "plain"), "forward", EngineOptions())
    assert not list((tmp_path / "plans").iterdir())


# --- the cache --------------------------------------------------------------------------------------


def test_a_plan_is_built_once_and_again_where_what_it_depends_on_changes(
    bundle, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.WARNING)

    def builds(
        version: str = "10.13.2.6", batches: Batches = BATCHES, *, of: Bundle = bundle, tf32: bool = False
    ) -> int:
        library, plans = stand_ins.library(version), tmp_path / "plans"
        loader = TrtLoader(library, stand_ins.driver(), cache=plans, batches=batches)
        loader(of, "forward", EngineOptions(tf32=tf32))
        return stand_ins.Builder.builds

    assert (builds(), builds()) == (1, 0)
    assert builds("10.14.1") == 1
    assert "it was built for library tensorrt 10.13.2.6, now it is tensorrt 10.14.1" in caplog.text
    assert builds("10.14.1") == 0
    monkeypatch.setenv("STUB_VERSION", "13010")
    assert builds("10.14.1") == 1
    assert "driver" in caplog.text
    assert builds("10.14.1", tf32=True) == 1
    assert builds("10.14.1", Batches(1, 8, 32)) == 1
    monkeypatch.setenv("STUB_NAME", "Other GPU")
    assert builds("10.14.1") == 1
    monkeypatch.delenv("STUB_NAME")
    assert builds("10.14.1") == 0  # the plans of two GPUs in one machine do not drive each other out
    weights = bundle.path / "weights.bin"
    weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
    changed = stand_ins.add_variants(bundle.path, bundle.manifest)
    assert builds("10.14.1", of=changed) == 1  # the same graph with other weights


def test_a_plan_that_lies_in_a_bundle_is_not_looked_at(bundle, loader, tmp_path):
    loader(bundle, "forward", EngineOptions())
    (plan,) = (tmp_path / "plans").glob("*.plan")
    (bundle.path / plan.name).write_bytes(plan.read_bytes())
    other = stand_ins.add_variants(bundle.path, bundle.manifest)
    assert plan.name in other.manifest.files
    fresh = TrtLoader(stand_ins.library(), stand_ins.driver(), cache=tmp_path / "elsewhere", batches=BATCHES)
    fresh(other, "forward", EngineOptions())
    assert stand_ins.Builder.builds == 1


def test_the_next_build_is_given_the_timings_of_the_one_before(bundle, loader):
    Engines.load(bundle, methods=["tent"], loader=loader)
    assert stand_ins.Builder.timings == [b"", b"+"]
