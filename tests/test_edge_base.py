"""A better theta comes from outside: probation in shadow, commit before it serves, adoption, going back, its file."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

import serving
import tiny_bundle
from disks import Call, Failing, PowerLoss, Recording, Unsynced
from running import running
from tta_edge.adapt import STANDARD, Guards, Stream
from tta_edge.base import Base, BaseStore, own
from tta_edge.client import Client
from tta_edge.enrol import Link
from tta_edge.errors import ModeRefused
from tta_edge.events import Event, Reason
from tta_edge.hosting import Host
from tta_edge.probation import MARGIN, Probation
from tta_edge.teaching import DECAY, KNOWN, WATCHED, Bases, Progress
from tta_runtime import sealed
from tta_runtime import theta as thetas
from tta_runtime.bundle import Bundle
from tta_runtime.errors import StateError, StateUnwritable
from tta_runtime.model import Engines, Model
from tta_runtime.root import Root, make_root, named
from tta_runtime.signing import SecretKey

EXAMPLES = int(os.environ.get("TTA_EXAMPLES", "200"))
X, Y = tiny_bundle.samples(64, seed=3)
SHIFTED, LABELS = tiny_bundle.samples(64, seed=4, shift=1.0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("bundle") / "tiny"
    tiny_bundle.build(path)
    return Bundle.open(path)


@pytest.fixture(scope="module")
def engines(bundle: Bundle) -> Engines:
    return Engines.load(bundle)


def better(bundle: Bundle) -> np.ndarray[Any, Any]:
    """A theta that undoes the shift of `SHIFTED`: its mean moved, its scale doubled."""
    theta = np.array(bundle.theta0)
    theta[: tiny_bundle.D] *= 2
    theta[2 * tiny_bundle.D :] += 1
    return theta


def base(bundle: Bundle, epoch: int = 1, seq: int = 5) -> Base:
    return Base(epoch, seq, better(bundle), epoch, seq)


def same(found: Base | None, wanted: Base) -> bool:
    return (
        found is not None
        and (found.order, found.seen) == (wanted.order, wanted.seen)
        and np.array_equal(found.theta, wanted.theta)
    )


# --- the file -------------------------------------------------------------------------------------


def test_a_committed_base_is_found_again_and_the_newest_counts(bundle: Bundle, tmp_path: Path) -> None:
    store = BaseStore(tmp_path / "b", bundle)
    assert store.load() == ([], [])
    for seq in (5, 6, 7):
        store.commit(base(bundle, seq=seq))
        found, refused = BaseStore(tmp_path / "b", bundle).load()
        assert same(found[0], base(bundle, seq=seq))
        assert not refused
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "b").iterdir())


def test_whatever_call_of_the_disk_fails_the_old_base_or_the_new_one_is_there(
    bundle: Bundle, tmp_path: Path
) -> None:
    old, new = base(bundle, seq=5), base(bundle, seq=6)
    for nth in range(1, 40):
        place = tmp_path / str(nth)
        BaseStore(place, bundle, disk=Unsynced()).commit(old)
        disk = Failing(nth, errno.ENOSPC)
        try:
            BaseStore(place, bundle, disk=disk).commit(new)
        except StateUnwritable:
            (found, *_), _ = BaseStore(place, bundle).load()
            assert same(found, old) or same(found, new)
            continue
        assert not disk.failures
        break
    else:
        raise AssertionError("every call fails")
    assert nth > 3


def test_a_power_cut_leaves_the_old_base_or_the_new_one(bundle: Bundle, tmp_path: Path) -> None:
    disk = Recording()
    (tmp_path / "live").mkdir()
    store = BaseStore(tmp_path / "live" / "b", bundle, disk=disk)
    bases = [base(bundle, seq=seq) for seq in (5, 6, 7)]
    for each in bases:
        store.load()
        store.commit(each)
        disk.calls.append(Call("mark", "", each.seq))
    power, committed = PowerLoss(tmp_path / "live"), 0
    seen = 0
    for call in disk.calls:
        power.apply(call)
        if call.name == "mark":
            committed = call.more
        for tree in power.trees():
            place = tmp_path / f"tree-{seen}"
            seen += 1
            for name, content in sorted(tree.items()):
                target = place / name
                if content is None:
                    target.mkdir(parents=True, exist_ok=True)
                else:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content)
            found, _ = BaseStore(place / "b", bundle).load()
            number = found[0].seq if found else 0
            assert number in (committed, max(5, committed + 1)), "an uncommitted base, or an old one"
    assert seen > 20


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_by_name(
    bundle: Bundle, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    store = BaseStore(Path("unused"), bundle)
    good = store._encode(base(bundle), 3)
    kind = data.draw(st.sampled_from(["bytes", "flip", "cut"]))
    place = data.draw(st.integers(0, len(good) - 1))
    if kind == "bytes":
        given = data.draw(st.binary(max_size=300))
    elif kind == "flip":
        given = good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1 :]
    else:
        given = good[:place]
    try:
        found, generation = store._decode(given)
    except StateError:
        return
    assert (same(found, base(bundle)), generation) == (True, 3)


def test_the_base_of_another_bundle_is_not_taken(bundle: Bundle, tmp_path: Path) -> None:
    serving.other_source(tmp_path / "other")
    other = Bundle.open(tmp_path / "other")
    BaseStore(tmp_path / "b", bundle).commit(base(bundle))
    found, (refused,) = BaseStore(tmp_path / "b", other).load()
    assert not found
    assert refused.error.code == "state-of-other-bundle"


# --- probation ------------------------------------------------------------------------------------


def spread(n: int, height: float) -> np.ndarray[Any, Any]:
    logits = np.zeros((n, 3), np.float32)
    logits[np.arange(n), np.arange(n) % 3] = height
    return logits


def judged(
    candidate: np.ndarray[Any, Any], served: np.ndarray[Any, Any], *, returns: bool = False
) -> Reason | None:
    probation = Probation.begin(3, len(candidate)).seen(candidate, served)
    assert probation.decided
    found = probation.objection(returns=returns)
    return None if found is None else found[0]


def test_a_candidate_that_says_as_much_passes() -> None:
    assert judged(spread(30, 3.0), spread(30, 3.0)) is None
    assert judged(spread(30, 5.0), spread(30, 3.0)) is None
    assert judged(spread(30, 2.9), spread(30, 3.0)) is None, "a little less is within the margin"


def test_a_candidate_that_is_broken_blind_or_knows_less_is_refused() -> None:
    broken = spread(30, 3.0)
    broken[7, 1] = np.nan
    assert judged(broken, spread(30, 3.0)) is Reason.NON_FINITE_LOGITS
    blind = np.zeros((30, 3), np.float32)
    blind[:, 1] = 20
    assert judged(blind, spread(30, 3.0)) is Reason.COLLAPSE
    assert judged(blind, blind) is None, "what serves sees one class as well: perhaps there is no other"
    assert judged(spread(30, 1.0), spread(30, 3.0)) is Reason.LESS_INFORMATION
    assert judged(np.roll(spread(30, 3.0), 1, axis=1), spread(30, 3.0)) is Reason.DISAGREES
    assert MARGIN < 0.5


def test_one_that_has_served_before_is_refused_only_where_it_is_broken_or_blind() -> None:
    broken, blind = spread(30, 3.0), np.zeros((30, 3), np.float32)
    broken[7, 1] = np.nan
    blind[:, 1] = 20
    assert judged(broken, spread(30, 3.0), returns=True) is Reason.NON_FINITE_LOGITS
    assert judged(blind, spread(30, 3.0), returns=True) is Reason.COLLAPSE
    assert judged(spread(30, 1.0), spread(30, 3.0), returns=True) is None
    assert judged(np.roll(spread(30, 3.0), 1, axis=1), spread(30, 3.0), returns=True) is None


def test_batches_of_any_size_give_the_same_probation() -> None:
    mine, served = spread(30, 2.0), spread(30, 3.0)
    whole = Probation.begin(3, 30).seen(mine, served)
    parts = Probation.begin(3, 30)
    for i in range(30):
        assert not parts.decided
        parts = parts.seen(mine[i : i + 1], served[i : i + 1])
    assert parts.decided
    assert parts.candidate.information == pytest.approx(whole.candidate.information)


# --- adoption -------------------------------------------------------------------------------------


def test_a_stream_stands_on_its_base_and_returns_to_it(bundle: Bundle, engines: Engines) -> None:
    stream = Stream("a", Model(engines, "tent"), Guards(max_distance=9.0, reset_every_steps=0))
    new = better(bundle)
    stream.answer(X)
    stream.adopt(new, (1, 2))
    np.testing.assert_array_equal(stream.model.theta, new)
    assert (stream.stands_on, len(stream.checkpoints)) == ((1, 2), 0)
    np.testing.assert_array_equal(
        stream.model.predict(SHIFTED).logits, stream.model.predict(SHIFTED, instead=new).logits
    )
    source = stream.model.predict(SHIFTED, source=True).logits
    assert (source.argmax(1) == LABELS).mean() < (
        stream.model.predict(SHIFTED).logits.argmax(1) == LABELS
    ).mean()
    stream.answer(SHIFTED)
    assert not np.array_equal(stream.model.theta, new)
    stream.reset()
    np.testing.assert_array_equal(stream.model.theta, new)
    np.testing.assert_array_equal(stream.model.predict(SHIFTED, source=True).logits, source)


def test_what_a_stream_has_learned_is_kept_in_part_where_it_learns(bundle: Bundle, engines: Engines) -> None:
    stream = Stream("a", Model(engines, "tent"), STANDARD)
    for _ in range(3):
        stream.answer(SHIFTED)
    trained = bundle.manifest.theta.trained
    learned, new = stream.model.theta - bundle.theta0, better(bundle)
    found = stream.adopted(new, decay=DECAY)
    np.testing.assert_allclose(found[:trained], new[:trained] + DECAY * learned[:trained], rtol=1e-5)
    np.testing.assert_array_equal(found[trained:], new[trained:])
    np.testing.assert_array_equal(stream.adopted(new), new)


# --- all of it ------------------------------------------------------------------------------------


class Taught:
    """A bundle's streams and bases, without a daemon."""

    def __init__(
        self,
        engines: Engines,
        directory: Path | None,
        mode: Any = "cloud",
        method: str = "source",
        **more: Any,
    ) -> None:
        self.events: list[Event] = []
        self.progress: list[Progress] = []
        self.host = Host("default", Path("unused"), engines, method, {})
        self.bases = Bases(
            mode, probation_samples=64, directory=directory, tell=self.events.append,
            streams=lambda: self.streams, **more,
        )  # fmt: skip
        self.bases.open(self.host)
        self.streams = [Stream(name, Model(engines, method), STANDARD) for name in ("a", "b")]
        for stream in self.streams:
            self.bases.admit(stream)

    def offer(self, theta: Any, seq: int = 1, epoch: int = 1) -> None:
        self.bases.offer(self.host, epoch, seq, theta, self.progress.append)

    def answer(self, x: Any = SHIFTED, stream: int = 0) -> np.ndarray[Any, Any]:
        found = self.streams[stream].answer(x)
        self.bases.answered(self.host, self.streams[stream], x, found.logits)
        return found.logits

    @property
    def states(self) -> list[tuple[int, str, str]]:
        return [(each.seq, each.state, each.reason) for each in self.progress]


