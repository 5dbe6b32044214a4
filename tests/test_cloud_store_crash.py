"""What the cloud's store has acknowledged survives kill -9, power cuts and damage.

As a program (`python test_cloud_store_crash.py`) this file starts stores: each line of stdin describes one, which works
in a fork of this process, so that the imports are paid for once. Lines on stdout say what it has acknowledged.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from cloud_records import AT_ONCE, EDGE, Kept, contents, key, options, patch, sample, unused
from running import PATIENCE_S, process_environment
from tta_cloud import edges, learners, ledger, samples
from tta_cloud.operations import Operation
from tta_cloud.store import FILE, Store, StoreOptions
from tta_cloud.writer import GroupCommit
from tta_runtime.atomic import Disk

GROUPS = ("g", "h")
WAL = f"{FILE}-wal"
WAL_HEADER, FRAME = 32, 24 + 4096
ROUND = 100_000
"""Samples of one round have numbers of their own."""


@pytest.fixture
def quick_path(tmp_path):
    """A directory in memory where there is one: what survives a kill, or a simulated cut, need not reach a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as path:
        yield Path(path)


# --- the process that is killed ---------------------------------------------------------------------


def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Dying(Disk):
    """Kills its process before or after the n-th rename."""

    def __init__(self, nth, when):
        self.nth, self.when, self.count = nth, when, 0

    def replace(self, source, target):
        self.count += 1
        if (self.count, self.when) == (self.nth, "before"):
            die()
        super().replace(source, target)
        if (self.count, self.when) == (self.nth, "after"):
            die()


def snapshot_of(keys):
    return json.dumps(sorted(keys)).encode()


def keys_in(learner):
    return set(json.loads(learner.snapshot)) if learner else set()


def work(root, seed):
    """Everything at once in a random order, until somebody ends it."""
    rng = random.Random(seed)
    places = threading.Semaphore(150)
    store = Store(
        root,
        lambda event: say("told", event.action),
        options=StoreOptions(commit=GroupCommit(linger_s=0.002)),
    )
    known = {g: keys_in(store.read(lambda db, g=g: learners.load(db, g))) for g in GROUPS}
    next_seq = {g: store.read(lambda db, g=g: ledger.last_seq(db, g, 1)) + 1 for g in GROUPS}

    def acknowledge(*words):
        def done(outcome):
            places.release()
            outcome.get()
            say(*words)

        return done

    def hand_in(operation, *words):
        assert places.acquire(timeout=PATIENCE_S)
        store.submit(operation, acknowledge(*words))

    def learn(group):
        while True:
            new = [s.sample.key for s in store.read(lambda db: unused(db, group, 8)).samples]
            if not new:
                continue
            known[group] |= set(new)
            after = store.read(lambda db: learners.generation(db, group))
            made = store.call(learners.save(group, snapshot_of(known[group]), new, after=after, saved_ms=1))
            say("learner", group, made)

    for group in GROUPS:
        threading.Thread(target=learn, args=(group,), daemon=True).start()
    say("ready")
    for number in range(seed * ROUND, (seed + 1) * ROUND):
        group = rng.choice(GROUPS)
        if rng.random() < 0.85:
            say("handed", number)
            hand_in(samples.insert(sample(number, group), received_ms=1), "sample", number, group)
        else:
            seq = next_seq[group]
            next_seq[group] += 1
            hand_in(ledger.append(patch(seq, group, state="built", size=3000)), "built", group, seq)
            hand_in(ledger.move(group, 1, seq, "published"), "published", group, seq)


SCRIPT = [
    lambda: samples.insert(sample(1), received_ms=1),
    lambda: samples.insert(sample(2, size=9000), received_ms=1),
    lambda: ledger.append(patch(1, state="built")),
    lambda: edges.issue("token", "north", "g", expires_ms=9),
    lambda: learners.save("g", b"one", [key(1)], after=0, saved_ms=1),
    lambda: ledger.move("g", 1, 1, "published"),
    lambda: samples.insert(sample(3), received_ms=2, caps=samples.Caps(max_samples=2)),
    lambda: edges.enrol("token", EDGE, now_ms=1),
    lambda: learners.save("g", b"two", [key(2), key(3)], after=1, saved_ms=2),
    lambda: samples.expire(2),
    lambda: ledger.append(patch(2, size=20_000)),
    lambda: edges.revoke(EDGE),
]
"""One of each kind of change, each of which needs those before it."""


