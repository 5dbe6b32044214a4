"""Figures of the service as Prometheus text. No clock, no socket, no state between two calls.

`METRICS` is the whole list; docs/metrics.md is made from it. No label names an edge or a sample, so a scrape grows with
the groups only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tta_cloud.rollout import Stage
from tta_cloud.stats import Figures
from tta_runtime.metrics import Definition, Samples, described, render


@dataclass(frozen=True)
class Group:
    """What the store has of one group.

    Attributes:
        samples: stored.
        unused: of them, those that nobody learned from.
        bytes: of all.
        epoch: of the patch that the whole group gets; 0 for none.
        seq: of that patch.
        pinned: whether it stays there.
        agreed: edges' samples on which the teacher agreed, over the newest of each active edge.
        compared: samples that were compared.
    """

    samples: int = 0
    unused: int = 0
    bytes: int = 0
    epoch: int = 0
    seq: int = 0
    pinned: bool = False
    agreed: int = 0
    compared: int = 0


@dataclass(frozen=True)
class Moment:
    """Everything that a scrape is made from.

    Attributes:
        version: of the service.
        uptime_s: since it started.
        rss_bytes: of its process.
        store_bytes: of the store's files.
        groups: by name.
        figures: what has happened.
    """

    version: str
    uptime_s: float
    rss_bytes: int
    store_bytes: int
    groups: Mapping[str, Group]
    figures: Figures


VERDICTS = ("few-samples", "non-finite", "lost", "lost-labelled")
"""What the gate may say beside `passed`."""
Metric = Definition[[Moment]]


def exposition(moment: Moment) -> bytes:
    """Everything in `METRICS` in Prometheus' text format, version 0.0.4."""
    return render(METRICS, moment)


def table() -> str:
    """The metrics as a Markdown table, for docs/metrics.md."""
    return described(METRICS)


# --- how metrics are read -----------------------------------------------------------------------------


def _one(value: float) -> Samples:
    return [((), value)]


def _by_group(figure: Callable[[Group], float]) -> Callable[[Moment], Samples]:
    return lambda moment: [((name,), figure(group)) for name, group in moment.groups.items()]


def _known(moment: Moment, values: Mapping[str, float]) -> Samples:
    """A value for each group; 0 from the start, so that rates see the first."""
    return [((name,), value) for name, value in ({**dict.fromkeys(moment.groups, 0), **values}).items()]


def _labelled(moment: Moment, values: Mapping[tuple[str, str], float], expected: tuple[str, ...]) -> Samples:
    """A value for each group and label; the expected ones are 0 from the start."""
    zero = {(name, label): 0.0 for name in moment.groups for label in expected}
    return list({**zero, **values}.items())


def _agreement(moment: Moment) -> Samples:
    """Of the groups of which something was compared."""
    compared = ((name, group) for name, group in moment.groups.items() if group.compared)
    return [((name,), group.agreed / group.compared) for name, group in compared]


def _stages(moment: Moment) -> Samples:
    stages = moment.figures.rollouts
    return [
        ((name, stage.value), float(stages.get(name) == stage.value))
        for name in moment.groups
        for stage in Stage
    ]


