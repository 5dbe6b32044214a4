"""What an edge box pays: installed size, time from process start to the first answer, memory while adapting.

Ours is the `[cpu]` install in a fresh virtual environment; beside it a PyTorch script that does the same with the same
network (ResNet-20, batch 16, TENT). The PyTorch side is measured in the environment this script runs in.

Example: python benchmarks/edge_footprint.py --json footprint.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FACTORY = f"{ROOT}/examples/cifar10/models.py:resnet20"

OURS = """
import sys, time
import numpy as np
from tta_runtime import Model, EngineOptions
model = Model.open(sys.argv[1], method="tent", options=EngineOptions(threads=2))
x = np.random.default_rng(0).random((16, 3, 32, 32), dtype=np.float32)
model.predict(x[:1])
print("first", time.time(), flush=True)
for _ in range(50):
    model.adapt(x)
print("peak", next(int(l.split()[1]) / 1024 for l in open("/proc/self/status") if l.startswith("VmHWM")))
"""

TORCH = """
import importlib.util, sys, time
import torch
from torch import nn
torch.set_num_threads(2)
spec = importlib.util.spec_from_file_location("models", sys.argv[1])
models = importlib.util.module_from_spec(spec); spec.loader.exec_module(models)
network = models.resnet20().train().requires_grad_(False)
parameters = []
for module in network.modules():
    if isinstance(module, nn.BatchNorm2d):
        module.track_running_stats, module.running_mean, module.running_var = False, None, None
        module.requires_grad_(True)
        parameters += [module.weight, module.bias]
optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, nesterov=True)
x = torch.rand(16, 3, 32, 32)
with torch.no_grad():
    network(x[:2])
print("first", time.time(), flush=True)
for _ in range(50):
    log_p = network(x).log_softmax(1)
    (-(log_p.exp() * log_p).sum(1).mean()).backward()
    optimizer.step(); optimizer.zero_grad()
print("peak", next(int(l.split()[1]) / 1024 for l in open("/proc/self/status") if l.startswith("VmHWM")))
"""

DAEMON = """
import sys, time
import numpy as np
from tta_edge.client import Client
with Client(sys.argv[1]) as client:
    client.predict(np.random.default_rng(0).random((1, 3, 32, 32), dtype=np.float32), adapt=False)
    print("first", time.time(), flush=True)
"""


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tta-footprint-") as work:
        bundle = Path(work) / "resnet20"
        export(bundle)
        python, installed = install(Path(work) / "venv")
        result: dict[str, Any] = {
            "installed_mb": installed,
            "torch_installed_mb": torch_size(),
            **script("ours", python, OURS, str(bundle), arguments.repeats),
            **script("torch", sys.executable, TORCH, FACTORY.rsplit(":", 1)[0], arguments.repeats),
        }
        result["daemon_first_answer_s"] = daemon(python, bundle, arguments.repeats)
    for key, value in result.items():
        print(f"{key:28s} {value:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def export(bundle: Path) -> None:
    """ResNet-20 with source and tent."""
    from tta_exporters.build import BuildOptions, InputOptions, build
    from tta_exporters.sources import load_network

    options = BuildOptions("resnet20", InputOptions((3, 32, 32)), 10, ["source", "tent"])
    build(load_network(FACTORY), options, bundle)


def install(venv: Path) -> tuple[str, float]:
    """A fresh environment with the `[cpu]` install; its Python and the megabytes it adds to an empty one."""
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    empty = size_mb(venv)
    python = str(venv / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "-q", "--no-compile"]
    subprocess.run([*pip, f"{ROOT}[cpu]"], check=True)
    return python, size_mb(venv) - empty


def size_mb(folder: Path) -> float:
    """Bytes of all regular files below, in megabytes, without compiled caches (they come with use)."""
    files = (
        file
        for file in folder.rglob("*")
        if file.is_file() and not file.is_symlink() and file.suffix != ".pyc"
    )
    return sum(file.stat().st_size for file in files) / 1e6


def torch_size() -> float:
    """Installed megabytes of the torch distribution and nothing it depends on."""
    files = importlib.metadata.files("torch") or []
    paths = [Path(str(file.locate())) for file in files]
    return sum(path.stat().st_size for path in paths if path.is_file() and path.suffix != ".pyc") / 1e6


def script(label: str, python: str, code: str, argument: str, repeats: int) -> dict[str, float]:
    """Median seconds from process start to the first answer, and median peak megabytes."""
    firsts, peaks = [], []
    for _ in range(repeats + 1):
        start = time.time()
        output = subprocess.run(
            [python, "-c", code, argument], check=True, capture_output=True, text=True
        ).stdout
        values = dict(line.split() for line in output.strip().splitlines())
        firsts.append(float(values["first"]) - start)
        peaks.append(float(values["peak"]))
    # The first process warms the file cache.
    return {
        f"{label}_first_answer_s": statistics.median(firsts[1:]),
        f"{label}_peak_mb": statistics.median(peaks[1:]),
    }


def daemon(python: str, bundle: Path, repeats: int) -> float:
    """Median seconds from starting `tta-edge serve` to the first answer over the socket."""
    times = []
    for _ in range(repeats):
        start = time.time()
        served = subprocess.Popen(
            [
                python,
                "-m",
                "tta_edge",
                "serve",
                str(bundle),
                "--bind",
                "tcp://127.0.0.1:0",
                "--method",
                "tent",
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            lines = iter(served.stderr) if served.stderr is not None else iter(())
            endpoint = next(
                word for line in lines if "ready" in line for word in line.split() if "tcp://" in word
            )
            output = subprocess.run(
                [python, "-c", DAEMON, endpoint], check=True, capture_output=True, text=True
            ).stdout
            times.append(float(output.split()[1]) - start)
        finally:
            served.terminate()
            served.wait(timeout=30)
    return statistics.median(times)


if __name__ == "__main__":
    main()
