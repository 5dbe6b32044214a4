"""The writing thread: newest job, going back, failures that heal, and what `settle` promises."""

from __future__ import annotations

import errno
import threading

import pytest

import tiny_bundle
from disks import Failing, Unsynced
from running import PATIENCE_S
from snapshots import learnt
from tta_edge.adapt import Guards, Stream
from tta_edge.saver import Saver
from tta_edge.store import StateStore
from tta_runtime import Engines, Model
from tta_runtime.errors import StateUnwritable

X, _ = tiny_bundle.samples(16, seed=3, shift=1.0)
WIDE = Guards(max_distance=1e9, reset_every_steps=0)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    tiny_bundle.build(path)
    return Engines.load(path)


class Gate(Unsynced):
    """A disk on which every write waits until the gate is opened.

    Attributes:
        reached: set when a write waits.
    """

    def __init__(self):
        self.open = threading.Event()
        self.reached = threading.Event()

    def write(self, fd, data):
        self.reached.set()
        assert self.open.wait(PATIENCE_S)
        return super().write(fd, data)


class Bench:
    """A store and a saver on a disk, with everything they told."""

    def __init__(self, root, engines, disk=None, **arguments):
        self.told = []
        self.changed = threading.Condition()
        self.engines = engines
        self.store = StateStore(root, self._tell, disk=disk or Unsynced())
        self.saver = Saver(self.store, **arguments)

    def _tell(self, event):
        with self.changed:
            self.told.append((event.action, event.reason))
            self.changed.notify_all()

    def wait_for(self, *event):
        with self.changed:
            assert self.changed.wait_for(lambda: event in self.told, PATIENCE_S)

    def stream(self, name="cam", steps=0):
        stream = Stream(name, Model(self.engines, "tent"), WIDE, keeper=self.saver)
        self.step(stream, steps)
        return stream

    def step(self, stream, steps=1):
        for _ in range(steps):
            stream.answer(X)

    def keep(self, stream):
        self.saver.keep(stream, stream.model.checkpoint, stream.notes())

    def on_disk(self, name="cam"):
        """Steps of what is saved, the newest first."""
        restored = self.store.load(self.stream(name)).restored
        if restored is None:
            return []
        steps = [restored.checkpoint.steps]
        return steps if restored.before is None else [*steps, restored.before.steps]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.saver.close()
        self.store.close()


def test_of_a_stream_only_the_newest_job_is_written(engines, tmp_path):
    gate = Gate()
    with Bench(tmp_path, engines, gate) as bench:
        stream = bench.stream()
        for _ in range(4):
            bench.step(stream)
            bench.keep(stream)
            assert gate.reached.wait(PATIENCE_S)  # the first is being written, the others replace one another
        gate.open.set()
        assert bench.saver.settle(stream)
        assert bench.on_disk() == [4, 1]


def test_a_checkpoint_after_a_reset_does_not_make_the_reset_forgotten(engines, tmp_path):
    """The disk is slow: the reset's job still waits when the next checkpoint comes."""
    gate = Gate()
    with Bench(tmp_path, engines, gate) as bench:
        gate.open.set()
        stream = bench.stream(steps=3)
        bench.saver.save_now(stream)
        bench.step(stream)
        bench.saver.save_now(stream)
        assert bench.on_disk() == [4, 3]
        gate.open.clear()
        gate.reached.clear()
        other = bench.stream("other", steps=1)
        bench.keep(other)
        assert gate.reached.wait(PATIENCE_S)
        stream.reset()
        bench.step(stream, 2)
        bench.keep(stream)
        gate.open.set()
        assert bench.saver.settle(stream)
        assert bench.on_disk() == [2], "nothing from before the reset"


def test_saving_now_after_a_reset_that_waits_leaves_nothing_from_before(engines, tmp_path):
    disk = Failing()
    with Bench(tmp_path, engines, disk, retry_s=1e9) as bench:
        stream = bench.stream(steps=3)
        bench.saver.save_now(stream)
        disk.broken = True
        stream.reset()
        assert not bench.saver.settle(stream)
        disk.broken = False
        bench.step(stream)
        bench.saver.save_now(stream)
        assert bench.on_disk() == [1]