METRICS: tuple[Metric, ...] = (
    Metric(
        "tta_cloud_build_info",
        "gauge",
        ("version",),
        "Always 1; the label says which version runs.",
        lambda moment: [((moment.version,), 1)],
    ),
    Metric(
        "tta_cloud_uptime_seconds",
        "gauge",
        (),
        "Time since the service started.",
        lambda moment: _one(moment.uptime_s),
    ),
    Metric(
        "tta_cloud_resident_memory_bytes",
        "gauge",
        (),
        "Resident memory of the service.",
        lambda moment: _one(moment.rss_bytes),
    ),
    Metric(
        "tta_cloud_edges_online",
        "gauge",
        ("group",),
        "Edges that are connected.",
        lambda moment: _known(moment, moment.figures.online),
    ),
    Metric(
        "tta_cloud_samples_total",
        "counter",
        ("group", "outcome"),
        "Samples that came: `stored`; `duplicate` and `quota`; or why intake or the store has refused them.",
        lambda moment: _labelled(moment, moment.figures.samples, ("stored", "duplicate", "quota")),
    ),
    Metric(
        "tta_cloud_sample_bytes_total",
        "counter",
        ("group",),
        "Bytes of the samples that were stored.",
        lambda moment: _known(moment, moment.figures.sample_bytes),
    ),
    Metric(
        "tta_cloud_store_samples",
        "gauge",
        ("group",),
        "Samples in the store.",
        _by_group(lambda group: group.samples),
    ),
    Metric(
        "tta_cloud_store_waiting_samples",
        "gauge",
        ("group",),
        "Of them, those that nobody has learned from yet.",
        _by_group(lambda group: group.unused),
    ),
    Metric(
        "tta_cloud_store_sample_bytes",
        "gauge",
        ("group",),
        "Bytes of the samples in the store.",
        _by_group(lambda group: group.bytes),
    ),
    Metric(
        "tta_cloud_store_bytes",
        "gauge",
        (),
        "Size of the store's files.",
        lambda moment: _one(moment.store_bytes),
    ),
    Metric(
        "tta_cloud_store_commit_seconds",
        "histogram",
        (),
        "Time of a commit of the store, its fsync included.",
        lambda moment: [((), moment.figures.commit_s)],
    ),
    Metric(
        "tta_cloud_rounds_total",
        "counter",
        ("group", "result"),
        "Rounds of learning, `learned`, or `refused` where something was not finite or could not be computed.",
        lambda moment: _labelled(moment, moment.figures.rounds, ("learned", "refused")),
    ),
    Metric(
        "tta_cloud_round_seconds",
        "histogram",
        ("group",),
        "Time of a round: the teacher's step and the student's.",
        lambda moment: [((name,), times) for name, times in moment.figures.round_s.items()],
    ),
    Metric(
        "tta_cloud_gate_verdicts_total",
        "counter",
        ("group", "verdict"),
        "What the gate said of a candidate: `passed`, `few-samples` (it has no say), or why it is not published.",
        lambda moment: _labelled(moment, moment.figures.verdicts, ("passed", *VERDICTS)),
    ),
    Metric(
        "tta_cloud_patches_total",
        "counter",
        ("group", "state"),
        "Patches that came into a state of the ledger: `canary`, `published`, `stopped`, `pinned`.",
        lambda moment: _labelled(
            moment, moment.figures.patches, ("canary", "published", "stopped", "pinned")
        ),
    ),
    Metric(
        "tta_cloud_patch_seq",
        "gauge",
        ("group",),
        "Number of the patch that the whole group gets; 0 before the first.",
        _by_group(lambda group: group.seq),
    ),
    Metric(
        "tta_cloud_patch_pinned",
        "gauge",
        ("group",),
        "1 while nothing newer is published, by an operator's word.",
        _by_group(lambda group: float(group.pinned)),
    ),
    Metric(
        "tta_cloud_rollout_stage",
        "gauge",
        ("group", "stage"),
        "1 for the stage of the newest patch's rollout: `canary`, `group` or `stopped`.",
        _stages,
    ),
    Metric(
        "tta_cloud_agreement_ratio",
        "gauge",
        ("group",),
        "Share of the edges' last samples on which the base that answered and the teacher name the same class.",
        _agreement,
    ),
    Metric(
        "tta_cloud_heads_sent_total",
        "counter",
        (),
        "Signed heads that were sent.",
        lambda moment: _one(moment.figures.heads),
    ),
    Metric(
        "tta_cloud_patches_sent_total",
        "counter",
        (),
        "Patches that edges have fetched.",
        lambda moment: _one(moment.figures.sent),
    ),
    Metric(
        "tta_cloud_messages_refused_total",
        "counter",
        ("code",),
        "Messages of edges that got an error, by its code.",
        lambda moment: [((code,), count) for code, count in moment.figures.refused.items()],
    ),
    Metric(
        "tta_cloud_connections_refused_total",
        "counter",
        ("domain", "reason"),
        "Connections that were not let in, where edges talk (`edges`) or enrol (`door`).",
        lambda moment: list(moment.figures.connections.items()),
    ),
)
"""Every metric of a scrape, in its order."""
