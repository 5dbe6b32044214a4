"""Status and figures of a daemon as the tests want them, without a daemon."""

from __future__ import annotations

import msgspec

from tta_edge.stats import Stats
from tta_edge.wire import BundleStatus, CloudInfo, Requests, StatusReply, StreamStatus

BUNDLE = BundleStatus(
    name="default", model_id="digits", digest="ab" * 32, method="tent", provider="CPU", loads=1
)
CLOUD = CloudInfo(
    phase="online", group="yard", problem="", stale=False, head="1.7", seen=100, chosen=12, sent=10, refused=1,
    dropped=2, waiting=3, patches_refused=4, head_age_s=1.5,
)  # fmt: skip


def stream(name="camera-1", **changes):
    figures = StreamStatus(
        id=name,
        bundle="default",
        method="tent",
        steps=3,
        theta_digest="cd" * 32,
        distance=0.1,
        state="adapting",
        restored="source",
        samples=48,
    )
    return msgspec.structs.replace(figures, **changes)


def status(**changes):
    reply = StatusReply(
        id=0,
        version="1.2.3",
        uptime_s=5.5,
        adapt=True,
        policy="inline",
        bundles=[BUNDLE],
        streams=[],
        stored_streams=0,
        requests=Requests(ok=0, failed=0),
        latency_ms={},
        rss_bytes=1 << 20,
    )
    return msgspec.structs.replace(reply, **changes)


def busy_stats():
    """A bit of everything."""
    stats = Stats()
    stats.answered("predict")
    stats.predicted("default", 16, queue_s=0.002, compute_s=0.004, total_s=0.006)
    stats.ran("default")
    stats.stepped("default", "committed", 0.02)
    stats.refused("busy")
    for action, reason in (("reset", "ball"), ("rollback", "requested"), ("refuse", "ball"), ("skip", "x")):
        stats.happened(action, reason)
    stats.dropped(7)
    stats.read("default", "absorbed", 16)
    stats.generated("default", compute_s=0.001, first_s=0.01)
    return stats
