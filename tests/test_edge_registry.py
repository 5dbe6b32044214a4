"""Streams leave memory and come back bit for bit; what cannot leave stays; reload and shutdown agree with the disk."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import numpy as np
import pytest

import tiny_bundle
from disks import Failing, Unsynced
from snapshots import learnt, unchanged
from tta_edge.adapt import Guards, Stream
from tta_edge.config import BundleConfig, Config
from tta_edge.errors import TooManyStreams, UnknownStream
from tta_edge.events import EventLog
from tta_edge.hosting import Host, load
from tta_edge.registry import Registry, worth_saving
from tta_edge.saver import Saver
from tta_edge.stats import Stats
from tta_edge.store import StateStore
from tta_runtime import Engines
from tta_runtime.slots import SLOTS

X, _ = tiny_bundle.samples(16, seed=3, shift=1.0)
GUARDS = Guards(max_distance=1e9, reset_every_steps=0, min_diversity=0.9, checkpoint_steps=4)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    tiny_bundle.build(path)
    return path


@pytest.fixture(scope="module")
def engines(bundle):
    return Engines.load(bundle)


class Daemon:
    """The registry with the store and the saver under it, as the responder puts them together."""

    def __init__(
        self, root, engines, *, method="tent", disk=None, max_streams=1, wall_clock=None, stored=4096
    ):
        clock = {} if wall_clock is None else {"wall_clock": wall_clock}
        self.events = EventLog(Stats(), **clock)
        self.config = Config()
        self.host = Host("default", root, engines, method, {})
        self.store = StateStore(root, self.events.add, disk=disk or Unsynced(), max_streams=stored)
        self.saver = Saver(self.store, retry_s=1e9)
        self.registry = Registry(
            self.make,
            max_streams=max_streams,
            tell=self.events.add,
            store=self.store,
            saver=self.saver,
        )

    def make(self, host, name):
        model = host.model(self.config)
        return Stream(name, model, GUARDS, bundle=host.name, tell=self.events.add, keeper=self.saver)

    def use(self, name, steps=1, seed=3):
        stream = self.registry.get(self.host, name)
        for step in range(steps):
            stream.answer(tiny_bundle.samples(16, seed=seed + step, shift=1.0)[0])
        self.registry.admit(stream)
        return stream

    def told(self):
        return [(event.action, event.reason, event.stream) for event in self.events.newest(1000)]

    def end(self):
        self.registry.save_all()
        self.saver.close()
        self.store.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.saver.close()
        self.store.close()


def everything(stream):
    """All that decides what a stream does next, and what it tells about itself."""
    return (
        learnt(stream.model),
        stream.notes(),
        stream.monitor.notes(),
        dict(stream.counts),
        stream.last_event,
        stream.enabled,
        stream.suspended,
    )


def eventful(daemon, name):
    """A stream whose guards have something to remember: skips, a rollback, a probe that is under way."""
    stream = daemon.use(name, steps=9)
    stream.answer(X[:1])
    stream.roll_back()
    one_class = np.tile(X[:1], (64, 1))
    while not stream.monitor.suspicious:
        stream.answer(one_class, adapt=False)
    stream.answer(X)
    return stream


@pytest.mark.parametrize("method", ["tent", "teacher"])
def test_a_stream_comes_back_bit_for_bit_and_goes_on_as_if_it_had_never_left(engines, tmp_path, method):
    with Daemon(tmp_path, engines, method=method) as daemon:
        stayed = eventful(daemon, "cam")
        before = everything(stayed)
        daemon.use("other")
        assert [stream.name for stream in daemon.registry.all()] == ["other"]
        back = daemon.registry.get(daemon.host, "cam")
        assert back is not stayed
        assert everything(back) == before
        assert back.restored in SLOTS
        stayed.reopen()
        for seed in range(20, 26):
            x = tiny_bundle.samples(16, seed=seed, shift=1.0)[0]
            was, now = stayed.answer(x), back.answer(x)
            np.testing.assert_array_equal(was.logits, now.logits)
            assert (was.adapted, was.reason, was.report) == (now.adapted, now.reason, now.report)
        assert learnt(back.model) == learnt(stayed.model)
        assert back.monitor.notes() == stayed.monitor.notes()


def test_a_restart_is_the_same(engines, tmp_path):
    daemon = Daemon(tmp_path, engines)
    before = everything(eventful(daemon, "cam"))
    daemon.end()
    with Daemon(tmp_path, engines) as again:
        assert again.registry.restore_all({"default": again.host}) == 1
        (stream,) = again.registry.all()
        assert everything(stream) == before
        assert again.told() == [("restore", "start", "cam")]


def test_one_that_was_restored_and_not_used_is_left_as_it_is(engines, tmp_path):
    """Else a daemon that starts and ends, again and again, would replace the state to roll back to."""
    daemon = Daemon(tmp_path, engines)
    assert daemon.saver.settle(daemon.use("cam", steps=4))
    daemon.use("cam", steps=2)
    daemon.end()
    with unchanged(tmp_path / "streams"):
        for _ in range(2):
            again = Daemon(tmp_path, engines)
            again.registry.restore_all({"default": again.host})
            again.end()
    with Daemon(tmp_path, engines) as again:
        again.registry.restore_all({"default": again.host})
        (stream,) = again.registry.all()
        assert stream.model.steps == 6
        assert stream.roll_back()
        assert stream.model.steps == 4


def test_what_cannot_go_to_disk_stays_as_it_is_and_adapts_on(engines, tmp_path):
    disk = Failing()
    with Daemon(tmp_path, engines, disk=disk) as daemon:
        stream = eventful(daemon, "cam")
        before = everything(stream)
        disk.broken = True
        for _ in range(2):
            with pytest.raises(TooManyStreams, match="none can go to disk"):
                daemon.registry.get(daemon.host, "other")
        assert daemon.registry.all() == [stream]
        assert everything(stream) == before
        assert daemon.registry.get(daemon.host, "cam") is stream
        assert stream.step_on(X) is True, "the stream is open again"
        now = learnt(stream.model)
        disk.broken = False
        daemon.use("other")
        assert learnt(daemon.registry.get(daemon.host, "cam").model) == now


def test_a_defect_while_it_goes_to_disk_leaves_the_stream_open(engines, tmp_path):
    class Defective(Unsynced):
        broken = False

        def create(self, path, mode):
            if self.broken:
                raise RuntimeError("a defect")
            return super().create(path, mode)

    disk = Defective()
    with Daemon(tmp_path, engines, disk=disk) as daemon:
        stream = daemon.use("cam")
        disk.broken = True
        with pytest.raises(TooManyStreams, match="RuntimeError"):
            daemon.registry.get(daemon.host, "other")
        assert stream.step_on(X) is True


def test_a_new_stream_that_was_switched_off_is_found_off_again(engines, tmp_path):
    """Also where the switch could not be written when it was asked for."""
    disk = Failing()
    with Daemon(tmp_path, engines, disk=disk) as daemon:
        stream = daemon.registry.get(daemon.host, "cam")
        daemon.registry.admit(stream)
        assert not worth_saving(stream)
        disk.broken = True
        stream.switch(False)
        assert worth_saving(stream)
        disk.broken = False
        daemon.use("other")
        assert not daemon.registry.get(daemon.host, "cam").enabled


def test_one_that_never_did_anything_leaves_nothing_behind(engines, tmp_path):
    with Daemon(tmp_path, engines) as daemon:
        daemon.registry.admit(daemon.registry.get(daemon.host, "idle"))
        daemon.use("other")
        assert daemon.store.keys() == []
        with pytest.raises(UnknownStream):
            daemon.registry.find(daemon.host, "idle")


def test_a_stream_on_disk_is_found_by_name_and_counted(engines, tmp_path):
    with Daemon(tmp_path, engines) as daemon:
        first = everything(daemon.use("one", steps=2))
        daemon.use("two")
        assert daemon.registry.stored() == 1
        assert everything(daemon.registry.find(daemon.host, "one")) == first
        assert daemon.registry.stored() == 1
        with pytest.raises(UnknownStream, match="did you mean `two`"):
            daemon.registry.find(daemon.host, "tow")


def test_beyond_the_bound_of_the_disk_the_oldest_starts_anew(engines, tmp_path):
    with Daemon(tmp_path, engines, stored=2) as daemon:
        for name in ("one", "two", "three", "four"):
            daemon.use(name)
        assert ("forget", "disk-cap", "one") in daemon.told()
        assert daemon.use("one").model.steps == 1
        assert daemon.use("three").model.steps == 2


def test_the_most_recently_saved_are_in_memory_after_a_restart(engines, tmp_path):
    daemon = Daemon(tmp_path, engines, max_streams=3)
    for name in ("a", "b", "c", "d", "b"):
        daemon.use(name)
    daemon.end()
    with Daemon(tmp_path, engines, max_streams=2) as again:
        assert again.registry.restore_all({"default": again.host}) == 4
        assert [stream.name for stream in again.registry.all()] == ["d", "b"]
        assert again.registry.stored() == 2


@pytest.mark.parametrize("jump", [timedelta(days=3652), -timedelta(days=1), None])
def test_a_wall_clock_that_jumps_changes_nothing_but_time_stamps(engines, tmp_path, jump):
    now = [datetime(2026, 1, 1, tzinfo=timezone.utc)]
    found = []
    for place, jumps in (("still", False), ("jumping", True)):
        with Daemon(tmp_path / place, engines, wall_clock=lambda: now[0]) as daemon:
            eventful(daemon, "cam")
            if jumps:
                now[0] = datetime(1970, 1, 1, tzinfo=timezone.utc) if jump is None else now[0] + jump
            daemon.use("other")
            stream = daemon.use("cam", steps=3)
            for name in SLOTS:
                path = tmp_path / place / "streams" / "default" / "other" / name
                if path.exists():
                    path.write_bytes(b"rubbish")
            daemon.use("other")
            found.append((everything(stream), daemon.told(), daemon.store.keys()))
            assert daemon.events.newest(1)[0].time.startswith(str(now[0].year))
    assert found[0] == found[1]


# --- reload -------------------------------------------------------------------------------------------


def test_after_a_reload_the_disk_holds_what_goes_on(bundle, engines, tmp_path):
    daemon = Daemon(tmp_path, engines, max_streams=2)
    before = everything(daemon.use("cam", steps=6))
    new = load("default", BundleConfig(path=str(bundle), method="tent"), Config())
    assert daemon.registry.swap(new) == (1, 0)
    daemon.host = new
    assert everything(daemon.registry.get(new, "cam")) == before
    daemon.end()
    with Daemon(tmp_path, engines) as again:
        again.registry.restore_all({"default": again.host})
        assert everything(again.registry.all()[0]) == before


def test_after_a_reload_that_fits_no_stream_nothing_old_is_written_as_new(bundle, engines, tmp_path):
    """The disk is broken while a checkpoint of the old method waits; then the method changes, and the disk heals."""
    disk = Failing()
    daemon = Daemon(tmp_path, engines, disk=disk, max_streams=2)
    stream = daemon.use("cam", steps=3)
    disk.broken = True
    daemon.saver.keep(stream, stream.model.checkpoint, stream.notes())
    assert not daemon.saver.settle(stream)
    teacher = load("default", BundleConfig(path=str(bundle), method="teacher"), Config())
    assert daemon.registry.swap(teacher) == (0, 1)
    disk.broken = False
    daemon.end()
    with Daemon(tmp_path, teacher.engines, method="teacher") as again:
        again.registry.restore_all({"default": again.host})
        (found,) = again.registry.all()
        assert found.model.steps == 0
        assert [action for action, _, _ in again.told()] == ["restore"], "nothing had to be set aside"
