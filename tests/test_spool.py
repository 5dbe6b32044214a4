"""The spool: its format against all damage, its bounds, its restarts, and the commands beside a daemon."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import stat
import struct
import subprocess
import sys
import threading

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tiny_bundle
from disks import Unsynced
from running import process_environment, run_cli, running
from tta_edge.errors import SampleRefused, SpoolDamaged, SpoolUnwritable
from tta_edge.spool import Spool, saved_counters
from tta_edge.spool_acks import COMPACT_BYTES
from tta_edge.spool_directory import ack_files, batches, discard, rewriting, survey
from tta_edge.spool_file import (
    DTYPES,
    HEAD_BYTES,
    MAX_SAMPLE_BYTES,
    Sample,
    decode_file,
    decode_record,
    encode_file,
    encode_record,
)
from tta_runtime.exit_codes import ExitCode

EXAMPLES = int(os.environ.get("TTA_EXAMPLES", "300"))
NONCE = bytes(range(16))


def sample(i=0, stream="cam1", side=4, **more):
    x = np.random.default_rng(i).random((3, side, side)).astype(np.float32)
    made = Sample.of(x, stream=stream, taken_ms=1_000_000 + i, seq=i % 7, entropy=0.5 + i / 1000)
    return dataclasses.replace(made, **more)


def equal(a, b):
    return dataclasses.astuple(a) == dataclasses.astuple(b)


def opened(path, **more):
    return Spool(path / "spool", disk=Unsynced(), **more)


def waiting(spool, **more):
    return spool.peek(10**6, **more)


def listing(path):
    return sorted(each.name for each in path.iterdir())


# --- the format -------------------------------------------------------------------------------------

samples = st.builds(
    lambda stream, taken, seq, entropy, dtype, shape, jpeg, fill: (
        Sample(stream, taken, seq, entropy, "uint8", shape, b"\xff\xd8" + fill, "jpeg")
        if jpeg
        else Sample(stream, taken, seq, entropy, dtype, shape, (fill + b"\0") * int(np.prod(shape)) * 8)
    ),
    st.text("abcXYZ019_-.", max_size=20).map(lambda name: f"s{name}"),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**63 - 1),
    st.floats(0, 100),
    st.sampled_from(DTYPES),
    st.lists(st.integers(1, 4), max_size=3).map(tuple),
    st.booleans(),
    st.binary(max_size=9),
).map(
    lambda made: (
        made
        if made.encoding == "jpeg"
        else dataclasses.replace(
            made, data=made.data[: int(np.prod(made.shape)) * np.dtype(made.dtype).itemsize]
        )
    )
)


@settings(max_examples=EXAMPLES, deadline=None)
@given(samples, st.integers(0, 2**63 - 1), st.binary(min_size=16, max_size=16), st.binary(max_size=40))
def test_a_record_comes_back_as_it_was(made, number, nonce, more):
    key, data = encode_record(made, number, nonce)
    record = decode_record(more + data + more, len(more))
    assert equal(record.sample, made)
    assert (record.key, record.number, record.offset, record.length) == (key, number, len(more), len(data))
    assert len(bytes.fromhex(key)) == 16


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.binary(max_size=400))
@example(b"")
@example(struct.pack("<II", 2**32 - 1, 2**32 - 1) + bytes(100))
@example(bytes(40))
def test_arbitrary_bytes_are_refused_by_name(data):
    with pytest.raises(SpoolDamaged):
        decode_record(data)
    records, damaged = decode_file(data)
    assert records == []
    assert damaged >= 1


@st.composite
def mutations(draw, data):
    """The bytes after a single change."""
    at = draw(st.integers(0, len(data) - 1))
    kind = draw(st.sampled_from(["flip", "cut", "leave out", "put in", "zeros", "append"]))
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
    if kind in ("put in", "append"):
        at = len(data) if kind == "append" else at
        return data[:at] + draw(st.binary(min_size=1, max_size=9)) + data[at:]
    return data[:at] + {"cut": b"", "leave out": data[at + 1 :], "zeros": bytes(len(data) - at)}[kind]


RECORDS = [encode_record(sample(i, side=2), i, NONCE) for i in range(5)]
FILE = b"".join(encode_file([data for _, data in RECORDS]))


@settings(max_examples=EXAMPLES, deadline=None)
@given(mutations(RECORDS[0][1]))
def test_a_changed_record_is_refused_or_is_the_same(changed):
    key, _ = RECORDS[0]
    try:
        record = decode_record(changed)
    except SpoolDamaged:
        return
    assert record.key == key
    assert equal(record.sample, sample(0, side=2))


@settings(max_examples=EXAMPLES, deadline=None)
@given(mutations(FILE))
def test_a_changed_file_gives_only_what_was_written_and_counts_the_rest(changed):
    records, damaged = decode_file(changed)
    keys = [key for key, _ in RECORDS]
    found = [record.key for record in records]
    assert found == [key for key in keys if key in found], "in their order, none twice"
    for record in records:
        assert equal(record.sample, sample(record.number, side=2))
    assert damaged >= (changed != FILE)
    if changed[:HEAD_BYTES] == FILE[:HEAD_BYTES]:
        assert damaged >= 5 - len(records)


def test_a_flipped_payload_costs_one_record():
    for i, (key, _) in enumerate(RECORDS):
        start = HEAD_BYTES + sum(len(data) for _, data in RECORDS[:i])
        at = start + len(RECORDS[i][1]) - 1
        records, damaged = decode_file(FILE[:at] + bytes([FILE[at] ^ 1]) + FILE[at + 1 :])
        assert damaged == 1
        assert key not in {record.key for record in records}
        assert len(records) == 4


BAD = {
    "entropy nan": {"entropy": float("nan")},
    "entropy inf": {"entropy": float("inf")},
    "entropy negative": {"entropy": -0.1},
    "stream": {"stream": "../up"},
    "no stream": {"stream": ""},
    "time": {"taken_ms": -1},
    "seq": {"seq": 2**63},
    "dtype": {"dtype": "object"},
    "shape": {"shape": (3, 4, 5)},
    "negative shape": {"shape": (-1,)},
    "dimensions": {"shape": (1,) * 9},
    "nothing": {"data": b"", "shape": (0,)},
    "encoding": {"encoding": "png"},
    "jpeg of floats": {"encoding": "jpeg"},
    "too large": {"data": bytes(MAX_SAMPLE_BYTES + 4), "shape": (MAX_SAMPLE_BYTES // 4 + 1,)},
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_sample_is_refused_and_leaves_no_trace(tmp_path, name):
    spool = opened(tmp_path)
    spool.append(sample(1))
    before = listing(spool.directory)
    with pytest.raises(SampleRefused):
        spool.append_many([sample(2), sample(3, **BAD[name])])
    assert listing(spool.directory) == before
    assert len(spool) == 1


@pytest.mark.parametrize("name", [name for name in BAD if name != "too large"])
def test_a_header_that_breaks_the_rules_is_refused_though_its_checksum_is_right(name):
    """As another version, or an attacker with access to the disk, could write it."""
    from tta_edge.spool_file import _digest

    made = sample(0, **BAD[name])
    fields = {**dataclasses.asdict(made), "number": 0, "nonce": NONCE}
    payload = fields.pop("data")
    header = msgspec.msgpack.encode(fields)
    lengths = struct.pack("<II", len(header), len(payload))
    with pytest.raises(SpoolDamaged, match="the record at byte 0: "):
        decode_record(lengths + _digest(lengths, header, payload) + header + payload)


def test_arrays_and_jpegs_come_back():
    for x in (
        np.float32(3.5),
        np.arange(6, dtype=">i2").reshape(2, 3),
        np.ones((2, 2), np.float16)[:, ::-1],
    ):
        made = Sample.of(np.asarray(x), stream="s", taken_ms=0, seq=0, entropy=0.0)
        back = decode_record(encode_record(made, 0, NONCE)[1]).sample.array()
        assert back.shape == np.shape(x)
        assert (back == x).all()
    jpeg = Sample("s", 0, 0, 0.0, "uint8", (3, 8, 8), b"\xff\xd8rest", "jpeg")
    assert decode_record(encode_record(jpeg, 0, NONCE)[1]).sample.array().tobytes() == b"\xff\xd8rest"


# --- the queue --------------------------------------------------------------------------------------


def test_samples_come_in_order_and_stay_until_they_are_removed(tmp_path):
    spool = opened(tmp_path)
    keys = [spool.append(sample(0)), *spool.append_many([sample(i) for i in range(1, 150)])]
    assert len(set(keys)) == 150
    assert [each.key for each in waiting(spool)] == keys
    assert all(equal(each.sample, sample(i)) for i, each in enumerate(waiting(spool)))
    assert [each.key for each in spool.peek(3)] == keys[:3]
    assert [each.key for each in spool.peek(3, skip=set(keys[:2]))] == keys[2:5]
    nbytes = len(sample().data)
    assert len(spool.peek(10, nbytes * 4)) == 4
    assert len(spool.peek(10, 1)) == 1, "else a sample larger than this would block the queue for ever"
    assert spool.peek(0) == []
    assert spool.remove([keys[1], keys[100], "0" * 32, "no key"]) == 2
    assert [each.key for each in waiting(spool)] == [k for k in keys if k not in (keys[1], keys[100])]
    assert spool.remove(keys) == 148
    assert waiting(spool) == []
    assert (len(spool), spool.nbytes, spool.streams()) == (0, 0, {})
    assert batches(spool.directory) == []


def test_everything_is_there_after_a_restart_and_what_was_removed_is_not(tmp_path):
    keys, gone = [], []
    for round_ in range(8):
        spool = opened(tmp_path)
        assert [each.key for each in waiting(spool)] == keys
        added = spool.append_many([sample(i + round_, stream=f"cam{i % 3}") for i in range(20)])
        keys += added
        gone += (removed := keys[round_ :: 3 + round_])
        spool.remove(removed)
        keys = [key for key in keys if key not in removed]
        assert sum(spool.streams().values()) == len(keys)
        if round_ % 2:
            spool.close()  # a kill does the same
    assert not set(keys) & set(gone)
    found = survey(tmp_path / "spool")
    assert found.total.samples == len(keys)
    assert found.total.oldest_ms is not None


def test_equal_samples_have_different_keys_over_restarts_and_spools(tmp_path):
    keys = set()
    for name in ("a", "b"):
        for _ in range(3):
            spool = opened_at(tmp_path / name)
            keys |= set(spool.append_many([sample(0)] * 5))
            spool.remove([each.key for each in waiting(spool)])
    assert len(keys) == 30


def opened_at(path):
    path.mkdir(exist_ok=True)
    return opened(path)


def test_files_are_for_their_owner_only(tmp_path):
    before = os.umask(0)
    try:
        spool = opened(tmp_path, max_samples=3)
        keys = [spool.append(sample(i)) for i in range(5)]
        spool.append_many([sample(i) for i in range(2)])
        spool.remove(keys[-1:])
    finally:
        os.umask(before)
    assert stat.S_IMODE(spool.directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(each.stat().st_mode) for each in spool.directory.iterdir()} == {0o600}


def test_the_bounds_hold_and_the_oldest_are_dropped_and_counted_over_restarts(tmp_path):
    told = []
    size = len(encode_record(sample(), 0, NONCE)[1])
    for bounds in ({"max_samples": 40}, {"max_bytes": 42 * size}, {"max_samples": 9, "max_bytes": 10**9}):
        path = tmp_path / str(len(told))
        path.mkdir()
        appended = []
        for _ in range(3):
            spool = opened(path, tell=told.append, **bounds)
            for i in range(30):
                appended += spool.append_many([sample(i)] * (1 + i % 3))
                assert len(spool) <= bounds.get("max_samples", 10**9)
                on_disk = sum(size for _, _, size in batches(spool.directory))
                assert spool.nbytes == on_disk <= bounds.get("max_bytes", 10**9)
            found = [each.key for each in waiting(spool)]
            assert found == appended[-len(found) :], "the newest stay"
            assert len(found) >= bounds.get("max_samples", 40) * 0.75
            assert spool.counters.dropped == len(appended) - len(found)
        told.append(None)
    events = [each for each in told if each]
    assert {each.reason for each in events} == {"spool-full"}
    assert len(events) == 9, "once each time it begins"


def test_bounds_that_were_lowered_hold_from_the_start(tmp_path):
    opened(tmp_path).append_many([sample(i) for i in range(300)])
    spool = opened(tmp_path, max_samples=100)
    assert 30 < len(spool) <= 100
    assert spool.counters.dropped == 300 - len(spool)


def test_a_sample_larger_than_the_spool_is_refused(tmp_path):
    spool = opened(tmp_path, max_bytes=1000)
    spool.append(sample(side=2))
    with pytest.raises(SampleRefused, match="the spool at most 1000"):
        spool.append(sample(side=20))
    assert len(spool) == 1
    assert spool.counters.dropped == 0


def test_the_directory_has_a_bound_over_many_restarts(tmp_path):
    for i in range(60):
        spool = opened(tmp_path, max_samples=20)
        keys = spool.append_many([sample(i), sample(i + 1), sample(i + 2)])
        spool.remove(keys[1:2])
        assert len(ack_files(spool.directory)) <= 1
    assert len(listing(tmp_path / "spool")) <= 20 + 3


def test_acknowledged_keys_have_a_bound_though_one_sample_stays_for_ever(tmp_path):
    spool = opened(tmp_path)
    stays = spool.append_many([sample(0, side=1), sample(1, side=1)])
    spool.remove(stays[1:])
    for _ in range(COMPACT_BYTES // 16 // 60 + 5):
        keys = spool.append_many([sample(1, side=1)] * 61)
        spool.remove(keys[:60])
        (file,) = ack_files(spool.directory)
        spool.remove(keys[60:])
    assert file.stat().st_size <= COMPACT_BYTES + 16 * 64
    assert [each.key for each in waiting(opened(tmp_path))] == stays[:1]


@pytest.mark.parametrize("place", ["file", "link", "no parent"])
def test_a_directory_that_cannot_be_is_told(tmp_path, place):
    path = tmp_path / "spool"
    if place == "file":
        path.write_text("")
    elif place == "link":
        path.symlink_to(tmp_path)
    else:
        path = tmp_path / "a" / "b"
    before = listing(tmp_path)
    with pytest.raises(SpoolUnwritable):
        Spool(path)
    assert listing(tmp_path) == before


def test_several_threads_use_it_at_once(tmp_path):
    spool = opened(tmp_path)
    taken, added = [], []
    done = threading.Event()

    def put():
        for i in range(40):
            added.extend(spool.append_many([sample(i)] * 3))

    def take():
        while not (done.is_set() and not len(spool)):
            keys = [each.key for each in spool.peek(5)]
            taken.extend(keys)
            spool.remove(keys)

    threads = [threading.Thread(target=put) for _ in range(3)]
    taker = threading.Thread(target=take)
    for thread in (*threads, taker):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    taker.join()
    assert sorted(taken) == sorted(added)


# --- damage -----------------------------------------------------------------------------------------


def filled(path):
    spool = opened(path)
    keys = []
    for i in range(3):
        keys += spool.append_many([sample(10 * i + j, side=2) for j in range(5)])
    spool.remove([*keys[:2], keys[6]])
    return keys


@pytest.mark.parametrize("kind", ["flip", "cut", "zeros"])
def test_every_file_damaged_at_each_percent_costs_little_and_stops_nothing(tmp_path, kind):
    tried = 0
    template = tmp_path / "template"
    template.mkdir()
    keys = filled(template)
    opened(template, max_samples=12).append(sample(99, side=2))  # so that there are counters
    original = {p.name: p.read_bytes() for p in (template / "spool").iterdir()}
    assert {name[:4] for name in original} >= {"0000", "acks", "coun"}
    everything = {each.key: each.sample for each in waiting(opened(template))}
    original = {p.name: p.read_bytes() for p in (template / "spool").iterdir()}
    for name, data in original.items():
        for at in sorted({len(data) * percent // 100 for percent in range(100)} if data else ()):
            spoilt = {
                "flip": data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :],
                "cut": data[:at],
                "zeros": data[:at] + bytes(len(data) - at),
            }[kind]
            path = tmp_path / f"{tried}"
            (path / "spool").mkdir(parents=True)
            for other, content in original.items():
                (path / "spool" / other).write_bytes(spoilt if other == name else content)
            told = []
            spool = opened(path, tell=told.append)
            found = {each.key: each.sample for each in waiting(spool)}
            for key, made in found.items():
                if key in everything:
                    assert equal(made, everything[key])
                else:
                    assert name.startswith("acks"), "only an acknowledgement can be lost"
                    assert key in keys
            lost = everything.keys() - found.keys()
            if name.endswith(".batch"):
                assert len(lost) <= 5
                changed = spoilt != data
                least = len(lost) if at >= HEAD_BYTES else 1  # the head says how many there were
                assert (spool.counters.damaged >= max(1, least)) == changed
                assert bool(told) == changed
            else:
                assert not lost
            # It works, and what was found damaged is not found again.
            key = spool.append(sample(5, side=2))
            damaged = spool.counters.damaged
            spool = opened(path)
            assert [each.key for each in waiting(spool)] == [*found, key]
            assert spool.counters.damaged == damaged
            tried += 1
    print(f"{kind}: {tried} damaged files")
    assert tried > 300


def test_damage_under_a_running_daemon_is_left_out_and_counted(tmp_path):
    told = []
    spool = opened(tmp_path, tell=told.append)
    keys = spool.append_many([sample(i) for i in range(5)])
    more = spool.append_many([sample(i) for i in range(5)])
    ((_, path, _), _) = batches(spool.directory)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert [each.key for each in waiting(spool)] == [*keys[:4], *more]
    assert (len(spool), spool.counters.damaged) == (9, 1)
    assert [each.reason for each in told] == ["spool-damaged"]
    path.write_bytes(b"nothing of it")
    assert [each.key for each in waiting(spool)] == more
    assert len(spool) == 5
    assert spool.nbytes == sum(size for _, _, size in batches(spool.directory))
    assert [each.key for each in waiting(opened(tmp_path))] == more


def test_what_is_not_ours_is_left_alone_and_nothing_is_followed(tmp_path):
    spool = opened(tmp_path)
    key = spool.append(sample())
    (tmp_path / "elsewhere").write_bytes(FILE)
    (spool.directory / f"{77:016d}.batch").symlink_to(tmp_path / "elsewhere")
    (spool.directory / f"{78:016d}.batch").mkdir()
    os.mkfifo(spool.directory / f"{79:016d}.batch")
    (spool.directory / "notes.txt").write_text("mine")
    (spool.directory / ".0000000000000000.batch.0123456789ab.tmp").write_bytes(FILE)
    again = opened(tmp_path)
    assert [each.key for each in waiting(again)] == [key]
    assert "notes.txt" in listing(spool.directory)
    assert not [name for name in listing(spool.directory) if name.endswith(".tmp")]
    assert (tmp_path / "elsewhere").read_bytes() == FILE


def test_a_file_that_cannot_be_read_now_is_read_at_the_next_start(tmp_path, monkeypatch):
    """As with too many open files: nothing may be deleted because of it."""
    spool = opened(tmp_path)
    keys = [spool.append(sample(i)) for i in range(3)]
    with monkeypatch.context() as patch:

        def refuse(path):
            raise OSError(errno.EMFILE, "Too many open files", str(path))

        patch.setattr("tta_edge.spool.read_batch", refuse)
        blind = opened(tmp_path)
        assert len(blind) == 0
        assert blind.nbytes == spool.nbytes
        keys.append(blind.append(sample(3)))
    assert [each.key for each in waiting(opened(tmp_path))] == keys


# --- removing beside a daemon -----------------------------------------------------------------------


def test_a_running_spool_notices_what_was_removed_beside_it(tmp_path):
    spool = opened(tmp_path)
    keys = spool.append_many([sample(i, stream=f"cam{i % 2}") for i in range(6)])
    more = spool.append_many([sample(i, stream="cam1") for i in range(3)])
    spool.remove(keys[:1])
    gone = discard(spool.directory, lambda name: name == "cam1")
    assert {name: tally.samples for name, tally in gone.streams.items()} == {"cam1": 6}
    assert gone.files == 1
    assert [each.key for each in waiting(spool)] == keys[2::2]
    assert (len(spool), spool.counters.damaged, spool.counters.dropped) == (2, 0, 0)
    assert spool.remove(more) == 0
    assert [each.key for each in waiting(opened(tmp_path))] == keys[2::2]
    discard(spool.directory, lambda name: True)
    assert waiting(spool) == []
    assert spool.nbytes == 0
    key = spool.append(sample())
    assert [each.key for each in waiting(opened(tmp_path))] == [key]


def test_what_was_removed_beside_it_does_not_count_as_dropped(tmp_path):
    spool = opened(tmp_path, max_samples=10)
    for i in range(10):
        spool.append(sample(i))
    discard(spool.directory, lambda name: True)
    spool.append(sample())
    assert spool.counters.dropped == 0


@pytest.fixture
def edge(capsys):
    """`tta-edge ARGUMENTS` in this process: exit status, stdout, stderr."""
    from tta_edge.cli import main

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(each) for each in arguments])
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return run


def test_ls_and_rm(tmp_path, edge):
    assert edge("spool", "ls", tmp_path)[:2] == (0, f"0 samples, 0 bytes wait in {tmp_path / 'spool'}\n")
    assert edge("spool", "rm", tmp_path, "--all")[:2] == (
        0, f"removed 0 samples, 0 bytes from {tmp_path / 'spool'}\n",
    )  # fmt: skip
    assert listing(tmp_path) == []
    spool = opened(tmp_path, max_samples=8)
    for i in range(10):
        spool.append(sample(i, stream=f"cam{i % 2}"))
    nbytes = len(sample().data)
    code, out, _ = edge("spool", "ls", "--state-dir", tmp_path)
    assert code == 0
    assert f"8 samples, {8 * nbytes} bytes, oldest 1970-01-01T00:16:40+00:00 wait in" in out
    assert f"  cam1: 4 samples, {4 * nbytes} bytes, oldest" in out
    assert "2 were dropped" in out
    before = {p.name: p.read_bytes() for p in spool.directory.iterdir()}
    code, out, _ = edge("spool", "ls", tmp_path, "--json")
    form = json.loads(out)
    assert {key: form[key] for key in ("samples", "bytes", "oldest_ms", "damaged", "dropped_before")} == {
        "samples": 8, "bytes": 8 * nbytes, "oldest_ms": 1_000_002, "damaged": 0, "dropped_before": 2,
    }  # fmt: skip
    assert {p.name: p.read_bytes() for p in spool.directory.iterdir()} == before
    code, out, _ = edge("spool", "rm", tmp_path, "--stream", "cam1")
    assert code == 0
    assert f"removed 4 samples, {4 * nbytes} bytes" in out
    assert {each.sample.stream for each in waiting(spool)} == {"cam0"}
    (spool.directory / ".x.batch.0123456789ab.tmp").write_bytes(b"half a sample")
    form = json.loads(edge("spool", "rm", "--state-dir", tmp_path, "--all", "--json")[1])
    assert form["samples"] == 4
    assert not [name for name in listing(spool.directory) if name.endswith((".batch", ".tmp"))]
    assert saved_counters(spool.directory).dropped == 2


@pytest.mark.parametrize(
    "arguments",
    [["ls"], ["ls", "/nowhere/at/all"], ["rm", "."], ["rm", ".", "--all", "--stream", "x"], ["rm", "--all"]],
)
def test_wrong_usage_ends_with_2_and_says_what_to_do(edge, arguments):
    code, _, told = edge("spool", *arguments)
    assert code == ExitCode.USAGE
    assert told.startswith("error (bad-value): ")


def test_rm_while_another_rewrites_ends_with_3_and_changes_nothing(tmp_path, edge):
    spool = opened(tmp_path)
    key = spool.append(sample())
    with rewriting(spool.directory):
        code, _, told = edge("spool", "rm", tmp_path, "--all")
    assert code == ExitCode.UNAVAILABLE
    assert told.startswith("error (spool-in-use): ")
    assert [each.key for each in waiting(spool)] == [key]


def test_rm_beside_a_running_daemon_leaves_its_half_written_files(tmp_path):
    bundle = tmp_path / "bundle"
    tiny_bundle.build(bundle)
    state = tmp_path / "state"
    with running(bundle, state_dir=str(state)):
        spool = opened(state)
        spool.append(sample())
        half = spool.directory / ".x.batch.0123456789ab.tmp"
        half.write_bytes(b"being written")
        assert json.loads(run_cli("spool", "ls", state, "--json").stdout)["samples"] == 1
        done = run_cli("spool", "rm", state, "--all")
        assert (done.returncode, done.stdout.split(" from ")[0][:16]) == (0, "removed 1 sample")
        assert half.exists()
        assert waiting(spool) == []
    assert run_cli("spool", "rm", state, "--all").returncode == 0
    assert not half.exists()


def test_many_threads_of_rm_and_a_busy_spool_agree(tmp_path):
    """rm in other processes while samples come and go: every other sample comes through, whole."""
    spool = opened(tmp_path)
    code = (
        "import sys; from pathlib import Path; from tta_edge.spool_directory import discard\n"
        "print('on', flush=True)\n"
        "from tta_edge.errors import SpoolInUse\n"
        "import contextlib\n"
        "for _ in range(30):\n"
        "    with contextlib.suppress(SpoolInUse): discard(Path(sys.argv[1]), lambda name: name == 'secret')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(spool.directory)],
        stdout=subprocess.PIPE,
        env=process_environment(),
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        kept, taken = [], []
        while other.poll() is None:
            keys = spool.append_many([sample(0, stream=("secret", "open")[i % 2]) for i in range(6)])
            kept += keys[1::2]
            for each in spool.peek(12):
                if each.sample.stream == "open":
                    taken.append(each.key)
                spool.remove([each.key])
    assert other.returncode == 0
    taken += [each.key for each in waiting(spool) if each.sample.stream == "open"]
    assert taken == kept
    assert (spool.counters.damaged, spool.counters.dropped) == (0, 0)


def test_the_lock_is_one_that_other_programs_see(tmp_path):
    spool = opened(tmp_path)
    with rewriting(spool.directory), open(spool.directory / "lock") as file, pytest.raises(OSError):  # noqa: PT011
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
