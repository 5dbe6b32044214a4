"""What one adaptation step costs: our compiled step against eager PyTorch TENT and torch.compile'd TENT.

Time: the four are interleaved in one process, two threads each, and the medians compared. Memory: each in a process of
its own, peak resident size. Weights are random (a step costs the same), so this needs no data. Before and after a
change: ``--against`` another checkout, two processes that take turns.

Example: python benchmarks/step_cost.py --json step_cost.json
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MODELS: dict[str, tuple[str, int, int]] = {
    "resnet20": (f"{ROOT}/examples/cifar10/models.py:resnet20", 32, 10),
    "resnet18": ("torchvision:resnet18", 224, 1000),
    "resnet50": ("torchvision:resnet50", 224, 1000),
    "vit_tiny": ("timm:vit_tiny_patch16_224", 224, 1000),
    "vit_b": ("timm:vit_base_patch16_224", 224, 1000),
}
DEFAULT = ("resnet20", "resnet18", "resnet50", "vit_tiny")
THREADS = 2
LR = 1e-3


def main() -> None:
    """Parses arguments and runs; also the entry of the memory children."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--models", default=",".join(DEFAULT), help="comma list")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9, help="interleaved rounds; the median is reported")
    parser.add_argument(
        "--no-compile", action="store_true", help="skip torch.compile (it needs a C++ compiler)"
    )
    parser.add_argument(
        "--profile", action="store_true", help="print where our step spends its time, by operator"
    )
    parser.add_argument(
        "--spin", action="store_true", help="let our idle threads spin during a step, as PyTorch's do"
    )
    parser.add_argument(
        "--against", type=Path, help="compare with the step of this other checkout instead, in turns"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--bundle", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child == "export":
        export(arguments.models, Path(arguments.bundle))
        return
    if arguments.child == "turns":
        turns_child(Path(arguments.bundle), arguments.models, arguments.batch)
        return
    if arguments.child:
        memory_child(arguments.child, arguments.models, arguments.bundle, arguments.batch)
        return
    if arguments.against:
        compare(arguments)
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="tta-bench-") as work:
        for name in arguments.models.split(","):
            bundle = Path(work) / name
            export(name, bundle)
            rows.append(
                measure(
                    name,
                    bundle,
                    arguments.batch,
                    arguments.repeats,
                    compiled=not arguments.no_compile,
                    spin=arguments.spin,
                )
            )
            print(format_row(rows[-1]), flush=True)
            if arguments.profile:
                print(profile(bundle, arguments.batch), flush=True)
    result = {
        "rows": rows,
        "geomean_vs_eager": geomean([row["eager_ms"] / row["step_ms"] for row in rows]),
        "geomean_vs_compile": geomean(
            [row["compile_ms"] / row["step_ms"] for row in rows if row["compile_ms"] is not None]
        ),
        "worst_memory_ratio": max(row["peak_mb"] / row["eager_peak_mb"] for row in rows),
        "threads": THREADS,
        "repeats": arguments.repeats,
        "spin": arguments.spin,
    }
    print(
        f"geometric mean: {result['geomean_vs_eager']:.2f}x faster than eager, "
        f"{result['geomean_vs_compile'] or float('nan'):.2f}x against torch.compile; "
        f"largest memory ratio {result['worst_memory_ratio']:.2f}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def export(name: str, bundle: Path, tensorrt: Sequence[tuple[int, int]] = ()) -> None:
    """Builds the bundle of a model with the methods source and tent, for TensorRT as well if targets are named."""
    from tta_exporters.build import BuildOptions, InputOptions, build
    from tta_exporters.sources import load_network

    source, size, classes = MODELS[name]
    inputs = InputOptions((3, size, size))
    options = BuildOptions(name, inputs, classes, ["source", "tent"])
    if tensorrt:
        options = dataclasses.replace(options, tensorrt=tensorrt)
    build(load_network(source), options, bundle)


def measure(
    name: str, bundle: Path, batch: int, repeats: int, *, compiled: bool, spin: bool
) -> dict[str, Any]:
    """Interleaved medians in milliseconds and peaks in megabytes."""
    import torch

    torch.set_num_threads(THREADS)
    size = MODELS[name][1]
    x = np.random.default_rng(0).random((batch, 3, size, size), dtype=np.float32)
    steps: dict[str, Callable[[], object]] = {
        **ours(bundle, x, spin=spin),
        "eager_ms": tent(name, x, compiled=False),
    }
    if compiled:
        steps["compile_ms"] = tent(name, x, compiled=True)
    times: dict[str, list[float]] = {key: [] for key in steps}
    for key in list(steps):
        try:
            steps[key]()
            steps[key]()
        except Exception as error:
            if key != "compile_ms":
                raise
            print(f"torch.compile failed: {type(error).__name__}: {str(error).splitlines()[0]}")
            del steps[key], times[key]
    for _ in range(repeats):
        for key, run in steps.items():
            start = time.perf_counter()
            run()
            times[key].append(1e3 * (time.perf_counter() - start))
    row: dict[str, Any] = {"model": name, "batch": batch, "compile_ms": None}
    row |= {key: round(statistics.median(values), 2) for key, values in times.items()}
    row |= {f"{key[:-3]}_min_ms": round(min(values), 2) for key, values in times.items()}
    row["peak_mb"] = peak("ours", name, bundle, batch)
    row["eager_peak_mb"] = peak("eager", name, bundle, batch)
    return row


def ours(bundle: Path, x: np.ndarray, *, spin: bool = False) -> dict[str, Callable[[], object]]:
    """The compiled step (committed, as in use) and the serving forward."""
    from tta_runtime import EngineOptions, Model

    model = Model.open(bundle, method="tent", options=EngineOptions(threads=THREADS, spin=spin))
    return {"step_ms": lambda: model.adapt(x), "forward_ms": lambda: model.predict(x)}


def tent(name: str, x: np.ndarray, *, compiled: bool, device: str = "cpu") -> Callable[[], object]:
    """TENT as one writes it in PyTorch: batch statistics, entropy, SGD on the norm layers' affine parameters.

    The batch comes from the host and the logits go back there, as a service has it.
    """
    import torch
    from torch import nn

    from tta_exporters.sources import load_network

    network = load_network(MODELS[name][0]).train().requires_grad_(False).to(device)
    parameters = []
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            module.requires_grad_(True)
            parameters += [module.weight, module.bias]
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=0.9, nesterov=True)
    forward = torch.compile(network) if compiled else network
    batch = torch.from_numpy(x)

    def step() -> object:
        logits = forward(batch.to(device))
        log_p = logits.log_softmax(1)
        loss = -(log_p.exp() * log_p).sum(1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return logits.detach().cpu()

    return step


def peak(kind: str, name: str, bundle: Path, batch: int) -> float:
    """Peak resident megabytes of a process that does nothing but six steps."""
    command = child(kind, bundle, name, batch)
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.strip().splitlines()[-1])


