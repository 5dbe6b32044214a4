"""Everything that is to be known of a GPU, measured in one call: agreement with the CPU, time, copies, percentiles.

For each model, at one batch size:

* parity: 20 tent steps on the engine and on the CPU, from the same batches; also each step from the CPU's theta;
* time: a step and a forward pass of each engine, eager PyTorch TENT and torch.compile'd TENT, interleaved; with TF32
  off and on;
* copies: bytes between host and device for a committed step, by itself and under the daemon's guards;
* answers: percentiles of a forward pass of one sample, alone and while another thread steps without a pause;
* profile: where a step spends its time (ONNX Runtime's profiler: on a GPU its kernels, if that build sees them, else
  what launching them took).

Weights are random: times are the same, and parity needs none. Nothing is skipped silently: what fails is in the result
as an error.

Example: python benchmarks/gpu.py --json gpu.json --engines cuda,tensorrt
Example: python benchmarks/gpu.py --device cpu --small       # a test of this script, not a measurement
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import step_cost

MODELS = ("resnet18", "resnet50", "vit_b")
PARITY_STEPS = 20
ANSWERS = 300
TARGETS = ((8, 6), (8, 9), (12, 0))


def main() -> None:
    """Parses arguments, measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where PyTorch computes")
    parser.add_argument(
        "--engines", default="cuda", help="comma list of cuda, tensorrt; with --device cpu: cpu"
    )
    parser.add_argument("--models", default=",".join(MODELS), help="comma list")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15, help="interleaved rounds; the median is reported")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    parser.add_argument(
        "--small", action="store_true", help="one small network, few rounds: a test of this script"
    )
    arguments = parser.parse_args()
    if arguments.small:
        arguments.models, arguments.batch, arguments.repeats = "resnet20", 8, 3
    engines = ["cpu"] if arguments.device == "cpu" else arguments.engines.split(",")
    result: dict[str, Any] = {"machine": machine(arguments.device), "batch": arguments.batch, "models": {}}
    with tempfile.TemporaryDirectory(prefix="tta-bench-gpu-") as work:
        for name in arguments.models.split(","):
            bundle = Path(work) / name
            step_cost.export(name, bundle, TARGETS if "tensorrt" in engines else ())
            row = measure(name, bundle, engines, arguments)
            result["models"][name] = row
            print(json.dumps({name: row}, indent=1), flush=True)
            if arguments.json:  # what was measured stays, whatever the next model does
                arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def machine(device: str) -> dict[str, Any]:
    """What the figures were made with."""
    import torch

    packages = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "torch", "numpy")
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "processor": processor(),
        "cores": os.cpu_count(),
    }
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if device == "cuda":
        from tta_runtime.cuda_driver import CudaDriver

        gpu = CudaDriver().gpu()
        found |= {"gpu": gpu.name, "capability": list(gpu.capability), "driver": gpu.driver}
        found["torch_cuda"] = torch.version.cuda
    return found


def processor() -> str:
    """Its name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def measure(name: str, bundle: Path, engines: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything of one model."""
    size = step_cost.MODELS[name][1]
    rng = np.random.default_rng(0)
    batches = [rng.random((arguments.batch, 3, size, size), dtype=np.float32) for _ in range(4)]
    row: dict[str, Any] = {"time": times(name, bundle, engines, batches[0], arguments)}
    steps = 3 if arguments.small else PARITY_STEPS
    answers = 20 if arguments.small else ANSWERS
    for engine in engines:
        parts: dict[str, Callable[[], Any]] = {
            "providers": lambda engine=engine: load(bundle, engine).engines.providers,
            "parity": lambda engine=engine: parity(bundle, engine, batches, steps),
            "copies": lambda engine=engine: copies(bundle, engine, batches[0]),
            "answers": lambda engine=engine: beside(bundle, engine, batches[0], answers),
        }
        if engine != "tensorrt":
            parts["profile"] = lambda engine=engine: step_cost.profile(
                bundle, arguments.batch, provider=engine
            )
        row[engine] = {key: tried(part) for key, part in parts.items()}
    return row


def tried(part: Callable[[], Any]) -> Any:
    """A result, or the error that there is instead of it."""
    try:
        return part()
    except Exception as error:  # noqa: BLE001 - one part that fails must not cost the others their figures
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}


def load(bundle: Path, engine: str, *, tf32: bool = False, apart: bool = False) -> Any:
    """The model with tent on an engine, as the daemon has it; `apart`: threads of their own for steps."""
    from tta_runtime import EngineOptions, Engines, Model
    from tta_runtime.plan_build import Batches
    from tta_runtime.selection import Selector

    # On a CPU the I/O bindings are used as well: that is the path under test.
    options = EngineOptions(threads=1 if apart else step_cost.THREADS, tf32=tf32, resident=True)
    select = Selector(engine, batches=Batches(1, 64, 64))
    engines = Engines.load(bundle, methods=["tent"], options=options, step_options=options, loader=select)
    return Model(engines, "tent")


