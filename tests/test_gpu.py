"""What needs an NVIDIA GPU: `pytest -m gpu tests/test_gpu.py`. See docs/gpu.md for where this has run."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest

import gpu_stand_ins
import tiny_bundle
from running import running
from tta_edge.builtin import builtin_bundle
from tta_edge.client import Client
from tta_runtime import Bundle, EngineOptions, Engines, Model, OrtEngine, errors
from tta_runtime.cuda_driver import CudaDevice, CudaDriver
from tta_runtime.engine_trt import TrtEngine, TrtLoader
from tta_runtime.held import Resident, unfetched
from tta_runtime.plan_build import Batches
from tta_runtime.selection import Selector

pytestmark = pytest.mark.gpu

STEPS = 20
TOLERANCE = 2e-4
"""Relative: kernels sum in another order than the CPU's; TF32, which is off, would be ten times worse."""


@pytest.fixture(scope="module", autouse=True)
def driver() -> CudaDriver:
    try:
        return CudaDriver()
    except errors.DriverMissing as error:
        pytest.skip(f"no GPU: {error.cause}")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return gpu_stand_ins.tensorrt_bundle(tmp_path / "bundle")


def images(path: Path, seed: int, n: int = 64) -> np.ndarray:
    spec = Bundle.open(path).manifest.input
    return np.random.default_rng(seed).random((n, *spec.shape[1:]), dtype=np.float32)


def agree(found: np.ndarray, expected: np.ndarray) -> None:
    scale = max(float(np.abs(expected).max()), 1e-6)
    np.testing.assert_allclose(found / scale, expected / scale, atol=TOLERANCE, rtol=0)


def twenty_steps(path: Path, method: str, engine: str, plans: Path) -> Model:
    """On the engine and on the CPU, each step from the same theta."""
    select = Selector(engine, plan_cache=plans, batches=Batches(1, 64, 64))
    there = Model(Engines.load(path, methods=[method], loader=select), method, seed=3)
    here = Model.open(path, method=method, seed=3)
    assert not select.fallbacks
    for seed in range(STEPS):
        x = images(path, seed)
        there.restore(here.checkpoint)
        expected, found = here.step(x), there.step(x)
        agree(found.logits, expected.logits)
        agree(found.theta, expected.theta)
        for name, value in expected.state.items():
            agree(found.state[name], value)
        for name, number in expected.report.items():
            assert found.report[name] == pytest.approx(number, rel=1e-2, abs=1e-4)
        here.commit(expected)
        there.commit(found)
        agree(there.predict(x).logits, here.predict(x).logits)
    assert isinstance(unfetched(there.checkpoint, "theta"), Resident)
    return there


@pytest.mark.parametrize("method", ["tent", "norm"])
def test_twenty_steps_of_the_digits_on_cuda(method, tmp_path):
    model = twenty_steps(builtin_bundle(), method, "cuda", tmp_path)
    for provider in model.engines.providers.values():
        assert provider == "cuda" or provider.startswith("cuda (")


@pytest.mark.parametrize("engine", ["cuda", "tensorrt"])
@pytest.mark.parametrize("method", ["tent", "teacher"])
def test_twenty_steps_of_the_tiny_bundle(method, engine, bundle, tmp_path):
    twenty_steps(bundle.path, method, engine, tmp_path / "plans")


def test_only_logits_and_report_come_to_the_host(bundle, tmp_path):
    for engine in ("cuda", "tensorrt"):
        select = Selector(engine, plan_cache=tmp_path / "plans")
        model = Model(Engines.load(bundle, methods=["tent"], loader=select), "tent")
        x = images(bundle.path, 0)
        model.adapt(x)
        before = dataclasses.replace(model._step.traffic)
        step = model.adapt(x)
        sums = 4 * (1 + len(model.spec.state))
        fetched = model._step.traffic.to_host - before.to_host
        assert fetched == step.logits.nbytes + 4 * len(step.report) + sums, engine
        assert model._step.traffic.to_device - before.to_device == x.nbytes + 4 * len(x), engine