def test_what_failed_is_tried_again_by_itself(engines, tmp_path):
    disk = Failing(number=errno.ENOSPC)
    with Bench(tmp_path, engines, disk, retry_s=0.01) as bench:
        disk.broken = True
        stream = bench.stream(steps=2)
        bench.keep(stream)
        bench.wait_for("disk", "disk-error")
        assert bench.saver.error.endswith("No space left on device")
        disk.broken = False
        bench.wait_for("disk", "disk-ok")
        assert bench.saver.error == ""
        assert bench.told == [("disk", "disk-error"), ("disk", "disk-ok")], "each told once"
        assert bench.on_disk() == [2]


def test_a_next_job_is_tried_at_once_and_takes_the_failed_ones_along(engines, tmp_path):
    disk = Failing()
    with Bench(tmp_path, engines, disk, retry_s=1e9) as bench:
        disk.broken = True
        streams = [bench.stream(name, steps=1) for name in ("one", "two", "three")]
        for stream in streams:
            bench.keep(stream)
            assert not bench.saver.settle(stream)
        disk.broken = False
        bench.keep(streams[0])
        bench.wait_for("disk", "disk-ok")
        assert [bench.on_disk(stream.name) for stream in streams] == [[1], [1], [1]]


def test_lines_of_events_do_not_keep_a_failed_job_from_being_tried_again(engines, tmp_path):
    disk = Failing()
    with Bench(tmp_path, engines, disk, retry_s=0.05) as bench:
        disk.broken = True
        stream = bench.stream(steps=1)
        bench.keep(stream)
        bench.wait_for("disk", "disk-error")
        disk.broken = False
        while bench.saver.error:
            bench.saver.line(b"{}\n")
        assert bench.on_disk() == [1]


def test_settling_tells_the_truth_after_the_thread_has_failed(engines, tmp_path):
    disk = Failing()
    with Bench(tmp_path, engines, disk, retry_s=1e9) as bench:
        stream = bench.stream(steps=1)
        assert bench.saver.settle(stream), "nothing is to be written"
        disk.broken = True
        bench.keep(stream)
        bench.wait_for("disk", "disk-error")  # the thread has taken the job, and failed
        assert not bench.saver.settle(stream)
        disk.broken = False
        assert bench.saver.settle(stream)
        assert bench.on_disk() == [1]


def test_one_stream_that_cannot_be_written_is_told_once_while_others_can(engines, tmp_path):
    with Bench(tmp_path, engines, retry_s=0.001) as bench:
        (tmp_path / "streams" / "default").mkdir()
        (tmp_path / "streams" / "default" / "blocked").write_text("mine")
        blocked, free = bench.stream("blocked", steps=1), bench.stream("free")
        bench.keep(blocked)
        bench.wait_for("disk", "disk-error")
        for _ in range(20):
            bench.step(free)
            bench.saver.save_now(free)
        assert bench.told == [("disk", "disk-error")]
        assert "blocked" in bench.saver.error
        (tmp_path / "streams" / "default" / "blocked").unlink()
        bench.wait_for("disk", "disk-ok")
        assert bench.on_disk("blocked") == [1]


def test_a_job_of_a_bundle_that_went_away_is_dropped_with_its_error(engines, tmp_path):
    disk = Failing()
    with Bench(tmp_path, engines, disk, retry_s=1e9) as bench:
        disk.broken = True
        stream = bench.stream(steps=1)
        bench.keep(stream)
        bench.wait_for("disk", "disk-error")
        bench.saver.drop(stream)
        assert bench.saver.error == ""
        disk.broken = False
        assert bench.saver.settle(stream)
        assert bench.on_disk() == []


def test_the_switch_is_tried_again_too(engines, tmp_path):
    disk = Failing()
    with Bench(tmp_path, engines, disk, retry_s=0.01) as bench:
        disk.broken = True
        assert not bench.saver.save_switch(False)
        assert bench.store.switch()
        disk.broken = False
        bench.wait_for("disk", "disk-ok")
        assert not bench.store.switch()


def test_the_last_position_of_the_switch_counts(engines, tmp_path):
    disk = Failing()
    with Bench(tmp_path, engines, disk, retry_s=0.01) as bench:
        disk.broken = True
        bench.saver.save_switch(False)
        bench.saver.save_switch(True)
        disk.broken = False
        bench.wait_for("disk", "disk-ok")
        assert bench.store.switch()


