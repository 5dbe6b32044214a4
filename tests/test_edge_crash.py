"""What a daemon has written survives kill -9, power cuts and failing disks: exactly what was committed is served."""

from __future__ import annotations

import random
import signal
import statistics
import threading
import time

import numpy as np
import pytest

import tiny_bundle
from disks import Crashing, History, every_call_is_watched
from running import PATIENCE_S
from tta_edge.client import Client
from tta_edge.errors import ConnectionLost, DeadlineExceeded, UnknownStream, Unreachable
from tta_runtime import Bundle, theta

X, _ = tiny_bundle.samples(16, seed=3, shift=1.0)
RESTART_S = 2.0
"""Until a daemon that was killed serves again."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    tiny_bundle.build(path)
    return path


@pytest.fixture(scope="module")
def layout(bundle):
    return Bundle.open(bundle).manifest.theta


def test_the_disks_know_every_call():
    assert every_call_is_watched()


def settings(bundle, tmp_path, **more):
    return {
        "bundle": str(bundle),
        "state_dir": str(tmp_path / "state"),
        "checkpoint_steps": 2,
        "max_distance": 1e6,
        "log_level": "error",
        **more,
    }


def served(client, names):
    """What the daemon serves: stream -> (steps, digest, where it was restored from or None)."""
    found = {s.id: (s.steps, s.theta_digest, s.restored) for s in client.status().streams}
    for name in names:
        if name not in found:
            reply = client.predict(X, stream=name, adapt=False)
            found[name] = (reply.steps, reply.theta_digest, None)
    return found


def agrees(found, adapting, history, layout):
    """Whether what is served is exactly what the history says was committed last."""
    for name, (steps, digest, restored) in found.items():
        slot = history.newest(("default", name))
        if slot is None:
            expected = (0, layout.digest, "source")
        else:
            vector = np.frombuffer(slot.theta, np.float32)
            expected = (slot.steps, theta.digest(layout, vector), slot.name)
        if (steps, digest) != expected[:2] or restored not in (None, expected[2]):
            return False
    return adapting == history.switch


# --- killed at every fail point ---------------------------------------------------------------------


def forward(client, stream="default", steps=1):
    for _ in range(steps):
        reply = client.predict(X, stream=stream)
    return reply


def settled(client, stream="default"):
    """A call that is confirmed when the stream is on the disk; gives its digest."""
    assert client.adapt(True, stream).durable
    return next(s.theta_digest for s in client.status().streams if s.id == stream)


def prepare(client):
    client.adapt(True)
    forward(client)
    client.reset()
    forward(client, steps=5)
    settled(client)


def save(client):
    forward(client)  # the sixth step
    settled(client)  # not reached


def forget_new(client):
    forward(client, "new")
    client.reset("new")  # also takes its directory away


def first_save(client):
    forward(client, "new", steps=2)
    settled(client, "new")  # not reached


WRITE = ["create", "write", "sync", "replace", "sync_directory"]
SCENARIOS = {
    "checkpoint": ({}, prepare, save, WRITE),
    "first checkpoint": ({}, forget_new, first_save, ["make_directory", "sync_directory"] * 3 + WRITE),
    "eviction": ({"max_streams": 1}, prepare, lambda client: forward(client, "other"), WRITE),
    "reset": (
        {},
        prepare,
        lambda client: client.reset(),
        ["remove", "sync_directory"] * 2 + ["remove_directory"],
    ),
    "rollback": ({}, prepare, lambda client: client.rollback(), [*WRITE, "remove", "sync_directory"]),
    "switch": ({}, prepare, lambda client: client.adapt(False), WRITE),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_each_fail_point(bundle, tmp_path, layout, name):
    """Before and after each call to the disk, and with half of it written; the next daemon goes on from there."""
    more, before, act, calls = SCENARIOS[name]
    arm = tmp_path / "arm"
    history = History()
    points = [
        (at, when)
        for at, call in enumerate(calls, 1)
        for when in ("before", "half", "after")
        if when != "half" or call == "write"
    ]
    with Crashing(settings(bundle, tmp_path, **more), arm) as crashing:
        for at, when in [*points, (0, "not at all")]:
            with Client(crashing.start(at, when)) as client:
                adapting = client.status().adapt
                found = served(client, {stream for _, stream in history.slots})
                assert agrees(found, adapting, history, layout), (at, when, found, history.slots)
                if at == 0:
                    break
                before(client)
                arm.touch()
                with pytest.raises(ConnectionLost):
                    act(client)
            assert crashing.ended() == -signal.SIGKILL
            assert crashing.calls() == calls[:at]
            arm.unlink()
            history.follow(crashing.said)
    assert not list((tmp_path / "state").rglob("*.tmp"))


# --- killed at any moment ---------------------------------------------------------------------------


class Traffic(threading.Thread):
    """One client that does everything in a random order until the daemon is gone.

    Attributes:
        last: stream -> what was asked for last, and the digest that was confirmed; None while it is open.
        seen: digests that were confirmed.
        switch: what was confirmed; None while it is open.
        broke: what ended it, where that was not the daemon's end.
    """

    def __init__(self, client, rng):
        super().__init__(daemon=True)
        self.last = {}
        self.seen = set()
        self.switch = True
        self.broke = None
        self._client = client
        self._rng = rng

    def run(self):
        try:
            self.switch = self._client.adapt(True).on
            while True:
                self._once()
        except (ConnectionLost, Unreachable, DeadlineExceeded):
            return
        except BaseException as error:  # noqa: BLE001 - raised in the test's own thread
            self.broke = error

    def _once(self):
        stream = self._rng.choice(STREAMS)
        what = self._rng.choices(("predict", "reset", "rollback", "switch"), (88, 4, 5, 3))[0]
        if what == "switch":
            for on in (False, True):
                self.switch = None
                self.switch = self._client.adapt(on).on
            return
        self.last[stream] = (what, None)
        try:
            reply = getattr(self._client, what)(*[X] * (what == "predict"), stream=stream)
        except UnknownStream:
            del self.last[stream]
            return
        self.last[stream] = (what, reply.theta_digest)
        self.seen.add(reply.theta_digest)


STREAMS = ("s0", "s1", "s2", "s3")


def kill_at_random(bundle, tmp_path, layout, rounds, seed):
    """Kill a daemon with four busy streams, two of them in memory, at random moments; seconds of each restart."""
    rng = random.Random(seed)
    config = settings(bundle, tmp_path, max_streams=2, checkpoint_steps=1)
    arm = tmp_path / "arm"
    arm.touch()
    history, traffic, restarts, seen = History(), None, [], {layout.digest}
    for number in range(rounds + 1):
        began_s = time.perf_counter()
        with Crashing(config, arm) as crashing, Client(crashing.start()) as client:
            status = client.status()
            names = sorted({stream for _, stream in history.slots})
            client.predict(X, stream=names[0] if names else "s0", adapt=False)
            restarts.append(time.perf_counter() - began_s)
            found = {s.id: (s.steps, s.theta_digest, s.restored) for s in status.streams}
            found = served(client, set(names) - found.keys()) | found
            matching = [h for h in history.outcomes() if agrees(found, status.adapt, h, layout)]
            assert matching, (number, found, history.slots)
            if traffic is not None:
                seen |= traffic.seen
                confirmed(traffic, status.adapt, found, seen, layout)
            seen |= {digest for _, digest, _ in found.values()}
            history = matching[0]
            if number == rounds:
                break
            traffic = Traffic(client, random.Random(rng.random()))
            traffic.start()
            for _ in range(rng.randrange(1, 120)):
                crashing.wait_for("call")
            crashing.signal(signal.SIGKILL)
            assert crashing.ended() == -signal.SIGKILL
            traffic.join(PATIENCE_S)
            assert traffic.broke is None
        history.follow(crashing.said)
    return restarts[1:]


def confirmed(traffic, adapting, found, seen, layout):
    """What a client was told is there."""
    assert traffic.switch in (None, adapting)
    for stream, (what, digest) in traffic.last.items():
        if digest is None:
            continue
        restored = found[stream][1] if stream in found else layout.digest
        if what == "predict":
            assert restored in seen, "theta is one that no client was ever answered with"
        else:
            assert restored == digest, f"a confirmed {what} is undone"


def report(restarts):
    print(
        f"{len(restarts)} kills, restart until the first answer: median {statistics.median(restarts):.2f} s, "
        f"max {max(restarts):.2f} s"
    )


def test_killed_at_random_moments(bundle, tmp_path, layout):
    report(kill_at_random(bundle, tmp_path, layout, rounds=8, seed=1))


@pytest.mark.slow
def test_killed_at_fifty_random_moments(bundle, tmp_path, layout):
    restarts = kill_at_random(bundle, tmp_path, layout, rounds=50, seed=2)
    report(restarts)
    assert statistics.median(restarts) < RESTART_S