@pytest.fixture
def taught(engines: Engines, tmp_path: Path) -> Taught:
    return Taught(engines, tmp_path)


def test_a_good_base_serves_all_streams_after_its_probation_and_not_before(
    taught: Taught, bundle: Bundle, engines: Engines, tmp_path: Path
) -> None:
    new = better(bundle)
    taught.offer(new)
    before = taught.answer(SHIFTED[:32])
    np.testing.assert_array_equal(taught.streams[0].model.theta, bundle.theta0)
    assert taught.states == [(1, "staged", "")]
    assert taught.bases.candidate("default") == (1, 1)
    assert Taught(engines, tmp_path).bases.base("default").seq == 0, "a candidate has survived a restart"
    taught.answer(SHIFTED[32:], stream=1)
    assert taught.states[-1] == (1, "committed", "")
    assert taught.bases.candidate("default") is None
    for stream in taught.streams:
        np.testing.assert_array_equal(stream.model.theta, new)
    after = taught.answer(SHIFTED[:32])
    assert (after.argmax(1) == LABELS[:32]).mean() > (before.argmax(1) == LABELS[:32]).mean()
    again = Taught(engines, tmp_path)
    assert same(again.bases.base("default"), Base(1, 1, new, 1, 1))
    np.testing.assert_array_equal(again.streams[0].model.theta, new)
    assert [(event.action, event.reason) for event in taught.events] == [
        ("stage", "patch"),
        ("commit", "patch"),
    ]


