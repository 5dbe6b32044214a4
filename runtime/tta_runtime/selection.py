"""Which engine runs a graph: the one that was asked for, or the best that works here. Falling back is never silent."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from .bundle import Bundle
from .cuda_driver import CudaDriver
from .engine import Engine, EngineOptions, Loader
from .engine_ort import OrtEngine
from .engine_trt import TrtLoader
from .errors import BadValue, DriverMissing, EngineError, LibraryMissing, did_you_mean
from .plan_build import STANDARD, Batches

_log = logging.getLogger(__name__)

ENGINES = ("auto", "cpu", "cuda", "tensorrt")


@dataclasses.dataclass(frozen=True)
class Fallback:
    """A graph that does not run on the engine that was the first choice.

    Attributes:
        graph: its key.
        wanted: the engine that does not run it.
        used: the one that does.
        reason: why.
    """

    graph: str
    wanted: str
    used: str
    reason: str

    def __str__(self) -> str:
        return f"{self.graph} runs on {self.used} and not on {self.wanted}: {self.reason}"


class Selector:
    """Loads graphs on the engine that is asked for, and with `auto` on the best one that works.

    `auto` takes TensorRT where the bundle was built for it, else CUDA, else the CPU. On a machine without an NVIDIA
    driver that is the CPU and nothing is missed. With a driver, whatever keeps a graph from its first choice is logged
    and kept in `fallbacks`. Any other name is taken at its word: what does not work is an error.

    Args:
        engine: one of `ENGINES`.
        device: number of the GPU.
        plan_cache: where plans are kept; None: `plan_cache.default_directory`.
        batches: samples that a plan takes at once.
        driver: loads the driver of CUDA.
        plans: makes the loader of plans.

    Attributes:
        fallbacks: of every graph loaded so far.

    Raises:
        BadValue: there is no such engine.
    """

    def __init__(
        self,
        engine: str = "auto",
        *,
        device: int = 0,
        plan_cache: Path | None = None,
        batches: Batches = STANDARD,
        driver: Callable[[], CudaDriver] = CudaDriver,
        plans: Callable[..., Loader] = TrtLoader,
    ) -> None:
        if engine not in ENGINES:
            raise BadValue(
                f"unknown engine `{engine}`" + did_you_mean(engine, ENGINES),
                f"Choose one of {', '.join(ENGINES)}",
            )
        self.fallbacks: list[Fallback] = []
        self._engine = engine
        self._device = device
        self._plan_cache = plan_cache
        self._batches = batches
        self._driver = driver
        self._make_plans = plans
        self._loaders: dict[str, Loader | EngineError] = {}

    def __call__(self, bundle: Bundle, graph: str, options: EngineOptions) -> Engine:
        """Load the graph of that key.

        Raises:
            EngineError: the engine that was asked for does not run it, or no engine does.
        """
        options = dataclasses.replace(options, device=self._device)
        reasons: list[tuple[str, EngineError]] = []
        names = self._names(bundle, graph)
        for name in names:
            try:
                engine = self._loader(name)(bundle, graph, options)
            except EngineError as error:
                if name == names[-1]:
                    raise
                reasons.append((name, error))
            else:
                self._tell(graph, engine, reasons)
                return engine
        raise AssertionError("there is always an engine to try")

    def _names(self, bundle: Bundle, graph: str) -> Sequence[str]:
        if self._engine != "auto":
            return [self._engine]
        try:
            self._driver()
        except DriverMissing as error:
            _log.debug("engine auto takes the CPU: %s", error.cause)
            return ["cpu"]
        has_plans = bundle.manifest.graphs[graph].tensorrt is not None
        return ["tensorrt", "cuda", "cpu"] if has_plans else ["cuda", "cpu"]

    def _loader(self, name: str) -> Loader:
        """What loads graphs on an engine; made once, and what forbids it is found out once."""
        known = self._loaders.get(name)
        if known is None:
            try:
                known = self._plans() if name == "tensorrt" else _provider(name)
            except EngineError as error:
                known = error
            self._loaders[name] = known
        if isinstance(known, EngineError):
            raise known
        return known

    def _plans(self) -> Loader:
        try:
            driver = self._driver()
            return self._make_plans(
                driver=driver, device=self._device, cache=self._plan_cache, batches=self._batches
            )
        except LibraryMissing as error:
            if not _offered("TensorrtExecutionProvider"):
                raise
            _log.info("%s; ONNX Runtime's TensorRT provider is used", error.cause)
            return _provider("tensorrt")

    def _tell(self, graph: str, engine: Engine, reasons: Sequence[tuple[str, EngineError]]) -> None:
        if not reasons:
            return
        wanted, error = reasons[0]
        fallback = Fallback(graph, wanted, engine.provider, error.cause)
        self.fallbacks.append(fallback)
        _log.warning("graph %s. %s", fallback, error.fix)


def _provider(name: str) -> Loader:
    def load(bundle: Bundle, graph: str, options: EngineOptions) -> Engine:
        return OrtEngine(bundle, graph, dataclasses.replace(options, provider=name))

    return load


def _offered(provider: str) -> bool:
    """Whether the installed onnxruntime was built with a provider."""
    try:
        import onnxruntime as ort
    except ImportError:
        return False
    return provider in ort.get_available_providers()
