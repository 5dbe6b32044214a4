"""What stands in for a GPU where there is none: a driver compiled from C whose device memory is the process's own, and
the part of TensorRT's interface that runs a plan, by ONNX Runtime.

They test our side of both interfaces: which functions are called in which order, with which addresses and shapes,
and what is done with every error. They say nothing about a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import json
import shutil
import subprocess
import tempfile
import types
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest

import tiny_bundle
from tta_runtime import Bundle, bundle
from tta_runtime.cuda_driver import CudaDriver
from tta_runtime.manifest import Manifest
from tta_runtime.trt_library import TrtLibrary

DRIVER = r"""
#include <stdlib.h>
#include <string.h>
#include <stdint.h>
static __thread void *current;
static int64_t allocated;
static int number(const char *name, int otherwise) { char *v = getenv(name); return v ? atoi(v) : otherwise; }
int cuInit(unsigned f) { (void)f; return number("STUB_INIT", 0); }
int cuDriverGetVersion(int *v) { *v = number("STUB_VERSION", 13000); return 0; }
int cuDeviceGetCount(int *n) { *n = number("STUB_COUNT", 1); return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetName(char *s, int n, int d) {
  (void)d; char *v = getenv("STUB_NAME"); strncpy(s, v ? v : "Stub GPU", n); return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) {
  (void)d; int c = number("STUB_CAPABILITY", 89); *v = a == 75 ? c / 10 : c % 10; return 0; }
int cuDeviceTotalMem_v2(size_t *n, int d) { (void)d; *n = (size_t)8 << 30; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = (void *)(intptr_t)(d + 1); return 0; }
int cuDevicePrimaryCtxRelease_v2(int d) { (void)d; return 0; }
int cuCtxSetCurrent(void *c) { current = c; return 0; }
int cuMemAlloc_v2(uint64_t *p, size_t n) {
  if (!current) return 201;
  if (allocated + (int64_t)n > number("STUB_MEMORY", 1 << 30)) return 2;
  char *m = malloc(n + 64); if (!m) return 2;
  *(size_t *)m = n; allocated += n; *p = (uint64_t)(uintptr_t)(m + 64); return 0; }
int cuMemFree_v2(uint64_t p) {
  char *m = (char *)(uintptr_t)p - 64; allocated -= *(size_t *)m; free(m); return 0; }
static int check(uint64_t p, size_t n) {  /* a copy beyond the end of a buffer */
  return !current ? 201 : n > *(size_t *)((char *)(uintptr_t)p - 64) ? 700 : 0; }
int cuMemcpyHtoDAsync_v2(uint64_t d, const void *s, size_t n, void *t) {
  (void)t; int e = check(d, n); if (!e) memcpy((void *)(uintptr_t)d, s, n); return e; }
int cuMemcpyDtoHAsync_v2(void *d, uint64_t s, size_t n, void *t) {
  (void)t; int e = check(s, n); if (!e) memcpy(d, (void *)(uintptr_t)s, n); return e; }
int cuMemcpyDtoH_v2(void *d, uint64_t s, size_t n) {
  int e = check(s, n); if (!e) memcpy(d, (void *)(uintptr_t)s, n); return e; }
int cuStreamCreate(void **s, unsigned f) { (void)f; *s = (void *)7; return current ? 0 : 201; }
int cuStreamSynchronize(void *s) { (void)s; return number("STUB_SYNC", 0); }
int cuStreamDestroy_v2(void *s) { (void)s; return 0; }
int cuGetErrorName(int e, const char **s) {
  *s = e == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : e == 100 ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR_STUB"; return 0; }
int cuGetErrorString(int e, const char **s) { (void)e; *s = "as told"; return 0; }
long long stub_allocated(void) { return allocated; }
"""


@functools.cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tta-test-driver-")


@functools.cache
def driver_library() -> Path:
    """The stand-in for libcuda.so.1, compiled once; skips the test where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler to make a stand-in for the driver with")
    source = Path(_directory().name) / "driver.c"
    source.write_text(DRIVER)
    library = source.with_name("libcuda.so.1")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    return library


def driver() -> CudaDriver:
    return CudaDriver(str(driver_library()))


def allocated() -> int:
    """Bytes of the stand-in's device memory that are not free."""
    count = ctypes.CDLL(str(driver_library())).stub_allocated
    count.restype = ctypes.c_longlong
    return int(count())


def tensorrt_bundle(path: Path, **arguments: Any) -> Bundle:
    """The tiny bundle with its graphs written for TensorRT as well; they hold nothing that it lacks."""
    manifest = tiny_bundle.build(path, **arguments)
    return add_variants(path, manifest)


def add_variants(path: Path, manifest: Manifest) -> Bundle:
    graphs = {}
    for key, graph in manifest.graphs.items():
        name = f"{key}.tensorrt.onnx"
        shutil.copy(path / graph.file, path / name)
        graphs[key] = msgspec.structs.replace(graph, tensorrt=name)
    bundle.seal(path, msgspec.structs.replace(manifest, graphs=graphs, files={}))
    return Bundle.open(path)


# --- TensorRT ---------------------------------------------------------------------------------------


_DTYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int64)": np.int64}


class Logger:
    INTERNAL_ERROR, ERROR, WARNING = "internal error", "error", "warning"

    def __init__(self) -> None:
        pass


class Tensor:
    def __init__(self, name: str, shape: tuple[object, ...]) -> None:
        self.name = name
        self.shape = shape


class Network:
    def __init__(self) -> None:
        self.model: onnx.ModelProto | None = None
        self.outputs: list[Tensor] = []
        self.sums: dict[Tensor, Tensor] = {}

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    def get_output(self, index: int) -> Tensor:
        return self.outputs[index]

    def add_reduce(self, tensor: Tensor, operation: str, axes: int, keep: bool) -> Any:
        assert operation == "sum"
        assert axes == (1 << len(tensor.shape)) - 1
        assert not keep
        total = Tensor("", ())
        self.sums[total] = tensor
        return types.SimpleNamespace(get_output=lambda _: total)

    def mark_output(self, tensor: Tensor) -> None:
        self.outputs.append(tensor)


class Parser:
    num_errors = 0

    def __init__(self, network: Network, _: Logger) -> None:
        self._network = network

    def parse_from_file(self, path: str) -> bool:
        self._network.model = onnx.load(path)
        for value in self._network.model.graph.output:
            dims = tuple(dim.dim_value or "batch" for dim in value.type.tensor_type.shape.dim)
            self._network.outputs.append(Tensor(value.name, dims))
        return True


class Config:
    def __init__(self) -> None:
        self.flags = {"tf32"}
        self.bounds: dict[str, tuple[list[int], list[int], list[int]]] = {}
        self._timing = b""

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)

    def create_timing_cache(self, data: bytes) -> bytes:
        return data

    def set_timing_cache(self, data: bytes, ignore_mismatch: bool) -> None:
        assert not ignore_mismatch
        self._timing = data

    def get_timing_cache(self) -> Any:
        return types.SimpleNamespace(serialize=lambda: self._timing + b"+")

    def add_optimization_profile(self, profile: Any) -> None:
        self.bounds = profile.bounds


