"""The cloud's store: group commit, samples, learners, edges, tokens, and what stands in the way."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_records import (
    AT_ONCE,
    EDGE,
    OTHER,
    Acknowledged,
    Kept,
    contents,
    key,
    options,
    patch,
    sample,
    unused,
)
from disks import Failing
from running import PATIENCE_S, process_environment
from snapshots import files
from tta_cloud import edges, learners, ledger, samples, schema
from tta_cloud.errors import (
    BadRecord,
    DamagedRecord,
    EdgeExists,
    EdgeRevoked,
    Internal,
    SampleTooLarge,
    StaleLearner,
    StoreBusy,
    StoreClosed,
    StoreDamaged,
    StoreFull,
    StoreInUse,
    StoreTooNew,
    StoreUnusable,
    TokenExpired,
    TokenUsed,
    UnknownEdge,
    UnknownToken,
)
from tta_cloud.operations import Operation
from tta_cloud.records import seal
from tta_cloud.samples import Caps, Quota
from tta_cloud.store import FILE, Store, StoreOptions
from tta_cloud.writer import GroupCommit


@pytest.fixture
def root(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def kept(root):
    with Kept(root) as store:
        yield store


def sql(root, statement, *values):
    """Change the file behind the store's back."""
    db = sqlite3.connect(root / FILE)
    with db:
        rows = db.execute(statement, values).fetchall()
    db.close()
    return rows


# --- commits ----------------------------------------------------------------------------------------


class Gate:
    """A fail point at which the writer waits until it is let through.

    Attributes:
        reached: released each time the writer comes to it.
        commits: how many commits were made.
    """

    def __init__(self, at="commit.before"):
        self.at = at
        self.commits = 0
        self.reached = threading.Semaphore(0)
        self.through = threading.Semaphore(0)

    def __call__(self, point):
        self.commits += point == "commit.after"
        if point == self.at:
            self.reached.release()
            assert self.through.acquire(timeout=PATIENCE_S)


@contextmanager
def gated(root, **commit):
    gate = Gate()
    with Kept(
        root, StoreOptions(commit=GroupCommit(**{"linger_s": 0.0, **commit})), fail_point=gate
    ) as store:
        try:
            yield store, gate
        finally:
            for _ in range(1000):
                gate.through.release()


def test_what_comes_during_a_commit_shares_the_next_one(root):
    told = Acknowledged()
    with gated(root) as (store, gate):
        store.submit(samples.insert(sample(0), received_ms=1), told)
        assert gate.reached.acquire(timeout=PATIENCE_S)
        for number in range(1, 101):
            store.submit(samples.insert(sample(number), received_ms=1), told)
        assert told.outcomes == [], "nothing is acknowledged before its commit"
        assert store.unused() == []
        gate.through.release()
        assert gate.reached.acquire(timeout=PATIENCE_S)
        assert len(told.wait(1)) == 1
        assert store.unused() == [key(0)]
        gate.through.release()
        assert gate.reached.acquire(timeout=PATIENCE_S)
        assert len(told.wait(65)) == 65, "64 operations share a commit"
        gate.through.release()
        assert [o.get() for o in told.wait(101)] == ["stored"] * 101
        assert gate.commits == 3
        assert store.unused() == [key(n) for n in range(101)]


def test_a_commit_waits_for_others_no_longer_than_it_may(root):
    """By a clock of the test's own: the writer looks at it, and at nothing else."""
    told = Acknowledged()
    with Kept(root, StoreOptions(commit=GroupCommit(max_rows=3, linger_s=PATIENCE_S))) as store:
        for number in range(3):  # the third one makes the group full, and ends the waiting
            store.submit(samples.insert(sample(number), received_ms=1), told)
        assert len(told.wait(3)) == 3
        store.submit(samples.insert(sample(3), received_ms=1), told)
    assert len(told.outcomes) == 4, "closing commits what lingers"


def test_bytes_bound_a_commit_and_the_queue(root):
    told = Acknowledged()
    with gated(root, max_bytes=1000, max_waiting_bytes=1500) as (store, gate):
        store.submit(samples.insert(sample(0), received_ms=1), told)
        assert gate.reached.acquire(timeout=PATIENCE_S)
        for number in (1, 2):
            store.submit(samples.insert(sample(number, size=700), received_ms=1), told)
        with pytest.raises(StoreBusy, match="2 operations of 1400 bytes wait") as caught:
            store.submit(samples.insert(sample(3, size=700), received_ms=1), told)
        assert caught.value.retry_after_s > 0
        for _ in range(3):
            gate.through.release()
        assert len(told.wait(3)) == 3
        assert gate.commits == 3, "each of the large ones has a commit of its own"


