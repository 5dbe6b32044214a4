"""What a bundle costs: run as a process of its own, so that the peak is this bundle's and PyTorch is not part of it.

python examples/adapters/cost.py BUNDLE METHOD
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from tta_runtime import EngineOptions, Model

BATCH = 64
REPEATS = 30


def cost(bundle: str, method: str) -> dict[str, float]:
    """Median milliseconds of a forward pass and of a step on one thread, and the peak of resident memory in MB."""
    model = Model.open(bundle, method=method, options=EngineOptions(threads=1))
    channels, height, width = (int(size) for size in model.manifest.input.shape[1:])
    x = np.random.default_rng(0).random((BATCH, channels, height, width), dtype=np.float32)
    times: dict[str, list[float]] = {"forward_ms": [], "step_ms": []}
    for repeat in range(1 + REPEATS):
        for name, call in (("forward_ms", model.predict), ("step_ms", model.adapt)):
            begun = time.perf_counter()
            call(x)
            if repeat:  # the first one warms up
                times[name].append(1000 * (time.perf_counter() - begun))
    # Not ru_maxrss: a child inherits its parent's value across fork and exec.
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
    medians = {name: float(np.median(values)) for name, values in times.items()}
    return {**medians, "peak_mb": peak, "theta": model.manifest.theta.size}


if __name__ == "__main__":
    print(json.dumps(cost(*sys.argv[1:3])))
