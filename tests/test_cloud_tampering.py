"""T15: a byte is flipped at each hundredth of each file of a store, a spool, a base and of the keys of both sides.

Nothing that is then found may be something else than what was written; what is lost is lost by name, and everything
else goes on.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

import tiny_bundle
from cloud_records import EDGE, Kept, contents, patch, sample
from disks import Unsynced
from tta_cloud import edges, identity, learners, ledger
from tta_cloud.errors import CloudError
from tta_edge import enrol
from tta_edge.base import Base, BaseStore
from tta_edge.spool import Spool
from tta_edge.spool_file import Sample
from tta_runtime import sealed as seals
from tta_runtime.bundle import Bundle
from tta_runtime.errors import TtaError
from tta_runtime.signing import write_secret

PLACES = 100


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: nothing here is about what reaches a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as path:
        yield Path(path)


def damaged(whole: Path, place: Path) -> Iterator[tuple[str, Path]]:
    """Copies of a directory, each with one byte flipped, at each hundredth of each file."""
    for file in sorted(path for path in whole.rglob("*") if path.is_file() and path.stat().st_size):
        data = file.read_bytes()
        for i in sorted({len(data) * k // PLACES for k in range(PLACES)}):
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(whole, place)
            changed = bytearray(data)
            changed[i] ^= 1 << i % 8
            (place / file.relative_to(whole)).write_bytes(changed)
            yield f"byte {i} of {file.relative_to(whole)}", place


def test_t15_a_flipped_byte_of_the_store_changes_nothing_that_is_believed(quick_path: Path) -> None:
    whole = quick_path / "whole"
    history: list[dict[tuple[object, ...], object]] = []
    with Kept(whole) as kept:
        kept.insert(*range(12), size=400)
        history.append(contents(kept.store))
        for seq in (1, 2, 3):
            kept.call(ledger.append(patch(seq)))
        kept.call(edges.register(EDGE, "camera", "g", now_ms=1))
        history.append(contents(kept.store))
        kept.call(edges.activate(EDGE))
        kept.call(edges.admit(edges.hash_of("secret"), "other", "g", expires_ms=2**50))
        kept.call(learners.save("g", b"snapshot" * 50, [sample(1).key], after=0, saved_ms=5))
        history.append(contents(kept.store))
        kept.call(edges.revoke(EDGE))
        history.append(contents(kept.store))
        shutil.copytree(whole, quick_path / "running")  # with what the log holds beside the file
    assert len(history[-1]) > 15
    set_aside = lost = 0
    for origin in (whole, quick_path / "running"):
        for what, place in damaged(origin, quick_path / "copy"):
            try:
                with Kept(place) as kept:
                    found = contents(kept.store)
                    set_aside += bool(kept.told)
                    kept.insert(99)  # it goes on
            except CloudError:
                lost += 1
                continue
            for name, value in found.items():
                # A damaged log ends there: what is found is then as it was at an earlier moment.
                assert value in [state.get(name) for state in history], f"{what}: {name}"
            lost += len(found) < len(history[-1])
    assert set_aside >= 5
    assert lost > 10


def test_t15_a_flipped_byte_of_the_spool_costs_what_it_hit_and_changes_nothing(quick_path: Path) -> None:
    whole = quick_path / "whole"
    spool = Spool(whole, max_samples=100)
    made: dict[str, tuple[object, ...]] = {}
    for file in range(3):
        each = [
            Sample.of(np.full((3, 4, 4), i, np.float32), stream="cam", taken_ms=i, seq=i, entropy=0.5)
            for i in range(8 * file, 8 * file + 8)
        ]
        made |= zip(spool.append_many(each), map(dataclasses.astuple, each), strict=True)
    kept = [each.key for each in spool.peek(10**6)]
    spool.remove(kept[1:3])
    spool.close()
    for what, place in damaged(whole, quick_path / "copy"):
        try:
            spool = Spool(place, max_samples=100, disk=Unsynced())
        except TtaError as error:
            pytest.fail(f"{what}: the spool does not open: {error}")
        found = {each.key: dataclasses.astuple(each.sample) for each in spool.peek(10**6)}
        assert all(made[key] == value for key, value in found.items()), what
        spool.append(Sample.of(np.zeros((3, 4, 4), np.float32), stream="cam", taken_ms=1, seq=1, entropy=0.5))
        spool.close()


def test_t15_a_flipped_byte_of_a_base_leaves_the_other_one(quick_path: Path) -> None:
    tiny_bundle.build(quick_path / "tiny")
    bundle = Bundle.open(quick_path / "tiny")
    store = BaseStore(quick_path / "whole", bundle)
    made = {seq: np.array(bundle.theta0) + np.float32(seq) for seq in (1, 2)}
    for seq, theta in made.items():
        store.commit(Base(1, seq, theta, 1, seq))
    for what, place in damaged(quick_path / "whole", quick_path / "copy"):
        found, refused = BaseStore(place, bundle, disk=Unsynced()).load()
        assert len(found) + len(refused) == 2, what
        assert len(found) >= 1, what
        for base in found:
            assert (base.order, base.seen) == ((1, base.seq), (1, base.seq))
            np.testing.assert_array_equal(base.theta, made[base.seq])


def refused_or_same(load: Callable[[Path], object], whole: Path, place: Path, most_same: float) -> None:
    """Each damaged copy is refused by name, or is the same as before; no more than a share of them is."""
    before, same, count = load(whole), 0, 0
    for what, copy in damaged(whole, place):
        count += 1
        try:
            found = load(copy)
        except TtaError:
            continue
        assert found == before, f"{what}: another key or root is believed"
        same += 1
    assert same <= most_same * count


def test_t15_a_flipped_byte_of_the_clouds_keys_is_refused(quick_path: Path) -> None:
    identity.create(quick_path / "whole")
    identity.rotate(quick_path / "whole", [])

    def load(store: Path) -> object:
        found = identity.load(store)
        return found.curve_secret, found.publisher.public, found.roots

    (quick_path / "root.key").write_bytes((quick_path / "whole" / "keys" / "root.key").read_bytes())
    (quick_path / "whole" / "keys" / "root.key").unlink()
    refused_or_same(load, quick_path / "whole", quick_path / "copy", 0.02)


def test_t15_a_flipped_byte_of_a_root_key_signs_no_root(quick_path: Path) -> None:
    identity.create(quick_path / "store")
    before = identity.load(quick_path / "store")
    key = quick_path / "store" / "keys" / "root.key"
    good = key.read_bytes()
    for i in range(len(good)):
        changed = bytearray(good)
        changed[i] ^= 1
        write_secret(key, bytes(changed))
        with pytest.raises(TtaError):
            identity.rotate(quick_path / "store", [])
        found = identity.load(quick_path / "store")
        assert (found.root, found.publisher.key_id) == (before.root, before.publisher.key_id), i
    write_secret(key, good)
    assert identity.rotate(quick_path / "store", []).root.version == 2


def test_t15_a_flipped_byte_of_an_edges_enrolment_is_refused(quick_path: Path) -> None:
    keys = identity.create(quick_path / "cloud")
    state = quick_path / "whole" / "cloud"
    state.mkdir(parents=True)
    public, secret = zmq.curve_keypair()
    link = enrol.Link(
        endpoint="tcp://127.0.0.1:7610", server_key=keys.curve_public, group="yard", name="camera"
    ).checked(public)
    write_secret(state / "edge.key", secret + b"\n")
    write_secret(state / "1.root", seals.encode(keys.roots[0][1]))
    write_secret(state / "link.json", msgspec.json.encode(link))

    def load(place: Path) -> object:
        found = enrol.load(place)
        return found.link, found.public, found.secret, found.roots

    refused_or_same(load, quick_path / "whole", quick_path / "copy", 0.02)