def test_a_full_queue_is_busy_and_takes_more_later(root):
    told = Acknowledged()
    with gated(root, max_waiting=5) as (store, gate):
        store.submit(samples.insert(sample(0), received_ms=1), told)
        assert gate.reached.acquire(timeout=PATIENCE_S)
        for number in range(1, 6):
            store.submit(samples.insert(sample(number), received_ms=1), told)
        with pytest.raises(StoreBusy, match="at most 5"):
            store.submit(samples.insert(sample(6), received_ms=1), told)
        gate.through.release()
        gate.through.release()
        assert len(told.wait(6)) == 6
        gate.through.release()
        store.call(samples.insert(sample(6), received_ms=1))
        assert store.unused() == [key(n) for n in range(7)]


def test_one_that_refuses_leaves_no_trace_and_the_others_are_committed(root):
    told = Acknowledged()

    def half(db):
        samples.insert(sample(50), received_ms=1).run(db)
        raise defect

    with gated(root) as (store, gate):
        store.submit(samples.insert(sample(0), received_ms=1), told)
        assert gate.reached.acquire(timeout=PATIENCE_S)
        refusals = (
            StaleLearner("no"), ValueError("a defect"), OverflowError("large"), sqlite3.IntegrityError("twice"),
            sqlite3.ProgrammingError("wrong"),
        )  # fmt: skip
        for number, defect in enumerate(refusals, 1):
            store.submit(samples.insert(sample(number), received_ms=1), told)
            store.submit(
                Operation(
                    "half",
                    lambda db, defect=defect: (
                        samples.insert(sample(50), received_ms=1).run(db),
                        raised(defect),
                    ),
                ),
                told,
            )
        for _ in range(100):
            gate.through.release()
        outcomes = told.wait(11)
        assert [type(o.error) for o in outcomes[2::2]] == [
            StaleLearner,
            Internal,
            BadRecord,
            BadRecord,
            Internal,
        ]
        assert [o.get() for o in outcomes[1::2]] == ["stored"] * 5
        assert store.unused() == [key(n) for n in range(6)]
        assert half is not None


def raised(error):
    raise error


def test_a_defect_in_who_is_told_does_not_stop_the_writer(kept):
    ended = threading.Event()

    def broken(_):
        ended.set()
        raise ValueError("a defect")

    kept.submit(samples.insert(sample(0), received_ms=1), broken)
    assert ended.wait(PATIENCE_S)
    assert kept.insert(1) == ["stored"]


def test_closing_commits_what_waits_and_refuses_the_rest(root):
    told = Acknowledged()
    store = Store(root, lambda _: None)
    for number in range(200):
        store.submit(samples.insert(sample(number), received_ms=1), told)
    store.close()
    assert len(told.outcomes) == 200
    with pytest.raises(StoreClosed):
        store.submit(samples.insert(sample(200), received_ms=1), told)
    with pytest.raises(StoreClosed):
        store.read(lambda db: unused(db, "g", 1))
    assert sorted(p.name for p in root.iterdir()) == [FILE, "lock"], "the WAL is folded in"
    with Kept(root) as again:
        assert len(again.unused()) == 200


def test_the_writers_thread_cannot_wait_for_itself(kept):
    caught = []
    ended = threading.Event()

    def wait(_):
        try:
            kept.call(samples.insert(sample(1), received_ms=1))
        except Internal as error:
            caught.append(error)
        ended.set()

    kept.submit(samples.insert(sample(0), received_ms=1), wait)
    assert ended.wait(PATIENCE_S)
    assert "wait for itself" in caught[0].cause


def test_many_threads_write_and_read_at_once(root):
    with Kept(root, StoreOptions()) as store:
        seen = []

        def work(number):
            for at in range(25):
                store.call(samples.insert(sample(number * 100 + at), received_ms=1))
                seen.append(store.read(lambda db: samples.totals(db, "g").samples) >= at + 1)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert seen == [True] * 200
        assert store.read(lambda db: samples.totals(db, "g")) == samples.Totals(200, 200, 200 * 48)


# --- samples ----------------------------------------------------------------------------------------


