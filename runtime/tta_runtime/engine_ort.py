"""Graphs on ONNX Runtime."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .bundle import Bundle
from .engine import Arrays, EngineOptions
from .errors import BadValue, EngineFailed, EngineMissing, GraphMismatch, OutOfDeviceMemory, did_you_mean
from .held import Held, Traffic, host
from .manifest import Graph, Port
from .memory import return_free_memory
from .ort_device import BoundSession, OrtDevice
from .ort_libraries import preload, why_not

_PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
_SHORT = {
    "CPUExecutionProvider": "cpu",
    "CUDAExecutionProvider": "cuda",
    "TensorrtExecutionProvider": "tensorrt",
}
_TYPES = {"float32": "tensor(float)", "uint8": "tensor(uint8)", "int64": "tensor(int64)"}
_FATAL = (
    4  # ONNX Runtime's highest log level: its errors reach the caller as exceptions, not as text on stderr
)


class OrtEngine:
    """One graph as an ONNX Runtime session. Stateless; `run` may be called from several threads at once.

    Args:
        bundle: an opened bundle.
        graph: key in the manifest's `graphs`.
        options: threads, provider and memory choices.

    Raises:
        EngineMissing: onnxruntime, or the provider, is not installed or does not start.
        EngineFailed: onnxruntime refuses the file.
        GraphMismatch: the file's inputs or outputs are not those of the manifest.
    """

    def __init__(self, bundle: Bundle, graph: str, options: EngineOptions | None = None) -> None:
        options = options or EngineOptions()
        if options.threads is not None and options.threads < 1:
            raise BadValue(f"threads is {options.threads}", "Use a number from 1, or leave it out")
        try:
            import onnxruntime as ort  # here, because the package must import and explain itself without it
        except ImportError as error:
            raise EngineMissing(
                f"onnxruntime cannot be imported: {error}", "Run `pip install tta-runtime[cpu]`"
            ) from error
        self.spec: Graph = bundle.manifest.graphs[graph]
        self._key = graph
        self._profiled = options.profile is not None
        self._failures = _failures()
        self._inputs = frozenset(p.name for p in self.spec.inputs)
        self._outputs = [p.name for p in self.spec.outputs]
        wanted = _providers(options.provider, ort.get_available_providers())
        on_gpu = options.provider != "cpu"
        providers = [(name, _settings(name, options)) for name in wanted]
        if on_gpu:
            preload(ort)
        settings = ort.SessionOptions()
        settings.log_severity_level = _FATAL
        settings.intra_op_num_threads = options.threads or 0
        settings.inter_op_num_threads = 1
        settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        levels = ort.GraphOptimizationLevel
        settings.graph_optimization_level = (
            levels.ORT_ENABLE_ALL if options.layout else levels.ORT_ENABLE_EXTENDED
        )
        settings.enable_cpu_mem_arena = options.arena
        if options.arena and _tight_arena():
            settings.add_session_config_entry("session.use_env_allocators", "1")
        # A step's forward pass leaves buffers that its backward pass could use again much later. Planning that reuse
        # ahead holds them idle all the while, and the pattern planner reserves the sum: together half of a step's
        # peak memory. The arena finds freed memory just as well when it is asked for.
        settings.enable_mem_pattern = False
        settings.enable_mem_reuse = False
        settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if options.spin else "0")
        # Spinning threads help within a run; between runs they only take the cores from others.
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        settings.add_session_config_entry("session.inter_op.allow_spinning", "0")
        settings.add_session_config_entry("session.disable_prepacking", "0" if options.prepack else "1")
        if on_gpu:
            settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if options.profile is not None:
            settings.enable_profiling = True
            settings.profile_file_prefix = options.profile
        try:
            self._session = ort.InferenceSession(
                str(_file(bundle, graph, options.provider)),
                settings,
                providers=providers,
                enable_fallback=0,
                # The exporter has merged equal expressions; those it repeats on purpose (see its relu_masks) keep an
                # activation from living until the backward pass.
                disabled_optimizers=["CommonSubexpressionElimination"],
            )
        except self._failures as error:
            if on_gpu and (why := why_not(ort, wanted[0])):
                raise _does_not_start(options.provider, why) from error
            raise EngineFailed(
                f"onnxruntime {ort.__version__} cannot load graph `{graph}`: {error}",
                "Build the bundle again, or upgrade onnxruntime",
            ) from error
        # onnxruntime falls back silently when a provider's libraries are there but do not start.
        active = self._session.get_providers()
        if active[0] != wanted[0]:
            why = why_not(ort, wanted[0]) or f"onnxruntime would use {active[0]}"
            raise _does_not_start(options.provider, why)
        self._session.disable_fallback()
        _check_ports(graph, "input", self.spec.inputs, self._session.get_inputs())
        _check_ports(graph, "output", self.spec.outputs, self._session.get_outputs())
        self.provider: str = placement(options.provider, self._session) if on_gpu else options.provider
        self._bound: BoundSession | None = None
        if on_gpu if options.resident is None else options.resident:
            kind, number = ("cuda", options.device) if on_gpu else ("cpu", 0)
            device = OrtDevice(ort, kind, number, providers, self._naming)
            self._bound = BoundSession(self._session, self.spec, device, ort)
        return_free_memory()  # what parsing took

    @property
    def traffic(self) -> Traffic | None:
        """Bytes copied between host and device; None where nothing stays on a device."""
        return None if self._bound is None else self._bound.traffic

    def run(self, inputs: Arrays) -> dict[str, Held]:
        """Outputs by value name, from inputs by value name.

        On a GPU, what is bound to theta and state stays there.

        Raises:
            EngineFailed: the names are not those of the graph, or onnxruntime refuses or fails.
            OutOfDeviceMemory: the GPU has no room for this batch.
        """
        if inputs.keys() != self._inputs:
            raise EngineFailed(
                f"graph `{self._key}` takes {sorted(self._inputs)}, given {sorted(inputs)}",
                "Give every input of the graph and nothing else",
            )
        try:
            if self._bound is not None:
                return self._bound.run(inputs)
            feed = {name: host(value) for name, value in inputs.items()}
            return dict(zip(self._outputs, self._session.run(self._outputs, feed), strict=True))
        except self._failures as error:
            raise self._named(error) from error

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Gives what onnxruntime raises our name."""
        try:
            yield
        except self._failures as error:
            raise self._named(error) from error

    def _named(self, error: Exception) -> EngineFailed:
        if _NO_ROOM.search(str(error)):
            return OutOfDeviceMemory(
                f"graph `{self._key}`: the GPU has no room: {error}",
                "Send smaller batches, lower step_batch, or free the GPU's memory",
            )
        return EngineFailed(
            f"graph `{self._key}` failed: {error}",
            "Try a smaller batch; if that fails too, report the message",
        )

    def end_profiling(self) -> Path:
        """Stops measuring (`EngineOptions.profile`) and says where the times are: JSON in Chrome's trace format.

        Raises:
            BadValue: the engine was loaded without `profile`.
        """
        if not self._profiled:
            raise BadValue(
                f"graph `{self._key}` was loaded without profiling",
                "Load it with EngineOptions(profile=PREFIX)",
            )
        return Path(self._session.end_profiling())


