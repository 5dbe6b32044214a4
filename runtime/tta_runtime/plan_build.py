"""From a graph to a TensorRT plan: parse, profile, build. The builder of TensorRT for RTX needs no GPU for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .engine import RESIDENT
from .errors import PlanRefused
from .manifest import Graph
from .trt_library import TrtLibrary

SUM = "sum of "
"""A plan has one more output for each float32 one that stays on the device: the sum of its values. See `sum_graph`."""
ELSEWHERE = "This graph runs on ONNX Runtime only; choose engine `cuda` or `cpu`, see docs/gpu.md"

Capability = tuple[int, int]
"""Of a GPU, e.g. (8, 9)."""
Shapes = tuple[list[int], list[int], list[int]]


@dataclass(frozen=True)
class Batches:
    """Samples that a plan takes at once.

    Attributes:
        least: and
        most: the bounds; a run outside of them is refused.
        usual: what it is fastest for.
    """

    least: int = 1
    usual: int = 16
    most: int = 64


STANDARD = Batches()


@dataclass(frozen=True)
class Request:
    """What to build.

    Attributes:
        name: of the graph, for messages.
        source: path of the ONNX file, whose external weights lie beside it, or its bytes with all weights inside.
        graph: its ports.
        batches: for every dimension named "batch".
        capabilities: compute capabilities to build for, where the library can be told; none: the GPU that is there.
        tf32: whether factors of float32 products may be rounded to 10 bits.
    """

    name: str
    source: Path | bytes
    graph: Graph
    batches: Batches = STANDARD
    capabilities: Sequence[Capability] = ()
    tf32: bool = False


def profile(request: Request) -> dict[str, Shapes]:
    """Input -> its least, usual and most dimensions, for each input that has a free one.

    Raises:
        PlanRefused: a dimension other than the batch is free.
    """
    batches = request.batches
    shapes: dict[str, Shapes] = {}
    for port in request.graph.inputs:
        free = [axis for axis in port.shape if isinstance(axis, str)]
        if strangers := [axis for axis in free if axis != "batch"]:
            raise PlanRefused(
                f"graph {request.name}: input {port.name} has a free dimension `{strangers[0]}`, and a plan has bounds "
                "for the batch only",
                ELSEWHERE,
            )
        if free:
            least, usual, most = (
                [size if isinstance(axis, str) else axis for axis in port.shape]
                for size in (batches.least, batches.usual, batches.most)
            )
            shapes[port.name] = (least, usual, most)
    return shapes


def build_plan(library: TrtLibrary, request: Request, timing: bytes = b"") -> tuple[bytes, bytes]:
    """A serialised plan, and the timing cache as it is after the build.

    Args:
        library: TensorRT.
        request: what to build.
        timing: the timing cache of an earlier build on this GPU; unused with TensorRT for RTX, which times nothing.

    Raises:
        PlanRefused: the parser or the builder refuses the graph; names the node where TensorRT does.
    """
    trt = library.module
    listener = make_listener(trt)
    shapes = profile(request)
    register_plugins(library, listener)
    try:
        builder = trt.Builder(listener)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, listener)
        if isinstance(request.source, Path):
            parsed = parser.parse_from_file(str(request.source))
        else:
            parsed = parser.parse(request.source)
        if not parsed:
            raise PlanRefused(
                f"graph {request.name}: TensorRT's parser refuses {_parser_reasons(parser)}", ELSEWHERE
            )
        _add_sums(trt, network, request.graph)
        config = builder.create_builder_config()
        # What a daemon answers must not depend on which engine it runs on by more than rounding.
        (config.set_flag if request.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
        if library.is_rtx and request.capabilities:
            config.num_compute_capabilities = len(request.capabilities)
            for index, (major, minor) in enumerate(request.capabilities):
                config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{major}{minor}"), index)
        timings = (
            None if library.is_rtx else config.create_timing_cache(timing)
        )  # must live as long as the build
        if timings is not None:
            config.set_timing_cache(timings, False)
        if shapes:
            bounds = builder.create_optimization_profile()
            for name, (least, usual, most) in shapes.items():
                bounds.set_shape(name, least, usual, most)
            config.add_optimization_profile(bounds)
        plan = builder.build_serialized_network(network, config)
        timed = b"" if library.is_rtx else bytes(config.get_timing_cache().serialize())
    except (RuntimeError, TypeError, ValueError, MemoryError) as error:  # what its Python binding raises
        raise PlanRefused(
            f"graph {request.name}: {library.name} failed: {flat(str(error))}", ELSEWHERE
        ) from error
    if plan is None:
        raise PlanRefused(
            f"graph {request.name}: TensorRT's builder refuses it: {listener.reason()}", ELSEWHERE
        )
    return bytes(plan), timed


def resident_outputs(graph: Graph) -> Mapping[str, str]:
    """Output that stays on the device -> output that holds its sum. A scalar has none: TensorRT does not reduce it."""
    kept = [port for port in graph.outputs if port.bind in RESIDENT and port.shape]
    ports = [port for port in kept if port.dtype == "float32"]
    return {port.name: f"{SUM}{port.name}" for port in ports}


def _add_sums(trt: Any, network: Any, graph: Graph) -> None:
    sums = resident_outputs(graph)
    for tensor in [network.get_output(index) for index in range(network.num_outputs)]:
        if tensor.name in sums:
            every_axis = (1 << len(tensor.shape)) - 1
            layer = network.add_reduce(tensor, trt.ReduceOperation.SUM, every_axis, False)
            total = layer.get_output(0)
            total.name = sums[tensor.name]
            network.mark_output(total)


def make_listener(trt: Any) -> Any:
    """A logger that is silent and keeps what TensorRT complains of: it tells its reasons to nobody else."""

    class Listener(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.complaints: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.complaints = [*self.complaints[-9:], message]

        def reason(self) -> str:
            """The last complaint."""
            return flat(self.complaints[-1]) if self.complaints else "it does not say why"

    return Listener()


def register_plugins(library: TrtLibrary, listener: Any) -> None:
    """Some operators of ONNX are plugins that TensorRT brings; it looks for them only when it is told to."""
    register = None if library.is_rtx else getattr(library.module, "init_libnvinfer_plugins", None)
    if register is not None:
        register(listener, "")


def flat(message: str) -> str:
    """A message on one line."""
    return " ".join(message.split())


def _parser_reasons(parser: Any) -> str:
    reasons = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = f"node {error.node_name() or 'without a name'} ({error.node_operator()})"
        # For an operator it does not know, the parser quotes the literal of its own assertion.
        why = "this operator is not supported" if error.desc() == "false" else flat(error.desc())
        reasons.append(f"{where if error.node_operator() else 'the graph'}: {why}")
    return "; ".join(reasons[:3]) or "the graph"