def play(root, point, nth):
    """The script; the process dies at the n-th time that a point is reached."""
    count = 0

    def fail_point(reached):
        nonlocal count
        count += reached == point
        if count == nth and reached == point:
            die()

    with Kept(root, fail_point=fail_point) as store:
        for operation in SCRIPT:
            store.call(operation())
            say("done")


def run_program():
    for line in sys.stdin:
        what = json.loads(line)
        pid = os.fork()
        if pid == 0:
            root = Path(what["root"])
            say("pid", os.getpid())
            try:
                if what["do"] == "work":
                    work(root, what["seed"])
                elif what["do"] == "play":
                    play(root, what["point"], what["nth"])
                else:
                    Store(
                        root, lambda event: say("told", event.action), disk=Dying(what["nth"], what["when"])
                    ).close()
            finally:
                os._exit(0)
        _, status = os.waitpid(pid, 0)
        say("exit", os.waitstatus_to_exitcode(status))


class Program:
    """This file as a program."""

    def __enter__(self):
        environment = process_environment()
        cloud = Path(__file__).resolve().parents[1] / "cloud"
        environment["PYTHONPATH"] = os.pathsep.join([str(cloud), environment.get("PYTHONPATH", "")])
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(PATIENCE_S)
        self.process.stdout.close()

    def run(self, kill_after=None, **what):
        """Start a store; gives its lines and its exit code.

        Args:
            kill_after: kill it after so many acknowledgements.
            what: what it does.
        """
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        said, acknowledged, pid = [], 0, 0
        for line in self.process.stdout:
            words = line.split()
            if words[0] == "exit":
                return said, int(words[1])
            if words[0] == "pid":
                pid = int(words[1])
                continue
            said.append(words)
            acknowledged += words[0] in ("sample", "built", "published", "learner")
            if kill_after is not None and acknowledged >= kill_after and words[0] != "killed":
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                kill_after = None
        raise AssertionError("the program is gone")


# --- killed at any moment ---------------------------------------------------------------------------


class History:
    """What was handed in and acknowledged over all rounds."""

    def __init__(self):
        self.handed, self.samples = set(), {}
        self.patches = {g: {} for g in GROUPS}
        self.generation = dict.fromkeys(GROUPS, 0)

    def follow(self, said):
        for what, *words in said:
            assert what != "told", "a kill is no damage"
            if what == "handed":
                self.handed.add(key(int(words[0])))
            elif what == "sample":
                self.samples[key(int(words[0]))] = words[1]
            elif what in ("built", "published"):
                self.patches[words[0]][int(words[1])] = what
            elif what == "learner":
                self.generation[words[0]] = int(words[1])

    def check(self, root):
        """Whether the store holds what was acknowledged, and else only what was handed in."""
        with Kept(root) as kept:
            assert kept.told == []
            for group in GROUPS:
                drawn = [
                    kept.read(lambda db, g=group: unused(db, g, 10**6)),
                    kept.read(lambda db, g=group: samples.replay(db, g, 10**6, newest=10**6, seed=0)),
                ]
                assert [each.damaged for each in drawn] == [(), ()]
                rows = {s.sample.key: s for each in drawn for s in each.samples}
                assert {k for k, g in self.samples.items() if g == group} <= rows.keys() <= self.handed
                for row in rows.values():
                    assert row.sample == sample(row.sample.seq, group)
                learner = kept.read(lambda db, g=group: learners.load(db, g))
                generation = learner.generation if learner else 0
                assert self.generation[group] <= generation
                assert {k for k, row in rows.items() if row.used} == keys_in(learner)
                assert all(row.used <= generation for row in rows.values())
                assert {row.used for row in rows.values()} - {0} == set(range(1, generation + 1))
                found = kept.read(lambda db, g=group: ledger.entries(db, g, 10**6))
                assert [e.seq for e in reversed(found)] == list(range(1, len(found) + 1)), "no gap"
                assert kept.read(lambda db, g=group: ledger.last_seq(db, g, 1)) == len(found)
                states = {e.seq: e.state for e in found}
                for seq, state in self.patches[group].items():
                    assert states[seq] == state or (state, states[seq]) == ("built", "published")
                for seq in random.Random(len(found)).sample(sorted(states), min(5, len(states))):
                    stored = kept.read(lambda db, g=group, s=seq: ledger.get(db, g, 1, s))
                    assert stored.payload == patch(seq, size=3000).payload
                published = [s for s, state in states.items() if state == "published"]
                newest = kept.read(lambda db, g=group: ledger.newest(db, g))
                assert (newest.entry.seq if newest else None) == max(published, default=None)


