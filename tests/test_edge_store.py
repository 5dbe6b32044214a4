"""The state directory: what is found again, what is set aside, and what stands in the way."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import tiny_bundle
from bad_bundles import put, reseal
from disks import Failing, Unsynced
from running import PATIENCE_S, daemon, process_environment, running
from snapshots import files, learnt, unchanged
from tta_edge.adapt import Guards, Stream
from tta_edge.client import Client
from tta_edge.errors import StateDirInUse, StateDirUnusable
from tta_edge.store import MAX_QUARANTINE, StateStore
from tta_runtime import Engines, Model, bundle, state_file, tensors, theta
from tta_runtime.errors import StateUnwritable
from tta_runtime.slots import SLOTS

X, _ = tiny_bundle.samples(16, seed=3, shift=1.0)
WIDE = Guards(max_distance=1e9, reset_every_steps=0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    tiny_bundle.build(path)
    return path


@pytest.fixture(scope="module")
def engines(tiny):
    return Engines.load(tiny)


class Open:
    """A store that is closed at the end, with what it told."""

    def __init__(self, root, engines, **arguments):
        self.told = []
        self.engines = engines
        self.store = StateStore(root, self.told.append, **{"disk": Unsynced(), **arguments})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.store.close()

    def stream(self, name="cam", method="tent", steps=0):
        stream = Stream(name, Model(self.engines, method), WIDE, tell=self.told.append)
        for _ in range(steps):
            stream.answer(X)
        return stream

    def saved(self, name="cam", method="tent", commits=2):
        """A stream of so many commits, one step each; gives (digest, file) of each that is on the disk."""
        stream = self.stream(name, method)
        found = {}
        for _ in range(commits):
            stream.answer(X)
            self.store.save(stream, stream.model.checkpoint, stream.notes())
            found[stream.model.steps] = stream.model.digest
        return found

    def loaded(self, name="cam", method="tent"):
        """(steps, digest) of what is found, None for nothing; and the codes of what was set aside."""
        stream = self.stream(name, method)
        found = self.store.load(stream)
        codes = [event.reason for event in found.set_aside]
        if found.restored is None:
            return None, codes
        vector = found.restored.checkpoint.theta
        return (found.restored.checkpoint.steps, theta.digest(stream.model.manifest.theta, vector)), codes


def slot(root, name="a.state", stream="cam"):
    return root / "streams" / "default" / stream / name


# --- damage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["flip", "truncate"])
@pytest.mark.parametrize("name", SLOTS)
def test_damage_at_each_percent_is_found_and_set_aside(engines, tmp_path, name, how):
    """a.state holds step 1 or 3, b.state step 2: whichever is damaged, exactly the other one is served."""
    root = tmp_path / "state"
    with Open(root, engines) as good:
        digests = good.saved(commits=2)
    whole = {each: slot(root, each).read_bytes() for each in SLOTS}
    survivor = {"a.state": 2, "b.state": 1}[name]
    for percent in range(100):
        for each, data in whole.items():
            slot(root, each).write_bytes(data)
        data = bytearray(whole[name])
        at = percent * len(data) // 100
        if how == "flip":
            data[at] ^= 1
        slot(root, name).write_bytes(data if how == "flip" else data[:at])
        with Open(root, engines) as state:
            found, codes = state.loaded()
            assert found == (survivor, digests[survivor]), percent
            assert len(codes) == 1
            assert codes[0] in ("state-malformed", "state-tampered", "newer-state", "older-state"), percent
        assert not slot(root, name).exists()
        set_aside = sorted((root / "quarantine").iterdir())
        assert len(set_aside) == min(percent + 1, MAX_QUARANTINE)
        assert set_aside[-1].read_bytes() == (data if how == "flip" else data[:at])


def test_both_damaged_is_the_source_and_the_next_commit_is_found(engines, tmp_path):
    root = tmp_path / "state"
    with Open(root, engines) as state:
        state.saved()
    for name in SLOTS:
        os.truncate(slot(root, name), 100)
    with Open(root, engines) as state:
        assert state.store.keys() == [("default", "cam")]
        assert state.loaded() == (None, ["state-malformed"] * 2)
        assert state.store.keys() == []
        digests = state.saved(commits=1)
    with Open(root, engines) as state:
        assert state.loaded() == ((1, digests[1]), [])


def test_a_daemon_says_what_it_set_aside(tiny, tmp_path):
    """In the status of the stream, among the events, in the event file; the other slot is served."""
    config = {"state_dir": str(tmp_path / "state"), "checkpoint_steps": 1, "max_distance": 1e6}
    with running(tiny, **config) as server, Client(server.endpoint) as client:
        digests = [client.predict(X).theta_digest for _ in range(3)]
        client.adapt(True, "default")
    states = {name: slot(tmp_path / "state", name, "default") for name in SLOTS}
    by_generation = sorted(
        SLOTS, key=lambda name: int(tensors.decode(states[name].read_bytes())[1]["generation"])
    )
    data = bytearray(states[by_generation[1]].read_bytes())
    data[-5] ^= 64
    states[by_generation[1]].write_bytes(data)
    for name in SLOTS:
        os.utime(states[name], (0, 0))
    with running(tiny, **config) as server, Client(server.endpoint) as client:
        (stream,) = client.status().streams
        assert stream.restored == by_generation[0]
        assert stream.theta_digest == digests[-1], "both slots held the last theta"
        assert stream.last_event == "quarantine: state-tampered"
        assert stream.events["state-tampered"] == 1
        told = [(event.action, event.reason) for event in client.events().events]
        assert told == [("quarantine", "state-tampered"), ("restore", "start")]
        assert client.predict(X).adapted
    lines = (tmp_path / "state" / "events.jsonl").read_text().splitlines()
    assert ["quarantine", "state-tampered"] in [
        [json.loads(x)["action"], json.loads(x)["reason"]] for x in lines
    ]


# --- of another bundle, method, version -----------------------------------------------------------------


def rewritten(path, **values):
    arrays, metadata = tensors.decode(path.read_bytes())
    metadata |= values
    del metadata["sha256"]
    path.write_bytes(tensors.encode(arrays, metadata | {"sha256": state_file.checksum(metadata, arrays)}))


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"format_version": "1"}, "older-state"),
        ({"format_version": "3"}, "newer-state"),
        ({"source": "0" * 64}, "state-of-other-bundle"),
        ({"layout": "0" * 64}, "state-of-other-bundle"),
        ({"method": "eata"}, "state-mismatch"),
        ({"generation": str(1 << 63)}, "state-malformed"),
    ],
)
def test_a_state_that_is_not_this_daemons_is_kept_in_the_quarantine(engines, tmp_path, values, code):
    root = tmp_path / "state"
    with Open(root, engines) as state:
        state.saved()
    for name in SLOTS:
        rewritten(slot(root, name), **values)
    before = {slot(root, name).read_bytes() for name in SLOTS}
    with Open(root, engines) as state:
        assert state.loaded() == (None, [code] * 2)
        assert state.loaded() == (None, []), "told once"
    assert {path.read_bytes() for path in (root / "quarantine").iterdir()} == before


def test_the_largest_generation_is_followed_by_the_first(engines, tmp_path):
    root = tmp_path / "state"
    with Open(root, engines) as state:
        state.saved()
    rewritten(slot(root, "b.state"), generation=str(state_file.MAX_GENERATION))
    with Open(root, engines) as state:
        stream = state.stream(steps=5)
        state.store.load(stream)
        state.store.save(stream, stream.model.checkpoint, "")
        assert state.loaded() == ((5, stream.model.digest), [])
    assert not slot(root, "b.state").exists()


def test_another_method_and_another_bundle_for_real(tiny, tmp_path):
    config = {"state_dir": str(tmp_path / "state"), "checkpoint_steps": 1, "max_distance": 1e6}
    other = tmp_path / "other"
    manifest = tiny_bundle.build(other)
    arrays, _ = tensors.decode((other / "theta.safetensors").read_bytes())
    arrays["norm.bias"] = np.full(tiny_bundle.D, 0.5, np.float32)
    bundle.write_tensors(other / "theta.safetensors", arrays)
    put("theta", "digest", value=theta.digest(manifest.theta, theta.pack(manifest.theta, arrays)))(other)
    reseal(other)
    for path, method, code in (
        (tiny, "tent", None),
        (tiny, "teacher", "state-mismatch"),
        (other, "teacher", "state-of-other-bundle"),
    ):
        with running(path, method=method, **config) as server, Client(server.endpoint) as client:
            (stream,) = client.status().streams
            assert (stream.steps, stream.restored) == (0, "source")
            told = {event.reason for event in client.events().events if event.action == "quarantine"}
            assert told == ({code} if code else set())
            assert client.predict(X).adapted
            client.adapt(True, "default")


# --- the quarantine -------------------------------------------------------------------------------------


def test_the_quarantine_keeps_the_newest_and_what_others_put_there(engines, tmp_path):
    root = tmp_path / "state"
    (root / "quarantine" / "mine").mkdir(parents=True)
    (root / "quarantine" / "notes.txt").write_text("mine")
    for number in range(MAX_QUARANTINE + 5):
        with Open(root, engines) as state:
            state.saved(commits=1)
            slot(root).write_bytes(b"%d" % number)
            assert state.loaded()[1] == ["state-malformed"]
    names = sorted(path.name for path in (root / "quarantine").iterdir())
    assert names[-2:] == ["mine", "notes.txt"]
    kept = [(root / "quarantine" / name).read_bytes() for name in names[:-2]]
    assert kept == [b"%d" % number for number in range(5, MAX_QUARANTINE + 5)]


@pytest.mark.parametrize("obstacle", ["file", "link", "broken"])
def test_without_a_quarantine_the_slot_stays_until_it_is_replaced(engines, tmp_path, obstacle):
    root = tmp_path / "state"
    disk = Failing(calls=("replace",))
    with Open(root, engines, disk=disk) as state:
        digests = state.saved()
        slot(root, "b.state").write_bytes(b"rubbish")
        if obstacle == "file":
            (root / "quarantine").write_text("mine")
        elif obstacle == "link":
            (root / "quarantine").symlink_to(tmp_path)
        disk.broken = obstacle == "broken"
        with unchanged(root / "streams"):
            stream = state.stream()
            found = state.store.load(stream)
        assert "it stays where it is" in found.set_aside[0].detail
        assert state.loaded() == ((1, digests[1]), ["state-malformed"])
        disk.broken = False
        stream.answer(X)
        stream.answer(X)
        state.store.save(stream, stream.model.checkpoint, "")
        assert state.loaded() == ((2, stream.model.digest), [])


@pytest.fixture
def mounted(tmp_path):
    """Mount a file system in memory; unmounted at the end."""
    places = []

    def mount(place, options="size=2m"):
        place.mkdir(parents=True, exist_ok=True)
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, check=False
        )
        if made.returncode:
            pytest.skip("mounting a file system is not allowed here")
        places.append(place)

    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a file system")
    yield mount
    for place in reversed(places):
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_quarantine_on_another_device(engines, tmp_path, mounted):
    root = tmp_path / "state"
    mounted(root / "quarantine")
    with Open(root, engines) as state:
        digests = state.saved()
        slot(root, "b.state").write_bytes(b"rubbish")
        stream = state.stream()
        found = state.store.load(stream)
        assert "it stays where it is (Invalid cross-device link)" in found.set_aside[0].detail
        assert state.loaded()[0] == (1, digests[1])


# --- the directory itself ---------------------------------------------------------------------------------


def test_a_directory_that_is_a_file(engines, tmp_path):
    (tmp_path / "state").write_text("mine")
    with unchanged(tmp_path), pytest.raises(StateDirUnusable, match="cannot be used: Not a directory"):
        Open(tmp_path / "state", engines)
    with unchanged(tmp_path), pytest.raises(StateDirUnusable):
        Open(tmp_path / "state" / "below", engines)


@pytest.mark.parametrize(
    "obstacle", ["streams is a file", "streams is a link", "lock is a link", "lock is a pipe"]
)
def test_what_stands_in_the_way_inside(engines, tmp_path, obstacle):
    root = tmp_path / "state"
    root.mkdir()
    (tmp_path / "target").mkdir()
    if obstacle == "streams is a file":
        (root / "streams").write_text("mine")
    elif obstacle == "streams is a link":
        (root / "streams").symlink_to(tmp_path / "target")
    else:
        (root / "streams").mkdir()
        if obstacle == "lock is a link":
            (root / "lock").symlink_to(tmp_path / "target" / "file")
        else:
            os.mkfifo(root / "lock")
    with unchanged(tmp_path), pytest.raises(StateDirUnusable):
        Open(root, engines)


def test_a_link_to_the_whole_directory_is_the_operators_choice(engines, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "state").symlink_to(tmp_path / "real")
    with Open(tmp_path / "state", engines) as state:
        digests = state.saved()
    with Open(tmp_path / "real", engines) as state:
        assert state.loaded() == ((2, digests[2]), [])


def test_links_and_foreign_files_below_are_no_streams(engines, tmp_path):
    root = tmp_path / "state"
    with Open(root, engines) as state:
        state.saved("cam")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(root / "streams" / "default" / "cam", elsewhere)
    (root / "streams" / "default" / "linked").symlink_to(elsewhere)
    (root / "streams" / "bundle").symlink_to(root / "streams" / "default")
    (root / "streams" / "default" / "empty").mkdir()
    (root / "streams" / "default" / "not a name").mkdir()
    (root / "streams" / "default" / "notes.txt").write_text("mine")
    (root / "streams" / "notes.txt").write_text("mine")
    with unchanged(elsewhere), Open(root, engines) as state:
        assert state.store.keys() == [("default", "cam")]
        assert state.loaded("linked") == (None, [])
        stream = state.stream("linked", steps=1)
        with pytest.raises(StateUnwritable, match="link"):
            state.store.save(stream, stream.model.checkpoint, "")


def test_what_killed_processes_left_is_deleted_and_nothing_else(engines, tmp_path):
    root = tmp_path / "state"
    with Open(root, engines) as state:
        state.saved()
    ours = [root / ".switch.json.0123456789ab.tmp", slot(root, ".a.state.ba9876543210.tmp")]
    theirs = [root / ".mine.tmp", slot(root, "b.tmp"), root / "streams" / "default" / ".x.0123456789ab.tmp"]
    for path in ours + theirs:
        path.write_bytes(b"half")
    with Open(root, engines):
        assert [path.exists() for path in ours] == [False, False]
        assert all(path.exists() for path in theirs)


def test_two_daemons_on_one_directory(tiny, tmp_path):
    config = {"state_dir": str(tmp_path / "state"), "checkpoint_steps": 1}
    with running(tiny, **config) as server, Client(server.endpoint) as client:
        client.predict(X)
        client.adapt(True, "default")
        with (
            unchanged(tmp_path),
            pytest.raises(StateDirInUse, match="another daemon uses"),
            running(tiny, **config),
        ):
            pass
        with daemon(tiny, "--state-dir", tmp_path / "state") as second:
            assert second.wait() != 0
            assert "state-dir-in-use" in second.log[-1]
        assert client.predict(X).steps == 2
    with running(tiny, **config) as server, Client(server.endpoint) as client:
        assert client.predict(X).steps == 3


# --- the switch -------------------------------------------------------------------------------------------


def put_switch(root, content):
    path = root / "switch.json"
    if content == "directory":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif content == "dangling link":
        path.symlink_to("nowhere")
    elif content == "link":
        (root / "on.json").write_bytes(b'{"adapt":true}')
        path.symlink_to("on.json")
    else:
        path.write_bytes(content)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{}", b"{", b'{"adapt":1}', b'{"adapt":null}', b'{"adapt":true', b'{"adapt":true,"x":1}', b"\xff\xfe",
        b"[" * 4000, b" " * 5000, b"true", "directory", "pipe", "dangling link", "link",
    ],
)  # fmt: skip
def test_a_damaged_switch_counts_as_off_until_it_is_switched_on(engines, tmp_path, content):
    root = tmp_path / "state"
    root.mkdir()
    put_switch(root, content)
    with Open(root, engines) as state:
        with unchanged(root):
            assert state.store.switch() is False
        assert [(event.action, event.reason) for event in state.told] == [("switch", "start")]
        if content == "directory":
            with pytest.raises(StateUnwritable):
                state.store.save_switch(True)
        else:
            state.store.save_switch(True)
            assert state.store.switch() is True


def test_each_flipped_bit_of_the_switch_gives_off_or_what_it_was(engines, tmp_path):
    root = tmp_path / "state"
    with Open(root, engines) as state:
        assert state.store.switch() is True
        state.store.save_switch(False)
        data = (root / "switch.json").read_bytes()
        for bit in range(8 * len(data)):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            (root / "switch.json").write_bytes(damaged)
            assert state.store.switch() is False
        for length in range(len(data)):
            (root / "switch.json").write_bytes(data[:length])
            assert state.store.switch() is False


def test_the_switch_survives_a_restart_for_all_and_for_one(tiny, tmp_path):
    config = {"state_dir": str(tmp_path / "state"), "checkpoint_steps": 1}
    with running(tiny, **config) as server, Client(server.endpoint) as client:
        client.predict(X, stream="one")
        client.predict(X, stream="two")
        assert client.adapt(False, "one").durable
    with running(tiny, **config) as server, Client(server.endpoint) as client:
        assert not client.predict(X, stream="one").adapted
        assert client.predict(X, stream="two").adapted
        assert client.adapt(False).durable
    with running(tiny, **config) as server, Client(server.endpoint) as client:
        assert not client.status().adapt
        assert not client.predict(X, stream="two").adapted
        client.adapt(True)
        assert client.predict(X, stream="two").adapted
        assert not client.predict(X, stream="one").adapted


# --- bounds and order ---------------------------------------------------------------------------------------


def test_beyond_the_bound_the_least_recently_saved_is_forgotten(engines, tmp_path):
    root = tmp_path / "state"
    with Open(root, engines, max_streams=3) as state:
        for name in ("one", "two", "three", "one", "four"):
            state.saved(name, commits=1)
        assert [name for _, name in state.store.keys()] == ["four", "one", "three"]  # noqa: SIM118
        assert [(e.action, e.stream) for e in state.told] == [("forget", "two")]
        assert not slot(root, stream="two").parent.exists()
    with Open(root, engines, max_streams=3) as state:
        assert [name for _, name in state.store.keys()] == ["four", "one", "three"]  # noqa: SIM118


def test_the_order_does_not_follow_a_wall_clock_that_jumps(engines, tmp_path):
    """The files of the first stream are from ten years ahead; the others are saved after it all the same."""
    root = tmp_path / "state"
    with Open(root, engines) as state:
        state.saved("ahead", commits=1)
    ahead_s = 10 * 365 * 86400 + slot(root, stream="ahead").stat().st_mtime
    os.utime(slot(root, stream="ahead"), (ahead_s, ahead_s))
    with Open(root, engines, max_streams=2) as state:
        state.saved("one", commits=1)
        assert [name for _, name in state.store.keys()] == ["one", "ahead"]  # noqa: SIM118
        state.saved("two", commits=1)
    with Open(root, engines, max_streams=2) as state:
        assert [name for _, name in state.store.keys()] == ["two", "one"]  # noqa: SIM118


def test_what_cannot_be_forgotten_does_not_keep_others_from_being_saved(engines, tmp_path):
    disk = Failing(calls=("remove",))
    with Open(tmp_path / "state", engines, max_streams=1, disk=disk) as state:
        state.saved("one", commits=1)
        disk.broken = True
        digests = state.saved("two", commits=1)
        assert state.loaded("two") == ((1, digests[1]), [])
        assert len(state.store.keys()) == 2
        disk.broken = False
        state.saved("two", commits=1)
        assert state.store.keys() == [("default", "two")]


def test_both_slots_bring_back_two_states(engines, tmp_path):
    with Open(tmp_path / "state", engines) as state:
        stream = state.stream()
        states = []
        for _ in range(3):
            stream.answer(X)
            state.store.save(stream, stream.model.checkpoint, stream.notes())
            states.append(learnt(stream.model))
        other = state.stream()
        restored = state.store.load(other).restored
        other.resume(restored.checkpoint, restored.notes, before=restored.before, restored=restored.slot)
        assert learnt(other.model) == states[2]
        assert other.roll_back()
        assert learnt(other.model) == states[1]


# --- disks that really are full, or read-only ---------------------------------------------------------------


def fill(path):
    with open(path, "wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(4096))


def test_a_disk_that_really_is_full(tiny, tmp_path, mounted):
    root = tmp_path / "state"
    mounted(root)
    config = {"state_dir": str(root), "checkpoint_steps": 2, "max_distance": 1e6}
    with running(tiny, **config) as server, Client(server.endpoint) as client:
        for _ in range(4):
            client.predict(X)
        assert client.adapt(True, "default").durable
        before = files(root / "streams")
        fill(root / "ballast")
        assert not client.adapt(True, "default").durable
        assert [client.predict(X).steps for _ in range(6)] == [5, 6, 7, 8, 9, 10]
        assert "No space left" in client.status().disk_error
        assert files(root / "streams") == before
        (root / "ballast").unlink()
        assert client.adapt(True, "default").durable
        assert client.status().disk_error == ""
        last = client.predict(X).theta_digest
    with running(tiny, **config) as server, Client(server.endpoint) as client:
        assert client.status().streams[0].theta_digest == last


def remount(place, how):
    subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True)


def test_a_file_system_that_becomes_read_only(tiny, tmp_path, mounted):
    """Only below `streams`: with the lock open, the system refuses to do it to the whole."""
    root = tmp_path / "state"
    mounted(root)
    mounted(root / "streams")
    config = {"state_dir": str(root), "checkpoint_steps": 2, "max_distance": 1e6}
    with running(tiny, **config) as server, Client(server.endpoint) as client:
        client.predict(X)
        assert client.adapt(True, "default").durable
        remount(root / "streams", "ro")
        with unchanged(root / "streams"):
            assert not client.adapt(True, "default").durable
            assert "Read-only file system" in client.status().disk_error
            assert [client.predict(X).steps for _ in range(4)] == [2, 3, 4, 5]
            client.reset()
            assert client.predict(X).steps == 1
        remount(root / "streams", "rw")
        assert client.adapt(True, "default").durable
        assert client.status().disk_error == ""
        last = client.predict(X).theta_digest
    with running(tiny, **config) as server, Client(server.endpoint) as client:
        assert client.status().streams[0].theta_digest == last
    remount(root, "ro")
    with (
        unchanged(root),
        pytest.raises(StateDirUnusable, match="Read-only file system"),
        running(tiny, **config),
    ):
        pass


def test_files_limited_in_size(tiny, tmp_path):
    """Without root: the process may write only 1000 bytes to any file, as on a disk with a quota."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from tta_edge.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    command = [
        sys.executable, "-c", code, "serve", str(tiny), "--bind", "tcp://127.0.0.1:0",
        "--state-dir", str(tmp_path / "state"), "--checkpoint-steps", "1", "--ready-file", str(tmp_path / "ready"),
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=process_environment()) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "ready tcp" in line)
        with Client(line.split()[-1]) as client:
            assert client.predict(X).adapted
            assert not client.adapt(True, "default").durable
            assert "File too large" in client.status().disk_error
            assert client.predict(X).adapted
        process.terminate()
        process.stderr.read()
        assert process.wait(PATIENCE_S) == 0
    assert not [path for path in (tmp_path / "state").rglob("*") if "state" in path.suffixes]


def test_reset_and_rollback_say_whether_a_restart_finds_them(tiny, tmp_path):
    with running(tiny) as server, Client(server.endpoint) as client:
        client.predict(X)
        assert client.reset().durable, "without a directory a restart is a reset"
        assert client.rollback().durable
    disk = Failing()
    settings = {"state_dir": str(tmp_path / "state"), "checkpoint_steps": 1}
    with running(tiny, disk=disk, **settings) as server, Client(server.endpoint) as client:
        for _ in range(3):
            client.predict(X)
        assert client.rollback().durable
        disk.broken = True
        client.predict(X)
        assert not client.rollback().durable
        disk.broken = False