_NO_ROOM = re.compile(r"out of memory|OUT_OF_MEMORY|CUDNN_STATUS_ALLOC_FAILED|Failed to allocate memory")
"""What onnxruntime says where the device, or its arena, has no room."""


def _file(bundle: Bundle, graph: str, provider: str) -> Path:
    """The graph's file; for TensorRT the variant without what it lacks, where there is one."""
    if provider == "tensorrt" and bundle.manifest.graphs[graph].tensorrt is not None:
        return bundle.tensorrt_file(graph)
    return bundle.file(graph)


def _does_not_start(provider: str, why: str) -> EngineMissing:
    return EngineMissing(
        f"provider `{provider}` does not start: {why}",
        "Run `tta-edge doctor`, which says what is missing and what to install, or choose engine `cpu`",
    )


def _settings(provider: str, options: EngineOptions) -> dict[str, str]:
    """Settings of an execution provider."""
    if provider == "CPUExecutionProvider":
        return {}
    device = {"device_id": str(options.device)}
    if provider == "TensorrtExecutionProvider":
        return device
    return {
        **device,
        "use_tf32": str(int(options.tf32)),
        # Trying every algorithm is done anew for every batch size, and a daemon sees many of them.
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
    }


def placement(provider: str, session: Any) -> str:
    """The provider, and how many nodes of a session onnxruntime gave to another one.

    Args:
        provider: "cuda" or "tensorrt".
        session: one that records the assignment.
    """
    ask = getattr(session, "get_provider_graph_assignment_info", None)
    if ask is None:  # an older onnxruntime does not tell
        return provider
    nodes: Counter[str] = Counter()
    for part in ask():
        nodes[_SHORT.get(part.ep_name, part.ep_name)] += len(part.get_nodes())
    others = [
        f"{count} of {nodes.total()} nodes on {name}"
        for name, count in sorted(nodes.items())
        if name != provider
    ]
    return f"{provider} ({', '.join(others)})" if others else provider