@pytest.mark.parametrize("error", [MemoryError("no memory"), RuntimeError("a defect")])
def test_the_thread_outlives_a_defect_and_says_so(engines, tmp_path, error):
    class Defective(Unsynced):
        broken = True

        def create(self, path, mode):
            if self.broken:
                raise error
            return super().create(path, mode)

    disk = Defective()
    with Bench(tmp_path, engines, disk) as bench:
        stream = bench.stream(steps=1)
        bench.keep(stream)
        bench.wait_for("disk", "disk-error")
        assert type(error).__name__ in bench.saver.error
        assert not bench.saver.settle(stream)
        with pytest.raises(StateUnwritable, match=type(error).__name__):
            bench.saver.save_now(stream)
        disk.broken = False
        bench.saver.save_now(stream)
        assert bench.saver.error == ""
        assert bench.on_disk() == [1]


def test_closing_writes_what_waits_and_what_failed_before(engines, tmp_path):
    disk = Failing()
    bench = Bench(tmp_path, engines, disk, retry_s=1e9)
    disk.broken = True
    failed, waits = bench.stream("failed", steps=1), bench.stream("waits", steps=2)
    bench.keep(failed)
    bench.wait_for("disk", "disk-error")
    disk.broken = False
    bench.keep(waits)
    bench.saver.line(b'{"last": true}\n')
    bench.saver.close()
    assert (bench.on_disk("failed"), bench.on_disk("waits")) == ([1], [2])
    assert (tmp_path / "events.jsonl").read_bytes().endswith(b'{"last": true}\n')
    bench.store.close()


def test_nothing_is_written_after_the_end(engines, tmp_path):
    bench = Bench(tmp_path, engines)
    stream = bench.stream(steps=1)
    bench.keep(stream)
    bench.saver.close()
    bench.step(stream)
    bench.keep(stream)
    assert not bench.saver.settle(stream)
    assert bench.on_disk() == [1]
    bench.store.close()


def test_what_is_owed_is_known_while_it_waits_is_written_and_has_failed(engines, tmp_path):
    gate = Gate()
    with Bench(tmp_path, engines, gate) as bench:
        stream = bench.stream(steps=1)
        assert not bench.saver.owes(stream.key)
        bench.keep(stream)
        assert gate.reached.wait(PATIENCE_S)
        assert bench.saver.owes(stream.key)  # under way
        bench.keep(stream)
        gate.open.set()
        assert bench.saver.settle(stream)
        assert not bench.saver.owes(stream.key)
    disk = Failing()
    with Bench(tmp_path / "failing", engines, disk, retry_s=1e9) as bench:
        disk.broken = True
        stream = bench.stream(steps=1)
        bench.keep(stream)
        bench.wait_for("disk", "disk-error")
        assert bench.saver.owes(stream.key)
        disk.broken = False
        assert bench.saver.settle(stream)
        assert not bench.saver.owes(stream.key)


def test_closing_on_a_broken_disk_ends(engines, tmp_path):
    disk = Failing()
    bench = Bench(tmp_path, engines, disk, retry_s=1e9)
    disk.broken = True
    for name in ("one", "two"):
        bench.keep(bench.stream(name, steps=1))
    bench.saver.close()
    assert disk.failures >= 2
    bench.store.close()


def test_a_rollback_knows_of_itself_when_it_is_found_again(engines, tmp_path):
    """Its event is among the counters that are saved with it."""
    with Bench(tmp_path, engines) as bench:
        stream = bench.stream(steps=20)
        bench.step(stream)
        assert stream.roll_back()
        assert bench.saver.settle(stream)
        other = bench.stream()
        restored = bench.store.load(other).restored
        other.resume(restored.checkpoint, restored.notes, before=restored.before, restored=restored.slot)
        assert learnt(other.model) == learnt(stream.model)
        assert other.counts == stream.counts == {"requested": 1}
        assert other.last_event == "rollback: requested"


def test_notes_too_long_to_be_read_again_leave_the_monitor_out(engines, tmp_path, monkeypatch):
    """A model with tens of thousands of classes; the limit is lowered here instead."""
    monkeypatch.setattr("tta_edge.adapt.MAX_NOTES", 200)
    with Bench(tmp_path, engines) as bench:
        stream = bench.stream(steps=2)
        stream.switch(False)
        assert '"monitor":null' in stream.notes()
        bench.saver.save_now(stream)
        other = bench.stream()
        restored = bench.store.load(other).restored
        other.resume(restored.checkpoint, restored.notes, before=None, restored=restored.slot)
        assert not other.enabled
        assert other.monitor.observed == 0
