"""Checks of the GPU: driver, the libraries of both GPU engines, and which package fits what this machine is.

Which packages exist for which machine, and their sizes, are facts of NVIDIA's and ONNX Runtime's releases; docs/gpu.md
has them in one table.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from tta_edge.config import Config
from tta_runtime import trt_library
from tta_runtime.checks import Check, fail, ok, warn
from tta_runtime.cuda_driver import CudaDriver, Gpu
from tta_runtime.errors import TtaError
from tta_runtime.ort_libraries import preload, why_not
from tta_runtime.plan_cache import PlanCache, default_directory
from tta_runtime.trt_library import TrtLibrary

Machine = Literal["jetson", "data centre", "desktop"]
DATA_CENTRE = ((8, 0), (9, 0), (10, 0), (10, 3))
"""Compute capabilities of cards that are sold for servers only: A100, H100 and H200, B200, B300."""
MODEL = Path("/proc/device-tree/model")
"""Where a board says what it is."""

CUDA_PACKAGE: dict[Machine, str] = {
    "desktop": "pip uninstall onnxruntime && pip install 'tta-runtime[gpu]'",
    "data centre": "pip uninstall onnxruntime && pip install 'tta-runtime[gpu]'",
    "jetson": "Install onnxruntime-gpu from the Jetson AI Lab index for your JetPack; PyPI has no wheel for Jetson",
}
TENSORRT_PACKAGE: dict[Machine, str] = {
    "desktop": "pip install 'tta-runtime[rtx]' (240 MB), or 'tta-runtime[tensorrt]' (several GB, from NVIDIA's index)",
    "data centre": "pip install 'tta-runtime[tensorrt]' (several GB, from NVIDIA's index)",
    "jetson": "Use JetPack's TensorRT: apt install python3-libnvinfer, and a virtual environment that sees it",
}


def machine_of(gpu: Gpu, model: Path = MODEL, architecture: str | None = None) -> Machine:
    """What kind of machine a GPU is in.

    Args:
        gpu: as the driver tells it.
        model: file in which a board says what it is.
        architecture: of the processor; None: the real one.
    """
    try:
        board = model.read_bytes().decode(errors="replace")
    except OSError:
        board = ""
    if "Jetson" in board or ((architecture or platform.machine()) == "aarch64" and "Orin" in gpu.name):
        return "jetson"
    return "data centre" if gpu.capability in DATA_CENTRE else "desktop"


def checks(
    config: Config,
    driver: Callable[[], CudaDriver] = CudaDriver,
    load: Callable[[str], Any] = import_module,
    machine: Callable[[Gpu], Machine] = machine_of,
) -> list[Check]:
    """Driver, CUDA provider, TensorRT; on a machine without a GPU one line, unless one is asked for.

    Args:
        config: of the daemon: which engine it wants.
        driver: loads the driver.
        load: imports a module by name.
        machine: what kind of machine a GPU is in.
    """
    wanted = config.engine in ("cuda", "tensorrt")
    try:
        gpus = driver().gpus()
        gpu = gpus[config.gpu] if config.gpu < len(gpus) else None
    except TtaError as error:
        if wanted:
            return [fail("gpu", f"engine {config.engine}: {error.cause}", error.fix)]
        return [ok("gpu", f"none: engine {config.engine} runs on the CPU ({error.cause})")]
    if gpu is None:
        return [fail("gpu", f"there is no GPU {config.gpu}, the driver finds {len(gpus)}", "Set gpu to 0")]
    kind = machine(gpu)
    text = (
        f"{gpu.name}, compute capability {gpu.capability[0]}.{gpu.capability[1]}, {gpu.memory_bytes / 2**30:.0f} GiB, "
        f"driver {gpu.driver}, a {kind} machine"
    )
    found = [ok("gpu", text)]
    if config.engine == "cpu":
        return found
    return [*found, cuda(config, kind, load), tensorrt(config, gpu, kind, load)]


def cuda(config: Config, kind: Machine, load: Callable[[str], Any]) -> Check:
    """ONNX Runtime has its CUDA provider, and the libraries that it needs."""
    complain = fail if config.engine == "cuda" else warn
    try:
        ort = load("onnxruntime")
    except ImportError as error:
        return complain("cuda", f"onnxruntime cannot be imported: {error}", CUDA_PACKAGE[kind])
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return complain(
            "cuda", f"onnxruntime {ort.__version__} was built without its CUDA provider", CUDA_PACKAGE[kind]
        )
    preload(ort)
    if why := why_not(ort, "CUDAExecutionProvider"):
        return complain(
            "cuda",
            f"onnxruntime {ort.__version__} has its CUDA provider, but not what it needs: {why}",
            "pip install 'onnxruntime-gpu[cuda,cudnn]', which brings CUDA and cuDNN as packages, or install them",
        )
    return ok("cuda", f"onnxruntime {ort.__version__} with its CUDA provider and libraries")


def tensorrt(config: Config, gpu: Gpu, kind: Machine, load: Callable[[str], Any]) -> Check:
    """A TensorRT is there that knows this GPU, and plans can be kept."""
    strict = config.engine == "tensorrt"
    try:
        library: TrtLibrary = trt_library.load(find=load)
        library.check_capability(gpu.capability, gpu.name)
        directory = default_directory() if config.plan_cache is None else Path(config.plan_cache)
        if directory.exists():
            PlanCache(directory)
    except TtaError as error:
        packages = error.code in ("library-missing", "library-unsuitable", "gpu-unsupported")
        fix = TENSORRT_PACKAGE[kind] if packages else error.fix
        if not strict:  # CUDA serves as well: nothing is wrong
            return ok("tensorrt", f"not used: {error.cause}. For plans: {fix}")
        return fail("tensorrt", error.cause, fix)
    return ok("tensorrt", f"{library.name}, plans in {directory}")
