"""Counters, histograms and quantiles of the daemon."""

from __future__ import annotations

import math
import threading

import pytest

from tta_edge.stats import WINDOW, Stats, quantile
from tta_runtime.histogram import BOUNDS_S, Histogram


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
    assert Stats().figures().latency() == {}


def test_memory_is_bounded_and_old_values_are_forgotten():
    stats = Stats()
    for value in range(3 * WINDOW):
        stats.predicted("b", 1, queue_s=0.0, compute_s=0.0, total_s=value / 1e3)
    kept = stats.figures().latency_ms
    assert len(kept) == WINDOW
    assert min(kept) == pytest.approx(2 * WINDOW)


def test_a_value_at_a_bound_counts_below_it_as_prometheus_has_it():
    histogram = Histogram()
    for seconds in (0.0, BOUNDS_S[0], BOUNDS_S[0] * 1.01, BOUNDS_S[-1] * 2):
        histogram.add(seconds)
    assert histogram.counts[0] == 2
    assert histogram.counts[1] == 1
    assert histogram.counts[-1] == 1
    assert sum(histogram.counts) == 4


def test_counts():
    stats = Stats()
    stats.answered("predict")
    stats.answered("info")
    stats.refused("busy")
    stats.refused("busy")
    stats.predicted("b", 8, queue_s=0.001, compute_s=0.001, total_s=0.002)
    stats.ran("b")
    stats.stepped("b", "committed", 0.5)
    stats.happened("reset", "ball")
    stats.dropped(3)
    figures = stats.figures()
    assert (figures.ok, figures.failed, figures.refused) == (2, 2, {"busy": 2})
    assert figures.latency() == {"p50": 2.0, "p99": 2.0}
    assert (figures.samples, figures.runs, figures.dropped) == ({"b": 8}, {"b": 1}, 3)
    assert figures.steps == {("b", "committed"): 1}
    assert figures.events == {("reset", "ball"): 1}


def test_figures_do_not_change_afterwards():
    stats = Stats()
    stats.predicted("b", 1, queue_s=0.0, compute_s=0.0, total_s=0.1)
    figures = stats.figures()
    stats.predicted("b", 1, queue_s=0.0, compute_s=0.0, total_s=0.1)
    assert sum(figures.request_s["b"].counts) == 1
    assert sum(stats.figures().request_s["b"].counts) == 2


def test_threads_lose_no_count():
    stats = Stats()

    def work():
        for _ in range(2000):
            stats.answered("predict")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stats.figures().ok == 8000
