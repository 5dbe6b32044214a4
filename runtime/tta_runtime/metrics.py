"""Figures as Prometheus text: a list of definitions, each of which reads its samples from what it is given. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, ParamSpec

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from .histogram import BOUNDS_S, Histogram

P = ParamSpec("P")
Samples = Iterable[tuple[tuple[str, ...], Any]]
"""Label values, in the order of the definition's labels, and the value: a number, or a `Histogram`."""


@dataclass(frozen=True)
class Definition(Generic[P]):
    """One metric family.

    Attributes:
        name: as it stands in a query; a histogram's without `_bucket`, `_sum` and `_count`.
        kind: its Prometheus type.
        labels: names of its labels.
        meaning: the HELP text.
        read: its samples at one moment, from what `render` is given.
        triton: the metric of the Triton inference server that means the same, if any.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    meaning: str
    read: Callable[P, Samples]
    triton: str = ""

    def family(self, *args: P.args, **kwargs: P.kwargs) -> Metric:
        """The family with its samples."""
        samples = self.read(*args, **kwargs)
        if self.kind == "histogram":
            return _histograms(self.name, self.meaning, self.labels, samples)
        kind = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        family = kind(self.name, self.meaning, labels=self.labels)
        for labels, value in samples:
            family.add_metric(labels, value)
        return family


def render(metrics: Iterable[Definition[P]], *args: P.args, **kwargs: P.kwargs) -> bytes:
    """Metrics in Prometheus' text format, version 0.0.4."""
    registry = CollectorRegistry()
    registry.register(_Moment([metric.family(*args, **kwargs) for metric in metrics]))
    return generate_latest(registry)


def described(metrics: Iterable[Definition[Any]]) -> str:
    """Metrics as a Markdown table."""
    rows = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        after = f" As Triton's `{metric.triton}`." if metric.triton else ""
        rows.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.meaning}{after} |")
    return "\n".join(rows)


@dataclass(frozen=True, eq=False)  # the registry keeps its collectors by identity
class _Moment(Collector):
    """What the client library asks for the metrics of one scrape."""

    families: list[Metric]

    def collect(self) -> Iterator[Metric]:
        """All families."""
        return iter(self.families)


def _histograms(name: str, meaning: str, labels: tuple[str, ...], samples: Samples) -> Metric:
    family = HistogramMetricFamily(name, meaning, labels=labels)
    for values, histogram in samples:
        family.add_metric(values, buckets=_buckets(histogram), sum_value=histogram.total)
    return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Cumulative counts by upper bound, as the format wants them."""
    below, buckets = 0, []
    for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), histogram.counts, strict=True):
        below += count
        buckets.append((bound, float(below)))
    return buckets