def test_a_plan_is_read_the_second_time_and_answers_the_same(bundle, tmp_path, caplog):
    caplog.set_level("INFO")
    answers = []
    for how in ("built", "read"):
        loader = TrtLoader(cache=tmp_path / "plans", batches=Batches(1, 16, 64))
        engine = loader(bundle, "forward", EngineOptions())
        assert isinstance(engine, TrtEngine)
        assert f"plan of graph `forward` {how}" in caplog.text
        answers.append(engine.run({"x": images(bundle.path, 0), "theta": bundle.theta0})["logits"])
    np.testing.assert_array_equal(*answers)


@pytest.mark.parametrize("engine", ["cuda", "tensorrt"])
def test_batches_of_every_size(engine, bundle, tmp_path):
    select = Selector(engine, plan_cache=tmp_path / "plans", batches=Batches(1, 16, 32))
    there = Model(Engines.load(bundle, methods=["tent"], loader=select), "tent")
    here = Model.open(bundle.path, method="tent")
    for n in (1, 2, 7, 32, 33, 100):
        agree(there.predict(images(bundle.path, n, n)).logits, here.predict(images(bundle.path, n, n)).logits)


@pytest.mark.parametrize("engine", ["cuda", "tensorrt"])
def test_answers_beside_steps(engine, bundle, tmp_path):
    select = Selector(engine, plan_cache=tmp_path / "plans")
    model = Model(Engines.load(bundle, methods=["tent"], loader=select), "tent")
    probe, steps = images(bundle.path, 99), [images(bundle.path, seed) for seed in range(50)]
    failures: list[BaseException] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            try:
                assert np.isfinite(model.predict(probe).logits).all()
            except BaseException as error:  # noqa: BLE001 - raised below
                failures.append(error)
                return

    thread = threading.Thread(target=ask)
    thread.start()
    for x in steps:
        model.adapt(x)
    done.set()
    thread.join()
    assert not failures


def test_a_theta_that_is_not_finite_is_refused_on_the_device(bundle, tmp_path):
    for engine in ("cuda", "tensorrt"):
        select = Selector(engine, plan_cache=tmp_path / "plans")
        model = Model(Engines.load(bundle, methods=["tent"], loader=select), "tent")
        start = np.array(model.theta)
        start[0] = np.inf
        with pytest.raises(errors.NonFiniteTheta):
            model.commit(model.step(images(bundle.path, 0), start=start))


def test_more_memory_than_the_gpu_has_is_refused_by_name(driver):
    device = CudaDevice(driver)
    device.use()
    with pytest.raises(errors.OutOfDeviceMemory):
        device.take(2 * device.gpu.memory_bytes)
    assert device.take(1024).nbytes >= 1024


def test_what_is_copied_to_the_gpu_comes_back(driver):
    device = CudaDevice(driver)
    device.use()
    array = np.random.default_rng(0).random(100_003, dtype=np.float32)
    buffer, stream = device.take(array.nbytes), device.stream()
    device.copy_in(buffer, array, stream)
    device.wait(stream)
    np.testing.assert_array_equal(device.fetch(buffer, array.shape, array.dtype), array)


def test_the_daemon_serves_and_adapts_on_the_gpu(tmp_path):
    tiny_bundle.build(tmp_path / "b")
    with running(tmp_path / "b", method="tent", engine="cuda") as server, Client(server.endpoint) as client:
        x = images(tmp_path / "b", 0)
        before = OrtEngine(Bundle.open(tmp_path / "b"), "forward").run(
            {"x": x, "theta": Bundle.open(tmp_path / "b").theta0}
        )
        reply = client.predict(x, compare=True)
        agree(reply.source_logits, before["logits"])
        (status,) = client.status().bundles
        assert status.provider.startswith("cuda")
        assert status.fallbacks == []
        assert client.status().streams[0].steps == 1
