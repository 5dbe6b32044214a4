"""Prometheus text from real figures: names, types, labels, and the table in the documents."""

from __future__ import annotations

import math
import re

import msgspec
import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from figures import BUNDLE, CLOUD, busy_stats, status, stream
from running import REPOSITORY
from tta_edge.metrics import METRICS, exposition, table
from tta_edge.stats import Stats
from tta_runtime.histogram import BOUNDS_S


def scrape(reply=None, stats=None):
    """(sample name, labels) -> value, as Prometheus reads it."""
    text = exposition(reply or status(), (stats or Stats()).figures()).decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} occurs twice"
            found[key] = sample.value
    return found


def value(found, name, **labels):
    return found[name, tuple(sorted(labels.items()))]


# --- names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_name_follows_the_conventions(metric):
    assert re.fullmatch(r"tta_[a-z][a-z0-9_]*[a-z0-9]", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.kind != "histogram" or metric.name.endswith("_seconds")
    assert not re.search(r"_(ms|us|milliseconds|microseconds|kb|mb|percent)(_|$)", metric.name)
    assert metric.meaning.endswith(".")
    assert "\n" not in metric.meaning
    assert "|" not in metric.meaning
    assert set(metric.labels).isdisjoint({"stream", "id", "sample", "le", "quantile"})
    assert len(set(metric.labels)) == len(metric.labels)


def test_names_differ():
    assert len({metric.name for metric in METRICS}) == len(METRICS)


@pytest.mark.parametrize("metric", [m for m in METRICS if m.triton], ids=lambda metric: metric.name)
def test_what_means_the_same_as_in_triton_has_its_stem(metric):
    stem = metric.triton.removeprefix("nv_").removesuffix("_us")
    assert metric.name.removeprefix("tta_").startswith(stem)


def test_every_definition_is_in_a_scrape_with_its_type_and_meaning():
    text = exposition(status(streams=[stream()]), busy_stats().figures()).decode()
    for metric in METRICS:
        assert f"# TYPE {metric.name} {metric.kind}\n" in text
        assert f"# HELP {metric.name} {metric.meaning}\n" in text
    families = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert families == {metric.name for metric in METRICS}


def test_a_busy_daemon_has_a_sample_of_each_with_the_declared_labels():
    figures = stream(entropy=0.5, diversity=0.9, agreement=0.8)
    samples = scrape(status(streams=[figures], cloud=CLOUD), busy_stats())
    for metric in METRICS:
        names = {metric.name} if metric.kind != "histogram" else {f"{metric.name}_count"}
        found = [dict(labels) for name, labels in samples if name in names]
        assert found, metric.name
        assert all(set(labels) == set(metric.labels) for labels in found), metric.name


# --- values -------------------------------------------------------------------------------------------


def test_a_histogram_is_cumulative_and_counts_what_is_above_the_last_bound():
    stats = Stats()
    times = [0.0001, 0.0005, 0.003, 0.2, 99.0]
    for seconds in times:
        stats.stepped("default", "committed", seconds)
    found = scrape(stats=stats)
    name = "tta_step_duration_seconds"
    for bound in BOUNDS_S:
        expected = sum(seconds <= bound for seconds in times)
        assert value(found, f"{name}_bucket", bundle="default", le=str(bound)) == expected
    assert value(found, f"{name}_bucket", bundle="default", le="+Inf") == len(times)
    assert value(found, f"{name}_count", bundle="default") == len(times)
    assert math.isclose(value(found, f"{name}_sum", bundle="default"), sum(times))


def test_figures_of_streams_are_aggregated_over_those_that_have_them():
    streams = [stream("a", entropy=0.2), stream("b", entropy=0.6), stream("c"), stream("d", distance=0.7)]
    found = scrape(status(streams=streams))
    for aggregate, expected in (("minimum", 0.2), ("mean", 0.4), ("maximum", 0.6)):
        name = "tta_stream_entropy_nats"
        assert math.isclose(value(found, name, bundle="default", aggregate=aggregate), expected)
    assert value(found, "tta_stream_distance_ratio", bundle="default", aggregate="maximum") == 0.7
    assert not [name for name, _ in found if name == "tta_stream_agreement_ratio"]


def test_streams_are_counted_by_state_and_place_and_windows_are_added_up():
    streams = [stream("a", window=3), stream("b", window=4), stream("c", state="frozen")]
    found = scrape(status(streams=streams, stored_streams=9))
    assert value(found, "tta_streams", bundle="default", state="adapting") == 2
    assert value(found, "tta_streams", bundle="default", state="frozen") == 1
    assert value(found, "tta_streams", bundle="default", state="off") == 0
    assert value(found, "tta_streams_held", place="memory") == 3
    assert value(found, "tta_streams_held", place="disk") == 9
    assert value(found, "tta_window_samples", bundle="default") == 7


def test_the_link_to_the_cloud_and_the_base():
    bundle = msgspec.structs.replace(BUNDLE, base="2.41", staged="2.42")
    found = scrape(status(bundles=[bundle], cloud=CLOUD))
    expected = {
        "up": 1, "head_age_seconds": 1.5, "seen_samples_total": 100, "uploaded_samples_total": 10,
        "unwanted_samples_total": 1, "dropped_samples_total": 2, "spooled_samples": 3, "refused_messages_total": 4,
    }  # fmt: skip
    assert {name: value(found, f"tta_link_{name}") for name in expected} == expected
    assert value(found, "tta_base_seq", bundle="default") == 41
    assert value(found, "tta_base_staged", bundle="default") == 1
    away = scrape(status(cloud=msgspec.structs.replace(CLOUD, phase="waiting")))
    assert value(away, "tta_link_up") == 0
    alone = scrape(status())
    assert not [name for name, _ in alone if name.startswith("tta_link_")]
    assert (
        value(alone, "tta_base_seq", bundle="default")
        == value(alone, "tta_base_staged", bundle="default")
        == 0
    )


def test_events_are_counted_by_what_was_done():
    found = scrape(stats=busy_stats())
    assert value(found, "tta_resets_total", reason="ball") == 1
    assert value(found, "tta_rollbacks_total", reason="requested") == 1
    assert value(found, "tta_refused_steps_total", reason="ball") == 1
    assert value(found, "tta_events_total", action="skip", reason="x") == 1


def test_switches_and_failures_are_zero_or_one():
    found = scrape(status(adapt=False, disk_error="No space left on device"))
    assert value(found, "tta_adapt_enabled") == 0
    assert value(found, "tta_disk_ok") == 0
    found = scrape()
    assert value(found, "tta_adapt_enabled") == 1
    assert value(found, "tta_disk_ok") == 1


def test_counters_begin_at_zero_so_that_a_rate_sees_their_first_event():
    found = scrape()
    assert value(found, "tta_inference_request_success_total", bundle="default") == 0
    assert value(found, "tta_steps_total", bundle="default", result="refused") == 0
    assert value(found, "tta_dropped_samples_total") == 0
    assert value(found, "tta_rollbacks_total", reason="collapse") == 0


def test_a_bundle_that_is_no_longer_served_keeps_its_counters():
    stats = Stats()
    stats.predicted("old", 8, queue_s=0.0, compute_s=0.1, total_s=0.1)
    found = scrape(stats=stats)
    assert value(found, "tta_inference_count_total", bundle="old") == 8
    assert value(found, "tta_inference_count_total", bundle="default") == 0


# --- what must not happen -----------------------------------------------------------------------------


def test_a_name_from_a_bundle_cannot_break_the_format():
    nasty = 'x"} 1\ntta_disk_ok 0 \\ # HELP'
    found = scrape(status(bundles=[msgspec.structs.replace(BUNDLE, model_id=nasty)]))
    assert value(found, "tta_disk_ok") == 1
    (labels,) = [dict(labels) for name, labels in found if name == "tta_bundle_info"]
    assert labels["model"] == nasty


def test_a_thousand_streams_make_no_longer_scrape_than_two():
    def lines(count):
        streams = [stream(f"camera-{i}", entropy=0.1 * i) for i in range(count)]
        return exposition(status(streams=streams), Stats().figures()).count(b"\n")

    assert lines(1000) == lines(2)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_does_not_break_the_scrape(odd):
    found = scrape(status(streams=[stream(distance=odd)]))
    got = value(found, "tta_stream_distance_ratio", bundle="default", aggregate="mean")
    assert got == odd or (math.isnan(got) and math.isnan(odd))


def test_a_scrape_leaves_nothing_behind():
    before = prometheus_client.generate_latest()
    stats, reply = busy_stats(), status(streams=[stream()])
    first = exposition(reply, stats.figures())
    assert exposition(reply, stats.figures()) == first
    names = re.findall(rb"# TYPE (\S+)", prometheus_client.generate_latest())
    assert names == re.findall(rb"# TYPE (\S+)", before)
    assert not [name for name in names if name.startswith(b"tta_")]


# --- the document -------------------------------------------------------------------------------------


def test_the_page_holds_the_table_of_the_definitions():
    page = (REPOSITORY / "docs" / "metrics.md").read_text()
    _, begin, rest = page.partition("<!-- metrics -->\n\n")
    written, end, _ = rest.partition("\n\n<!-- end:metrics -->")
    assert begin
    assert end
    assert written == table(), "make the table in docs/metrics.md again; the page says how"
