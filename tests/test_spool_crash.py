"""What the spool has reported durable survives kill -9, power cuts and every failing call to the disk."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from disks import Call, Failing, PowerLoss, Recording, Unsynced, plant
from running import process_environment
from tta_edge.errors import SpoolUnwritable
from tta_edge.spool import Spool
from tta_edge.spool_directory import batches, discard
from tta_edge.spool_file import Sample


@pytest.fixture
def quick_path(tmp_path):
    """A directory in memory where there is one: what survives a kill, or a simulated cut, need not reach a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as path:
        yield Path(path)


def sample(number, side=3):
    """The content tells the number, so that half a sample, or another's, would be seen."""
    x = np.random.default_rng(number).random((side, side)).astype(np.float32)
    return Sample.of(x, stream=f"cam{number % 3}", taken_ms=number, seq=0, entropy=1.0)


def whole(waiting):
    return waiting.sample.data == sample(waiting.sample.taken_ms).data


# --- kill -9 ----------------------------------------------------------------------------------------

CHILD = """
import json, os, random, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from test_spool_crash import sample
from tta_edge.spool import Spool
from disks import Unsynced

def say(**line):
    os.write(1, json.dumps(line).encode() + b"\\n")

rng, number = random.Random(int(sys.argv[2])), int(sys.argv[3])
spool = Spool(Path(sys.argv[1]), max_samples=60, disk=Unsynced())
say(ready=True, dropped=spool.counters.dropped)
while True:
    if rng.random() < 0.6:
        count = rng.randrange(1, 12)
        say(adding=list(range(number, number + count)))
        keys = spool.append_many([sample(number + i) for i in range(count)])
        number += count
        say(added=keys, dropped=spool.counters.dropped)
    else:
        keys = [each.key for each in spool.peek(rng.randrange(1, 12), skip=())][:: rng.randrange(1, 3)]
        say(removing=keys)
        say(removed=keys, count=spool.remove(keys))
"""


class Ledger:
    """What one after the other child has reported: keys in their order, and what may be of them.

    Attributes:
        order: every key that was reported durable.
        gone: keys whose removal was reported.
        open: keys, or numbers, of the operation that was under way.
        dropped: the counter as last reported.
    """

    def __init__(self):
        self.order, self.gone = [], set()
        self.open, self.dropped, self.next = {}, 0, 0

    def follow(self, lines):
        for line in lines:
            if "adding" in line or "removing" in line:
                self.open = line
                self.next = max([self.next, *(n + 1 for n in line.get("adding", ()))])
            elif "added" in line:
                self.order += line["added"]
                self.open = {}
            elif "removed" in line:
                self.gone |= set(line["removed"])
                self.open = {}
            self.dropped = line.get("dropped", self.dropped)

    def check(self, spool):
        """Exactly what must be there is there; then it is taken as the truth."""
        found = spool.peek(10**6)
        assert all(whole(each) for each in found)
        keys = [each.key for each in found]
        assert len(set(keys)) == len(keys)
        assert [each.number for each in found] == sorted(each.number for each in found)
        assert not self.gone & set(keys), "a removal that was reported is undone"
        place = {key: at for at, key in enumerate(self.order)}
        known = [key for key in keys if key in place]
        new = [each for each in found if each.key not in place]
        assert {each.sample.taken_ms for each in new} <= set(self.open.get("adding", ()))
        present = set(keys)
        missing = {key for key in self.order if key not in self.gone | present}
        unsure = missing & set(self.open.get("removing", ()))
        dropped = spool.counters.dropped
        # Each one that is missing was counted as dropped, or was being removed; nothing was counted twice.
        assert len(missing) - len(unsure) <= dropped <= len(missing) + len(self.open.get("removing", ()))
        if not self.open:
            assert dropped == self.dropped == len(missing)
        at_most = max((place[key] for key in missing - unsure), default=-1)
        assert all(place[key] > at_most for key in known), "the oldest are dropped first"
        assert spool.counters.damaged == 0
        self.gone |= unsure
        self.order += [each.key for each in new]
        self.open, self.dropped = {}, dropped
        return keys


def kill_at_random(path, rounds, seed):
    rng, ledger, kills = random.Random(seed), Ledger(), 0
    environment = process_environment(OPENBLAS_NUM_THREADS="1")
    environment["PYTHONPATH"] += os.pathsep + str(Path(__file__).parent)
    for _ in range(rounds):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(path / "spool"), str(rng.randrange(10**6)), str(ledger.next),
             str(Path(__file__).parent)],
            stdout=subprocess.PIPE, env=environment,
        )  # fmt: skip
        assert child.stdout is not None
        lines = []
        for _ in range(rng.randrange(2, 150)):
            lines.append(json.loads(child.stdout.readline()))
        child.send_signal(signal.SIGKILL)
        lines += [json.loads(line) for line in child.stdout.read().splitlines()]
        assert child.wait() == -signal.SIGKILL
        kills += 1
        child.stdout.close()
        ledger.follow(lines)
        ledger.check(Spool(path / "spool", max_samples=60, disk=Unsynced()))
    assert not [each for each in (path / "spool").iterdir() if each.name.endswith(".tmp")]
    return kills, len(ledger.order), ledger.dropped


