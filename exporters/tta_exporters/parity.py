"""Parity: the compiled step against the torch function it came from, evaluated in float64, over many steps.

The reference runs freely; at every step the compiled graph starts from the reference's theta and state, so a deviation
belongs to that step alone. A network with ReLUs is not smooth: now and then rounding puts one unit on the other side of
zero, and one step's gradient differs visibly although nothing is wrong. Therefore two tolerances: a tight one for the
median over the steps, which finds a wrong formula, and a loose one for the worst step, which finds a wrong branch.

A network of millions of ReLUs has such a unit in every step. There the yardstick decides, the same torch function in
float32: in the median of the steps, the compiled graph may stray from float64 as far as eager torch does in its worst.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tta_adapters.base import Batch, Method, init_state
from tta_exporters.build import BuildOptions, prepare
from tta_exporters.check import example_target
from tta_exporters.errors import ParityError
from tta_runtime import Model
from tta_runtime.numerics import uniforms

MEDIAN_TOLERANCE = 1e-4
WORST_TOLERANCE = 5e-2

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Deviation:
    """How far one tensor is from the reference, as largest |difference| / largest |reference| of that tensor.

    Attributes:
        output: "logits", "theta.<tensor>", "state.<array>" or "report.<entry>".
        median: over the steps.
        worst: over the steps.
        worst_step: the step (from 1) of the worst.
        eager_worst: the same of eager torch in float32, or 0 where it was not asked.
    """

    output: str
    median: float
    worst: float
    worst_step: int
    eager_worst: float = 0.0

    @property
    def median_tolerance(self) -> float:
        """What the median may be: never so much that a wrong sign or factor passes."""
        return min(max(MEDIAN_TOLERANCE, self.eager_worst), WORST_TOLERANCE)

    @property
    def ok(self) -> bool:
        """Within both tolerances; NaN is not."""
        return self.median <= self.median_tolerance and self.worst <= WORST_TOLERANCE

    @property
    def excess(self) -> float:
        """How many times the tolerance the deviation is; infinite for NaN."""
        ratio = max(self.median / self.median_tolerance, self.worst / WORST_TOLERANCE)
        return ratio if self.median == self.median and self.worst == self.worst else float("inf")


@dataclass(frozen=True)
class ParityReport:
    """The deviation of every output of a method, worst first."""

    method: str
    steps: int
    deviations: Sequence[Deviation]

    @property
    def worst(self) -> Deviation:
        """The deviation largest against its tolerance."""
        return self.deviations[0]

    @property
    def ok(self) -> bool:
        """Whether every output is within both tolerances."""
        return all(entry.ok for entry in self.deviations)

    def require(self) -> None:
        """Does nothing if :attr:`ok`.

        Raises:
            ParityError: names the worst tensor.
        """
        if not self.ok:
            worst = self.worst
            raise ParityError(
                f"method {self.method}: {worst.output} deviates by {worst.median:.1e} in the median of {self.steps} "
                f"steps (tolerance {worst.median_tolerance:.0e}) and {worst.worst:.1e} at step {worst.worst_step} "
                f"(tolerance {WORST_TOLERANCE:.0e})",
                "the compiled graph does not compute what the torch function computes; do not ship this bundle",
            )


def reference(network: nn.Module, options: BuildOptions, method: str) -> Method:
    """The torch function of ``method`` over a float64 copy of ``network``: the oracle of :func:`parity`."""
    return prepare(copy.deepcopy(network).double(), options)[1][method]


def eager(network: nn.Module, options: BuildOptions, method: str) -> Method:
    """The torch function of ``method`` in float32: the yardstick of :func:`parity`."""
    return prepare(network, options)[1][method]


def parity(
    model: Model,
    oracle: Method,
    batches: Iterable[NDArray[np.generic]],
    yardstick: Method | None = None,
) -> ParityReport:
    """Steps ``model`` beside ``oracle`` over the batches.

    Args:
        model: opened with the same method and its default settings; it is stepped from its present theta.
        oracle: see :func:`reference`.
        batches: inputs as the bundle's input spec declares them.
        yardstick: see :func:`eager`; without it, a large network of ReLUs may be found wrong that is not.

    Returns:
        The report; see :meth:`ParityReport.require`.
    """
    theta = torch.from_numpy(np.array(model.theta)).double()
    state = {key: value.double() for key, value in init_state(oracle.spec, theta).items()}
    # The graph's own: what was estimated from source images is an input of the step, not a result of it.
    anchor = {
        key: torch.from_numpy(np.array(value)).double() for key, value in model.engines.bundle.anchor.items()
    }
    hyper = torch.tensor([model.hyper[entry.name] for entry in oracle.spec.hyper], dtype=torch.float64)
    errors: dict[str, list[float]] = {}
    eager_errors: dict[str, float] = {}
    for x in batches:
        rand = torch.from_numpy(uniforms(model.seed, model.steps, oracle.spec.rand)).double()
        target = example_target(model, len(x), model.steps)
        found = model.step(x, target=target)
        batch = Batch(
            torch.from_numpy(x),
            torch.ones(len(x), dtype=torch.float64),
            None if target is None else torch.from_numpy(target).double(),
        )
        before = theta, state
        expected = oracle.step(batch, theta, state, anchor, hyper, rand)
        theta = expected.theta.detach()
        state = {key: value.detach() for key, value in expected.state.items()}
        wanted = _outputs(oracle, expected.logits, theta, state, expected.report)
        numbers = np.array([found.report[name] for name in oracle.spec.report], dtype=np.float32)
        for name, value in _outputs(oracle, found.logits, found.theta, found.state, numbers).items():
            errors.setdefault(name, []).append(relative_error(value, wanted[name]))
        if yardstick is not None:
            single = yardstick.step(
                Batch(batch.x, batch.weight.float(), None if batch.target is None else batch.target.float()),
                before[0].float(),
                {key: value.float() for key, value in before[1].items()},
                {key: value.float() for key, value in anchor.items()},
                hyper.float(),
                rand.float(),
            )
            outputs = _outputs(oracle, single.logits, single.theta, single.state, single.report)
            for name, value in outputs.items():
                error = relative_error(value, wanted[name])
                eager_errors[name] = max(eager_errors.get(name, 0.0), error)
        model.commit(replace(found, theta=_array(theta), state=_arrays(state)))
    deviations = [
        Deviation(
            name,
            statistics.median(series),
            max(series),
            series.index(max(series)) + 1,
            eager_errors.get(name, 0.0),
        )
        if all(value == value for value in series)
        else Deviation(name, float("nan"), float("nan"), next(i for i, v in enumerate(series, 1) if v != v))
        for name, series in errors.items()
    ]
    steps = len(errors.get("logits", []))
    return ParityReport(model.method, steps, sorted(deviations, key=lambda entry: entry.excess, reverse=True))


def _outputs(
    method: Method,
    logits: Tensor | Array,
    theta: Tensor | Array,
    state: Mapping[str, Tensor | Array],
    report: Tensor | Array,
) -> dict[str, NDArray[np.floating]]:
    """Everything a step returns, by the names of :class:`Deviation`."""
    vector, numbers = _numpy(theta), _numpy(report)
    named = {"logits": _numpy(logits)}
    for entry in method.adapter.tensors:
        named[f"theta.{entry.name}"] = vector[entry.offset : entry.offset + entry.size]
    named |= {f"state.{key}": _numpy(value) for key, value in state.items()}
    return named | {
        f"report.{name}": numbers[index : index + 1] for index, name in enumerate(method.spec.report)
    }


def _numpy(value: Tensor | Array) -> NDArray[np.floating]:
    return value.detach().numpy() if isinstance(value, Tensor) else value


def relative_error(found: NDArray[np.floating], wanted: NDArray[np.floating]) -> float:
    """Largest |found - wanted| over the largest |wanted|; NaN if either holds one."""
    if not (np.isfinite(found).all() and np.isfinite(wanted).all()):
        return float("nan")
    # The floor keeps a tensor that is zero in exact arithmetic from turning rounding noise into an infinite error.
    return float(np.abs(found - wanted).max(initial=0.0) / max(np.abs(wanted).max(initial=0.0), 1e-3))


def _array(tensor: Tensor) -> Array:
    return tensor.numpy().astype(np.float32)


def _arrays(state: Mapping[str, Tensor]) -> dict[str, Array]:
    return {key: _array(value) for key, value in state.items()}
