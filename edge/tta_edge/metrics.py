"""Figures of the daemon as Prometheus text. No clock, no socket, no state between two calls.

`METRICS` is the whole list: each entry says what it is called, what it means and how it is read from the
daemon's status and figures. docs/metrics.md is made from it. No label names a stream or a sample, so a scrape
grows with the bundles only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, get_args

from tta_edge.events import Reason
from tta_edge.stats import USES, Figures
from tta_edge.wire import CloudInfo, StatusReply, StreamState, StreamStatus
from tta_runtime.metrics import Definition, Samples, described, render

STEP_RESULTS = ("committed", "refused")
CAUSES: Mapping[str, tuple[Reason, ...]] = {
    "reset": (
        Reason.REQUESTED,
        Reason.PERIODIC,
        Reason.BALL,
        Reason.NON_FINITE_LOGITS,
        Reason.OTHER_BUNDLE,
    ),
    "rollback": (Reason.REQUESTED, Reason.COLLAPSE),
    "refuse": (
        Reason.NON_FINITE_LOGITS,
        Reason.NON_FINITE_THETA,
        Reason.NON_FINITE_STATE,
        Reason.BALL,
        Reason.STALE,
        Reason.ENGINE,
    ),
}
"""What can be behind an action: counted from 0, because a rate does not see the first value of a new series."""

Metric = Definition[[StatusReply, Figures]]


def exposition(status: StatusReply, figures: Figures) -> bytes:
    """Everything in `METRICS` in Prometheus' text format, version 0.0.4."""
    return render(METRICS, status, figures)


def table() -> str:
    """The metrics as a Markdown table, for docs/metrics.md."""
    return described(METRICS)


# --- how metrics are read -----------------------------------------------------------------------------


def _one(value: float) -> Samples:
    return [((), value)]


def _by_name(values: Mapping[str, Any]) -> Samples:
    return [((name,), value) for name, value in values.items()]


def _by_bundle(status: StatusReply, values: Mapping[str, float]) -> Samples:
    """A value for each bundle that is served now or has been; 0 from the start, so that rates see the first."""
    served = dict.fromkeys((bundle.name for bundle in status.bundles), 0.0)
    return _by_name({**served, **values})


def _steps(status: StatusReply, figures: Figures) -> Samples:
    served = {(bundle.name, result): 0.0 for bundle in status.bundles for result in STEP_RESULTS}
    return list({**served, **figures.steps}.items())


def _tokens(status: StatusReply, figures: Figures) -> Samples:
    texts = {bundle.name for bundle in status.bundles if bundle.task == "text"}
    served: dict[tuple[str, str], float] = {(name, use): 0 for name in texts for use in USES}
    return list({**served, **figures.tokens}.items())


def _events(action: str) -> Callable[[StatusReply, Figures], Samples]:
    """The events of one action by their reason."""

    def read(_: StatusReply, figures: Figures) -> Samples:
        expected = dict.fromkeys((reason.value for reason in CAUSES[action]), 0)
        return _by_name(expected | {why: n for (what, why), n in figures.events.items() if what == action})

    return read


def _streams(status: StatusReply, _: Figures) -> Samples:
    counts = Counter((stream.bundle, stream.state) for stream in status.streams)
    served = [(bundle.name, state) for bundle in status.bundles for state in get_args(StreamState)]
    return [(labels, counts[labels]) for labels in dict.fromkeys((*served, *counts))]


def _waiting(status: StatusReply, _: Figures) -> Samples:
    waiting: Counter[str] = Counter()
    for stream in status.streams:
        waiting[stream.bundle] += stream.window
    return _by_bundle(status, waiting)


def _over_streams(
    figure: Callable[[StreamStatus], float | None],
) -> Callable[[StatusReply, Figures], Samples]:
    """Least, mean and greatest of one figure over the streams of each bundle that have it."""

    def read(status: StatusReply, _: Figures) -> Samples:
        values: dict[str, list[float]] = {}
        for stream in status.streams:
            value = figure(stream)
            if value is not None:
                values.setdefault(stream.bundle, []).append(value)
        for bundle, found in values.items():
            yield (bundle, "minimum"), min(found)
            yield (bundle, "mean"), sum(found) / len(found)
            yield (bundle, "maximum"), max(found)

    return read


def _of_link(figure: Callable[[CloudInfo], float]) -> Callable[[StatusReply, Figures], Samples]:
    """A figure of the link; nothing where there is none."""
    return lambda status, _: [] if status.cloud is None else _one(figure(status.cloud))


_OVER = ("bundle", "aggregate")