def test_killed_at_random_moments(quick_path):
    print("kills, samples, dropped:", kill_at_random(quick_path, 15, seed=1))


@pytest.mark.slow
def test_killed_at_a_hundred_random_moments(quick_path):
    print("kills, samples, dropped:", kill_at_random(quick_path, 100, seed=2))


# --- a workload that does everything ------------------------------------------------------------------


def work(spool, note=lambda **_: None):
    """Appends, full and partial removals, drops; `note` is told before and after each."""
    number = 0

    def add(count):
        nonlocal number
        made = [sample(number + i) for i in range(count)]
        number += count
        note(adding=made)
        note(added=spool.append_many(made))

    def take(keys):
        note(removing=keys)
        spool.remove(keys)
        note(removed=keys)

    add(2)
    add(1)
    take([each.key for each in spool.peek(1)])
    take([each.key for each in spool.peek(1)])
    add(3)
    add(3)
    add(3)  # more than there is room for
    take([each.key for each in spool.peek(2)])


BOUNDS = {"max_samples": 8}
"""A batch is one sample then, so every append of several is several files."""


class Facts:
    """What `work` was told: keys that are durable, and keys that may be gone."""

    def __init__(self):
        self.durable, self.removed, self.adding = [], set(), []

    def __call__(self, **line):
        self.durable += line.get("added", ())
        self.removed |= set(line.get("removing", ()))
        self.adding = line.get("adding", self.adding)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("bounds", [BOUNDS, {"max_samples": 70}], ids=["full", "roomy"])
def test_each_call_to_the_disk_fails_once(quick_path, number, bounds):
    """The n-th for all n: a named error or none, and what was reported durable is there unless counted as dropped."""
    nth = 0
    while True:
        nth += 1
        path = quick_path / str(nth)
        path.mkdir()
        disk = Failing(nth, number)
        facts, told = Facts(), None
        try:
            spool = Spool(path / "spool", disk=disk, **bounds)
        except SpoolUnwritable:
            assert disk.failures == 1
            spool = Spool(path / "spool", disk=disk, **bounds)
        try:
            work(spool, facts)
        except SpoolUnwritable as error:
            told = error
            assert disk.failures == 1
        within(spool, facts, bounds)
        # The disk is well again: the same spool and a new one go on.
        disk._nth = 0
        key = spool.append(sample(50))
        facts.durable.append(key)
        assert spool.peek(100)[-1].key == key
        within(spool, facts, bounds)
        counted = spool.counters
        again = Spool(path / "spool", **bounds)
        assert again.counters.dropped >= counted.dropped
        within(again, facts, bounds)
        assert told is None or disk.failed.is_set()
        if not disk.failures:
            break
    print(f"{os.strerror(number)}: {nth - 1} calls failed, one by one")
    assert nth > 40


def within(spool, facts, bounds):
    found = spool.peek(100)
    assert all(whole(each) for each in found)
    assert len(found) == len(spool) <= bounds["max_samples"]
    present = {each.key for each in found}
    missing = [key for key in facts.durable if key not in present and key not in facts.removed]
    assert len(missing) <= spool.counters.dropped
    assert spool.counters.damaged == 0
    order = [key for key in facts.durable if key in present]
    assert [each.key for each in found if each.key in order] == order


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_stays_broken_loses_nothing_and_heals(quick_path, number):
    disk = Failing(0, number, ("create", "write", "sync", "replace"))
    spool = Spool(quick_path / "spool", disk=disk, max_samples=70)
    keys = spool.append_many([sample(i) for i in range(16)])
    disk.broken = True
    for i in range(20):
        with pytest.raises(SpoolUnwritable, match="cannot be written"):
            spool.append(sample(20 + i))
    assert not [each for each in (quick_path / "spool").iterdir() if each.name.endswith(".tmp")]
    disk.broken = False
    keys.append(spool.append(sample(60)))
    found = [each.key for each in spool.peek(100)]
    assert found == keys[-len(found) :]
    assert spool.counters.dropped == len(keys) - len(found)
    assert Spool(quick_path / "spool", max_samples=70).counters == spool.counters
    if number == errno.EIO:
        assert found == keys, "only room is worth a sample"


class Small(Unsynced):
    """A disk with room for so many bytes, all of them in one directory."""

    def __init__(self, path, room):
        self._path, self._room = path, room

    def write(self, fd, data):
        used = sum(each.stat().st_size for each in self._path.iterdir())
        if used + len(data) > self._room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(fd, data)