def test_a_sample_is_found_as_it_was_sent(kept):
    x = np.random.default_rng(0).standard_normal((3, 4, 5)).astype("<f4")
    raw = sample(1, dtype="float32", shape=x.shape, x=x.tobytes(), entropy=-0.0, taken_ms=-(2**63))
    jpeg = sample(2, encoding="jpeg", dtype="uint8", shape=(8, 8, 3), x=b"\xff\xd8 not looked into")
    scalar = sample(3, shape=(), x=b"\x07", entropy=2)
    for each in (raw, jpeg, scalar):
        assert kept.call(samples.insert(each, received_ms=7)) == "stored"
    found = kept.read(lambda db: unused(db, "g", 10)).samples
    assert [s.sample for s in found] == [raw, jpeg, scalar]
    assert [(s.number, s.received_ms, s.used) for s in found] == [(1, 7, 0), (2, 7, 0), (3, 7, 0)]
    array = found[0].sample.array()
    np.testing.assert_array_equal(array, x)
    assert not array.flags.writeable
    assert found[2].sample.array() == 7
    with pytest.raises(BadRecord, match="takes no images"):
        found[1].sample.array()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"key": "0" * 31}, "key"),
        ({"key": "G" * 32}, "key"),
        ({"edge": "short"}, "edge"),
        ({"group": "../g"}, "group"),
        ({"stream": ""}, "stream"),
        ({"stream": "a\n"}, "stream"),
        ({"entropy": float("nan")}, "nan"),
        ({"entropy": float("inf")}, "inf"),
        ({"seq": -1}, "seq"),
        ({"seq": 2**63}, "seq"),
        ({"dtype": "object"}, "dtype"),
        ({"encoding": "png"}, "encoding"),
        ({"shape": (49,)}, "48 bytes, uint8 of shape"),
        ({"shape": (0,)}, "shape"),
        ({"shape": (1,) * 9}, "shape"),
        ({"x": b"", "encoding": "jpeg"}, "x"),
        ({"taken_ms": 2**63}, "taken_ms"),
    ],
)
def test_a_bad_sample_is_refused_before_it_waits(kept, change, says):
    with pytest.raises(BadRecord, match=says):
        samples.insert(sample(0, **change), received_ms=1)
    assert kept.unused() == []


def test_the_same_key_is_stored_once(kept):
    assert kept.insert(1, 1, 2) == ["stored", "duplicate", "stored"]
    assert kept.insert(1, group="h") == ["duplicate"]
    assert kept.unused() == [key(1), key(2)]
    assert kept.unused(group="h") == []


def test_a_forgotten_sample_is_still_known(kept):
    kept.insert(1, 2, received_ms=5)
    kept.insert(3, received_ms=6)
    assert kept.call(samples.expire(6)) == 2
    assert kept.insert(1) == ["duplicate"]
    assert kept.unused() == [key(3)]
    assert kept.read(lambda db: samples.totals(db, "g")) == samples.Totals(1, 1, 48)


def test_quota_counts_what_was_stored_within_the_window(kept):
    quota = Quota(max_samples=2, window_ms=100)
    assert kept.insert(1, received_ms=1000, quota=quota) == ["stored"]
    assert kept.insert(2, received_ms=1050, quota=quota) == ["stored"]
    assert kept.insert(3, received_ms=1099, quota=quota) == ["quota"]
    assert kept.insert(1, received_ms=1099, quota=quota) == ["duplicate"], (
        "an answer that was lost, not a new one"
    )
    assert kept.insert(4, received_ms=1099, quota=quota, edge=OTHER) == ["stored"]
    kept.call(samples.expire(2000))
    assert kept.insert(5, received_ms=1099, quota=quota) == ["quota"], "retention gives no new quota"
    assert kept.insert(3, received_ms=1100, quota=quota) == ["stored"]
    assert kept.read(lambda db: [samples.received(db, e, 999) for e in (EDGE, OTHER)]) == [3, 1]


def test_beyond_its_caps_a_group_loses_the_oldest_used_then_the_oldest(kept):
    caps = Caps(max_samples=5)
    kept.insert(*range(5), caps=caps)
    kept.insert(50, group="h", caps=caps)
    kept.call(samples.mark_used("g", [key(2), key(3)], 1))
    kept.insert(5, caps=caps)
    assert stored(kept) == {0, 1, 3, 4, 5}, "2 was used, and came first"
    kept.insert(6, 7, caps=caps)
    assert stored(kept) == {1, 4, 5, 6, 7}, "3 was used; then 0 was the oldest"
    assert kept.unused(group="h") == [key(50)]


