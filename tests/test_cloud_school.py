"""What a group's samples are made into: rounds that repeat, and that are kept whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

import cloud_records
import exported
from networks import SIZE
from tta_cloud import identity, learners, ledger, samples
from tta_cloud.config import Config
from tta_cloud.errors import OutOfOrder
from tta_cloud.gate import GateOptions
from tta_cloud.learner import LearnerOptions
from tta_cloud.operations import Operation
from tta_cloud.school import School
from tta_cloud.store import Store
from tta_runtime.bundle import Bundle
from tta_runtime.engine import EngineOptions
from tta_runtime.model import Engines

OPTIONS = Config(learner=LearnerOptions(new=8, replay=8, rounds=1), gate=GateOptions(min_samples=2))


@pytest.fixture(scope="module")
def engines() -> Engines:
    bundle = Bundle.open(exported.built("resnet", ("source", "distill")).path)
    return Engines.load(bundle, methods=["source", "distill"], options=EngineOptions(threads=1))


def image(number: int) -> samples.Sample:
    x = np.random.default_rng(number).random((3, SIZE, SIZE), dtype=np.float32)
    return cloud_records.sample(number, dtype="float32", shape=x.shape, x=x.tobytes())


@contextmanager
def school(root: Path, engines: Engines) -> Iterator[tuple[School, Store]]:
    identity.create(root)
    store = Store(root / "data", lambda event: None, options=cloud_records.AT_ONCE)
    try:
        yield School(OPTIONS, engines, engines, store, identity.load(root), lambda published: None), store
    finally:
        store.close()


def patches(store: Store) -> list[bytes]:
    """Payloads, oldest first."""
    found = store.read(lambda db: ledger.entries(db, "g"))
    return [
        store.read(lambda db, e=each: ledger.get(db, "g", e.epoch, e.seq)).payload for each in reversed(found)
    ]


def test_the_same_arrivals_make_the_same_patches_at_any_pace(tmp_path: Path, engines: Engines) -> None:
    """Rounds must not depend on how many samples have come while one was learned from."""
    made = []
    for pace in (1, 60):
        with school(tmp_path / str(pace), engines) as (one, store):
            for first in range(1, 61, pace):
                for number in range(first, first + pace):
                    # Keys are an edge's to write, and differ each time.
                    sample = msgspec.structs.replace(
                        image(number), key=cloud_records.key(number + 1000 * pace)
                    )
                    store.call(samples.insert(sample, received_ms=pace))
                while one.learn("g"):
                    pass
            made.append(patches(store))
    assert len(made[0]) >= 5
    assert made[0] == made[1]


def test_a_round_whose_patch_cannot_be_kept_leaves_no_trace(tmp_path: Path, engines: Engines) -> None:
    with school(tmp_path, engines) as (one, store):
        for number in range(1, 11):
            store.call(samples.insert(image(number), received_ms=1))
        store.call(ledger.append(cloud_records.patch(1, epoch=2, state="built")))  # then epoch 1 is over
        with pytest.raises(OutOfOrder):
            one.learn("g")
        assert store.read(lambda db: samples.totals(db, "g")).unused == 10
        assert store.read(lambda db: learners.load(db, "g")) is None
        for table in ("patches", "counters"):
            store.call(Operation("mend", lambda db, t=table: db.execute(f"DELETE FROM {t} WHERE epoch = 2")))
        assert one.learn("g")
        after = patches(store)
    with school(tmp_path / "other", engines) as (one, store):
        for number in range(1, 11):
            store.call(samples.insert(image(number), received_ms=1))
        assert one.learn("g")
        assert patches(store) == after, "what failed has not been learned"
