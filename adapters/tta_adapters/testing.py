"""``check_method``: the contract of a method, executable. A new method is finished when it passes.

The checks need no bundle and no runtime: they call the step on a small network and look at what comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tta_adapters.base import Batch, Calibrated, Method, State, Step, init_state
from tta_adapters.network import NetworkAdapter
from tta_adapters.shelf import make_adapter

SHARPNESS = {"batch": 40.0, "group": 15.0, "layer": 50.0, "rms": 50.0}
"""Factors on the small networks' classifiers: mean entropies between 0.1 and 0.4 of ln C."""

PATIENCE = 16
"""Steps of six samples within which a method that trains must have moved theta."""

MakeMethod = Callable[[NetworkAdapter], Method]


class MethodContractError(AssertionError):
    """A method breaks its contract; names the check, what was found and what was expected."""


@dataclass(frozen=True)
class Case:
    """A method over a small network, with inputs to step it on.

    Attributes:
        method: the method under test.
        theta: [P], its source theta.
        state: its initial state.
        batches: inputs x [batch, ...], all of one shape but the last, which is smaller.
    """

    method: Method
    theta: Tensor
    state: State
    batches: tuple[Tensor, ...]

    def step(self, x: Tensor, theta: Tensor, state: State, weight: Tensor | None = None) -> Step:
        """One step with default hyper values and recorded random numbers."""
        spec = self.method.spec
        rand = torch.rand(spec.rand, generator=torch.Generator().manual_seed(7))
        weight = torch.ones(len(x)) if weight is None else weight
        return self.method.step(
            self.batch(x, weight), theta, state, self.method.anchor(), spec.default_hyper(), rand
        )

    def batch(self, x: Tensor, weight: Tensor) -> Batch:
        """The batch, with a teacher's logits where the method asks for them."""
        if not self.method.spec.target:
            return Batch(x, weight)
        return Batch(x, weight, 3 * torch.randn([len(x), 5], generator=torch.Generator().manual_seed(9)))


def small_networks() -> dict[str, nn.Module]:
    """One small classifier per kind of normalisation, [batch, 3, 8, 8] -> [batch, 5], seeded.

    Their classifiers are sharpened, so that some predictions are certain and some are not: methods that choose samples
    by entropy have something to choose from.
    """
    norms: dict[str, Callable[[], nn.Module]] = {
        "batch": lambda: nn.BatchNorm2d(8),
        "group": lambda: nn.GroupNorm(2, 8),
        "layer": lambda: nn.LayerNorm([8, 8, 8]),
        "rms": lambda: nn.RMSNorm([8, 8, 8]),
    }
    networks: dict[str, nn.Module] = {}
    for name, make in norms.items():
        with torch.random.fork_rng():
            torch.manual_seed(3)
            body = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1),
                make(),
                nn.GELU(),
                nn.Conv2d(8, 8, 3, padding=1),
                make(),
                nn.GELU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            )
            classifier = nn.Linear(8, 5)
            classifier.weight.data *= SHARPNESS[name]
            networks[name] = nn.Sequential(*body, classifier)
    return networks


def check_method(make: MakeMethod, *, adapter: str = "norm") -> None:
    """Runs every check of the contract on every small network the method accepts.

    Args:
        make: builds the method over an adapter, e.g. ``lambda adapter: Tent(adapter, lr=0.01)``. It may refuse an
            adapter by ValueError (a method that needs BatchNorm); it must accept at least one. One that needs source
            images is calibrated on random ones.
        adapter: that the small networks get, a key of ``tta_adapters.ADAPTERS``.

    Raises:
        MethodContractError: names the network, the check, and what was found.
    """
    accepted = 0
    for name, network in small_networks().items():
        adapted = make_adapter(adapter, network, input_shape=(3, 8, 8))
        try:
            method = make(adapted)
        except ValueError:
            continue
        accepted += 1
        generator = torch.Generator().manual_seed(11)
        if isinstance(method, Calibrated):
            method.calibrate([torch.rand([8, 3, 8, 8], generator=generator) for _ in range(2)])
        sizes = (6, 6, 6, 6, max(4, method.spec.min_batch))
        batches = tuple(torch.rand([size, 3, 8, 8], generator=generator) for size in sizes)
        theta = adapted.source_theta()
        case = Case(method, theta, init_state(method.spec, theta), batches)
        for check in CHECKS:
            for complaint in check(case):
                raise MethodContractError(
                    f"{method.spec.name} on the {name} network, {check.__name__}: {complaint}"
                )
    if accepted == 0:
        raise MethodContractError("the method refused every network; it must accept at least one")


