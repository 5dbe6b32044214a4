"""When a step runs: pure functions of counts and times. Threads and windows are in stepper.py."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["inline", "always", "every", "budget"]


@dataclass(frozen=True)
class Policy:
    """The daemon's choice.

    Attributes:
        kind: `inline`: a request of at least `inline_min_batch` samples is predicted and adapted on in one pass, the
            samples of smaller ones are collected as with `always`. `always`: a background step whenever
            `step_batch` samples wait. `every`: one for each `every_samples`. `budget`: like `always`, within a
            share of the time.
        step_batch: samples of a background step.
        every_samples: of a stream, between two of its steps.
        budget: share of the time that background steps may take.
        inline_min_batch: samples.
        window: most samples that wait.
    """

    kind: Kind
    step_batch: int
    every_samples: int
    budget: float
    inline_min_batch: int
    window: int

    def inline(self, samples: int) -> bool:
        """Whether a request of so many samples is adapted on in the pass that answers it."""
        return self.kind == "inline" and samples >= self.inline_min_batch


def step_size(policy: Policy, *, fixed: int | None, least: int) -> int | None:
    """Samples of one background step of a method.

    Args:
        policy: the daemon's.
        fixed: the only batch size the method was compiled for; None: any.
        least: the fewest samples it can step on.

    Returns:
        A number of samples; None where so many do not fit into the window.
    """
    size = fixed if fixed is not None else max(policy.step_batch, least)
    return size if size <= policy.window else None


def due(policy: Policy, size: int, *, waiting: int, fresh: int) -> bool:
    """Whether a stream should step.

    Args:
        policy: the daemon's.
        size: samples of one step.
        waiting: samples in the window.
        fresh: samples that arrived since the last step, those included that the window has dropped.
    """
    if waiting < size:
        return False
    return policy.kind != "every" or fresh >= policy.every_samples


@dataclass(frozen=True)
class Credit:
    """Time that background steps may still take.

    Attributes:
        seconds: earned and not yet spent; negative after a step that was dearer than expected.
        at_s: when that was.
    """

    seconds: float
    at_s: float


def earned(credit: Credit, now_s: float, *, share: float, most_s: float) -> Credit:
    """The credit after some time.

    Args:
        credit: before.
        now_s: on the clock of `at_s`; an earlier time earns nothing.
        share: seconds earned in each second.
        most_s: credit does not grow beyond it, so a quiet hour does not buy a busy minute.
    """
    seconds = credit.seconds + share * max(0.0, now_s - credit.at_s)
    return Credit(min(seconds, max(most_s, credit.seconds)), now_s)


def spent(credit: Credit, seconds: float) -> Credit:
    """The credit after a step that took so long."""
    return replace(credit, seconds=credit.seconds - seconds)


def delay_s(credit: Credit, cost_s: float, *, share: float) -> float:
    """How long to wait until a step of that cost is affordable; 0 where it is now."""
    return max(0.0, (cost_s - credit.seconds) / share)
