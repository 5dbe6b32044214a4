"""Checking a bundle: its files, its graphs on ONNX Runtime, on request TensorRT and parity with the torch source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from tta_exporters.errors import CheckFailed, ExtraMissing
from tta_exporters.tensorrt import build_plan, load_builder
from tta_runtime import Bundle, Engines, Model
from tta_runtime.errors import EngineMissing, TtaError
from tta_runtime.manifest import Graph, InputSpec, MethodSpec
from tta_runtime.plan_build import Capability


@dataclass(frozen=True)
class Check:
    """One line of the result: a graph, what was asked of it, whether it passed, and how or why not."""

    graph: str
    check: str
    ok: bool
    detail: str

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def check_bundle(path: Path, *, tensorrt: Sequence[Capability] = ()) -> Iterator[Check]:
    """Checks every graph of a bundle; yields as it goes, never stops at the first failure.

    Args:
        path: the bundle directory.
        tensorrt: compute capabilities; with any, every graph is also parsed and built with the TensorRT-RTX builder.

    Raises:
        BundleError: the directory is no bundle, so there is nothing to check graph by graph.
        ExtraMissing: ``tensorrt`` asked for without the builder installed.
        EngineMissing: ONNX Runtime is not installed.
    """
    bundle = Bundle.open(path)
    if tensorrt:
        load_builder()
    for key, graph in bundle.manifest.graphs.items():
        yield _attempt(key, "onnx checker", partial(_onnx_check, path / graph.file))
    for name, method in bundle.manifest.methods.items():
        key = method.step or method.serve
        yield _attempt(key, f"runs ({name})", partial(_run, bundle, name))
    if tensorrt:
        for key, graph in bundle.manifest.graphs.items():
            yield _attempt(key, "tensorrt", partial(_plan, path, key, graph, tensorrt))


def example_batch(spec: InputSpec, batch: int, seed: int) -> NDArray[np.float32] | NDArray[np.uint8]:
    """Uniform noise over the declared range, [batch, ...] of the declared dtype."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    shape = [batch, *(int(axis) for axis in spec.shape[1:])]
    x = spec.low + (spec.high - spec.low) * generator.random(shape, dtype=np.float32)
    return x.astype(np.uint8) if spec.dtype == "uint8" else x.astype(np.float32)


def example_target(model: Model, batch: int, seed: int) -> NDArray[np.float32] | None:
    """Logits [batch, classes] of a teacher that is sure of something, or None where the method has no teacher."""
    if not model.takes_target:
        return None
    generator = np.random.Generator(np.random.Philox(key=seed))
    return 3 * generator.standard_normal((batch, model.manifest.classes), dtype=np.float32)


def _attempt(graph: str, check: str, run: Callable[[], str]) -> Check:
    try:
        return Check(graph, check, True, run())
    except (EngineMissing, ExtraMissing):
        # Nothing is wrong with the bundle; no other graph would fare better.
        raise
    except TtaError as error:
        return Check(graph, check, False, " ".join(str(error).split()))
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return Check(graph, check, False, " ".join(str(error).split()))


def _onnx_check(file: Path) -> str:
    onnx.checker.check_model(str(file), full_check=True)
    return f"{file.stat().st_size} bytes"


def _plan(path: Path, key: str, graph: Graph, targets: Sequence[Capability]) -> str:
    names = ", ".join(f"{major}.{minor}" for major, minor in targets)
    return f"plan of {build_plan(path, key, graph, targets).plan_bytes} bytes for compute capability {names}"


def _run(bundle: Bundle, method: str) -> str:
    model = Model(Engines.load(bundle, methods=[method]), method)
    sizes = _sizes(model.spec)
    for size in sizes:
        x = example_batch(model.manifest.input, size, seed=size)
        step = model.adapt(x, target=example_target(model, size, seed=size))
        for name, logits in (("serves", model.predict(x).logits), ("steps", step.logits)):
            if not np.isfinite(logits).all():
                raise CheckFailed(
                    f"the logits with which {method} {name} a batch of {size} are not finite",
                    "The model overflows on noise",
                )
    moved = "theta moved" if model.distance > 0 else "theta unchanged"
    return f"batches {' and '.join(map(str, sizes))}, {moved}"


def _sizes(spec: MethodSpec) -> tuple[int, ...]:
    """Two sizes where the batch is free: a dimension that was silently fixed fails one of them."""
    smallest = max(4, spec.min_batch)
    return (smallest, smallest + 3) if spec.batch is None else (spec.batch,)
