"""What an operator does to the patches of a group: look, compare, stay at one, go back; and what edges make of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import exported
from cloud_records import Kept, patch
from cloud_server import METHODS, images, serving, ticket
from running import PATIENCE_S, process_environment, running
from serving import until
from tta_cloud import control, identity, learners, ledger, steering
from tta_cloud.cli import app
from tta_cloud.errors import GroupPinned, NothingToDo, NotPinnable, Refused, StaleLearner, UnknownPatch
from tta_cloud.learner import LearnerOptions
from tta_cloud.reading import fleet, read
from tta_cloud.records import Patch
from tta_edge.client import Client
from tta_edge.enrol import enrol
from tta_runtime import theta as thetas
from tta_runtime.bundle import Bundle
from tta_runtime.errors import TtaError


@pytest.fixture(scope="module")
def bundle() -> Path:
    return exported.built("resnet", METHODS).path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    identity.create(tmp_path / "cloud")
    return tmp_path / "cloud"


def states(kept: Kept, group: str = "g") -> list[tuple[int, str]]:
    return [(e.seq, e.state) for e in reversed(kept.read(lambda db: ledger.entries(db, group)))]


def again(seq: int) -> Patch:
    return patch(seq, state="published")


def back(seq: int, to: int, *, hold: bool = False, after: int = 0) -> Any:
    return steering.roll_back(again(seq), 1, to, hold=hold, snapshot=b"learner", after=after, now_ms=1)


def command(store: Path, *words: str) -> Any:
    """What a command prints with --json, run in this process."""
    result = CliRunner().invoke(app, [*words, "--store", str(store), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(store: Path, *words: str) -> TtaError:
    """The error that a command ends with."""
    result = CliRunner().invoke(app, [*words, "--store", str(store)])
    assert isinstance(result.exception, TtaError), result.output
    return result.exception


# --- in the ledger --------------------------------------------------------------------------------


def test_a_pinned_group_gets_nothing_newer_until_it_may_go_on(tmp_path: Path) -> None:
    with Kept(tmp_path / "data") as kept:
        kept.call(ledger.append(patch(1)))
        assert kept.call(steering.pin("g", 1, 1, "audit")).state == "pinned"
        with pytest.raises(GroupPinned, match=r"pinned at patch 1.1, patch 2 is not published"):
            kept.call(steering.publish(patch(2, state="built")))
        kept.call(steering.publish(patch(1, group="h", state="built")))
        assert states(kept) == [(1, "pinned")]
        with pytest.raises(NothingToDo):
            kept.call(steering.pin("g", 1, 1, ""))
        assert kept.call(steering.unpin("g", "done")).state == "published"
        with pytest.raises(NothingToDo):
            kept.call(steering.unpin("g", ""))
        kept.call(steering.publish(patch(2, state="built")))
        assert states(kept) == [(1, "published"), (2, "built")]


@pytest.mark.parametrize("newer", ["built", "canary", "published"])
def test_a_group_cannot_stay_where_edges_have_gone_on(newer: str, tmp_path: Path) -> None:
    with Kept(tmp_path / "data") as kept:
        kept.call(ledger.append(patch(1)))
        kept.call(ledger.append(patch(2, state=newer)))
        with pytest.raises(NotPinnable, match=r"patch 1.2 is .*rollback g 1 --pin"):
            kept.call(steering.pin("g", 1, 1, ""))
        if newer != "published":
            with pytest.raises(NotPinnable, match="not what the whole group has"):
                kept.call(steering.pin("g", 1, 2, ""))
        with pytest.raises(UnknownPatch):
            kept.call(steering.pin("g", 1, 9, ""))
        assert states(kept) == [(1, "published"), (2, newer)]


@pytest.mark.parametrize("hold", [False, True])
def test_a_rollback_is_a_new_number_and_ends_what_came_after(hold: bool, tmp_path: Path) -> None:
    with Kept(tmp_path / "data") as kept:
        for seq in (1, 2, 3):
            kept.call(ledger.append(patch(seq)))
        kept.call(ledger.append(patch(4, state="canary")))
        assert kept.call(back(5, 2, hold=hold)) == 1
        end = "pinned" if hold else "published"
        assert states(kept) == [
            (1, "published"), (2, "published"), (3, "rolled-back"), (4, "rolled-back"), (5, end),
        ]  # fmt: skip
        assert kept.read(lambda db: ledger.newest(db, "g")).entry.seq == 5  # type: ignore[union-attr]
        learner = kept.read(lambda db: learners.load(db, "g"))
        assert learner is not None
        assert (learner.generation, learner.snapshot) == (1, b"learner")


def test_a_rollback_lets_a_pinned_group_go(tmp_path: Path) -> None:
    with Kept(tmp_path / "data") as kept:
        kept.call(ledger.append(patch(1)))
        kept.call(ledger.append(patch(2)))
        kept.call(steering.pin("g", 1, 2, ""))
        kept.call(back(3, 1))
        assert states(kept) == [(1, "published"), (2, "rolled-back"), (3, "published")]
        kept.call(steering.publish(patch(4, state="built")))


def test_a_rollback_that_is_refused_leaves_everything_as_it_was(tmp_path: Path) -> None:
    with Kept(tmp_path / "data") as kept:
        kept.call(ledger.append(patch(1)))
        with pytest.raises(NothingToDo, match="nothing came after it"):
            kept.call(back(2, 1))
        kept.call(ledger.append(patch(2)))
        with pytest.raises(StaleLearner):  # the learner is another one: the last step of the transaction
            kept.call(back(3, 1, after=7))
        assert states(kept) == [(1, "published"), (2, "published")]
        assert kept.read(lambda db: learners.load(db, "g")) is None


# --- notes and answers ----------------------------------------------------------------------------


def test_without_a_service_a_note_waits_and_nobody_waits_for_it(store: Path) -> None:
    assert control.ask(store, control.Unpin("g"), 60.0) is None
    ((path, note),) = control.notes(store)
    assert note == control.Unpin("g")
    control.tell(path, control.Answer())  # nobody has asked: nothing happens
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]


def test_an_answer_is_written_into_pipes_only(store: Path, tmp_path: Path) -> None:
    """Who can write beside the notes must not have the service write elsewhere."""
    control.leave(store, control.Unpin("g"))
    ((path, _),) = control.notes(store)
    precious = tmp_path / "precious"
    precious.write_bytes(b"as it was")
    path.with_suffix(".answer").symlink_to(precious)
    control.tell(path, control.Answer())
    path.with_suffix(".answer").write_bytes(b"a file")
    control.tell(path, control.Answer())
    assert precious.read_bytes() == b"as it was"
    assert path.with_suffix(".answer").read_bytes() == b"a file"


def test_notes_have_bounds(store: Path) -> None:
    directory = store / control.DIRECTORY
    control.leave(store, control.Unpin("g"))
    ((path, _),) = control.notes(store)
    for text in (
        b'{"type":"pin","group":"../x","epoch":1,"seq":1}',
        b'{"type":"roll-back","group":"g","epoch":1,"seq":-1,"last":1}',
        b'{"type":"pin","group":"g","epoch":1,"seq":1,"why":"' + b"x" * 300 + b'"}',
        b"x" * 10_000,
    ):
        path.write_bytes(text)
        assert list(control.notes(store)) == [(path, None)]
    assert directory.stat().st_mode & 0o077 == 0


# --- end to end -----------------------------------------------------------------------------------


def test_an_edge_goes_back_stays_and_goes_on(store: Path, bundle: Path, tmp_path: Path) -> None:
    """A running edge adopts what was rolled back to, and keeps it while the group is pinned."""
    options = {"mode": "cloud", "method": "source", "state_dir": str(tmp_path / "a"), "probation_samples": 16}
    gently = LearnerOptions(
        new=8, replay=8, rounds=1, student_lr=1e-4
    )  # nothing that a probation would refuse
    with serving(store, bundle, learner=gently) as server:
        enrol(ticket(server, store), tmp_path / "a")
        with running(bundle, upload="all", **options) as daemon, Client(daemon.endpoint) as client:
            seeds = iter(range(10_000))

            def seq() -> int:
                found = client.status()
                assert found.cloud is not None
                if found.cloud.waiting < 64:  # else the cloud is still at what it has
                    client.predict(images(next(seeds)))
                base = found.bundles[0].base
                return int(base.split(".")[1]) if base else 0

            until(seq, lambda found: found >= 2)
            answer = _process(store, "patches", "rollback", "yard", "1", "--pin", "--why", "fog", "--json")
            assert answer["done"]
            assert answer["state"] == "pinned"
            until(seq, lambda found: found == answer["seq"])
            for _ in range(20):  # more than enough for further rounds, were they published
                assert seq() == answer["seq"]

            log = read(store, lambda db: ledger.entries(db, "yard"))
            assert (log[0].seq, log[0].state, log[0].reason) == (
                answer["seq"], "pinned", "rolled back to 1.1: fog",
            )  # fmt: skip
            assert log[-1].state == "published"
            middle = [entry for entry in log if 1 < entry.seq < answer["seq"]]
            assert {entry.state for entry in middle} <= {"rolled-back", "built"}
            assert any("rolled back to 1.1: fog" in entry.reason for entry in middle)
            shown = [command(store, "patches", "show", "yard", str(n)) for n in (1, answer["seq"])]
            assert shown[0]["body"]["theta_digest"] == shown[1]["body"]["theta_digest"]
            assert shown[1]["body"]["samples"] == 0

            # What the edge serves is that theta, to the bit.
            (row,) = fleet(store)
            until(lambda: fleet(store)[0]["theta_digest"], lambda d: d == shown[0]["body"]["theta_digest"])
            assert row["seq"] == answer["seq"]

            with pytest.raises(Refused, match="is pinned at patch"):
                control.ask(store, control.Pin("yard", 1, answer["seq"]), PATIENCE_S)
            with pytest.raises(Refused, match="edges that have it do not go back"):
                control.ask(store, control.Pin("yard", 1, 1), PATIENCE_S)

            off = command(store, "patches", "pin", "yard", "--off")
            assert (off["done"], off["seq"], off["state"]) == (True, answer["seq"], "published")
            newer = until(seq, lambda found: found > answer["seq"])

            # The learner has gone on from there, not from where it had been.
            parent = command(store, "patches", "show", "yard", str(answer["seq"] + 1))["body"][
                "parent_digest"
            ]
            assert parent == shown[0]["body"]["theta_digest"]

            source = command(store, "patches", "rollback", "yard", "0", "--pin")
            assert source["seq"] > newer
            until(seq, lambda found: found == source["seq"])
            made = Bundle.open(bundle)
            until(
                lambda: fleet(store)[0]["theta_digest"],
                lambda d: d == thetas.digest(made.manifest.theta, np.asarray(made.theta0)),
            )
        assert not list((store / "control").iterdir())
    # It is so after a restart of the service as well.
    held = read(store, lambda db: ledger.newest(db, "yard"))
    assert held is not None
    assert (held.entry.seq, held.entry.state) == (source["seq"], "pinned")


def _process(store: Path, *words: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "tta_cloud", *words, "--store", str(store)], env=process_environment(),
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
