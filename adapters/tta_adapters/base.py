"""The two ideas every other file builds on: an adapter says *what* theta is, a method says *how* it changes.

An :class:`Adapter` owns a frozen copy of the user's network and knows which of its numbers form theta, one flat
float32 vector. A :class:`Method` is a pure step over that vector::

    logits, theta', state', report = method.step(batch, theta, state, anchor, hyper, rand)

The step is ordinary torch code that differentiates inside itself, so the very same function is compared with the
paper, run eagerly in tests, and compiled, backward pass included, into an ONNX graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

State = dict[str, Tensor]
"""What a method carries between steps besides theta: named arrays of fixed shape."""


class Batch(NamedTuple):
    """One batch of a stream.

    Attributes:
        x: [batch, ...], the input as the bundle's input spec declares it.
        weight: [batch] float32, >= 0. A gate refuses a sample by weight 0; the sample still passes through the
            network (and so through batch statistics) but contributes nothing to the objective.
        target: [batch, classes] float32, a teacher's logits, for a method whose spec asks for them; else None.
    """

    x: Tensor
    weight: Tensor
    target: Tensor | None = None


class Step(NamedTuple):
    """What one step returns.

    Attributes:
        logits: [batch, classes] float32, of theta before the step unless the method's spec says otherwise.
        theta: [P] float32, the proposed theta.
        state: the proposed state, same names and shapes as the one passed in.
        report: [R] float32, in the order of ``MethodSpec.report``.
    """

    logits: Tensor
    theta: Tensor
    state: State
    report: Tensor


class Forward(NamedTuple):
    """What one forward pass of an adapted network returns.

    Attributes:
        logits: [batch, classes] float32.
        features: [batch, F] float32, the input of the classifier head.
        statistics: per normalisation layer with running statistics, the batch's (mean [C], biased variance [C]);
            empty unless batch statistics were asked for.
    """

    logits: Tensor
    features: Tensor
    statistics: dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ThetaTensor:
    """One named tensor of theta."""

    name: str
    shape: tuple[int, ...]
    kind: str
    trained: bool
    offset: int

    @property
    def size(self) -> int:
        """Number of values."""
        count = 1
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True)
class StateSpec:
    """A named array of a method's state; ``init`` is "zeros", "ones" or "theta" (a copy of the source theta)."""

    name: str
    shape: tuple[int, ...]
    init: Literal["zeros", "ones", "theta"] = "zeros"


@dataclass(frozen=True)
class Hyper:
    """A run-time setting: one entry of the float32 hyper vector, tunable without exporting again."""

    name: str
    default: float
    doc: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class MethodSpec:
    """Everything a host must know of a method to run it without seeing its code.

    Attributes:
        name: the method's name, as in ``step.<name>.onnx``.
        doc: one line for people.
        state: the arrays carried between steps.
        hyper: run-time settings with defaults, in vector order.
        report: names of the report vector's entries.
        logits: whether the returned logits belong to theta "before" or "after" the step.
        trains: whether the step moves theta.
        steps: whether there is a step at all; False means the method only serves. A method may step without
            training: it adjusts the batch's logits, or keeps a memory.
        min_batch: smallest batch whose statistics mean anything to the method.
        serve_vector: what serves between steps: "theta", or "state:NAME" for a vector held in the state (a teacher).
        rand: number of uniform random numbers in [0, 1) the host must supply per step.
        target: whether a step needs logits beside the images: a teacher's, or with a window the stream's own.
        window: 0, or how many recent samples, balanced by predicted class, the host keeps for a step; it gives what
            they were last predicted as by way of target.
        forwards: passes through the network for each sample of one step; None where the author does not say.
        backwards: passes back through it, likewise.
    """

    name: str
    doc: str
    state: tuple[StateSpec, ...] = ()
    hyper: tuple[Hyper, ...] = ()
    report: tuple[str, ...] = ()
    logits: Literal["before", "after"] = "before"
    trains: bool = True
    steps: bool = True
    min_batch: int = 1
    serve_vector: str = "theta"
    rand: int = 0
    target: bool = False
    window: int = 0
    forwards: float | None = None
    backwards: float | None = None

    def unpack_hyper(self, vector: Tensor) -> dict[str, Tensor]:
        """Names the entries of the hyper vector [H]; each value is a 0-d tensor."""
        return {entry.name: vector[index] for index, entry in enumerate(self.hyper)}

    def default_hyper(self) -> Tensor:
        """The defaults as a float32 vector [H]."""
        return torch.tensor([entry.default for entry in self.hyper], dtype=torch.float32)