def memory_child(kind: str, name: str, bundle: str, batch: int) -> None:
    """Six steps, then the peak resident size of this process in megabytes, printed."""
    size = MODELS[name][1]
    x = np.random.default_rng(0).random((batch, 3, size, size), dtype=np.float32)
    if kind == "ours":
        step = ours(Path(bundle), x)["step_ms"]
    else:
        import torch

        torch.set_num_threads(THREADS)
        step = tent(name, x, compiled=False)
    for _ in range(6):
        step()
    # Not ru_maxrss: a child inherits its parent's value across fork and exec.
    status = Path("/proc/self/status").read_text()
    print(next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")))


def compare(arguments: argparse.Namespace) -> None:
    """This checkout beside another: step and forward of each in a process of its own, in turns; medians and ratios."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="tta-bench-") as work, contextlib.ExitStack() as stack:
        for name in arguments.models.split(","):
            bundle = Path(work) / name
            # Built by the other one: a newer version reads what an older one wrote, not the reverse.
            subprocess.run(
                child("export", bundle, name, arguments.batch),
                check=True,
                env=environment(arguments.against),
            )
            sides = {
                "before": stack.enter_context(turns(arguments.against, bundle, name, arguments.batch)),
                "after": stack.enter_context(turns(ROOT, bundle, name, arguments.batch)),
            }
            times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
            for turn in range(arguments.repeats + 2):
                # The one that comes second finds other caches and clocks: each is first every other time.
                for side in sorted(sides, reverse=turn % 2 == 0):
                    step, forward = take_turn(sides[side])
                    if turn >= 2:
                        times[side].append((step, forward))
            row: dict[str, Any] = {"model": name, "batch": arguments.batch}
            for index, kind in enumerate(("step", "forward")):
                before, after = ([pair[index] for pair in times[side]] for side in ("before", "after"))
                row |= {
                    f"{kind}_before_ms": round(statistics.median(before), 3),
                    f"{kind}_after_ms": round(statistics.median(after), 3),
                    f"{kind}_ratio": round(statistics.median(after) / statistics.median(before), 3),
                    f"{kind}_min_ratio": round(min(after) / min(before), 3),
                }
            rows.append(row)
            print(json.dumps(row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "repeats": arguments.repeats}, indent=2) + "\n")


@contextlib.contextmanager
def turns(checkout: Path, bundle: Path, name: str, batch: int) -> Iterator[subprocess.Popen[str]]:
    """A process with the packages of ``checkout`` that steps once per line it is sent."""
    process = subprocess.Popen(
        child("turns", bundle, name, batch),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(checkout),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def child(kind: str, bundle: Path, name: str, batch: int) -> list[str]:
    """The command of a process of this script."""
    options = ["--child", kind, "--bundle", str(bundle), "--models", name, "--batch", str(batch)]
    return [sys.executable, __file__, *options]


def environment(checkout: Path) -> dict[str, str]:
    """What makes a process import the packages of ``checkout``."""
    packages = ("runtime", "adapters", "exporters", "edge", "cloud")
    path = os.pathsep.join(str(checkout.resolve() / package) for package in packages)
    return {**os.environ, "PYTHONPATH": path}


def take_turn(process: subprocess.Popen[str]) -> tuple[float, float]:
    """One step and one forward of that process, in milliseconds."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the process has no pipes")
    process.stdin.write("\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the process of a checkout ended with status {process.wait()}")
    step, forward = line.split()
    return float(step), float(forward)