class Profile:
    def __init__(self) -> None:
        self.bounds: dict[str, tuple[list[int], list[int], list[int]]] = {}

    def set_shape(self, name: str, least: list[int], usual: list[int], most: list[int]) -> None:
        self.bounds[name] = least, usual, most


class Builder:
    builds = 0
    timings: list[bytes] = []  # noqa: RUF012 - what each build was given

    def __init__(self, logger: Logger) -> None:
        self._logger = logger

    def create_network(self, flags: int) -> Network:
        return Network()

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        Builder.builds += 1
        Builder.timings.append(config._timing)
        assert network.model is not None
        head = {
            "bounds": config.bounds,
            "tf32": "tf32" in config.flags,
            "sums": {total.name: of.name for total, of in network.sums.items()},
        }
        return json.dumps(head).encode() + b"\n" + network.model.SerializeToString()


class Context:
    def __init__(self, plan: bytes, logger: Logger) -> None:
        head, _, model = plan.partition(b"\n")
        form = json.loads(head)
        self._bounds, self._sums = form["bounds"], form["sums"]
        self._session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
        self._logger = logger
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._at: dict[str, int] = {}
        self._scratch = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name in self._bounds:
            least, _, most = self._bounds[name]
            if any(not low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
                self._logger.log(Logger.ERROR, f"{name} {shape} is outside of its profile")
                return False
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._at[name] = address
        return bool(address)

    def infer_shapes(self) -> list[str]:
        return [value.name for value in self._session.get_inputs() if value.name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._sums:
            return ()
        output = next(value for value in self._session.get_outputs() if value.name == name)
        batch = self._shapes["x"][0]
        return tuple(length if isinstance(length, int) else batch for length in output.shape)

    def update_device_memory_size_for_shapes(self) -> int:
        return 4096 * self._shapes["x"][0]

    def set_device_memory(self, address: int, nbytes: int) -> None:
        self._scratch = nbytes if address else 0

    def execute_async_v3(self, stream: int) -> bool:
        assert stream
        assert self._scratch >= self.update_device_memory_size_for_shapes()
        feed = {}
        for value in self._session.get_inputs():
            dtype = _DTYPES[value.type]
            array = np.empty(self._shapes[value.name], dtype)
            ctypes.memmove(array.ctypes.data, self._at[value.name], array.nbytes)
            feed[value.name] = array
        found = dict(
            zip([v.name for v in self._session.get_outputs()], self._session.run(None, feed), strict=True)
        )
        found |= {total: np.array(found[of].sum()) for total, of in self._sums.items()}
        for name, array in found.items():
            ctypes.memmove(self._at[name], np.ascontiguousarray(array).ctypes.data, array.nbytes)
        return True


class Engine:
    def __init__(self, plan: bytes, logger: Logger) -> None:
        self._plan, self._logger = plan, logger

    def create_execution_context(self, strategy: str) -> Context:
        assert strategy == "user managed"
        return Context(self._plan, self._logger)


class Runtime:
    def __init__(self, logger: Logger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        if not plan.startswith(b"{"):
            self._logger.log(Logger.ERROR, "the plan is for another GPU")
            return None
        return Engine(plan, self._logger)


def library(version: str = "10.13.2.6") -> TrtLibrary:
    """A TensorRT that runs its plans by ONNX Runtime, and counts builds anew."""
    Builder.builds, Builder.timings = 0, []
    module = types.SimpleNamespace(
        ILogger=Logger, Builder=Builder, OnnxParser=Parser, Runtime=Runtime, __version__=version,
        BuilderFlag=types.SimpleNamespace(TF32="tf32"),
        ReduceOperation=types.SimpleNamespace(SUM="sum"),
        ExecutionContextAllocationStrategy=types.SimpleNamespace(USER_MANAGED="user managed"),
    )  # fmt: skip
    return TrtLibrary(module, "tensorrt", version)


__all__ = ["add_variants", "allocated", "driver", "driver_library", "library", "tensorrt_bundle"]