def test_used_samples_go_in_the_order_of_their_use(kept):
    kept.insert(*range(4))
    kept.call(samples.mark_used("g", [key(3)], 1))
    kept.call(samples.mark_used("g", [key(0)], 2))
    kept.insert(4, caps=Caps(max_samples=4))
    assert stored(kept) == {0, 1, 2, 4}


def test_bytes_are_capped_and_one_that_is_too_large_is_refused(kept):
    caps = Caps(max_bytes=1000)
    kept.insert(*range(4), size=300, caps=caps)
    assert stored(kept) == {1, 2, 3}
    kept.insert(4, size=1000, caps=caps)
    assert stored(kept) == {4}
    with pytest.raises(SampleTooLarge, match="1001 bytes, its group may have 1000"):
        kept.insert(5, size=1001, caps=caps)
    assert kept.read(lambda db: samples.totals(db, "g")) == samples.Totals(1, 1, 1000)


def stored(kept, group="g", numbers=range(100)):
    """Numbers of the samples that are there, used or not."""
    names = {key(n): n for n in numbers}
    return {names[what[1]] for what in contents(kept.store, (group,)) if what[0] == "sample"}


def test_replay_is_drawn_from_the_newest_used_without_replacement(kept):
    kept.insert(*range(20))
    for generation, numbers in enumerate((range(10, 16), range(6)), 1):
        kept.call(samples.mark_used("g", [key(n) for n in numbers], generation))
    names = {key(n): n for n in range(20)}

    def draw(count, newest, seed):
        drawn = kept.read(lambda db: samples.replay(db, "g", count, newest=newest, seed=seed))
        return [names[s.sample.key] for s in drawn.samples]

    assert sorted(draw(100, 100, 0)) == [*range(6), *range(10, 16)]
    assert sorted(draw(100, 6, 0)) == list(range(6)), "the second generation was used last"
    assert sorted(draw(100, 8, 0)) == [*range(6), 14, 15]
    assert draw(4, 100, 1) == draw(4, 100, 1)
    drawn = [draw(4, 100, seed) for seed in range(50)]
    assert all(len(set(each)) == 4 for each in drawn)
    assert {n for each in drawn for n in each} == {*range(6), *range(10, 16)}
    assert draw(0, 100, 0) == draw(4, 0, 0) == []
    assert kept.read(lambda db: samples.replay(db, "none", 4, newest=4, seed=0)).samples == ()


def test_refusals_are_counted_by_reason(kept):
    for reason in ("quota", "redundant", "quota"):
        kept.call(samples.refuse("g", reason))
    assert kept.read(lambda db: samples.refusals(db, "g")) == {"quota": 2, "redundant": 1}
    assert kept.read(lambda db: samples.refusals(db, "h")) == {}
    with pytest.raises(BadRecord, match="0 characters"):
        samples.refuse("g", "")


def test_a_damaged_sample_is_passed_over_and_can_be_discarded(root, kept):
    kept.insert(*range(4))
    sql(root, "UPDATE samples SET x = ? WHERE key = ?", b"\x00" * 48, key(1))
    sql(root, "UPDATE samples SET entropy = 'high' WHERE key = ?", key(2))
    drawn = kept.read(lambda db: unused(db, "g", 4))
    assert [s.sample.key for s in drawn.samples] == [key(0), key(3)]
    assert len(drawn.damaged) == 2
    assert kept.call(samples.discard(drawn.damaged)) == 2
    assert kept.read(lambda db: unused(db, "g", 9)).damaged == ()
    assert kept.read(lambda db: samples.totals(db, "g")) == samples.Totals(2, 2, 96)
    assert kept.told == [], "a row is no reason to give up the file"


# --- learners ---------------------------------------------------------------------------------------


