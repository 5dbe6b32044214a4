"""What a player's answers cost, counted where it arises: at the engines that run for it."""

from __future__ import annotations

from collections.abc import Mapping

from tta_runtime.bundle import Bundle
from tta_runtime.engine import Arrays, Engine, EngineOptions
from tta_runtime.engine_ort import OrtEngine
from tta_runtime.held import Held
from tta_runtime.manifest import Graph, Manifest


class Meter:
    """Counts forward-equivalents: a forward pass of one sample is 1, a backward pass 2.

    A graph that only serves costs one forward pass; a step costs what the bundle says of its method.

    Args:
        manifest: of the bundle whose graphs are run.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._costs = graph_costs(manifest)
        self._total: float | None = 0.0

    def loader(self, bundle: Bundle, graph: str, options: EngineOptions) -> Engine:
        """Load a graph so that its runs are counted; for `Engines.load`.

        Raises:
            EngineError: as `OrtEngine`.
        """
        return _Counted(OrtEngine(bundle, graph, options), self, self._costs[graph])

    def take(self) -> float | None:
        """What was run since the last call; None if some of it has no known cost."""
        total, self._total = self._total, 0.0
        return total

    def count(self, samples: int, cost: float | None) -> None:
        """Add a run."""
        self._total = None if cost is None or self._total is None else self._total + samples * cost


def graph_costs(manifest: Manifest) -> dict[str, float | None]:
    """Graph -> forward-equivalents of one sample; None where the bundle does not say."""
    steps = {
        spec.step: spec.forward_equivalents for spec in manifest.methods.values() if spec.step is not None
    }
    return {key: steps.get(key, 1.0) for key in manifest.graphs}


class _Counted:
    """An engine that tells the meter how many samples it ran."""

    def __init__(self, engine: Engine, meter: Meter, cost: float | None) -> None:
        self._engine = engine
        self._meter = meter
        self._cost = cost
        self._x = next(port.name for port in engine.spec.inputs if port.bind == "batch" and port.key == "x")

    @property
    def spec(self) -> Graph:
        """The engine's."""
        return self._engine.spec

    @property
    def provider(self) -> str:
        """The engine's."""
        return self._engine.provider

    def run(self, inputs: Arrays) -> Mapping[str, Held]:
        """Run the graph and count it.

        Raises:
            EngineFailed: as the engine.
        """
        outputs = self._engine.run(inputs)
        self._meter.count(inputs[self._x].shape[0], self._cost)
        return outputs