METRICS: tuple[Metric, ...] = (
    Metric(
        "tta_build_info",
        "gauge",
        ("version",),
        "Always 1; the label says which version runs.",
        lambda status, _: [((status.version,), 1)],
    ),
    Metric(
        "tta_bundle_info",
        "gauge",
        ("bundle", "model", "method", "provider", "digest"),
        "Always 1; the labels say what is served, the digest by its first 12 digits.",
        lambda status, _: [
            ((bundle.name, bundle.model_id, bundle.method, bundle.provider, bundle.digest[:12]), 1)
            for bundle in status.bundles
        ],
    ),
    Metric(
        "tta_engine_fallback_graphs",
        "gauge",
        ("bundle",),
        "Graphs that do not run on the GPU that is there; the status says why.",
        lambda status, _: [((bundle.name,), len(bundle.fallbacks)) for bundle in status.bundles],
    ),
    Metric(
        "tta_bundle_loads_total",
        "counter",
        ("bundle",),
        "How often the bundle was loaded: 1 for the start, one more for each reload.",
        lambda status, _: [((bundle.name,), bundle.loads) for bundle in status.bundles],
    ),
    Metric(
        "tta_uptime_seconds",
        "gauge",
        (),
        "Time since the daemon started.",
        lambda status, _: _one(status.uptime_s),
    ),
    Metric(
        "tta_resident_memory_bytes",
        "gauge",
        (),
        "Resident memory of the daemon.",
        lambda status, _: _one(status.rss_bytes),
    ),
    Metric(
        "tta_disk_ok",
        "gauge",
        (),
        "0 if the last write to the state directory failed, else 1.",
        lambda status, _: _one(float(not status.disk_error)),
    ),
    Metric(
        "tta_requests_total",
        "counter",
        ("message",),
        "Requests of any kind that got what they asked for.",
        lambda _, figures: _by_name(figures.answered),
    ),
    Metric(
        "tta_inference_request_success_total",
        "counter",
        ("bundle",),
        "Predictions answered.",
        lambda status, figures: _by_bundle(
            status, {bundle: sum(times.counts) for bundle, times in figures.request_s.items()}
        ),
        triton="nv_inference_request_success",
    ),
    Metric(
        "tta_inference_request_failure_total",
        "counter",
        ("reason",),
        "Requests of any kind that got an error, or whose reply could not be delivered, by the error's code.",
        lambda _, figures: _by_name(figures.refused),
        triton="nv_inference_request_failure",
    ),
    Metric(
        "tta_inference_count_total",
        "counter",
        ("bundle",),
        "Samples answered.",
        lambda status, figures: _by_bundle(status, figures.samples),
        triton="nv_inference_count",
    ),
    Metric(
        "tta_inference_exec_count_total",
        "counter",
        ("bundle",),
        "Runs of the engine for an answer; one run may answer several requests.",
        lambda status, figures: _by_bundle(status, figures.runs),
        triton="nv_inference_exec_count",
    ),
    Metric(
        "tta_inference_request_duration_seconds",
        "histogram",
        ("bundle",),
        "Time of a prediction from its arrival to its answer.",
        lambda _, figures: _by_name(figures.request_s),
        triton="nv_inference_request_duration_us",
    ),
    Metric(
        "tta_inference_queue_duration_seconds",
        "histogram",
        ("bundle",),
        "Time of a prediction in the queue.",
        lambda _, figures: _by_name(figures.queue_s),
        triton="nv_inference_queue_duration_us",
    ),
    Metric(
        "tta_inference_compute_infer_duration_seconds",
        "histogram",
        ("bundle",),
        "Time of a prediction in the engine.",
        lambda _, figures: _by_name(figures.compute_s),
        triton="nv_inference_compute_infer_duration_us",
    ),
    Metric(
        "tta_inference_pending_request_count",
        "gauge",
        (),
        "Requests received and not answered yet.",
        lambda status, _: _one(status.requests.open),
        triton="nv_inference_pending_request_count",
    ),
    Metric(
        "tta_adapt_enabled",
        "gauge",
        (),
        "The kill switch: 1 if streams may adapt, 0 if none may.",
        lambda status, _: _one(float(status.adapt)),
    ),
    Metric(
        "tta_steps_total",
        "counter",
        ("bundle", "result"),
        "Steps of the method, `committed` or `refused` by a guard.",
        _steps,
    ),
    Metric(
        "tta_step_duration_seconds",
        "histogram",
        ("bundle",),
        "Time of a step.",
        lambda _, figures: _by_name(figures.step_s),
    ),
    Metric(
        "tta_events_total",
        "counter",
        ("action", "reason"),
        "Everything the daemon did by itself or was told to do; reasons are listed in operations.md.",
        lambda _, figures: list(figures.events.items()),
    ),
    Metric(
        "tta_resets_total",
        "counter",
        ("reason",),
        "Streams returned to the source.",
        _events("reset"),
    ),
    Metric(
        "tta_rollbacks_total",
        "counter",
        ("reason",),
        "Streams returned to their last good checkpoint.",
        _events("rollback"),
    ),
    Metric(
        "tta_refused_steps_total",
        "counter",
        ("reason",),
        "Steps that a guard refused; theta stayed as it was.",
        _events("refuse"),
    ),
    Metric(
        "tta_streams",
        "gauge",
        ("bundle", "state"),
        "Streams in memory by what they do: `adapting`; `frozen` by the guards; `source`, the method has no "
        "step; `off`, switched off.",
        _streams,
    ),
    Metric(
        "tta_streams_held",
        "gauge",
        ("place",),
        "Streams by where they are: in `memory`, or on `disk` only.",
        lambda status, _: [(("memory",), len(status.streams)), (("disk",), status.stored_streams)],
    ),
    Metric(
        "tta_window_samples",
        "gauge",
        ("bundle",),
        "Samples that wait for a step, over all streams.",
        _waiting,
    ),
    Metric(
        "tta_dropped_samples_total",
        "counter",
        (),
        "Samples that left a window without having been adapted on.",
        lambda _, figures: _one(figures.dropped),
    ),
    Metric(
        "tta_stream_entropy_nats",
        "gauge",
        _OVER,
        "Running mean entropy of the predictions: `minimum`, `mean`, `maximum` over the streams in memory.",
        _over_streams(lambda stream: stream.entropy),
    ),
    Metric(
        "tta_stream_diversity_ratio",
        "gauge",
        _OVER,
        "Entropy of the running mean prediction as a fraction of ln C, over the streams; near 0: collapsed.",
        _over_streams(lambda stream: stream.diversity),
    ),
    Metric(
        "tta_stream_distance_ratio",
        "gauge",
        _OVER,
        "Distance of theta to the source theta, relative to the norm of the latter, over the streams.",
        _over_streams(lambda stream: stream.distance),
    ),
    Metric(
        "tta_stream_agreement_ratio",
        "gauge",
        _OVER,
        "Share of the compared samples to which stream and frozen source give the same class, over the streams.",
        _over_streams(lambda stream: stream.agreement),
    ),
    Metric(
        "tta_sessions_held",
        "gauge",
        ("place",),
        "Sessions of language models by where they are: in `memory`, or on `disk` only.",
        lambda status, _: [(("memory",), len(status.sessions)), (("disk",), status.stored_sessions)],
    ),
    Metric(
        "tta_session_memory_bytes",
        "gauge",
        (),
        "Memory set apart for sessions and for texts under way; at most `max_session_bytes`.",
        lambda status, _: _one(status.text_bytes),
    ),
    Metric(
        "tta_text_tokens_total",
        "counter",
        ("bundle", "use"),
        "Tokens of language models: `scored`, `generated` or `absorbed`.",
        _tokens,
    ),
    Metric(
        "tta_text_first_token_seconds",
        "histogram",
        ("bundle",),
        "Time from the arrival of a `generate` to its first token.",
        lambda _, figures: _by_name(figures.first_s),
    ),
    Metric(
        "tta_text_token_seconds",
        "histogram",
        ("bundle",),
        "Time of a generated token in the engine.",
        lambda _, figures: _by_name(figures.token_s),
    ),
    Metric(
        "tta_base_seq",
        "gauge",
        ("bundle",),
        "Number of the cloud's patch that is the base; 0: the bundle's own theta.",
        lambda status, _: [((b.name,), int(b.base.partition(".")[2] or 0)) for b in status.bundles],
    ),
    Metric(
        "tta_base_staged",
        "gauge",
        ("bundle",),
        "1 while a patch is on probation.",
        lambda status, _: [((b.name,), float(bool(b.staged))) for b in status.bundles],
    ),
    Metric(
        "tta_link_up",
        "gauge",
        (),
        "1 while the cloud is there; this and the following only in the modes `cloud` and `both`.",
        _of_link(lambda cloud: float(cloud.phase == "online")),
    ),
    Metric(
        "tta_link_head_age_seconds",
        "gauge",
        (),
        "Time since the last good head of the cloud, or since the start.",
        _of_link(lambda cloud: cloud.head_age_s),
    ),
    Metric(
        "tta_link_seen_samples_total",
        "counter",
        (),
        "Samples that the upload filter has looked at.",
        _of_link(lambda cloud: cloud.seen),
    ),
    Metric(
        "tta_link_uploaded_samples_total",
        "counter",
        (),
        "Samples that the cloud has acknowledged.",
        _of_link(lambda cloud: cloud.sent),
    ),
    Metric(
        "tta_link_unwanted_samples_total",
        "counter",
        (),
        "Of them, those that the cloud did not want.",
        _of_link(lambda cloud: cloud.refused),
    ),
    Metric(
        "tta_link_dropped_samples_total",
        "counter",
        (),
        "Samples for the cloud that were dropped because too many waited.",
        _of_link(lambda cloud: cloud.dropped),
    ),
    Metric(
        "tta_link_spooled_samples",
        "gauge",
        (),
        "Samples that wait for upload.",
        _of_link(lambda cloud: cloud.waiting),
    ),
    Metric(
        "tta_link_refused_messages_total",
        "counter",
        (),
        "Patches, heads and roots that did not pass verification.",
        _of_link(lambda cloud: cloud.patches_refused),
    ),
)
"""Every metric of a scrape, in its order."""