def test_a_snapshot_and_what_it_has_consumed_are_one(kept):
    kept.insert(*range(5))
    assert kept.read(lambda db: (learners.load(db, "g"), learners.generation(db, "g"))) == (None, 0)
    assert kept.call(learners.save("g", b"one", [key(0), key(1)], after=0, saved_ms=9)) == 1
    assert kept.unused() == [key(2), key(3), key(4)]
    assert kept.call(learners.save("g", b"two", [key(2), key(99)], after=1, saved_ms=10)) == 2
    found = kept.read(lambda db: learners.load(db, "g"))
    assert (found.generation, found.snapshot, found.saved_ms) == (2, b"two", 10)
    before = contents(kept.store)
    with pytest.raises(StaleLearner, match="follows generation 1, stored is 2"):
        kept.call(learners.save("g", b"three", [key(3)], after=1, saved_ms=11))
    with pytest.raises(StaleLearner, match="used in generation 1, and again in 3"):
        kept.call(learners.save("g", b"three", [key(3), key(0)], after=2, saved_ms=11))
    assert contents(kept.store) == before, "neither the snapshot nor a mark of a refused one is there"
    assert kept.unused() == [key(3), key(4)]
    assert kept.unused(group="h") == []


def test_a_damaged_snapshot_is_refused_and_forgotten_but_its_samples_stay_used(root, kept):
    kept.insert(*range(3))
    kept.call(learners.save("g", b"one", [key(0)], after=0, saved_ms=9))
    sql(root, "UPDATE learners SET snapshot = x'6f6e66'")
    with pytest.raises(DamagedRecord):
        kept.read(lambda db: learners.load(db, "g"))
    kept.call(learners.forget("g"))
    assert kept.read(lambda db: learners.generation(db, "g")) == 1
    assert kept.call(learners.save("g", b"two", [key(1)], after=1, saved_ms=9)) == 2
    assert kept.unused() == [key(2)]


# --- edges and tokens -------------------------------------------------------------------------------


def test_an_edge_from_pending_to_revoked(kept):
    edge = kept.call(edges.register(EDGE, "north", "g", now_ms=5))
    assert (edge.state, edge.first_seen_ms) == ("pending", 5)
    assert kept.call(edges.register(EDGE, "north", "g", now_ms=8)) == edge
    with pytest.raises(EdgeExists, match="north of g, not south of g"):
        kept.call(edges.register(EDGE, "south", "g", now_ms=8))
    assert kept.call(edges.activate(EDGE)).state == "active"
    told = kept.call(edges.report(EDGE, epoch=1, seq=7, theta_digest="ab", progress="committed", now_ms=20))
    assert (told.epoch, told.seq, told.theta_digest, told.progress, told.last_seen_ms) == (
        1,
        7,
        "ab",
        "committed",
        20,
    )
    assert kept.call(edges.seen([EDGE, OTHER], now_ms=30)) == 1
    assert kept.call(edges.seen([EDGE], now_ms=10)) == 1
    assert kept.read(lambda db: edges.get(db, EDGE)).last_seen_ms == 30
    assert kept.call(edges.assign(EDGE, "h")).group == "h"
    assert [e.name for e in kept.read(lambda db: edges.listed(db, "h"))] == ["north"]
    assert kept.read(lambda db: edges.listed(db, "g")) == []
    assert kept.call(edges.revoke(EDGE)).state == "revoked"
    for refused in (edges.activate(EDGE), edges.register(EDGE, "north", "h", now_ms=40)):
        with pytest.raises(EdgeRevoked):
            kept.call(refused)
    with pytest.raises(UnknownEdge):
        kept.call(edges.activate(OTHER))
    with pytest.raises(BadRecord):
        kept.call(edges.assign(EDGE, "no group"))
    with pytest.raises(BadRecord):
        edges.register("x" * 39, "north", "g", now_ms=0)
    assert kept.read(lambda db: edges.get(db, EDGE)).state == "revoked"


def test_a_token_works_once_and_is_kept_as_a_hash(root, kept):
    token = edges.new_token()
    assert len(token) >= 43
    assert edges.new_token() != token
    kept.call(edges.issue(token, "north", "g", expires_ms=100))
    for wrong in ("", token[:-1], token + "A", token.swapcase()):
        with pytest.raises(UnknownToken):
            kept.call(edges.enrol(wrong, EDGE, now_ms=50))
    edge = kept.call(edges.enrol(token, EDGE, now_ms=50))
    assert (edge.state, edge.name, edge.group) == ("active", "north", "g")
    assert kept.call(edges.enrol(token, EDGE, now_ms=500)) == edge, "the answer to the first time may be lost"
    with pytest.raises(TokenUsed):
        kept.call(edges.enrol(token, OTHER, now_ms=60))
    assert kept.read(lambda db: edges.find(db, OTHER)) is None
    kept.store.close()
    assert token.encode() not in b"".join(p.read_bytes() for p in root.iterdir())


