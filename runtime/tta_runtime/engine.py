"""What an engine is: a loaded graph, ready to run. It holds no theta and no state; those are inputs.

Therefore one engine serves any number of streams, and a swap of theta never touches it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from .bundle import Bundle
from .held import Held
from .manifest import Graph

Arrays = Mapping[str, Held]
RESIDENT = ("theta", "state")
"""What a step returns bound to these, an engine with a device of its own leaves there (see `held.Resident`)."""
FIXED = (*RESIDENT, "anchor", "hyper")
"""Inputs bound to these are the same array again and again, so a device that has one keeps it."""


class Engine(Protocol):
    """One graph on one backend. `run` may be called from several threads at once."""

    @property
    def spec(self) -> Graph:
        """The graph's role, inputs and outputs."""

    @property
    def provider(self) -> str:
        """What really runs the graph, e.g. "cpu", "cuda" or "cuda (2 of 340 nodes on cpu)"."""

    def run(self, inputs: Arrays) -> Mapping[str, Held]:
        """Outputs by value name, from inputs by value name.

        Any engine takes what another one left on its device. Outputs bound to theta and state may stay on this one's;
        all others are arrays of the host.

        Raises:
            EngineFailed: an input is missing or does not fit, or the backend failed.
        """


@dataclass(frozen=True)
class EngineOptions:
    """How graphs are loaded. The defaults suit a daemon that shares its cores with other work."""

    threads: int | None = None
    """Threads of one engine; None: one for each physical core."""
    provider: str = "cpu"
    """"cpu", "cuda" or "tensorrt"; there is no silent fallback to another one."""
    device: int = 0
    """Number of the GPU."""
    tf32: bool = False
    """Let a GPU round the factors of float32 products to 10 bits: faster, and no longer equal to the CPU's answers."""
    resident: bool | None = None
    """Keep theta and state where the provider computes; None: on a GPU. On a CPU that is the same memory, for tests."""
    spin: bool = False
    """Let idle threads spin: a little faster alone, much slower when a step and a forward share the cores."""
    prepack: bool = True
    """Keep a second, faster copy of constant weights: costs their size in memory once for each engine."""
    layout: bool = True
    """Allow the blocked (NCHWc) convolution layout of the CPU: faster, and also a copy of the weights."""
    arena: bool = True
    """Keep freed memory for the next run: faster, and the memory of the largest batch is never given back."""
    profile: str | None = None
    """Measure every operator and write the times to a file whose path begins so; see `OrtEngine.end_profiling`."""


class Loader(Protocol):
    """Makes an engine; `OrtEngine` is one."""

    def __call__(self, bundle: Bundle, graph: str, options: EngineOptions) -> Engine:
        """Load the graph of that key.

        Raises:
            EngineMissing: the backend or the provider is not installed.
            EngineFailed: the backend refuses the graph.
            GraphMismatch: the graph's real inputs or outputs are not those of the manifest.
        """