def shapes_are_stable(case: Case) -> Iterator[str]:
    """Theta, state and report keep their shapes, names and dtypes at any batch size."""
    theta, state = case.theta, case.state
    for x in case.batches:
        out = case.step(x, theta, state)
        if out.logits.shape != (len(x), 5):
            yield f"logits {list(out.logits.shape)} for a batch of {len(x)}, expected [{len(x)}, 5]"
        if out.theta.shape != theta.shape or out.theta.dtype != torch.float32:
            yield f"theta {list(out.theta.shape)} {out.theta.dtype}, expected {list(theta.shape)} torch.float32"
        found = {key: tuple(value.shape) for key, value in out.state.items()}
        expected = {entry.name: entry.shape for entry in case.method.spec.state}
        if found != expected:
            yield f"state {found}, the spec says {expected}"
        if out.report.shape != (len(case.method.spec.report),):
            yield f"report {list(out.report.shape)}, the spec names {len(case.method.spec.report)} entries"
        theta, state = out.theta, out.state


def step_is_pure(case: Case) -> Iterator[str]:
    """Equal arguments give equal results, bit for bit, and no argument is changed."""
    x = case.batches[0]
    before = [value.clone() for value in (x, case.theta, *case.state.values())]
    first = case.step(x, case.theta, case.state)
    second = case.step(x, case.theta, case.state)
    for name, a, b in (
        ("logits", first.logits, second.logits),
        ("theta", first.theta, second.theta),
        ("report", first.report, second.report),
        *((f"state.{key}", first.state[key], second.state[key]) for key in first.state),
    ):
        if not torch.equal(a, b):
            yield f"two equal calls differ in {name} by {float((a - b).abs().max()):.2e}"
    for value, kept in zip((x, case.theta, *case.state.values()), before, strict=True):
        if not torch.equal(value, kept):
            yield "an argument was changed in place"


def results_are_finite_and_detached(case: Case) -> Iterator[str]:
    """Nothing non-finite over several steps, and no result drags an autograd graph along."""
    theta, state = case.theta, case.state
    for number, x in enumerate(case.batches, 1):
        out = case.step(x, theta, state)
        for name, value in (
            ("logits", out.logits),
            ("theta", out.theta),
            ("report", out.report),
            *out.state.items(),
        ):
            if not torch.isfinite(value).all():
                yield f"{name} is not finite at step {number}"
            if value.requires_grad:
                yield f"{name} requires a gradient"
        theta, state = out.theta, out.state


def trains_as_declared(case: Case) -> Iterator[str]:
    """A method that trains moves theta, at once or after it has gathered samples; one that does not never does."""
    theta, state = case.theta, case.state
    for _ in range(PATIENCE):
        out = case.step(case.batches[0], theta, state)
        moved, theta, state = not torch.equal(out.theta, theta), out.theta, out.state
        if moved:
            break
    if moved != case.method.spec.trains:
        yield f"theta {'moved' if moved else 'did not move'}, spec.trains is {case.method.spec.trains}"


def refused_batch_changes_nothing(case: Case) -> Iterator[str]:
    """A batch whose every weight is 0 leaves theta and state bit-identical, also after earlier steps."""
    x = case.batches[0]
    warm = case.step(x, case.theta, case.state)
    out = case.step(case.batches[1], warm.theta, warm.state, torch.zeros(len(x)))
    if not torch.equal(out.theta, warm.theta):
        yield f"theta moved by {float((out.theta - warm.theta).abs().max()):.2e} on refused samples"
    for key, value in out.state.items():
        if not torch.equal(value, warm.state[key]):
            yield f"state {key} changed on refused samples"


def refused_sample_has_no_say_in_the_objective(case: Case) -> Iterator[str]:
    """Doubling every weight changes nothing: weights say who takes part, their scale does not."""
    x = case.batches[0]
    once = case.step(x, case.theta, case.state)
    twice = case.step(x, case.theta, case.state, 2 * torch.ones(len(x)))
    gap = float((once.theta - twice.theta).abs().max())
    if gap > 1e-6:
        yield f"theta differs by {gap:.2e} between weights 1 and 2"


def logits_are_as_declared(case: Case) -> Iterator[str]:
    """A method that returns logits "before" the update does not let the learning rate touch them."""
    if case.method.spec.logits != "before" or not any(entry.name == "lr" for entry in case.method.spec.hyper):
        return
    x = case.batches[0]
    spec = case.method.spec
    still = torch.tensor([0.0 if entry.name == "lr" else entry.default for entry in spec.hyper])
    batch = case.batch(x, torch.ones(len(x)))
    rand = torch.rand(spec.rand, generator=torch.Generator().manual_seed(7))
    frozen = case.method.step(batch, case.theta, case.state, case.method.anchor(), still, rand)
    if not torch.equal(frozen.logits, case.step(x, case.theta, case.state).logits):
        yield "the returned logits depend on the learning rate although the spec says they are made before the step"


CHECKS: tuple[Callable[[Case], Iterator[str]], ...] = (
    shapes_are_stable,
    step_is_pure,
    results_are_finite_and_detached,
    trains_as_declared,
    refused_batch_changes_nothing,
    refused_sample_has_no_say_in_the_objective,
    logits_are_as_declared,
)