def test_a_bad_base_never_serves_and_is_not_taken_again(
    taught: Taught, bundle: Bundle, engines: Engines, tmp_path: Path
) -> None:
    blind = np.array(bundle.theta0)
    blind[: tiny_bundle.D] = 0
    blind[tiny_bundle.D : 2 * tiny_bundle.D] = np.arange(tiny_bundle.D) % 3 == 1
    blind[tiny_bundle.D : 2 * tiny_bundle.D] *= 10
    taught.offer(blind)
    taught.answer(X)
    assert taught.states == [(1, "staged", ""), (1, "refused", "collapse")]
    np.testing.assert_array_equal(taught.streams[0].model.theta, bundle.theta0)
    for again in (taught, Taught(engines, tmp_path)):
        again.offer(blind)
        assert again.states[-1] == (1, "refused", "stale")
    taught.offer(better(bundle), seq=2)
    taught.answer(SHIFTED)
    assert taught.states[-1] == (2, "committed", "")


def confused(bundle: Bundle) -> np.ndarray[Any, Any]:
    """As sure as `better`, of other classes."""
    theta = better(bundle)
    theta[: tiny_bundle.D] *= -1
    return theta


def test_the_cloud_can_go_back_from_what_is_sure_and_wrong(
    taught: Taught, bundle: Bundle, engines: Engines, tmp_path: Path
) -> None:
    """What served before is known again, after a restart as well; a stranger that says the same is not let in."""
    taught.offer(better(bundle), seq=1)
    taught.answer()
    wrong = Taught(engines, tmp_path)  # found on disk, as after a restart
    stranger = better(bundle) * np.float32(1.001)
    for number, theta in ((2, confused(bundle)), (3, better(bundle)), (4, np.array(bundle.theta0))):
        if number == 2:  # it has got through, however that may be
            wrong.bases._taught["default"].known += (thetas.digest(bundle.manifest.theta, theta),)
        wrong.offer(theta, seq=number)
        wrong.answer()
        assert wrong.states[-1] == (number, "committed", ""), number
        np.testing.assert_array_equal(wrong.streams[0].model.theta, theta)
        if number == 2:
            other = Taught(engines, tmp_path / "other")
            other.bases._taught["default"].known += (thetas.digest(bundle.manifest.theta, theta),)
            other.offer(theta, seq=2)
            other.answer()
            other.offer(stranger, seq=3)
            other.answer()
            assert other.states[-1][1] == "refused"