@runtime_checkable
class Adapter(Protocol):
    """What theta is. Built once from a network; afterwards every call is a pure function of its arguments."""

    name: str

    @property
    def tensors(self) -> Sequence[ThetaTensor]:
        """The named tensors of theta in order, trained ones first."""
        ...

    @property
    def size(self) -> int:
        """P, the length of theta."""
        ...

    @property
    def trained(self) -> int:
        """Length of the leading part of theta that methods learn by gradient."""
        ...

    def source_theta(self) -> Tensor:
        """[P] float32, the values the network was trained with."""
        ...

    def unpack(self, theta: Tensor) -> dict[str, Tensor]:
        """Names the slices of ``theta`` [P]; trained ones are fresh leaves that require a gradient."""
        ...

    def forward(
        self, tensors: Mapping[str, Tensor], x: Tensor, *, statistics: Statistics = "running"
    ) -> Forward:
        """Runs the network with theta given by name."""
        ...


class Blend(NamedTuple):
    """(1 - share) * running + share * batch statistics, of some of the batch's samples.

    Attributes:
        share: 0-d, of the batch.
        weight: [batch], >= 0, how much each sample counts in the batch's statistics; not all 0.
    """

    share: Tensor
    weight: Tensor


Statistics = Literal["running", "batch", "renorm"] | Tensor | Blend
"""Which mean and variance normalisation layers with running statistics use: those in theta ("running"), the
batch's own ("batch"), those in theta with the gradient that the batch's own would have ("renorm"),
(1 - a) * running + a * batch for a 0-d tensor a, or the same of some samples only."""


@runtime_checkable
class Method(Protocol):
    """How theta changes: a spec and a pure step."""

    spec: MethodSpec

    @property
    def adapter(self) -> Adapter:
        """What theta is."""
        ...

    def anchor(self) -> dict[str, Tensor]:
        """Read-only facts of the source the step needs, by name; empty for most methods."""
        ...

    def step(
        self,
        batch: Batch,
        theta: Tensor,
        state: State,
        anchor: Mapping[str, Tensor],
        hyper: Tensor,
        rand: Tensor,
    ) -> Step:
        """One adaptation step; pure."""
        ...


@runtime_checkable
class Calibrated(Protocol):
    """A method that needs unlabelled source images once, before its anchor exists."""

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Takes what the anchor needs from x [batch, ...] of each batch."""
        ...


def init_state(spec: MethodSpec, theta: Tensor) -> State:
    """The state before the first step.

    Args:
        spec: the method's spec.
        theta: [P] float32, the source theta.
    """
    return initial(spec.state, theta)


def initial(entries: Iterable[StateSpec], theta: Tensor) -> State:
    """Some state arrays as they are before the first step.

    Args:
        entries: the arrays.
        theta: [P] float32, copied where an array starts as theta.
    """
    makers = {"zeros": torch.zeros, "ones": torch.ones}
    return {
        entry.name: theta.clone()
        if entry.init == "theta"
        else makers[entry.init](entry.shape, dtype=torch.float32)
        for entry in entries
    }


def gradient(loss: Tensor, adapter: Adapter, tensors: Mapping[str, Tensor]) -> Tensor:
    """Gradient of ``loss`` with respect to the trained part of theta, as one vector.

    Differentiates the slices and concatenates once: differentiating the flat vector would emit one scatter of
    the full length per tensor.

    Args:
        loss: 0-d tensor.
        adapter: whose layout the result follows.
        tensors: what ``adapter.unpack`` returned and the loss was computed from.

    Returns:
        [T] float32, T = ``adapter.trained``; zero where the loss does not depend on a tensor.
    """
    leaves = [tensors[entry.name] for entry in adapter.tensors if entry.trained]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(leaf).reshape(-1) if grad is None else grad.reshape(-1)
            for leaf, grad in zip(leaves, grads, strict=True)
        ]
    )