def kill_at_random(root, rounds, seed):
    rng = random.Random(seed)
    history = History()
    kills = 0
    with Program() as program:
        for number in range(rounds):
            said, code = program.run(do="work", root=str(root), seed=number, kill_after=rng.randrange(0, 120))
            assert code == -signal.SIGKILL
            kills += 1
            history.follow(said)
            history.check(root)
    found = len(history.samples), sum(map(len, history.patches.values())), history.generation
    print(f"{kills} kills; acknowledged: {found[0]} samples, {found[1]} patches, generations {found[2]}")
    assert found[0] > rounds
    assert found[1] > rounds // 5
    assert min(history.generation.values()) > rounds // 5


def test_killed_at_fifty_moments(quick_path):
    kill_at_random(quick_path / "store", 50, seed=11)


@pytest.mark.slow
def test_killed_at_five_hundred_moments(quick_path):
    for seed in range(10):
        kill_at_random(quick_path / f"store-{seed}", 50, seed)


def states_of_the_script(root):
    """What a store holds after each step of the script, the beginning included."""
    found = []
    with Kept(root) as kept:
        found.append(contents(kept.store))
        for operation in SCRIPT:
            kept.call(operation())
            found.append(contents(kept.store))
    assert all(a != b for a, b in itertools.pairwise(found)), "each step changes something"
    return found


@pytest.mark.parametrize("point", ["commit.before", "commit.after"])
def test_killed_around_each_commit(quick_path, point):
    """Before a commit nothing of it is there, after it everything is, also where nobody was told."""
    states = states_of_the_script(quick_path / "whole")
    with Program() as program:
        for nth in range(1, len(SCRIPT) + 1):
            root = quick_path / f"{nth}"
            said, code = program.run(do="play", root=str(root), point=point, nth=nth)
            assert code == -signal.SIGKILL
            assert said == [["done"]] * (nth - 1)
            with Kept(root) as kept:
                assert kept.told == []
                assert contents(kept.store) == states[nth - (point == "commit.before")]
                for operation in SCRIPT[nth - (point == "commit.before") :]:
                    kept.call(operation())
                assert contents(kept.store) == states[-1]


def test_killed_while_a_damaged_store_is_set_aside(quick_path):
    """Before and after each rename: the next start finishes it, and nothing of the damaged store is deleted."""
    with Program() as program:
        for number, (nth, when) in enumerate([(n, w) for n in (1, 2) for w in ("before", "after")]):
            root = quick_path / str(number)
            root.mkdir()
            parts = {"": b"no database" * 500, "-wal": b"no wal" * 900, "-shm": b"no index" * 5000}
            for ending, data in parts.items():
                (root / (FILE + ending)).write_bytes(data)
            _, code = program.run(do="open", root=str(root), nth=nth, when=when)
            assert code == -signal.SIGKILL
            left = any((root / (FILE + ending)).exists() for ending in parts)
            with Kept(root) as kept:
                assert len(kept.told) == left
                assert contents(kept.store) == {}
                kept.insert(1)
            for ending in ("", "-wal"):  # the index was made anew from the WAL
                assert (root / f"{FILE}.corrupt-1{ending}").read_bytes() == parts[ending]
            assert not list(root.glob("*.corrupt-2*"))
            with Kept(root) as kept:
                assert kept.told == []
                assert kept.unused() == [key(1)]