def test_what_collapsed_is_not_known_again(taught: Taught, bundle: Bundle) -> None:
    bad = confused(bundle)
    taught.bases._taught["default"].known += (thetas.digest(bundle.manifest.theta, bad),)
    taught.offer(bad, seq=1)
    taught.answer()
    assert taught.states[-1] == (1, "committed", "")
    assert taught.bases.collapsed(taught.host, "all of class 1")
    taught.offer(better(bundle), seq=2)
    taught.answer()
    taught.offer(bad, seq=3)
    taught.answer()
    assert taught.states[-1][1] == "refused"


def test_few_of_the_thetas_that_served_are_known(taught: Taught, bundle: Bundle) -> None:
    taught.offer(better(bundle), seq=1)
    taught.answer()
    for seq in range(2, KNOWN + 4):
        taught.offer(better(bundle) * np.float32(1 + seq / 10_000), seq=seq)
        taught.answer()
    known = taught.bases._taught["default"].known
    assert (len(known), known[0]) == (KNOWN, bundle.manifest.theta.digest)


@pytest.mark.parametrize(("epoch", "seq"), [(1, 3), (1, 2), (0, 9)])
def test_replay_and_rollback_are_refused_after_a_restart_too(
    engines: Engines, bundle: Bundle, tmp_path: Path, epoch: int, seq: int
) -> None:
    taught = Taught(engines, tmp_path)
    taught.offer(better(bundle), seq=3)
    taught.answer()
    assert taught.states[-1] == (3, "committed", "")
    for each in (taught, Taught(engines, tmp_path)):
        theta = each.streams[0].model.theta
        each.offer(np.array(bundle.theta0), seq=seq, epoch=epoch)
        assert each.states[-1] == (seq, "refused", "stale")
        each.answer()
        np.testing.assert_array_equal(each.streams[0].model.theta, theta)


def test_newer_patches_do_not_put_off_a_decision_for_ever(taught: Taught, bundle: Bundle) -> None:
    for seq in range(1, 5):
        taught.offer(better(bundle), seq=seq)
        taught.answer(SHIFTED[16 * (seq - 1) : 16 * seq])
    assert taught.states[-1] == (4, "committed", "")
    assert [state for state in taught.states if state[1] == "refused"] == [
        (1, "refused", "newer"),
        (2, "refused", "newer"),
        (3, "refused", "newer"),
    ]