def test_a_full_disk_drops_the_oldest_and_keeps_the_newest(quick_path):
    spool = Spool(quick_path / "spool", disk=Small(quick_path / "spool", 8000))
    keys = []
    for i in range(60):
        keys += spool.append_many([sample(i), sample(60 + i)])
    found = [each.key for each in spool.peek(1000)]
    assert 10 < len(found) < 60
    assert found == keys[-len(found) :]
    assert spool.counters.dropped == len(keys) - len(found)
    again = Spool(quick_path / "spool")
    assert [each.key for each in again.peek(1000)] == found
    assert again.counters.dropped == spool.counters.dropped


# --- power cuts ---------------------------------------------------------------------------------------


def check_cuts(path, script, bounds):
    """After each call of a workload, in every state that a power cut could leave."""
    root = path / "disk"
    root.mkdir()
    disk = Recording()
    facts, marks = Facts(), {}

    def note(**line):
        facts(**line)
        marks[len(disk.calls)] = (list(facts.durable), set(facts.removed))

    script(root, disk, note)
    loss = PowerLoss(root)
    cuts, now = 0, ([], set())
    # A removal may begin to show with the calls that follow its mark.
    for number, call in enumerate([*disk.calls, Call("mark", "")]):
        now = marks.get(number, now)
        durable, removed = now
        loss.apply(call)
        for tree in loss.trees():
            cuts += 1
            found_in = path / f"cut{cuts}"
            plant(tree, found_in)
            spool = Spool(found_in / "spool", disk=Unsynced(), **bounds)
            found = spool.peek(100)
            assert all(whole(each) for each in found)
            present = [each.key for each in found]
            missing = [key for key in durable if key not in present and key not in removed]
            assert len(missing) <= spool.counters.dropped, (number, call)
            assert [key for key in present if key in durable] == [key for key in durable if key in present]
            assert spool.counters.damaged == 0, (number, call)
            assert len(present) <= bounds["max_samples"]
            key = spool.append(sample(70))
            assert Spool(found_in / "spool", disk=Unsynced(), **bounds).peek(100)[-1].key == key
    print(f"{cuts} power cuts in {len(disk.calls)} calls")
    return cuts


def test_a_power_cut_at_any_call_leaves_what_was_reported(quick_path):
    def script(root, disk, note):
        work(Spool(root / "spool", disk=disk, **BOUNDS), note)

    assert check_cuts(quick_path, script, BOUNDS) > 100


def test_a_power_cut_with_several_samples_in_a_file(quick_path):
    bounds = {"max_samples": 24}

    def script(root, disk, note):
        spool = Spool(root / "spool", disk=disk, **bounds)
        note(added=spool.append_many([sample(i) for i in range(3)]))
        keys = [each.key for each in spool.peek(2)]
        note(removing=keys[1:])
        spool.remove(keys[1:])
        note(added=spool.append_many([sample(i) for i in range(3, 6)]))
        note(removing=keys[:1])
        spool.remove(keys[:1])
        spool = Spool(root / "spool", disk=disk, **bounds)
        note(added=spool.append_many([sample(i) for i in range(6, 8)]))

    assert check_cuts(quick_path, script, bounds) > 50


def test_what_rm_has_removed_does_not_come_back_after_a_power_cut(quick_path):
    root = quick_path / "disk"
    root.mkdir()
    disk = Recording()
    spool = Spool(root / "spool", disk=disk)
    spool.append_many([sample(i) for i in range(6)])
    spool.append_many([sample(i) for i in (1, 4)])
    discard(root / "spool", lambda name: name == "cam1", disk=disk)
    loss = PowerLoss(root)
    for call in disk.calls:
        loss.apply(call)
    trees = list(loss.trees())
    for i, tree in enumerate(trees):
        plant(tree, quick_path / f"cut{i}")
        found = Spool(quick_path / f"cut{i}" / "spool").peek(100)
        assert [each.sample.stream for each in found] == ["cam0", "cam2"] * 2
    assert trees


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_each_call_of_rm_fails_once(quick_path, number):
    nth = 0
    while True:
        nth += 1
        path = quick_path / str(nth)
        path.mkdir()
        spool = Spool(path / "spool", disk=Unsynced())
        keys = spool.append_many([sample(i) for i in range(6)])
        spool.append_many([sample(i) for i in (1, 4)])
        disk = Failing(nth, number)
        try:
            discard(path / "spool", lambda name: name == "cam1", disk=disk)
        except SpoolUnwritable:
            assert disk.failures == 1
        else:
            assert disk.failures == 0
        kept = [key for i, key in enumerate(keys) if i % 3 != 1]
        for each in (spool, Spool(path / "spool")):
            assert [w.key for w in each.peek(100) if w.sample.stream != "cam1"] == kept
        discard(path / "spool", lambda name: name == "cam1")
        assert [w.key for w in Spool(path / "spool").peek(100)] == kept
        assert len(batches(path / "spool")) == 1
        if not disk.failures:
            break
    assert nth > 5