def test_tokens_expire_are_withdrawn_and_are_not_used_up_by_a_refusal(kept):
    kept.call(edges.issue("one", "north", "g", expires_ms=100))
    kept.call(edges.issue("two", "south", "g", expires_ms=200))
    with pytest.raises(TokenExpired, match="until 100 ms, it is 100 ms"):
        kept.call(edges.enrol("one", EDGE, now_ms=100))
    assert kept.call(edges.expire_tokens(100)) == 1
    kept.call(edges.register(EDGE, "east", "g", now_ms=0))
    with pytest.raises(EdgeExists):
        kept.call(edges.enrol("two", EDGE, now_ms=100))
    assert kept.call(edges.enrol("two", OTHER, now_ms=100)).name == "south"
    assert kept.call(edges.withdraw("south")) == 1
    with pytest.raises(UnknownToken):
        kept.call(edges.enrol("two", OTHER, now_ms=100))
    assert kept.read(edges.tokens) == []


def test_a_damaged_edge_is_no_edge(root, kept):
    """A flipped bit must not make an active edge of a revoked one, or move it to another group."""
    kept.call(edges.register(EDGE, "north", "g", now_ms=0))
    kept.call(edges.register(OTHER, "south", "g", now_ms=0))
    sql(root, "UPDATE edges SET state = 'active' WHERE key = ?", EDGE)
    with pytest.raises(DamagedRecord):
        kept.read(lambda db: edges.get(db, EDGE))
    assert [e.name for e in kept.read(edges.listed)] == ["south"]
    assert kept.call(edges.remove(EDGE))
    assert not kept.call(edges.remove(EDGE))
    kept.call(edges.register(EDGE, "north", "g", now_ms=0))


# --- the directory and the file ---------------------------------------------------------------------


def test_nobody_else_can_read_it(root):
    root.mkdir(mode=0o755)
    with Kept(root) as store:
        store.insert(1)
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in root.iterdir()}
        assert modes == dict.fromkeys([FILE, f"{FILE}-wal", f"{FILE}-shm", "lock"], 0o600)
        assert stat.S_IMODE(root.stat().st_mode) == 0o700


def test_each_commit_is_durable(kept):
    def pragmas(db):
        return {n: db.execute(f"PRAGMA {n}").fetchone()[0] for n in ("journal_mode", "synchronous")}

    assert kept.call(Operation("look", pragmas)) == {"journal_mode": "wal", "synchronous": 2}
    with pytest.raises(StoreUnusable, match="readonly"):
        kept.read(lambda db: db.execute("DELETE FROM samples"))
    assert kept.insert(1) == ["stored"], "a reader that writes is refused, and no damage is believed"
    assert kept.told == []


