"""From where a new group starts: the nearest group's patch, judged, noted, and decided once whatever is killed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import cloud_records
import exported
from clouds import Cloud, Edge, Program, look
from networks import SIZE
from tta_cloud import identity, learners, ledger, origins, samples
from tta_cloud.cli import app
from tta_cloud.config import Config
from tta_cloud.errors import DamagedRecord, OutOfOrder
from tta_cloud.gate import GateOptions, held_out
from tta_cloud.learner import LearnerOptions
from tta_cloud.nearest import described, distance, ranked
from tta_cloud.operations import Operation
from tta_cloud.publishing import build, theta_of
from tta_cloud.reading import read
from tta_cloud.records import Origin, Sample
from tta_cloud.school import Published, School
from tta_cloud.store import Store
from tta_edge.spool_file import Sample as Spooled
from tta_runtime.bundle import Bundle
from tta_runtime.engine import EngineOptions
from tta_runtime.model import Engines

N = 12
LEARNER = LearnerOptions(new=8, replay=8, rounds=1, nearest=N, nearest_distance=0.9)
GATE = GateOptions(min_samples=4, tolerance=1.0)
"""Nothing loses: what is tried here is not the gate."""
STRICT = GateOptions(min_samples=4, tolerance=-1.0)
"""Everything loses."""


# --- the measure ------------------------------------------------------------------------------------------


def test_the_distance_is_the_formula() -> None:
    draw = np.random.default_rng(0)
    a = draw.normal(0, 1, (4000, 3)).astype(np.float32)
    assert distance(a, a) == 0
    shifted = a + np.array([2.0, 0, 0], np.float32)
    assert distance(a, shifted) == pytest.approx(2 / math.sqrt(3), rel=0.05)
    wide = a * 3  # (s_a - s_b)^2 = 4, (s_a^2 + s_b^2) / 2 = 5
    assert distance(a, wide) == pytest.approx(math.sqrt(4 / 5), rel=0.05)
    assert distance(a, wide) == pytest.approx(distance(wide, a))
    assert distance(a * 1000, shifted * 1000) == pytest.approx(distance(a, shifted), rel=1e-4), "no units"


def test_alike_groups_are_as_far_as_chance_puts_them() -> None:
    draw = np.random.default_rng(1)
    for n in (32, 128):
        found = [distance(*draw.normal(size=(2, n, 200))) for _ in range(20)]  # type: ignore[arg-type]
        assert np.mean(found) == pytest.approx(math.sqrt(3 / n), rel=0.2)


def test_a_feature_that_hardly_moves_decides_nothing() -> None:
    draw = np.random.default_rng(2)
    a, b = draw.normal(size=(2, 200, 50)).astype(np.float32)
    a[:, 0], b[:, 0] = 0.0, 1e-6
    assert distance(a, b) < 0.5
    dead = np.zeros((20, 4), np.float32)
    assert distance(dead, dead) == 0
    assert distance(dead, dead + 1) == math.inf, "unlike, and no unit to tell by how much"


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]), st.sampled_from([0, 1, 5]))
def test_any_features_have_a_distance_or_none(seed: int, scale: float, count: int) -> None:
    draw = np.random.default_rng(seed)
    a = (draw.normal(size=(count, 4)) * scale).astype(np.float32)
    b = (draw.normal(size=(5, 4)) * scale).astype(np.float32)
    if seed % 3 == 0:
        b[0, 0] = (math.nan, math.inf)[seed % 2]
    found = distance(a, b)
    assert found >= 0
    assert math.isinf(found) == (not count or not np.isfinite(b).all())


def test_ties_go_by_name_and_the_unknown_is_left_out() -> None:
    assert ranked({"b": 1.0, "a": 1.0, "c": 0.5, "d": math.inf}) == [("c", 0.5), ("a", 1.0), ("b", 1.0)]
    assert described([(f"g{i}", i / 10) for i in range(10)]).endswith("g7 0.70 and 2 more")


# --- with a store -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engines() -> Engines:
    bundle = Bundle.open(exported.built("resnet", ("source", "distill")).path)
    return Engines.load(bundle, methods=["source", "distill"], options=EngineOptions(threads=1))


LOOKS = {"dark": (0.0, 0.2), "light": (0.8, 0.2), "noisy": (0.0, 1.0)}
"""Least value and range of the images of a group."""


def image(number: int, group: str, look: str) -> Sample:
    low, span = LOOKS[look]
    x = low + span * np.random.default_rng(number).random((3, SIZE, SIZE), dtype=np.float32)
    x = x.astype(np.float32)
    return cloud_records.sample(number, group, dtype="float32", shape=x.shape, x=x.tobytes())


class Schooled:
    """A school with its store."""

    def __init__(self, root: Path, engines: Engines, **options: Any) -> None:
        if not (root / "keys").exists():
            identity.create(root)
        self.keys = identity.load(root)
        self.store = Store(root / "data", lambda event: None, options=cloud_records.AT_ONCE)
        self.published: list[Published] = []
        config = Config(**{"learner": LEARNER, "gate": GATE, **options})
        self.school = School(
            config, engines, engines, self.store, self.keys, self.published.append, clock_s=lambda: 5.0
        )

    def send(self, group: str, look: str, first: int, count: int = N) -> None:
        for number in range(first, first + count):
            self.store.call(samples.insert(image(number, group, look), received_ms=1))

    def learn(self, group: str) -> None:
        while self.school.learn(group):
            pass
        for entry in self.entries(group):  # as the service does at the end of a rollout
            if entry.state == "built":
                self.store.call(ledger.move(group, entry.epoch, entry.seq, "published", entry.reason))

    def origin(self, group: str) -> Origin | None:
        return self.store.read(lambda db: origins.get(db, group))

    def entries(self, group: str) -> list[Any]:
        return self.store.read(lambda db: ledger.entries(db, group))[::-1]

    def theta(self, group: str, seq: int) -> np.ndarray:
        patch = self.store.read(lambda db: ledger.get(db, group, 1, seq))
        return theta_of(patch, self.keys, self.school._student.bundle)


@contextmanager
def schooled(root: Path, engines: Engines, **options: Any) -> Iterator[Schooled]:
    made = Schooled(root, engines, **options)
    try:
        yield made
    finally:
        made.store.close()


def taught(made: Schooled) -> None:
    """Two groups that have learned."""
    for i, group in enumerate(("dark", "light")):
        made.send(group, group, 1000 * (i + 1), 40)
        made.learn(group)


@pytest.mark.parametrize(("look", "parent"), [("dark", "dark"), ("light", "light")])
def test_a_new_group_starts_from_the_nearest(
    tmp_path: Path, engines: Engines, look: str, parent: str
) -> None:
    with schooled(tmp_path, engines) as made:
        taught(made)
        last = made.entries(parent)[-1].seq
        made.send("new", look, 9000, N - 1)
        assert not made.school.learn("new"), "it serves the source until there are enough"
        assert made.origin("new") is None
        assert not made.entries("new")
        made.send("new", look, 9500, 1)
        made.published.clear()
        made.learn("new")
        origin = made.origin("new")
        assert origin is not None
        assert (origin.parent, origin.epoch, origin.seq, origin.samples) == (parent, 1, last, N)
        assert origin.distance < 0.9
        assert set(origin.reason.replace(",", "").split()) >= {"dark", "light"}
        first, *later = made.entries("new")
        assert first.reason == f"starts from {parent}'s 1.{last}, distance {origin.distance:.2f}"
        np.testing.assert_array_equal(made.theta("new", 1), made.theta(parent, last))
        assert [each.patch.entry.seq for each in made.published] == [1, *[each.seq for each in later]]
        assert later, "and it learns from the same samples then"
        kept = made.store.read(lambda db: samples.totals(db, "new"))
        assert kept.unused < N


def test_a_group_that_is_like_no_other_begins_at_the_source(tmp_path: Path, engines: Engines) -> None:
    with schooled(tmp_path, engines) as made:
        taught(made)
        made.send("new", "noisy", 9000)
        made.learn("new")
        origin = made.origin("new")
        assert origin is not None
        assert (origin.parent, origin.seq) == ("", 0)
        assert origin.distance > 0.9
        assert origin.reason.startswith("no group is within 0.9: ")
        assert not any(entry.reason for entry in made.entries("new"))
        assert made.school._groups["new"].learner.rounds <= 1, "it learns by itself"


def test_the_first_group_starts_at_the_source_and_waits_for_nothing(tmp_path: Path, engines: Engines) -> None:
    with schooled(tmp_path, engines) as made:
        made.send("dark", "dark", 1, 10)
        made.learn("dark")
        origin = made.origin("dark")
        assert origin is not None
        assert (origin.parent, origin.seq, origin.reason) == ("", 0, "no other group has a patch")
        assert len(made.entries("dark")) == 1
        assert not made.entries("dark")[0].reason


def test_what_the_gate_refuses_is_no_start(tmp_path: Path, engines: Engines) -> None:
    with schooled(tmp_path, engines) as made:
        taught(made)
    with schooled(tmp_path, engines, gate=STRICT) as made:
        made.send("new", "dark", 9000)
        made.learn("new")
        origin = made.origin("new")
        assert origin is not None
        assert (origin.parent, origin.seq) == ("", 0)
        assert origin.reason.startswith("the gate refused dark's: lost")
        assert not any(entry.reason for entry in made.entries("new")), "what it has learned itself"
        learner = made.school._groups["new"].learner
        assert learner.rounds <= 1, "nothing of the other group's learner is left"


def test_a_group_without_enough_samples_or_with_a_patch_of_another_key_is_not_compared(
    tmp_path: Path, engines: Engines
) -> None:
    with schooled(tmp_path, engines) as made:
        alien = build(
            engines.bundle.theta0, identity.create(tmp_path / "other"), engines.bundle, group="alien",
            seq=1, parent=engines.bundle.theta0, samples=1, now_s=5, state="published",
        )  # fmt: skip
        made.store.call(ledger.append(alien))
        made.send("dark", "dark", 1000, 40)
        made.learn("dark")
        made.store.call(Operation("forget", lambda db: db.execute("DELETE FROM samples WHERE number > 5")))
        made.send("new", "dark", 9000)
        made.learn("new")
        origin = made.origin("new")
        assert origin is not None
        assert (origin.parent, origin.reason) == ("", f"no other group has a patch and {N} samples")


def test_it_is_off_where_it_is_turned_off(tmp_path: Path, engines: Engines) -> None:
    off = msgspec.structs.replace(
        Config(), learner=LearnerOptions(new=8, replay=8, rounds=1, nearest=0)
    ).learner
    with schooled(tmp_path, engines, learner=off) as made:
        taught(made)
        made.send("new", "dark", 9000)
        made.learn("new")
        assert made.origin("new") is None
        first = made.entries("new")[0]
        assert not first.reason
        assert not np.array_equal(made.theta("new", 1), made.theta("dark", made.entries("dark")[-1].seq))


def test_a_group_that_has_learned_does_not_start_again(tmp_path: Path, engines: Engines) -> None:
    """Neither one that a service of before has taught, nor after a restart, nor where the note is damaged."""
    with schooled(tmp_path, engines) as made:
        taught(made)
        made.store.call(Operation("older", lambda db: db.execute("DELETE FROM origins WHERE grp = 'dark'")))
        made.store.call(
            Operation("harm", lambda db: db.execute("UPDATE origins SET seq = 7 WHERE grp = 'light'"))
        )
        with pytest.raises(DamagedRecord):
            made.origin("light")
    with schooled(tmp_path, engines) as made:
        for group in ("dark", "light"):
            before = len(made.entries(group))
            made.send(group, "noisy", 20_000 + 100 * len(group))
            made.learn(group)
            assert all(not entry.reason for entry in made.entries(group)[before:])
        assert made.origin("dark") is None
        assert [each.group for each in made.store.read(origins.listed)] == []


def test_the_same_store_decides_the_same(tmp_path: Path, engines: Engines) -> None:
    found = []
    for turn in ("a", "b"):
        with schooled(tmp_path / turn, engines) as made:
            taught(made)
            made.send("new", "light", 9000)
            made.learn("new")
            found.append((made.origin("new"), made.theta("new", 1).tobytes(), made.theta("new", 2).tobytes()))
    assert found[0] == found[1]


def test_what_cannot_be_kept_leaves_no_trace_and_is_decided_again(tmp_path: Path, engines: Engines) -> None:
    with schooled(tmp_path, engines) as made:
        taught(made)
        made.send("new", "dark", 9000)
        made.store.call(ledger.append(cloud_records.patch(1, "new", epoch=2, state="refused")))
        made.store.call(Operation("hide", lambda db: db.execute("DELETE FROM patches WHERE grp = 'new'")))
        with pytest.raises(OutOfOrder):
            made.school.learn("new")
        assert made.origin("new") is None
        assert made.store.read(lambda db: learners.load(db, "new")) is None
        assert made.school._groups["new"].learner.rounds == 0
        made.store.call(Operation("mend", lambda db: db.execute("DELETE FROM counters WHERE grp = 'new'")))
        made.learn("new")
        origin = made.origin("new")
        assert origin is not None
        assert origin.parent == "dark"


def test_the_command_says_where_a_group_started(tmp_path: Path, engines: Engines) -> None:
    with schooled(tmp_path, engines) as made:
        taught(made)
        made.send("new", "dark", 9000)
        made.learn("new")
        origin = made.origin("new")
        assert origin is not None

    def said(*words: str) -> str:
        done = CliRunner().invoke(app, ["patches", "origin", *words, "--store", str(tmp_path)])
        assert done.exit_code == 0, done.output
        return done.output

    assert json.loads(said("new", "--json")) == msgspec.to_builtins(origin)
    assert f"dark's 1.{origin.seq}, distance {origin.distance:.2f}" in said("new")
    assert "the source, at" in said("dark")
    assert "nothing was decided" in said("nobody")
    assert json.loads(said("nobody", "--json")) is None
    log = CliRunner().invoke(app, ["patches", "log", "new", "--store", str(tmp_path)]).output
    assert f"starts from dark's 1.{origin.seq}" in log


# --- with a process that is killed ---------------------------------------------------------------------------


SETTINGS = f"""
[learner]
new = 8
replay = 8
rounds = 1
nearest = {N}
nearest_distance = 0.9

