"""Counters and quantiles of the daemon."""

from __future__ import annotations

import math

import pytest

from tta_edge.stats import WINDOW, Quantiles, Stats, quantile


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [
        ([3.0], 0.5, 3.0),
        ([4, 1, 3, 2], 0.5, 2),
        ([4, 1, 3, 2], 0.0, 1),
        ([4, 1, 3, 2], 1.0, 4),
        (range(1, 101), 0.99, 99),
    ],
)
def test_nearest_rank(values, q, expected):
    assert quantile([float(v) for v in values], q) == expected


def test_no_values_have_no_quantile():
    assert math.isnan(quantile([], 0.5))
    assert Stats().latency() == {}


def test_memory_is_bounded_and_old_values_are_forgotten():
    quantiles = Quantiles()
    for value in range(3 * WINDOW):
        quantiles.add(float(value))
    assert len(quantiles.window) == WINDOW
    assert quantiles.at(0.0) == 2 * WINDOW


def test_counts():
    stats = Stats()
    stats.answered("predict", 2.0)
    stats.answered("info")
    stats.refused("busy")
    stats.refused("busy")
    assert (stats.ok, stats.failed, stats.failures()) == (2, 2, {"busy": 2})
    assert stats.latency() == {"p50": 2.0, "p99": 2.0}