@pytest.mark.parametrize("mode", ["off", "local"])
def test_modes_that_take_no_patches_take_none(
    engines: Engines, bundle: Bundle, tmp_path: Path, mode: str
) -> None:
    taught = Taught(engines, tmp_path, mode)
    taught.offer(better(bundle))
    taught.answer()
    assert taught.states == [(1, "refused", "mode")]
    np.testing.assert_array_equal(taught.streams[0].model.theta, bundle.theta0)


def test_what_cannot_be_written_does_not_serve(engines: Engines, bundle: Bundle, tmp_path: Path) -> None:
    disk = Failing()
    taught = Taught(engines, tmp_path, disk=disk)
    disk.broken = True
    taught.offer(better(bundle))
    taught.answer()
    assert taught.states[-1] == (1, "refused", "disk-error")
    np.testing.assert_array_equal(taught.streams[0].model.theta, bundle.theta0)
    assert ("disk", "disk-error") in [(event.action, event.reason) for event in taught.events]
    disk.broken = False
    taught.offer(better(bundle))
    taught.answer()
    assert taught.states[-1] == (1, "committed", ""), "it is offered again when there is room"


def test_a_collapse_soon_after_a_commit_takes_the_base_back(
    taught: Taught, bundle: Bundle, engines: Engines, tmp_path: Path
) -> None:
    taught.offer(better(bundle), seq=1)
    taught.answer()
    taught.offer(better(bundle) * np.float32(1.01), seq=2)
    taught.answer()
    assert taught.bases.base("default").seq == 2
    assert taught.bases.collapsed(taught.host, "all of class 1")
    assert taught.states[-1] == (2, "rolled-back", "collapse")
    for each in (taught, Taught(engines, tmp_path)):
        found = each.bases.base("default")
        assert (found.seq, found.seen_seq) == (1, 2)
        np.testing.assert_array_equal(each.streams[0].model.theta, better(bundle))
        each.offer(better(bundle), seq=2)
        assert each.states[-1] == (2, "refused", "stale")
    assert not taught.bases.collapsed(taught.host, "again"), "there is one way back"


def test_what_was_gone_back_from_is_not_found_by_a_restart_and_a_restart_can_still_go_back(
    taught: Taught, bundle: Bundle, engines: Engines, tmp_path: Path
) -> None:
    for seq in (1, 2):
        taught.offer(better(bundle) * np.float32(1 + seq / 100), seq=seq)
        taught.answer()
    again = Taught(engines, tmp_path)
    assert again.bases.collapsed(again.host, "after a restart")
    assert again.bases.base("default").seq == 1
    assert len(list((tmp_path / "bases" / "default").iterdir())) == 1
    third = Taught(engines, tmp_path)
    assert (third.bases.base("default").seq, third.bases.base("default").seen_seq) == (1, 2)
    assert not third.bases.collapsed(third.host, "there is nothing before it")


def test_a_stream_that_comes_back_does_not_adopt_its_base_again(
    engines: Engines, bundle: Bundle, tmp_path: Path
) -> None:
    """What it has learned on the base, its state included, is as it was."""
    taught = Taught(engines, tmp_path, "both", "tent")
    taught.offer(better(bundle) * np.float32(0.6))
    taught.answer()
    assert taught.states[-1] == (1, "committed", "")
    for _ in range(3):
        taught.streams[0].answer(SHIFTED)
    old = taught.streams[0]
    new = Stream("a", Model(engines, "tent"), STANDARD)
    new.resume(old.model.checkpoint, old.notes(), before=None, restored="a")
    taught.bases.admit(new)
    np.testing.assert_array_equal(new.model.theta, old.model.theta)
    np.testing.assert_array_equal(new.model.state["momentum"], old.model.state["momentum"])
    new.reset()
    np.testing.assert_array_equal(new.model.theta, taught.bases.base("default").theta)


def test_a_base_that_breaks_is_answered_for_by_the_source(engines: Engines, bundle: Bundle) -> None:
    stream = Stream("a", Model(engines, "source"), STANDARD)
    broken = np.array(bundle.theta0)
    broken[: tiny_bundle.D] = 3e38
    stream.adopt(broken, (1, 1))
    found = stream.answer(X)
    assert found.reason is Reason.NON_FINITE_LOGITS
    np.testing.assert_array_equal(found.logits, stream.model.predict(X, source=True).logits)