def times(
    name: str, bundle: Path, engines: list[str], x: np.ndarray, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Milliseconds of everything that steps or answers, interleaved, for TF32 off and on."""
    found = {}
    for tf32 in (False, True) if arguments.device == "cuda" else (False,):
        runs: dict[str, Callable[[], object]] = {}
        errors: dict[str, Any] = {}
        for engine in engines:
            model = tried(lambda engine=engine, tf32=tf32: load(bundle, engine, tf32=tf32))
            if isinstance(model, dict):
                errors[engine] = model["error"]
                continue
            runs[f"{engine} step"] = lambda model=model: model.adapt(x)
            runs[f"{engine} forward"] = lambda model=model: model.predict(x)
        runs["eager step"] = step_cost.tent(name, x, compiled=False, device=arguments.device)
        if not arguments.no_compile and not arguments.small:
            runs["compile step"] = step_cost.tent(name, x, compiled=True, device=arguments.device)
        found["tf32" if tf32 else "float32"] = {**interleaved(runs, arguments, tf32=tf32), "errors": errors}
    return found


def interleaved(
    runs: Mapping[str, Callable[[], object]], arguments: argparse.Namespace, *, tf32: bool
) -> dict[str, Any]:
    """Median and minimum of each in milliseconds; every run ends with its results on the host."""
    import torch

    if arguments.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    spent: dict[str, list[float]] = {}
    results: dict[str, Any] = {}
    for key, run in runs.items():
        warm = tried(lambda run=run: [run() for _ in range(3)] and None)  # builds, compiles, chooses kernels
        if warm is not None:
            results[key] = warm
        else:
            spent[key] = []
    for _ in range(arguments.repeats):
        for key, times_ms in spent.items():
            began_s = time.perf_counter()
            runs[key]()
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            times_ms.append(1e3 * (time.perf_counter() - began_s))
    for key, times_ms in spent.items():
        results[key] = {"median_ms": round(statistics.median(times_ms), 3), "min_ms": round(min(times_ms), 3)}
    return results


def parity(bundle: Path, engine: str, batches: list[np.ndarray], steps: int) -> dict[str, Any]:
    """How far an engine is from the CPU's plain path: on a run of its own, and in each step from the CPU's theta."""
    from tta_runtime import EngineOptions, Model

    cpu = Model.open(bundle, method="tent", options=EngineOptions(threads=step_cost.THREADS))
    alone, led = load(bundle, engine), load(bundle, engine)
    apart, single = [], []
    for index in range(steps):
        x = batches[index % len(batches)]
        led.restore(cpu.checkpoint)
        expected, found, one = cpu.step(x), alone.step(x), led.step(x)
        apart.append(relative(found.logits, expected.logits))
        single.append(max(relative(one.logits, expected.logits), relative(one.theta, expected.theta)))
        cpu.commit(expected)
        alone.commit(found)
    moved = float(np.abs(cpu.theta - cpu.theta0).max())
    return {
        "steps": steps,
        "logits_worst": max(apart),
        "theta_after": relative(alone.theta, cpu.theta),
        "theta_over_its_movement": float(np.abs(alone.theta - cpu.theta).max()) / max(moved, 1e-12),
        "one_step_worst": max(single),
    }


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-12))


def copies(bundle: Path, engine: str, x: np.ndarray) -> dict[str, Any]:
    """Bytes of one committed step: by itself, and as the daemon makes it, with its guards."""
    from tta_edge.adapt import STANDARD, Stream

    model = load(bundle, engine)
    stream = Stream("benchmark", load(bundle, engine), STANDARD)
    found: dict[str, Any] = {}
    for key, of, run in (
        ("step", model, lambda: model.adapt(x)),
        ("step with guards", stream.model, lambda: stream.answer(x)),
    ):
        run()
        run()
        traffic = of.engines["step.tent"].traffic
        if traffic is None:
            return {"error": "this engine keeps nothing on a device"}
        before = traffic.to_host, traffic.to_device
        run()
        found[key] = {"to_host": traffic.to_host - before[0], "to_device": traffic.to_device - before[1]}
    logits, report = 4 * len(x) * model.manifest.classes, 4 * len(model.spec.report)
    found["logits_and_report"] = logits + report
    found["only_logits_report_and_sums"] = found["step"]["to_host"] == logits + report + 4 * (
        1 + len(model.spec.state)
    )
    found["batch"] = x.nbytes
    found["theta"] = 4 * model.manifest.theta.size
    return found


def beside(bundle: Path, engine: str, x: np.ndarray, answers: int) -> dict[str, Any]:
    """Percentiles of a forward pass of one sample in milliseconds, alone and while another thread steps."""
    model = load(bundle, engine, apart=True)
    one = x[:1]
    for _ in range(5):
        model.predict(one)
        model.adapt(x)
    found: dict[str, Any] = {"alone": percentiles(lambda: model.predict(one), answers)}
    done, counts = threading.Event(), [0]

    def step() -> None:
        while not done.is_set():
            model.adapt(x)
            counts[0] += 1

    thread = threading.Thread(target=step)
    thread.start()
    try:
        began_s = time.perf_counter()
        found["beside a step"] = percentiles(lambda: model.predict(one), answers)
        took_s = time.perf_counter() - began_s
    finally:
        done.set()
        thread.join()
    found["steps_per_second_meanwhile"] = round(counts[0] / took_s, 2)
    return found


def percentiles(run: Callable[[], object], count: int) -> dict[str, float]:
    """p50 and p99 in milliseconds."""
    spent = []
    for _ in range(count):
        began_s = time.perf_counter()
        run()
        spent.append(1e3 * (time.perf_counter() - began_s))
    return {f"p{p}_ms": round(float(np.percentile(spent, p)), 3) for p in (50, 99)}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(step_cost.THREADS))
    if importlib.util.find_spec("torch") is None:
        sys.exit(
            "this benchmark compares with PyTorch: pip install 'tta-runtime[gpu,export]' torchvision timm"
        )
    main()