[gate]
tolerance = 1.0
"""


def sent(edge: Edge, count: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    edge.send(
        [
            Spooled.of(
                0.2 * draw.random((3, SIZE, SIZE), dtype=np.float32), stream="s", taken_ms=1, seq=0, entropy=0.5
            )
            for _ in range(count)
        ]
    )  # fmt: skip


def test_a_kill_between_the_decision_and_its_publication_loses_nothing(
    program: Program, tmp_path: Path, engines: Engines
) -> None:
    bundle = engines.bundle
    with Cloud(program, tmp_path / "cloud", bundle.path, SETTINGS) as cloud:
        cloud.start()
        cloud.enrol(tmp_path / "old", "old", "yard")
        cloud.enrol(tmp_path / "young", "young", "roof")
        with Edge(tmp_path / "old", bundle) as edge:
            sent(edge, 24, 1)
            look(lambda: edge.base.seq)
            edge.settled(24)
            look(lambda: _at_rest(cloud, "yard"))
        cloud.end()
        for point in ("before-ledger", "after-ledger"):
            cloud.launch((point, 1))
            with Edge(tmp_path / "young", bundle) as edge:
                if point == "before-ledger":
                    sent(edge, N, 2)
                cloud.ended()
            found = read(cloud.store, lambda db: origins.get(db, "roof"))
            assert (found is None) is (point == "before-ledger")
            assert len(_states(cloud, "roof")) == (point == "after-ledger")
        assert found is not None
        assert found.parent == "yard"
        cloud.start()
        with Edge(tmp_path / "young", bundle) as edge:
            look(lambda: edge.base.seq)
            look(lambda: _states(cloud, "roof"), lambda states: states[:1] == ["published"])
            assert edge.staged[0] == (1, 1) or edge.base.seq > 1
        assert read(cloud.store, lambda db: origins.get(db, "roof")) == found, "decided once"
        first = read(cloud.store, lambda db: ledger.entry_of(db, "roof", 1, 1))
        assert first.reason.startswith(f"starts from yard's 1.{found.seq}, ")


def _at_rest(cloud: Cloud, group: str) -> bool:
    """Whether there is no round left to make, and no patch to hand out."""
    waiting = [number for number, *_ in read(cloud.store, lambda db: samples.waiting(db, group))]
    fresh = sum(not held_out(number) for number in waiting)
    return fresh < LEARNER.new and set(_states(cloud, group)) == {"published"}


def _states(cloud: Cloud, group: str) -> list[str]:
    return [each.state for each in read(cloud.store, lambda db: ledger.entries(db, group))][::-1]