def test_two_services_cannot_share_it(root, kept):
    kept.insert(1)
    before = files(root)
    with pytest.raises(StoreInUse, match="another service uses"):
        Store(root, lambda _: None)
    code = (
        "import sys, pathlib\nfrom tta_cloud.store import Store\nfrom tta_cloud.errors import StoreInUse\n"
        "try:\n    Store(pathlib.Path(sys.argv[1]), print)\nexcept StoreInUse as e:\n    print(e.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(root)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.stdout == "store-in-use\n", done.stderr
    assert files(root) == before
    assert kept.insert(2) == ["stored"]
    kept.store.close()
    with Kept(root) as again:
        assert again.unused() == [key(1), key(2)]


def environment():
    found = process_environment()
    cloud = Path(__file__).resolve().parents[1] / "cloud"
    return {**found, "PYTHONPATH": os.pathsep.join([str(cloud), found.get("PYTHONPATH", "")])}


def test_what_a_newer_version_wrote_is_left_alone(root):
    with Kept(root) as store:
        store.insert(1)
    version = schema.VERSION + 1
    sql(root, "UPDATE meta SET value = ?, seal = ? WHERE name = 'version'", version, seal("version", version))
    before = files(root)
    with pytest.raises(StoreTooNew, match=f"version {version}, this service knows up to {schema.VERSION}"):
        Store(root, lambda _: None)
    assert {k: v for k, v in files(root).items() if k in before} == before
    assert not list(root.glob("*corrupt*"))


@pytest.mark.parametrize(
    "spoil",
    [
        "UPDATE meta SET value = 9 WHERE name = 'version'",
        "UPDATE meta SET value = 0 WHERE name = 'version'",
        "DELETE FROM meta",
        "DROP TABLE meta",
        "DROP INDEX samples_order",
        "CREATE TABLE more (x)",
        "DROP TRIGGER samples_in",
    ],
)
def test_a_file_that_is_no_store_is_set_aside(root, spoil):
    with Kept(root) as store:
        store.insert(1)
    sql(root, spoil)
    with Kept(root) as store:
        assert store.told == [("quarantine", "store-damaged")]
        assert store.unused() == []
        assert store.insert(1) == ["stored"]
    assert (root / f"{FILE}.corrupt-1").exists()


def test_totals_are_counted_anew_at_each_start(root):
    with Kept(root) as store:
        store.insert(1, 2)
    sql(root, "UPDATE totals SET samples = 1000000, bytes = -5")
    with Kept(root) as store:
        assert store.read(lambda db: samples.totals(db, "g")) == samples.Totals(2, 2, 96)


def test_set_aside_stores_are_numbered_and_the_newest_eight_stay(root):
    for number in range(10):
        root.mkdir(exist_ok=True)
        (root / FILE).write_bytes(b"not a database at all" * 100 + bytes([number]))
        with Kept(root) as store:
            assert store.told == [("quarantine", "store-damaged")]
    found = sorted(root.glob("*corrupt*"), key=lambda p: int(p.name.rpartition("-")[2]))
    assert [p.name for p in found] == [f"{FILE}.corrupt-{n}" for n in range(3, 11)]
    assert [p.read_bytes()[-1] for p in found] == list(range(2, 10))


def test_a_store_that_cannot_be_set_aside_is_not_touched(root):
    root.mkdir()
    (root / FILE).write_bytes(b"not a database at all")
    with pytest.raises(StoreUnusable, match="Input/output error"):
        Store(root, lambda _: None, disk=Failing(1, errno.EIO, ("replace",)))
    assert (root / FILE).read_bytes() == b"not a database at all"
    with Kept(root) as store:
        assert store.insert(1) == ["stored"]


@pytest.mark.parametrize("what", ["directory", "link", "pipe"])
def test_what_is_no_file_of_ours_is_refused(root, tmp_path, what):
    root.mkdir()
    if what == "directory":
        (root / FILE).mkdir()
    elif what == "link":
        (tmp_path / "elsewhere").write_bytes(b"")
        (root / FILE).symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(root / FILE)
    with pytest.raises(StoreUnusable):
        Store(root, lambda _: None)
    assert sorted(p.name for p in root.iterdir()) == [FILE, "lock"]


def test_a_file_where_the_directory_belongs(tmp_path):
    (tmp_path / "store").write_text("mine")
    with pytest.raises(StoreUnusable):
        Store(tmp_path / "store", lambda _: None)
    assert (tmp_path / "store").read_text() == "mine"


# --- damage while it is in use, and a full disk -----------------------------------------------------


def smash(root):
    """Overwrite every page but the first of the file and of the WAL, under the service."""
    for path in (root / FILE, root / f"{FILE}-wal"):
        if path.exists() and (size := path.stat().st_size) > 8192:
            with open(path, "r+b") as file:
                file.seek(4096)
                file.write(b"\xa5" * (size - 4096))


@pytest.mark.parametrize("finder", ["writer", "reader"])
def test_damage_that_is_found_while_running_begins_a_new_store(root, finder):
    with Kept(root, options(checkpoint_pages=1)) as store:
        store.insert(*range(64), size=60_000)  # more than the writer's connection keeps in memory
        smash(root)
        for _ in range(40):
            try:
                if finder == "reader":
                    store.read(lambda db: unused(db, "g", 100))
                else:
                    store.call(Operation("check", schema.check))
            except StoreDamaged:
                pass
            if store.told:
                break
        assert store.told == [("quarantine", "store-damaged")]
        assert store.insert(99) == ["stored"]
        assert store.unused() == [key(99)]
    assert (root / f"{FILE}.corrupt-1").exists()


def fill(store, numbers, **more):
    """Insert until the store is full; gives what was acknowledged."""
    stored = []
    for number in numbers:
        try:
            store.insert(number, **more)
        except StoreFull:
            return stored
        stored.append(number)
    raise AssertionError("it is never full")


def full_store_keeps_its_word(store, root, make_room):
    stored = fill(store, range(10_000), size=5000)
    assert len(stored) > 10
    with pytest.raises(StoreFull):
        store.call(ledger.append(patch(1, size=200_000)))
    assert sorted(store.unused(10**6)) == sorted(key(n) for n in stored)
    assert store.read(lambda db: ledger.last_seq(db, "g", 1)) == 0
    # In one group only those fail that do not fit.
    told = Acknowledged()
    for number in range(20_000, 20_008):
        store.submit(samples.insert(sample(number, size=5000), received_ms=1), told)
    outcomes = told.wait(8)
    assert {type(o.error) for o in outcomes} <= {StoreFull, type(None)}
    stored += [n for n, o in zip(range(20_000, 20_008), outcomes, strict=True) if o.error is None]
    make_room(store)
    store.call(ledger.append(patch(1)))
    assert store.insert(30_000, size=5000) == ["stored"]
    assert store.told == []
    return stored


def test_a_full_share_of_the_disk_is_told_and_heals(root):
    with Kept(root, options(max_pages=100)) as store:
        stored = full_store_keeps_its_word(store, root, lambda s: s.call(samples.discard(range(1, 9))))
        assert len(store.unused(10**6)) == len(stored) - 8 + 1
    with Kept(root) as store:
        assert store.told == []
        assert store.read(lambda db: ledger.newest(db, "g")) == patch(1)


@pytest.fixture
def small_disk(tmp_path):
    path = tmp_path / "small"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("checkpoint_pages", [1, 1000])
def test_a_full_disk_is_told_and_heals(small_disk, checkpoint_pages):
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\x00" * (1 << 20))
    with Kept(small_disk / "store", options(checkpoint_pages=checkpoint_pages)) as store:
        stored = full_store_keeps_its_word(store, small_disk / "store", lambda _: ballast.unlink())
        assert sorted(store.unused(10**6)) == sorted(key(n) for n in [*stored, 30_000])
    with Kept(small_disk / "store") as store:
        assert store.told == []
        assert sorted(store.unused(10**6)) == sorted(key(n) for n in [*stored, 30_000])


def test_a_disk_that_is_full_at_the_start_sets_nothing_aside(small_disk):
    root = small_disk / "store"
    with Kept(root) as store:
        store.insert(1)
    ballast = small_disk / "ballast"
    with open(ballast, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\x00" * 4096)
    try:
        with Kept(root) as store:
            assert store.told == []
    except (StoreFull, StoreUnusable):
        pass
    assert not list(root.glob("*corrupt*"))
    ballast.unlink()
    with Kept(root) as store:
        assert store.told == []
        assert store.unused() == [key(1)]


# --- row decoders -----------------------------------------------------------------------------------

CELLS = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=40),
    st.binary(max_size=40),
    st.sampled_from([EDGE, "g", "uint8", "raw", "active", "built", "3,2", "1,,2", "-1", "9" * 30, "², 3"]),
)
DECODERS = [
    (samples.decode, 15, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 14], 13),
    (ledger.decode_entry, 7, list(range(6)), 6),
    (edges.decode_edge, 11, list(range(10)), 10),
    (edges.decode_token, 7, list(range(6)), 6),
]