_MAX_WASTE_BYTES = 1 << 20
"""What the arena may leave unused at the end of a block it hands out; onnxruntime's own choice is 128 MB."""


@functools.cache
def _tight_arena() -> bool:
    """Registers one arena for all engines of this process that splits blocks closely; whether there is one.

    By default onnxruntime hands out a free block of up to twice the size asked for, whole. The activations of a step
    live long and have many sizes, so that a sixth of its peak memory was waste.
    """
    import onnxruntime as ort

    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    try:
        ort.create_and_register_allocator(
            info, ort.OrtArenaCfg({"max_dead_bytes_per_chunk": _MAX_WASTE_BYTES})
        )
    except _failures():
        # The program around us has registered one of its own, or this onnxruntime knows no such setting.
        return False
    return True


def _providers(name: str, available: list[str]) -> tuple[str, ...]:
    if name not in _PROVIDERS:
        raise BadValue(
            f"unknown provider `{name}`" + did_you_mean(name, _PROVIDERS),
            f"Choose one of {', '.join(_PROVIDERS)}",
        )
    wanted = _PROVIDERS[name]
    if wanted[0] not in available:
        raise EngineMissing(
            f"provider `{name}` needs {wanted[0]}, this onnxruntime has {', '.join(available)}",
            "Run `pip uninstall onnxruntime && pip install tta-runtime[gpu]`, or choose provider `cpu`",
        )
    return tuple(p for p in wanted if p in available)


def _failures() -> tuple[type[Exception], ...]:
    """What onnxruntime raises: its own classes derive from Exception alone, the rest are built-in ones."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [v for v in vars(state).values() if isinstance(v, type) and issubclass(v, Exception)]
    return (*own, RuntimeError, ValueError, TypeError, MemoryError)


def _check_ports(graph: str, side: str, ports: list[Port], found: list[Any]) -> None:
    """B9: name, dtype, rank and fixed dimensions of the file's values equal the manifest's."""
    names, listed = sorted(v.name for v in found), sorted(p.name for p in ports)
    if names != listed:
        raise GraphMismatch(
            f"graph `{graph}` has {side}s {names}, the manifest lists {listed}", "Build the bundle again"
        )
    by_name = {v.name: v for v in found}
    for port in ports:
        value = by_name[port.name]
        # A dimension that the file leaves open (a name or None) fits anything; a fixed one must be the same.
        same = len(value.shape) == len(port.shape) and all(
            not isinstance(real, int) or real == said
            for real, said in zip(value.shape, port.shape, strict=True)
        )
        if value.type != _TYPES[port.dtype] or not same:
            raise GraphMismatch(
                f"graph `{graph}`: {side} `{port.name}` is {value.type} {value.shape}, the manifest says "
                f"{port.dtype} {port.shape}",
                "Build the bundle again",
            )