# --- power cuts -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """The script: the main file before and after the only checkpoint, the WAL, and where each step ended in it."""
    root = tmp_path_factory.mktemp("played") / "store"
    with Kept(root, options(checkpoint_pages=0)) as kept:
        ends, states = [wal_end(root)], [contents(kept.store)]
        before = (root / FILE).read_bytes()
        for operation in SCRIPT:
            kept.call(operation())
            ends.append(wal_end(root))
            states.append(contents(kept.store))
        assert (root / FILE).read_bytes() == before
        assert ends == sorted(set(ends))
        wal = (root / WAL).read_bytes()
        kept.call(Operation("nothing", lambda db: None))
        db = sqlite3.connect(root / FILE)
        assert db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[0] == 0
        db.close()
        after = (root / FILE).read_bytes()
    assert len(after) > len(before)
    return before, after, wal, ends, states


def wal_end(root):
    return (root / WAL).stat().st_size


def found_in(root, database, wal):
    """What a store holds that is begun from these two files; it must not be taken for damaged."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    (root / FILE).write_bytes(database)
    (root / WAL).write_bytes(wal)
    with Kept(root) as kept:
        found = contents(kept.store)
        assert kept.told == []
        kept.insert(99)
    return found


def test_any_prefix_of_the_wal_is_the_last_commit_within_it(quick_path, played):
    """Proven: with the first L bytes of the WAL, exactly the commits that end within them are there.

    `done` is called after the fsync of its commit, so a power cut leaves at least the WAL up to there: whatever is
    acknowledged is found. Tried at every frame boundary, one byte to either side of each commit's end, and at 100
    random lengths.
    """
    before, _, wal, ends, states = played
    rng = random.Random(5)
    lengths = {
        *range(WAL_HEADER, len(wal) + 1, FRAME),
        0,
        1,
        31,
        len(wal),
        *(rng.randrange(len(wal)) for _ in range(100)),
    }
    lengths |= {end + off for end in ends for off in (-1, 0, 1)}
    for length in sorted(lengths):
        committed = sum(end <= length for end in ends)
        expected = states[committed - 1] if committed else {}
        assert found_in(quick_path / "cut", before, wal[:length]) == expected, length


def test_a_torn_last_commit_is_there_wholly_or_not_at_all(quick_path, played):
    """Proven: where any 512-byte sectors that were written since an fsync are lost, the commit before is found."""
    before, _, wal, ends, states = played
    rng = random.Random(6)
    for _ in range(100):
        step = rng.randrange(1, len(ends))
        torn = bytearray(wal[: ends[step]])
        sectors = range(ends[step - 1], ends[step], 512)
        for at in rng.sample(sectors, rng.randrange(1, len(sectors) + 1)):
            end = min(at + 512, ends[step])
            torn[at:end] = bytes(end - at)
        whole = bytes(torn) == wal[: ends[step]]  # only zeros were lost
        assert found_in(quick_path / "torn", before, bytes(torn)) == states[step if whole else step - 1]


def test_a_torn_checkpoint_loses_nothing(quick_path, played):
    """Proven: whichever sectors of the main file a checkpoint has reached, the WAL beside it has everything."""
    before, after, wal, _, states = played
    rng = random.Random(7)
    for _ in range(60):
        length = rng.choice([len(before), len(after), rng.randrange(len(before), len(after))])
        mixed = bytearray(length)
        mixed[: min(length, len(before))] = before[:length]
        for at in range(0, length, 512):
            if rng.random() < 0.5:
                mixed[at : at + 512] = after[at : min(at + 512, length)]
        assert found_in(quick_path / "mixed", bytes(mixed), wal) == states[-1]


def test_a_copy_between_two_steps_holds_the_first(quick_path):
    """Proven: so do main file and WAL as they are after each `done`, also while the WAL is begun again."""
    root = quick_path / "store"
    with Kept(root, options(checkpoint_pages=4)) as kept:
        folded = 0
        before = (root / FILE).read_bytes()
        for operation in [
            *SCRIPT,
            *(lambda n=n: samples.insert(sample(n), received_ms=9) for n in range(100, 140)),
        ]:
            kept.call(operation())
            expected = contents(kept.store)
            found = found_in(quick_path / "copy", (root / FILE).read_bytes(), (root / WAL).read_bytes())
            assert found == expected
            folded += (root / FILE).read_bytes() != before
            before = (root / FILE).read_bytes()
        assert folded > 10


# --- damage -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store of all kinds of rows: its file when closed; file and WAL when not; what it held after each change."""
    root = tmp_path_factory.mktemp("whole") / "store"
    states = [{}]
    with Kept(root, options(checkpoint_pages=0)) as kept:
        changes = [
            *(samples.insert(sample(n), received_ms=1) for n in range(20)),
            *(samples.insert(sample(n, "h", size=9000), received_ms=1) for n in range(20, 26)),
            learners.save("g", b"snapshot" * 1000, [key(n) for n in range(8)], after=0, saved_ms=3),
            *(ledger.append(patch(seq, size=6000)) for seq in range(1, 6)),
            edges.issue("token", "north", "g", expires_ms=9),
            edges.enrol("token", EDGE, now_ms=1),
        ]
        for change in changes:
            kept.call(change)
            states.append(contents(kept.store))
        open_files = (root / FILE).read_bytes(), (root / WAL).read_bytes()
    return (root / FILE).read_bytes(), open_files, states


