"""What a stream's figures mean: rolling accuracy, gap recovered, recovery time, drift. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Recovery:
    """The window and the tolerance that define a recovery time.

    Attributes:
        window: samples over which the rolling error is taken.
        tolerance: how far above its settled value the rolling error may lie, as a fraction (0.05: 5 %
        points).
    """

    window: int = 64
    tolerance: float = 0.05


def rolling_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean of the last `window` values at each place; at the start, of the values so far.

    Args:
        values: [n].
        window: at least 1.

    Returns:
        [n].
    """
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return np.asarray((total[end] - total[start]) / (end - start))


def gap_recovered(clean: float, source: float, adapted: float) -> float | None:
    """(adapted - source) / (clean - source); None where the shift took nothing, so that there is no gap.

    Args:
        clean: accuracy of the source model without the shift, as a fraction.
        source: accuracy of the source model under the shift.
        adapted: accuracy of the adapting model under the shift.
    """
    gap = clean - source
    return None if gap <= 0 else (adapted - source) / gap


def recovery_samples(wrong: NDArray[np.bool_], recovery: Recovery) -> int | None:
    """Samples from the start of the shift until the rolling error is back near its settled value.

    The settled value is the mean error over the last third of the shift. The recovery time is the smallest t
    >= window with: mean error of the samples t - window .. t - 1 <= settled value + tolerance. A method that
    is settled from its first batch on thus has the recovery time `window`, the finest that the window
    resolves.

    Args:
        wrong: [n], whether each sample since the start of the shift was misclassified.
        recovery: window and tolerance.

    Returns:
        The number of samples; None if the shift has fewer than three windows, or the error never comes back.
    """
    if len(wrong) < 3 * recovery.window:
        return None
    settled = float(wrong[-(len(wrong) // 3) :].mean())
    rolling = rolling_mean(wrong.astype(np.float64), recovery.window)[recovery.window - 1 :]
    # Half a sample of slack: the comparison must not hang on the last bit of a sum.
    reached = np.flatnonzero(rolling <= settled + recovery.tolerance + 0.5 / recovery.window)
    return int(reached[0]) + recovery.window if len(reached) else None


def drift(reference: NDArray[np.float64], now: NDArray[np.float64]) -> float:
    """Total variation distance of two mean predictions: 0 the same, 1 disjoint.

    Without labels this says how far the frozen source's answers have moved as a whole. It is half the sum of
    |reference - now| over the classes; unlike a divergence it is bounded and needs no smoothing.

    Args:
        reference: [classes], mean predicted probabilities over the part compared with.
        now: [classes], the same over the part looked at.
    """
    return float(0.5 * np.abs(reference - now).sum())