def turns_child(bundle: Path, name: str, batch: int) -> None:
    """Steps and serves once for each line of standard input, and prints how long the two took."""
    size = MODELS[name][1]
    x = np.random.default_rng(0).random((batch, 3, size, size), dtype=np.float32)
    run = ours(bundle, x)
    for _ in sys.stdin:
        milliseconds = []
        for kind in ("step_ms", "forward_ms"):
            start = time.perf_counter()
            run[kind]()
            milliseconds.append(1e3 * (time.perf_counter() - start))
        print(*milliseconds, flush=True)


def profile(bundle: Path, batch: int, rounds: int = 4, provider: str = "cpu") -> str:
    """Milliseconds per operator type of our step, from ONNX Runtime's own profiler."""
    from tta_runtime import Bundle, EngineOptions, OrtEngine

    options = EngineOptions(threads=THREADS, provider=provider, profile=str(bundle.parent / "profile"))
    engine = OrtEngine(Bundle.open(bundle), "step.tent", options)
    shapes = {
        port.name: [batch if axis == "batch" else int(axis) for axis in port.shape]
        for port in engine.spec.inputs
    }
    generator = np.random.default_rng(0)
    feed = {key: generator.random(shape, dtype=np.float32) for key, shape in shapes.items()}
    for _ in range(rounds + 1):
        engine.run(feed)
    events = json.loads(engine.end_profiling().read_text())
    starts = [event["ts"] for event in events if event["name"] == "model_run"]
    totals: dict[str, float] = {}
    on_gpu = any(event.get("cat") == "Kernel" for event in events)
    for event in events:
        node = event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        if (event.get("cat") == "Kernel" if on_gpu else node) and event["ts"] >= starts[1]:
            kind = event["name"][:40] if on_gpu else event["args"]["op_name"]
            totals[kind] = totals.get(kind, 0.0) + event["dur"] / 1e3 / rounds
    whole = sum(totals.values())
    top = sorted(totals.items(), key=lambda item: -item[1])[:10]
    return "  " + ", ".join(f"{kind} {ms:.0f} ms ({100 * ms / whole:.0f} %)" for kind, ms in top)


def geomean(values: Sequence[float]) -> float | None:
    """Geometric mean, None of nothing."""
    return math.exp(sum(math.log(value) for value in values) / len(values)) if values else None


def format_row(row: dict[str, Any]) -> str:
    """One line for people."""
    compiled = f"{row['compile_ms']:8.1f}" if row["compile_ms"] is not None else "       -"
    return (
        f"{row['model']:10s} batch {row['batch']}: step {row['step_ms']:8.1f} ms, forward {row['forward_ms']:8.1f}, "
        f"eager {row['eager_ms']:8.1f}, compile {compiled}, peak {row['peak_mb']:.0f} MB, "
        f"eager {row['eager_peak_mb']:.0f} MB ({row['peak_mb'] / row['eager_peak_mb']:.2f})"
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
    if importlib.util.find_spec("torch") is None:
        sys.exit(
            "this benchmark compares with PyTorch: pip install 'tta-runtime[cpu,export]' torchvision timm"
        )
    main()