def damage(root, whole, how, target, steps):
    """Open a store that is damaged at each of `steps` offsets; gives how often it was set aside, and how often not."""
    closed, (database, wal), states = whole
    rng = random.Random(9)
    counts = {"set aside": 0, "opened": 0, "all there": 0}
    data = closed if target == "closed" else database if target == "main" else wal
    for step in range(steps):
        at = step * len(data) // steps
        spoilt = bytearray(data[:at] if how == "truncate" else data)
        if how == "flip":
            spoilt[at] ^= 1 << rng.randrange(8)
        elif how == "sector":
            spoilt[at : at + 512] = rng.randbytes(min(512, len(data) - at))
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        (root / FILE).write_bytes(closed if target == "closed" else database)
        if target != "closed":
            (root / WAL).write_bytes(wal)
        (root / (WAL if target == "wal" else FILE)).write_bytes(spoilt)
        with Kept(root) as kept:
            found = contents(kept.store)
            if target == "closed":
                assert found.items() <= states[-1].items(), (how, target, at)
            else:
                assert found in states, (how, target, at)
            assert kept.told in ([], [("quarantine", "store-damaged")])
            if kept.told:
                assert found == {}
                assert (root / f"{FILE}.corrupt-1").exists()
            counts["set aside" if kept.told else "opened"] += 1
            counts["all there"] += found == states[-1]
            assert kept.insert(99) == ["stored"]
        with Kept(root) as kept:
            assert kept.told == []
            assert key(99) in kept.unused()
    return counts


@pytest.mark.parametrize("target", ["closed", "main", "wal"])
@pytest.mark.parametrize("how", ["flip", "truncate", "sector"])
def test_damage_at_each_two_percent_is_seen(quick_path, whole, how, target):
    """Nothing is ever found that was not stored: a row is as it was, or not there; or the file is set aside."""
    counts = damage(quick_path / "store", whole, how, target, 50)
    print(how, target, counts)
    assert sum(counts.values()) >= 50
    if target == "closed" and how == "truncate":
        assert counts["set aside"] == 49, "all but the empty file, which is how a new store begins"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["closed", "wal"])
@pytest.mark.parametrize("how", ["flip", "truncate", "sector"])
def test_damage_at_each_permille_is_seen(quick_path, whole, how, target):
    print(how, target, damage(quick_path / "store", whole, how, target, 1000))


def test_the_helpers_know_the_files():
    assert AT_ONCE.checkpoint_pages == 1000
    assert msgspec.structs.asdict(sample(1))["key"] == key(1)


if __name__ == "__main__":
    run_program()