@pytest.mark.parametrize(("decode", "width", "sealed", "at"), DECODERS)
@pytest.mark.parametrize("with_seal", [False, True])
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_row_of_anything_is_a_record_or_refused(decode, width, sealed, at, with_seal, data):
    row = [data.draw(CELLS) for _ in range(width)]
    if with_seal:
        row[at] = seal(*(row[i] for i in sealed))
    try:
        decode(row)
    except DamagedRecord:
        return
    assert with_seal


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_changed_cell_of_a_good_row_is_refused(data):
    row = ROW
    at = data.draw(st.sampled_from([i for i in range(len(row)) if i not in (0, 12)]))
    other = data.draw(CELLS.filter(lambda cell: (type(cell), repr(cell)) != (type(row[at]), repr(row[at]))))
    with pytest.raises(DamagedRecord):
        samples.decode([*row[:at], other, *row[at + 1 :]])


def _row():
    with tempfile.TemporaryDirectory() as path, Kept(Path(path)) as store:
        store.insert(1)
        query = f"SELECT {samples._COLUMNS} FROM samples"
        return store.read(lambda db: list(db.execute(query).fetchone()))


ROW = _row()


def test_the_good_row_is_good():
    assert samples.decode(ROW).sample == sample(1)
    assert AT_ONCE.commit.linger_s == 0.0
