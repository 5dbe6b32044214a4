"""What a daemon has written survives kill -9, power cuts and failing disks: exactly what was committed is served."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import shutil
import signal
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import tiny_bundle
from disks import (
    Call,
    Crashing,
    Failing,
    History,
    PowerLoss,
    Recording,
    Unsynced,
    every_call_is_watched,
    plant,
)  # fmt: skip
from running import PATIENCE_S, daemon, running
from snapshots import files
from tta_edge.adapt import Guards, Stream
from tta_edge.client import Client
from tta_edge.errors import (
    AddressInUse,
    ConnectionLost,
    StateDirUnusable,
    TooManyStreams,
    UnknownStream,
    Unreachable,
)
from tta_edge.store import StateStore
from tta_runtime import Bundle, Engines, Model, theta
from tta_runtime.slots import SLOTS

X, _ = tiny_bundle.samples(16, seed=3, shift=1.0)
RESTART_S = 2.0
"""Until a daemon that was killed serves again."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    tiny_bundle.build(path)
    return path


@pytest.fixture(scope="module")
def engines(bundle):
    return Engines.load(bundle)


@pytest.fixture
def quick_path(tmp_path):
    """A directory in memory where there is one: what survives a kill, or a simulated cut, need not reach a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as path:
        yield Path(path)


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
def test_killed_at_each_fail_point(bundle, quick_path, layout, name):
    """Before and after each call to the disk, and with half of it written; the next daemon goes on from there."""
    more, before, act, calls = SCENARIOS[name]
    arm = quick_path / "arm"
    history = History()
    points = [
        (at, when)
        for at, call in enumerate(calls, 1)
        for when in ("before", "half", "after")
        if when != "half" or call == "write"
    ]
    with Crashing(settings(bundle, quick_path, **more), arm) as crashing:
        for at, when in [*points, (0, "not at all")]:
            with Client(crashing.start(at, when)) as client:
                adapting = client.status().adapt
                found = served(client, {stream for _, stream in history.slots})
                assert agrees(found, adapting, history, layout), (at, when, found, history.slots)
                if at == 0:
                    break
                before(client)
                arm.touch()
                # The saver's thread is killed at a moment of its own: the client may be between two calls then.
                with pytest.raises((ConnectionLost, Unreachable)):
                    act(client)
            assert crashing.ended() == -signal.SIGKILL
            assert crashing.calls() == calls[:at]
            arm.unlink()
            history.follow(crashing.said)
    assert not list((quick_path / "state").rglob("*.tmp"))


# --- killed at any moment ---------------------------------------------------------------------------


class Traffic(threading.Thread):
    """One client that does everything in a random order until the daemon is gone.

    Attributes:
        last: stream -> what was asked for last, and the digest that was confirmed; None while it is open.
        seen: digests that were confirmed.
        switch: what was confirmed; None while it is open.
        broke: what ended it, where that was not the loss of the connection.
    """

    def __init__(self, client, rng, give_up):
        super().__init__(daemon=True)
        self.last = {}
        self.seen = set()
        self.switch = True
        self.broke = None
        self._client = client
        self._rng = rng
        self._give_up = give_up

    def run(self):
        try:
            self.switch = self._client.adapt(True).on
            while True:
                self._once()
        except (ConnectionLost, Unreachable):
            pass
        except BaseException as error:  # noqa: BLE001 - raised in the test's own thread
            self.broke = error
        finally:
            self._give_up()  # whoever waits for the daemon's next call to the disk must not wait for ever

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


def kill_at_random(bundle, tmp_path, layout, rounds, seed, *, fresh):
    """Kill a daemon with four busy streams, two of them in memory, at random moments.

    Returns:
        Of each restart, the seconds until the first answer: of a new process, and without its imports.
    """
    rng = random.Random(seed)
    config = settings(bundle, tmp_path, max_streams=2, checkpoint_steps=1)
    arm = tmp_path / "arm"
    arm.touch()
    history, traffic, restarts, seen = History(), None, [], {layout.digest}
    starter = None if fresh else Crashing(config, arm)
    for number in range(rounds + 1):
        began_s = time.perf_counter()
        with (
            Crashing(config, arm) if starter is None else contextlib.nullcontext(starter) as crashing,
            Client(crashing.start()) as client,
        ):
            status = client.status()
            names = sorted({stream for _, stream in history.slots})
            client.predict(X, stream=names[0] if names else "s0", adapt=False)
            now_s = time.perf_counter()
            restarts.append((now_s - began_s, now_s - crashing.forked_s))
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
            traffic = Traffic(client, random.Random(rng.random()), crashing.kill)
            traffic.start()
            for _ in range(rng.randrange(1, 120)):
                if "exit" in crashing.wait_for("call", "exit"):
                    break
            else:
                crashing.kill()
                assert crashing.ended() == -signal.SIGKILL
            traffic.join(PATIENCE_S)
            assert traffic.broke is None
            assert "exit" in crashing.said[-1]
        history.follow(crashing.said)
    if starter is not None:
        starter.close()
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
    for what, seconds in zip(
        ("of a new process", "without its imports"), zip(*restarts, strict=True), strict=True
    ):
        print(
            f"{len(restarts)} kills, until the first answer {what}: median {statistics.median(seconds):.2f} s, "
            f"max {max(seconds):.2f} s"
        )


def check_random_kills(bundle, tmp_path, layout, rounds, seed, *, fresh=True):
    restarts = kill_at_random(bundle, tmp_path, layout, rounds, seed, fresh=fresh)
    report(restarts)
    # Importing numpy and onnxruntime says more about who else uses the machine than about us.
    assert statistics.median(seconds for _, seconds in restarts) < RESTART_S


def test_killed_at_random_moments(bundle, tmp_path, layout):
    check_random_kills(bundle, tmp_path, layout, rounds=10, seed=1)


@pytest.mark.slow
def test_killed_at_fifty_random_moments(bundle, tmp_path, layout):
    check_random_kills(bundle, tmp_path, layout, rounds=50, seed=2)


@pytest.mark.slow
def test_killed_at_two_hundred_random_moments(bundle, quick_path, layout):
    """Each daemon a fork of one process that has the imports behind it."""
    check_random_kills(bundle, quick_path, layout, rounds=200, seed=3, fresh=False)


# --- power cuts ---------------------------------------------------------------------------------------


class Journal:
    """A workload on a recorded state directory, with what may be found after a cut at each call.

    Attributes:
        disk: the recording.
        allowed: for each recorded call, what may be found of each stream and of the switch.
    """

    def __init__(self, engines, root):
        self.disk = Recording()
        self.root = root
        self.engines = engines
        self.store = StateStore(root, lambda _: None, disk=self.disk)
        self.allowed = []
        self._now = {"switch": {True}}
        self._fill()

    def stream(self, name):
        return new_stream(self.engines, name)

    def doing(self, what, then, act):
        """Carry out what leads from what is committed to `then`; in between both may be found."""
        was = self._now.get(what, {self.engines.bundle.manifest.theta.digest})
        self._now[what] = was | {then}
        act()
        self._fill()
        self._now[what] = {then}
        self.disk.calls.append(Call("mark", ""))
        self._fill()

    def save(self, stream, *, alone=False):
        checkpoint = stream.model.checkpoint
        self.doing(
            stream.name, stream.model.digest, lambda: self.store.save(stream, checkpoint, "", alone=alone)
        )

    def spoil(self, path, data):
        path.write_bytes(data)
        self.disk.calls.append(Call("spoil", str(path), data))

    def _fill(self):
        missing = len(self.disk.calls) - len(self.allowed)
        self.allowed += [{what: set(found) for what, found in self._now.items()}] * missing


def new_stream(engines, name, method="tent", **arguments):
    return Stream(name, Model(engines, method), Guards(max_distance=1e9, reset_every_steps=0), **arguments)


def work(journal):
    """Everything that is ever done to a state directory."""
    one, two = journal.stream("one"), journal.stream("two")
    source = one.model.manifest.theta.digest
    for _ in range(3):
        one.answer(X)
        journal.save(one)
    two.answer(X)
    journal.save(two)
    one.answer(X)
    journal.save(one, alone=True)  # a rollback
    one.answer(X)
    journal.save(one)
    journal.doing("switch", False, lambda: journal.store.save_switch(False))
    journal.doing("two", source, lambda: journal.store.clear(two))  # a reset
    two.answer(X)
    journal.save(two)
    journal.doing("switch", True, lambda: journal.store.save_switch(True))
    # A bit of the newer slot flips: the older one counts, the newer one goes to the quarantine, and it goes on.
    slots = {name: journal.root / "streams/default/one" / name for name in SLOTS}
    saved = {name: one.model.decode(path.read_bytes()) for name, path in slots.items()}
    newer, older = sorted(saved, key=lambda name: -saved[name][1])
    digest = theta.digest(one.model.manifest.theta, saved[older][0].theta)
    damaged = bytearray(slots[newer].read_bytes())
    damaged[-1] ^= 1
    journal.doing("one", digest, lambda: journal.spoil(slots[newer], bytes(damaged)))
    journal.store.discard(one)
    journal.doing("one", digest, lambda: journal.store.load(one))
    for _ in range(2):
        one.answer(X)
        journal.save(one)
    journal.doing("one", source, lambda: journal.store.clear(one))


def opened(engines, root, names):
    """What a daemon would serve from a state directory: of each stream, and of the switch."""
    told = []
    store = StateStore(root, told.append, disk=Unsynced())
    try:
        found = {"switch": store.switch()}
        for name in names:
            stream = new_stream(engines, name)
            restored = store.load(stream).restored
            if restored is not None:
                stream.resume(restored.checkpoint, restored.notes, before=None, restored=restored.slot)
            found[name] = stream.model.digest
        return found, told
    finally:
        store.close()


def cut_everywhere(engines, base):
    """Cut the power after every call of the workload; how many different trees that gave."""
    base.mkdir()
    root = base / "disk"
    root.mkdir()
    journal = Journal(engines, root / "state")
    work(journal)
    cut = PowerLoss(root)
    trees = 0
    seen = set()
    for call, allowed in zip(journal.disk.calls, journal.allowed, strict=True):
        cut.apply(call)
        for tree in cut.trees():
            key = (repr(sorted(tree.items(), key=lambda item: item[0])), repr(sorted(allowed.items())))
            if key in seen:
                continue
            seen.add(key)
            trees += 1
            place = base / "after"
            plant(tree, place)
            for _ in range(2):  # and the second start finds the same as the first one left
                found, _ = opened(engines, place / "state", ("one", "two"))
                for what, value in found.items():
                    source = engines.bundle.manifest.theta.digest
                    expected = allowed.get(what, {source})
                    assert value in expected
            shutil.rmtree(place)
    print(f"{len(journal.disk.calls)} calls, {trees} trees")
    return trees


def test_a_power_cut_at_any_call_leaves_what_was_committed(engines, quick_path):
    """With everything that was not synced there, in part, or not, in all combinations."""
    assert cut_everywhere(engines, quick_path / "base") > 100


@pytest.mark.parametrize("left_out", ["sync", "sync_directory"])
def test_the_power_cut_notices_a_missing_sync(engines, quick_path, monkeypatch, left_out):
    """The companion: without one of the two kinds of fsync something that was committed is lost."""
    monkeypatch.setattr(Recording, left_out, getattr(Unsynced, left_out))
    with pytest.raises(AssertionError, match=r"assert '[0-9a-f]{64}' in"):
        cut_everywhere(engines, quick_path / "base")


# --- the n-th call fails ------------------------------------------------------------------------------


def busy(client):
    """Two streams, of which one is in memory; gives every digest that was answered."""
    digests = []
    for stream in ("s0", "s1", "s0", "s0", "s1", "s1", "s0", "s0"):
        digests.append(insisting(lambda name=stream: client.predict(X, stream=name)).theta_digest)
    insisting(lambda: client.rollback("s0"))
    insisting(lambda: client.adapt(False))
    insisting(lambda: client.adapt(True))
    insisting(lambda: client.reset("s1"))
    digests += [insisting(lambda: client.predict(X, stream="s1")).theta_digest for _ in range(3)]
    return digests


def insisting(ask):
    """Ask again where a stream could not go to disk: nothing may be lost by that."""
    try:
        return ask()
    except TooManyStreams:
        return ask()


def check_nth(bundle, engines, root, nth, number, reference):
    """Whether the n-th call failed. Answers, adaptation, events, the next start: all as without the failure."""
    disk, refused = Failing(nth, number), None
    config = {"state_dir": str(root), "max_streams": 1, "checkpoint_steps": 2, "max_distance": 1e6}
    try:
        with running(bundle, disk=disk, **config) as server, Client(server.endpoint) as client:
            digests = busy(client)
            streams = client.status().streams
            failed_before = disk.failures
            events = client.events(1000).events
            while (
                client.status().disk_error
            ):  # it heals: what failed is written with the next job, or by itself
                client.adapt(True, streams[-1].id)
            last = {s.id: s.theta_digest for s in client.status().streams}
    except StateDirUnusable as error:
        refused = error
        digests, last, failed_before, events = reference, {}, 0, []
    if refused is not None:
        assert os.strerror(number) in refused.cause
        assert disk.failures == 1
    assert digests == reference
    assert sum(event.action == "disk" and event.reason == "disk-error" for event in events) <= failed_before
    found, told = opened(engines, root, last or {"s0"})
    assert found.pop("switch") is True
    assert told == [], "nothing is damaged"
    assert found == (last or {"s0": engines.bundle.manifest.theta.digest})
    return disk.failures > 0


def undisturbed(bundle, root):
    config = {"state_dir": str(root), "max_streams": 1, "checkpoint_steps": 2, "max_distance": 1e6}
    with running(bundle, **config) as server, Client(server.endpoint) as client:
        return busy(client)


@pytest.mark.parametrize("number", [errno.EIO, pytest.param(errno.ENOSPC, marks=pytest.mark.slow)])
def test_whichever_call_fails_nothing_is_lost(bundle, engines, quick_path, number):
    reference = undisturbed(bundle, quick_path / "reference")
    for nth in itertools.count(1):
        if not check_nth(bundle, engines, quick_path / str(nth), nth, number, reference):
            break
    print(f"{nth - 1} calls failed, one at a time")
    assert nth > 40


def test_a_disk_that_stays_broken_is_told_once_and_adaptation_goes_on_in_memory(bundle, tmp_path):
    disk = Failing(number=errno.ENOSPC)
    config = {"state_dir": str(tmp_path / "state"), "checkpoint_steps": 2, "max_distance": 1e6}
    with running(bundle, disk=disk, **config) as server, Client(server.endpoint) as client:
        before = settled_after(client, 4)
        saved = files(tmp_path / "state" / "streams")
        disk.broken = True
        assert not client.adapt(True, "default").durable
        for step in range(5, 11):
            reply = client.predict(X)
            assert (reply.adapted, reply.steps) == (True, step)
        assert not client.adapt(True, "default").durable
        assert not client.adapt(False).durable
        client.adapt(True)
        status = client.status()
        assert "No space left on device" in status.disk_error
        assert [e.reason for e in client.events().events if e.action == "disk"] == ["disk-error"]
        assert files(tmp_path / "state" / "streams") == saved, "the last commit is as it was"
        assert reply.theta_digest != before
        disk.broken = False
        assert client.adapt(True, "default").durable
        assert client.adapt(True).durable
        assert client.status().disk_error == ""
        assert [e.reason for e in client.events().events if e.action == "disk"] == ["disk-error", "disk-ok"]
        last = client.predict(X).theta_digest
    with running(bundle, **config) as server, Client(server.endpoint) as client:
        assert client.status().streams[0].theta_digest == last


def settled_after(client, steps):
    forward(client, steps=steps)
    return settled(client)


def test_a_stream_that_cannot_go_to_disk_stays_and_adapts_on(bundle, tmp_path):
    disk = Failing(number=errno.ENOSPC)
    config = {"state_dir": str(tmp_path / "state"), "max_streams": 1, "max_distance": 1e6}
    with running(bundle, disk=disk, **config) as server, Client(server.endpoint) as client:
        last = forward(client, "s0", steps=3).theta_digest
        disk.broken = True
        with pytest.raises(TooManyStreams, match="No space left on device"):
            client.predict(X, stream="s1")
        (stream,) = client.status().streams
        assert (stream.id, stream.theta_digest) == ("s0", last)
        assert forward(client, "s0").steps == 4
        disk.broken = False
        assert forward(client, "s1").steps == 1
        assert forward(client, "s0").steps == 5


# --- told and killed ------------------------------------------------------------------------------------


def reset(client):
    return client.reset().theta_digest


def roll_back(client):
    reply = client.rollback()
    assert reply.to == "checkpoint"
    return reply.theta_digest


def switch(client):
    assert client.adapt(False).durable


def switch_one(client):
    assert client.adapt(False, "default").durable


@pytest.mark.parametrize("act", [reset, roll_back, switch, switch_one])
def test_what_was_confirmed_survives_a_kill_right_after_the_reply(bundle, tmp_path, act):
    with Crashing(settings(bundle, tmp_path), tmp_path / "arm") as crashing:
        with Client(crashing.start()) as client:
            prepare(client)
            expected = act(client)
            crashing.signal(signal.SIGKILL)
            assert crashing.ended() == -signal.SIGKILL
        with Client(crashing.start()) as client:
            status = client.status()
            (stream,) = status.streams
            assert expected in (None, stream.theta_digest)
            assert status.adapt == (act is not switch)
            assert (stream.state == "off") == (act in (switch, switch_one))
            assert client.predict(X).adapted == (act in (reset, roll_back))
            if act is roll_back:
                assert stream.last_event == "rollback: requested"
                assert stream.events == {"requested": 2}


# --- SIGTERM -------------------------------------------------------------------------------------------


def digests(client):
    return {stream.id: stream.theta_digest for stream in client.status().streams}


def test_sigterm_commits_every_stream(bundle, tmp_path):
    """The real command; no checkpoint was due yet."""
    arguments = (bundle, "--state-dir", tmp_path / "state", "--max-distance", "1000", "--threads", "1")
    with daemon(*arguments) as first, Client(first.endpoint) as client:
        for number, name in enumerate(("one", "two", "three"), 1):
            forward(client, name, steps=number)
        before = digests(client)
        assert first.stop() == 0
    with daemon(*arguments) as second, Client(second.endpoint) as client:
        after = digests(client)
        assert {name: after[name] for name in ("one", "two", "three")} == {
            name: before[name] for name in ("one", "two", "three")
        }
        assert {s.id: s.restored in SLOTS for s in client.status().streams if s.id in before}["one"]
        assert second.stop() == 0


@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm_while_steps_run_in_the_background(bundle, tmp_path, layout, signals):
    """However often it is sent: what is restored is what was committed last, and not older than what was seen."""
    config = settings(bundle, tmp_path, policy="always", step_batch=16, window=1024, threads=2)
    history = History()
    with Crashing(config, tmp_path / "arm") as crashing:
        for _ in range(2):
            with Client(crashing.start()) as client:
                seen = max(client.predict(X).steps for _ in range(20))
                for _ in range(signals):
                    crashing.signal(signal.SIGTERM)
            assert crashing.ended() == 0
            history.follow(crashing.said)
            with Client(crashing.start()) as client:
                assert agrees(served(client, ()), True, history, layout)
                assert history.newest(("default", "default")).steps >= seen
                crashing.signal(signal.SIGTERM)
            assert crashing.ended() == 0
            history.follow(crashing.said)


def test_sigterm_at_any_moment_of_the_start(bundle, tmp_path):
    with Crashing(settings(bundle, tmp_path), tmp_path / "arm") as crashing:
        with Client(crashing.start()) as client:
            prepare(client)
            expected = digests(client)
            crashing.signal(signal.SIGTERM)
        assert crashing.ended() == 0
        calls = sum("call" in line for line in crashing.said)
        for moment in range(0, min(calls, 12)):
            crashing.launch()
            for _ in range(moment):
                if "call" not in crashing.wait_for("call", "ready"):
                    break
            crashing.signal(signal.SIGTERM)
            assert crashing.ended() in (0, -signal.SIGTERM)
        with Client(crashing.start()) as client:
            assert digests(client) == expected


def test_a_start_that_fails_leaves_the_states_as_they_are(bundle, tmp_path):
    config = {"state_dir": str(tmp_path / "state"), "max_distance": 1e6}
    with running(bundle, **config) as server, Client(server.endpoint) as client:
        expected = forward(client, steps=3).theta_digest
    with (
        running(bundle) as other,
        pytest.raises(AddressInUse),
        running(bundle, bind=other.endpoint, **config),
    ):
        pass
    with running(bundle, **config) as server, Client(server.endpoint) as client:
        assert digests(client) == {"default": expected}