def test_a_suspended_stream_serves_the_source_and_adopts_nothing(taught: Taught, bundle: Bundle) -> None:
    taught.streams[1].suspended = True
    taught.offer(better(bundle))
    taught.answer()
    np.testing.assert_array_equal(taught.streams[0].model.theta, better(bundle))
    np.testing.assert_array_equal(taught.streams[1].model.theta, bundle.theta0)
    taught.bases.admit(taught.streams[1])
    np.testing.assert_array_equal(taught.streams[1].model.theta, bundle.theta0)


def test_a_collapse_long_after_is_not_laid_to_the_base(taught: Taught, bundle: Bundle) -> None:
    taught.offer(better(bundle))
    taught.answer()
    for _ in range(WATCHED // len(SHIFTED)):
        taught.answer()
    assert not taught.bases.collapsed(taught.host, "late")
    assert taught.bases.base("default").seq == 1


def test_a_damaged_slot_is_told_and_the_other_serves(
    engines: Engines, bundle: Bundle, tmp_path: Path
) -> None:
    taught = Taught(engines, tmp_path)
    for seq in (1, 2):
        taught.offer(better(bundle) * np.float32(1 + seq / 100), seq=seq)
        taught.answer()
    slots = (tmp_path / "bases" / "default").iterdir()
    (newest,) = (path for path in slots if b'"seq":"2"' in path.read_bytes())
    data = newest.read_bytes()
    newest.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    again = Taught(engines, tmp_path)
    assert again.bases.base("default").seq == 1
    assert (again.events[0].action, again.events[0].reason) == ("quarantine", "state-tampered")


def test_no_patch_is_the_bundles_own_theta(bundle: Bundle) -> None:
    assert (own(bundle).order, own(bundle).seen) == ((0, 0), (0, 0))
    assert own(bundle).theta is bundle.theta0


# --- in the daemon --------------------------------------------------------------------------------


def enrolled(state_dir: Path) -> str:
    """A state directory whose edge is known to a cloud that does not run."""
    directory = state_dir / "cloud"
    directory.mkdir(parents=True)
    public, secret = zmq.curve_keypair()
    key = SecretKey.generate()
    keys = named([key.public])
    root = Root(
        version=1, epoch=1, root_keys=keys, root_threshold=1, publisher_keys=keys, publisher_threshold=1,
        not_after_s=2**40,
    )  # fmt: skip
    (directory / "1.root").write_bytes(sealed.encode(make_root(root, [key])))
    (directory / "edge.key").write_bytes(secret)
    (directory / "edge.key").chmod(0o600)
    link = Link(endpoint="tcp://127.0.0.1:1", server_key=public.decode(), group="yard", name="camera")
    (directory / "link.json").write_bytes(msgspec.json.encode(link))
    return str(state_dir)


@pytest.fixture
def path(bundle: Bundle) -> Path:
    return bundle.path


def test_the_daemon_takes_a_base_between_two_requests_and_serves_it_after_a_restart(
    path: Path, bundle: Bundle, tmp_path: Path
) -> None:
    options = {"mode": "cloud", "method": "source", "state_dir": enrolled(tmp_path / "state")}
    with running(path, **options) as server, Client(server.endpoint) as client:
        progress: list[Progress] = []
        client.predict(SHIFTED)
        server._responder.offer_base("", 1, 7, better(bundle), progress.append)
        first = client.predict(SHIFTED)
        second = client.predict(SHIFTED)
        assert [each.state for each in progress] == ["staged", "committed"]
        assert not np.array_equal(first.logits, second.logits)
        assert client.status().bundles[0].base == "1.7"
    with running(path, **options) as server, Client(server.endpoint) as client:
        np.testing.assert_array_equal(client.predict(SHIFTED).logits, second.logits)
        assert client.status().bundles[0].base == "1.7"


def test_mode_cloud_refuses_a_method_that_learns(path: Path, tmp_path: Path) -> None:
    first, second = enrolled(tmp_path / "a"), enrolled(tmp_path / "b")
    with (
        pytest.raises(ModeRefused, match="mode = both"),
        running(path, mode="cloud", method="tent", state_dir=first),
    ):
        pass
    with (
        running(path, mode="both", method="tent", state_dir=first),
        running(path, mode="cloud", method="source", state_dir=second),
    ):
        pass


def test_mode_off_serves_the_source(path: Path) -> None:
    with running(path, mode="off", method="tent") as server, Client(server.endpoint) as client:
        client.predict(SHIFTED)
        assert not client.predict(SHIFTED).adapted
        assert client.status().adapt is False
