"""Graphs as native TensorRT plans, built on the machine that runs them and kept in its cache.

Theta and state stay on the GPU. Every engine has an execution context and a stream of its own, so that a step and the
answers beside it share nothing but the device.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import trt_library
from .arrays import is_fixed
from .bundle import Bundle
from .cuda_driver import Buffer, CudaDevice, CudaDriver
from .engine import FIXED, RESIDENT, Arrays, EngineOptions
from .errors import BatchTooLarge, EngineError, EngineFailed, PlanRefused
from .held import Held, Resident, Traffic, host
from .manifest import Graph, Port
from .plan_build import Batches, Request, build_plan, make_listener, register_plugins, resident_outputs
from .plan_cache import Key, PlanCache, default_directory
from .trt_library import TrtLibrary

_log = logging.getLogger(__name__)
_UPLOADS = 8
"""Arrays of the host that a graph keeps on its device; see ort_device.py."""


class TrtLoader:
    """Makes engines of graphs; those of one loader share the device and its memory.

    Args:
        library: TensorRT; None: the one that is installed.
        driver: of CUDA; None: the one that is installed.
        device: number of the GPU.
        cache: where plans are kept; None: `plan_cache.default_directory`.
        batches: samples that a plan takes at once.

    Raises:
        DriverMissing: there is no driver or no GPU.
        LibraryMissing, LibraryUnsuitable: there is no TensorRT that can be used.
        GpuUnsupported: TensorRT does not know this GPU.
        PlanCacheRefused: plans cannot be kept there.
    """

    def __init__(
        self,
        library: TrtLibrary | None = None,
        driver: CudaDriver | None = None,
        device: int = 0,
        cache: Path | None = None,
        batches: Batches = Batches(),  # noqa: B008 - it is immutable
    ) -> None:
        driver = driver or CudaDriver()  # first: without a GPU no library helps
        self.library = library or trt_library.load()
        gpu = driver.gpu(device)
        self.library.check_capability(gpu.capability, gpu.name)
        self.device = CudaDevice(driver, device)
        self.cache = PlanCache(cache or default_directory())
        self.batches = batches

    def __call__(self, bundle: Bundle, graph: str, options: EngineOptions) -> TrtEngine:
        """Load the graph of that key, building its plan where the cache has none.

        Raises:
            GraphsMissing: the bundle was built without graphs for TensorRT.
            PlanRefused: TensorRT refuses the graph or its plan.
            OutOfDeviceMemory: the GPU has no room for it.
        """
        return TrtEngine(self, bundle, graph, options)

    def key(self, bundle: Bundle, graph: str, options: EngineOptions) -> Key:
        """What the plan of a graph depends on."""
        manifest, gpu, batches = bundle.manifest, self.device.gpu, self.batches
        file = bundle.tensorrt_file(graph).name
        # Which of the other files hold its weights stands inside of the graph; all that may are named here.
        graphs = {name for each in manifest.graphs.values() for name in (each.file, each.tensorrt)}
        digest = hashlib.sha256(manifest.files[file].sha256.encode())
        for name in sorted(manifest.files.keys() - graphs):
            digest.update(f"\0{name}\0{manifest.files[name].sha256}".encode())
        return Key(
            graph=f"{file} {digest.hexdigest()}",
            profile=f"batch {batches.least}..{batches.most}, usual {batches.usual}, tf32 {int(options.tf32)}",
            gpu=f"{gpu.name} {gpu.capability[0]}.{gpu.capability[1]}",
            library=f"{self.library.flavour} {self.library.version}",
            driver=gpu.driver,
        )


class TrtResident(Resident):
    """An array in a buffer of the device, with the sum that the plan made of it."""

    def __init__(
        self, device: CudaDevice, buffer: Buffer, port: Port, shape: tuple[int, ...], traffic: Traffic
    ) -> None:
        super().__init__(shape, np.dtype(port.dtype), traffic)
        self.device = device
        self.buffer = buffer
        self.total: float | None = None

    def _fetch(self) -> NDArray[Any]:
        return self.device.fetch(self.buffer, self.shape, self.dtype)

    def _total(self) -> float | None:
        return self.total


class TrtEngine:
    """One graph as a TensorRT plan. Stateless; `run` may be called from several threads, one after the other.

    Args:
        loader: library, device and cache.
        bundle: an opened bundle, built with `--tensorrt`.
        graph: key in the manifest's `graphs`.
        options: whether factors may be rounded.

    Raises:
        GraphsMissing, PlanRefused, OutOfDeviceMemory: see `TrtLoader`.
    """

    def __init__(self, loader: TrtLoader, bundle: Bundle, graph: str, options: EngineOptions) -> None:
        self.spec: Graph = bundle.manifest.graphs[graph]
        self.provider: str = loader.library.name
        self.traffic = Traffic()
        self._key = graph
        self._device = loader.device
        self._batches = loader.batches
        self._inputs = frozenset(port.name for port in self.spec.inputs)
        self._lock = threading.Lock()
        self._uploads: OrderedDict[int, tuple[NDArray[Any], Buffer]] = OrderedDict()
        self._sums = resident_outputs(self.spec)
        self._device.use()
        plan = _plan(loader, bundle, graph, options)
        trt = loader.library.module
        self._listener = make_listener(trt)
        register_plugins(loader.library, self._listener)
        self._runtime = trt.Runtime(self._listener)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise PlanRefused(
                f"graph {graph}: {loader.library.name} does not load its plan: {self._listener.reason()}",
                "Read the message; where the GPU has no room, free some, else choose engine `cuda` or `cpu`",
            )
        # The memory of activations is ours, so that it follows the batches that come, not the largest there could be.
        self._context = self._engine.create_execution_context(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if self._context is None:
            raise PlanRefused(
                f"graph {graph}: no execution context: {self._listener.reason()}",
                "Free the GPU's memory, or choose engine `cuda` or `cpu`",
            )
        self._scratch: Buffer | None = None
        self._stream = self._device.stream()

    def run(self, inputs: Arrays) -> Mapping[str, Held]:
        """Outputs by value name, from inputs by value name; what is bound to theta and state stays on the GPU.

        A graph that only serves takes any batch, in parts of what its plan takes; a step's batch cannot be parted.

        Raises:
            EngineFailed: the names, shapes or types are not those of the graph, or TensorRT fails.
            BatchTooLarge: a step on more samples than its plan takes.
            OutOfDeviceMemory: the GPU has no room for this batch.
        """
        if inputs.keys() != self._inputs:
            raise EngineFailed(
                f"graph `{self._key}` takes {sorted(self._inputs)}, given {sorted(inputs)}",
                "Give every input of the graph and nothing else",
            )
        feed = {port.name: _fitting(self._key, port, inputs[port.name]) for port in self.spec.inputs}
        batch = _batch(self._key, self.spec, feed)
        most = self._batches.most
        with self._lock:
            self._device.use()
            if batch is None or batch <= most:
                return self._guarded(feed)
            if self.spec.role != "serve":
                raise BatchTooLarge(
                    f"x has {batch} samples, the plan of graph `{self._key}` takes {most} at once",
                    "Step on fewer samples, or raise plan_max_batch",
                )
            parts = [self._guarded(_part(self.spec, feed, at, most)) for at in range(0, batch, most)]
        return {name: np.concatenate([host(part[name]) for part in parts]) for name in parts[0]}

    def _guarded(self, feed: Mapping[str, Held]) -> dict[str, Held]:
        try:
            return self._run(feed)
        except BaseException:
            with suppress(EngineError):  # the first one is told
                self._device.wait(self._stream)  # what was begun still reads what is about to be let go
            raise

    def _run(self, feed: Mapping[str, Held]) -> dict[str, Held]:
        context, device = self._context, self._device
        used: list[object] = []  # must live until the stream was waited for
        for port in self.spec.inputs:
            buffer = self._placed(port, feed[port.name], used)
            self._must(
                context.set_input_shape(port.name, tuple(feed[port.name].shape)), f"shape of {port.name}"
            )
            self._must(context.set_tensor_address(port.name, buffer.pointer), f"address of {port.name}")
        if unknown := context.infer_shapes():
            raise EngineFailed(f"graph `{self._key}`: {unknown} have no shape", "Build the bundle again")
        outputs: dict[str, tuple[Port, tuple[int, ...], Buffer]] = {}
        for port in self.spec.outputs:
            outputs[port.name] = (
                port,
                tuple(context.get_tensor_shape(port.name)),
                self._output(port.name, port.dtype),
            )
        totals = {name: self._output(total, "float32") for name, total in self._sums.items()}
        self._give_scratch()
        if not context.execute_async_v3(self._stream):
            raise self._failed("does not run")
        results: dict[str, Held] = {}
        for name, (port, shape, buffer) in outputs.items():
            if port.bind in RESIDENT:
                results[name] = TrtResident(device, buffer, port, shape, self.traffic)
            else:
                results[name] = self._fetched(buffer, shape, port.dtype)
        sums = {name: self._fetched(buffer, (), "float32") for name, buffer in totals.items()}
        device.wait(self._stream)
        for name, total in sums.items():
            resident = results[name]
            if isinstance(resident, TrtResident):
                resident.total = float(total)
        return results

    def _placed(self, port: Port, value: Held, used: list[object]) -> Buffer:
        """Where an input is on the device; copied there unless it is there."""
        if isinstance(value, TrtResident) and value.device is self._device:
            used.append(value)
            return value.buffer
        array = np.ascontiguousarray(host(value))
        known = self._uploads.get(id(array)) if port.bind in FIXED else None
        if known is not None:
            self._uploads.move_to_end(id(array))
            return known[1]
        buffer = self._device.take(array.nbytes)
        self._device.copy_in(buffer, array, self._stream)
        self.traffic.to_device += array.nbytes
        used += [array, buffer]
        if port.bind in FIXED and is_fixed(array):
            self._uploads[id(array)] = array, buffer
            if len(self._uploads) > _UPLOADS:
                used.append(self._uploads.popitem(last=False))
        return buffer

    def _output(self, name: str, dtype: str) -> Buffer:
        shape = tuple(self._context.get_tensor_shape(name))
        if any(length < 0 for length in shape):
            raise EngineFailed(
                f"graph `{self._key}`: the shape {list(shape)} of `{name}` depends on data",
                "Choose engine `cuda`",
            )
        buffer = self._device.take(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize)
        self._must(self._context.set_tensor_address(name, buffer.pointer), f"address of {name}")
        return buffer

    def _fetched(self, buffer: Buffer, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        array = np.empty(shape, dtype)
        self._device.copy_out(array, buffer, self._stream)
        self.traffic.to_host += array.nbytes
        return array

    def _give_scratch(self) -> None:
        """Memory for the activations of the shapes that were set; kept for the next run."""
        nbytes = int(self._context.update_device_memory_size_for_shapes())
        if self._scratch is None or self._scratch.nbytes < nbytes:
            self._scratch = None
            self._device.trim()  # before the larger one is taken
            self._scratch = self._device.take(nbytes)
        self._context.set_device_memory(self._scratch.pointer, self._scratch.nbytes)

    def _must(self, done: bool, what: str) -> None:
        if not done:
            raise self._failed(f"refuses the {what}")

    def _failed(self, what: str) -> EngineFailed:
        return EngineFailed(
            f"graph `{self._key}`: {self.provider} {what}: {self._listener.reason()}",
            "Try a smaller batch; if that fails too, report the message",
        )


def _plan(loader: TrtLoader, bundle: Bundle, graph: str, options: EngineOptions) -> bytes:
    """From the cache, or built and kept."""
    gpu, cache = loader.device.gpu, loader.cache
    key = loader.key(bundle, graph, options)
    began_s = time.monotonic()

    def build() -> bytes:
        _log.info("building the plan of graph `%s` with %s for %s", graph, loader.library.name, key.gpu)
        request = Request(
            graph, bundle.tensorrt_file(graph), bundle.manifest.graphs[graph], loader.batches,
            (gpu.capability,), options.tf32,
        )  # fmt: skip
        plan, timing = build_plan(loader.library, request, cache.timing(key))
        cache.keep_timing(key, timing)
        return plan

    found = cache.get(key, build)
    took_s = time.monotonic() - began_s
    how = "built" if found.built else "read"
    _log.info(
        "plan of graph `%s` %s in %.1f s, %d bytes, %s", graph, how, took_s, len(found.plan), cache.directory
    )
    return found.plan


def _fitting(graph: str, port: Port, value: Held) -> Held:
    """An input, if it has the port's type and shape; TensorRT would read past the end of a shorter one."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    fits = shape is not None and len(shape) == len(port.shape) and dtype == np.dtype(port.dtype)
    if not fits or any(isinstance(n, int) and n != m for n, m in zip(port.shape, shape or (), strict=False)):
        raise EngineFailed(
            f"graph `{graph}`: input `{port.name}` is {dtype} {list(shape or ())}, expected {port.dtype} {port.shape}",
            "Give what the bundle's manifest lists",
        )
    return value


def _batch(graph: str, spec: Graph, feed: Mapping[str, Held]) -> int | None:
    """The number of samples; None where it is fixed."""
    sizes = {
        feed[port.name].shape[port.shape.index("batch")] for port in spec.inputs if "batch" in port.shape
    }
    if len(sizes) > 1:
        raise EngineFailed(
            f"graph `{graph}`: its inputs have {sorted(sizes)} samples", "Give each input as many samples"
        )
    return next(iter(sizes), None)


def _part(spec: Graph, feed: Mapping[str, Held], at: int, most: int) -> dict[str, Held]:
    """So many samples of every input that has a batch, from a place on."""
    return {
        port.name: host(feed[port.name])[at : at + most] if "batch" in port.shape else feed[port.name]
        for port in spec.inputs
    }
