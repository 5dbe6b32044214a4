"""What an operator does to the patches of a group: look, compare, stay at one, go back; and what edges make of it."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

import exported
from cloud_records import EDGE, OTHER, Kept, patch
from cloud_server import METHODS, images, serving, ticket
from running import PATIENCE_S, REPOSITORY, process_environment, running
from serving import until
from tta_cloud import agreement, control, edges, identity, learners, ledger, origins, schema, steering
from tta_cloud.cli import app
from tta_cloud.errors import GroupPinned, NothingToDo, NotPinnable, Refused, StaleLearner, UnknownPatch
from tta_cloud.exit_codes import exit_code
from tta_cloud.learner import Learner, LearnerOptions
from tta_cloud.operations import Operation
from tta_cloud.patch_view import find, signatures
from tta_cloud.publishing import sealed_of
from tta_cloud.reading import fleet, read
from tta_cloud.records import Entry, Patch, Sample, Stored
from tta_cloud.teacher import open_student
from tta_edge.client import Client
from tta_edge.enrol import enrol
from tta_runtime import theta as thetas
from tta_runtime.bundle import Bundle
from tta_runtime.errors import TtaError
from tta_runtime.patch import make_patch
from tta_runtime.sealed import SignatureEntry
from tta_runtime.signing import SecretKey


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
        kept.call(ledger.append(patch(5, state="built")))
        assert kept.call(back(6, 2, hold=hold)) == 1
        end = "pinned" if hold else "published"
        assert states(kept) == [
            (1, "published"), (2, "published"), (3, "rolled-back"), (4, "rolled-back"), (5, "rolled-back"), (6, end),
        ]  # fmt: skip
        assert kept.read(lambda db: ledger.newest(db, "g")).entry.seq == 6  # type: ignore[union-attr]
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
            assert {entry.state for entry in middle} == {"rolled-back"}
            assert any("rolled back to 1.1: fog" in entry.reason for entry in middle)
            shown = [command(store, "patches", "show", "yard", str(n)) for n in (1, answer["seq"])]
            assert shown[0]["body"]["theta_digest"] == shown[1]["body"]["theta_digest"]
            assert shown[1]["body"]["samples"] == 0

            # What the edge serves is that theta, to the bit.
            (row,) = fleet(store)
            assert row["agreement_samples"] > 0
            assert 0 <= row["agreement"] <= 1
            until(lambda: fleet(store)[0]["theta_digest"], lambda d: d == shown[0]["body"]["theta_digest"])
            assert row["seq"] == answer["seq"]

            with pytest.raises(Refused, match="is pinned at patch"):
                control.ask(store, control.Pin("yard", 1, answer["seq"]), PATIENCE_S)
            with pytest.raises(Refused, match="edges that have it do not go back"):
                control.ask(store, control.Pin("yard", 1, 1), PATIENCE_S)
            with pytest.raises(Refused, match="cannot be read"):
                control.ask(store, control.Pin("yard", 1, 1, "x" * 300), PATIENCE_S)

            off = command(store, "patches", "pin", "yard", "--off")
            assert (off["done"], off["seq"], off["state"]) == (True, answer["seq"], "published")

            def published() -> int:
                seq()  # something to learn from; whether the edge likes what is learned is another matter
                return read(store, lambda db: ledger.last_seq(db, "yard", 1))

            newer = until(published, lambda found: found > answer["seq"])

            # The learner has gone on from there, not from where it had been.
            parent = command(store, "patches", "show", "yard", str(answer["seq"] + 1))["body"][
                "parent_digest"
            ]
            assert parent == shown[0]["body"]["theta_digest"]

            source = command(store, "patches", "rollback", "yard", "0", "--pin")
            assert source["seq"] > newer  # the edge takes it, whatever it serves: it is the source
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


# --- commands -------------------------------------------------------------------------------------


@pytest.fixture
def ledger_of_two(store: Path, bundle: Path) -> Path:
    """A store with two patches of a real layout: the second changes one tensor of the first."""
    keys, made = identity.load(store), Bundle.open(bundle)
    layout, source = made.manifest.theta, np.array(made.theta0)
    first = source + np.float32(0.01)
    second = first.copy()
    entry = layout.entries[0]
    second[entry.offset : entry.offset + int(np.prod(entry.shape))] += np.float32(0.5)
    with Kept(store / "data") as kept:
        for seq, (vector, parent) in enumerate(((first, source), (second, first)), 1):
            sealed, payload = make_patch(
                vector, layout, [keys.publisher], bundle_digest=made.digest, channel="yard", epoch=1, seq=seq,
                parent_digest=thetas.digest(layout, parent), samples=32, issued_s=1_790_000_000,
            )  # fmt: skip
            kept.call(
                ledger.append(
                    Patch(
                        entry=Entry(
                            group="yard", epoch=1, seq=seq, state="published", reason="", created_ms=1_790_000_000_000
                        ),
                        body=sealed.body, signatures=msgspec.msgpack.encode(sealed.signatures), payload=payload,
                    )
                )
            )  # fmt: skip
    return store


def test_a_patch_is_shown_with_its_signers_and_distances(ledger_of_two: Path, bundle: Path) -> None:
    key, made = identity.load(ledger_of_two).publisher.key_id, Bundle.open(bundle)
    alone = command(ledger_of_two, "patches", "show", "yard", "2")
    assert (alone["state"], alone["body"]["samples"], alone["body"]["seq"]) == ("published", 32, 2)
    assert alone["signatures"] == [{"key": key, "trusted": True, "good": True}]
    assert alone["from_source"] is None
    assert alone["from_parent"]["from"] == "1.1"
    assert alone["from_parent"]["tensors"] == []
    found = command(ledger_of_two, "patches", "show", "yard", "2", "--student", str(bundle))
    rows = {row["name"]: row for row in found["from_parent"]["tensors"]}
    changed = made.manifest.theta.entries[0].name
    assert [name for name, row in rows.items() if row["max_abs"]] == [changed]
    assert rows[changed]["max_abs"] == pytest.approx(0.5)
    assert rows[changed]["norm"] == pytest.approx(0.5 * rows[changed]["size"] ** 0.5)
    assert found["from_source"]["max_abs"] == pytest.approx(0.51)
    assert command(ledger_of_two, "patches", "show", "yard", "1", "--student", str(bundle))["from_parent"][
        "from"
    ] == "source"  # fmt: skip
    text = (
        CliRunner()
        .invoke(
            app, ["patches", "show", "yard", "2", "--store", str(ledger_of_two), "--student", str(bundle)]
        )
        .stdout
    )
    assert f"signed by {key}: good" in text
    assert changed in text


def test_two_patches_are_compared_tensor_by_tensor(ledger_of_two: Path, bundle: Path) -> None:
    words = ("patches", "diff", "yard")
    found = command(ledger_of_two, *words, "1", "2", "--student", str(bundle))
    assert (found["from"], found["to"]) == ("1.1", "1.2")
    assert sum(row["max_abs"] > 0 for row in found["tensors"]) == 1
    assert command(ledger_of_two, *words, "1", "1")["norm"] == 0
    back = command(ledger_of_two, *words, "2", "0", "--student", str(bundle))
    assert (back["from"], back["to"]) == ("1.2", "source")
    assert "Give --student" in str(refused(ledger_of_two, *words, "0", "1"))


def test_a_signature_that_does_not_fit_is_told_apart_from_a_strangers(ledger_of_two: Path) -> None:
    patch_, _ = find(ledger_of_two, "yard", 1, None)
    roots = [root for root, _ in identity.read_roots(ledger_of_two)]
    (entry,) = sealed_of(patch_).signatures
    flipped = SignatureEntry(entry.key_id, bytes([entry.value[0] ^ 1]) + entry.value[1:])
    stranger = SecretKey.generate().sign(b"tta-patch-1\n", patch_.body)
    packed = msgspec.msgpack.encode((flipped, SignatureEntry(stranger.key_id, stranger.value)))
    found = signatures(msgspec.structs.replace(patch_, signatures=packed), roots)
    assert [(row["trusted"], row["good"]) for row in found] == [(True, False), (False, False)]


@pytest.mark.parametrize(
    ("words", "says", "code"),
    [
        (("show", "yrad", "1"), "did you mean `yard`", 2),
        (("show", "yard", "9"), "holds no patch 9", 2),
        (("diff", "yard", "1", "9"), "holds no patch 9", 2),
        (("pin", "yard", "9"), "holds no patch 9", 2),
        (("pin", "yrad", "--off"), "did you mean `yard`", 2),
        (("rollback", "yard", "9"), "holds no patch 9", 2),
        (("rollback", "yard", "1", "--epoch", "7"), "in epoch 7", 2),
        (("show", "yard", "1", "--student", "nowhere"), "nowhere", 4),
    ],
)
def test_what_is_not_there_is_named(
    words: tuple[str, ...], says: str, code: int, ledger_of_two: Path
) -> None:
    error = refused(ledger_of_two, "patches", *words)
    assert says in str(error)
    assert exit_code(error) == code
    assert not list(control.notes(ledger_of_two))


def test_without_a_service_pin_and_rollback_wait_for_its_start(ledger_of_two: Path, bundle: Path) -> None:
    waits = {"done": False, "epoch": None, "seq": None, "state": None}
    assert command(ledger_of_two, "patches", "rollback", "yard", "1", "--why", "fog") == waits
    assert command(ledger_of_two, "patches", "pin", "yard", "--off") == waits
    said = CliRunner().invoke(app, ["patches", "pin", "yard", "2", "--store", str(ledger_of_two)]).stdout
    assert "no service runs: yard stays at 1.2 when one starts" in said
    before = read(ledger_of_two, lambda db: ledger.entries(db, "yard"))
    assert [entry.state for entry in before] == ["published", "published"]
    notes = [note for _, note in control.notes(ledger_of_two)]
    for path, note in list(control.notes(ledger_of_two)):
        if not isinstance(note, control.RollBack):
            path.unlink()
    assert control.RollBack("yard", 1, 1, 2, False, "fog") in notes
    with serving(ledger_of_two, bundle):
        until(lambda: not list(control.notes(ledger_of_two)))
    after = read(ledger_of_two, lambda db: ledger.entries(db, "yard"))
    assert [(e.seq, e.state) for e in after] == [(3, "published"), (2, "rolled-back"), (1, "published")]
    assert after[0].reason == "rolled back to 1.1: fog"


def test_a_rollback_that_was_carried_out_is_not_carried_out_again(ledger_of_two: Path, bundle: Path) -> None:
    """As after a kill between the commit and the end of the note."""
    note = control.RollBack("yard", 1, 1, 2)
    for _ in range(2):
        control.leave(ledger_of_two, note)
        with serving(ledger_of_two, bundle):
            until(lambda: not list(control.notes(ledger_of_two)))
    assert read(ledger_of_two, lambda db: ledger.last_seq(db, "yard", 1)) == 3


@pytest.mark.parametrize(
    "words",
    [
        ("keys", "init"), ("keys", "list"), ("keys", "revoke"), ("keys", "rotate"), ("enroll",), ("serve",), ("fleet",),
        ("doctor",), *(("patches", name) for name in ("log", "show", "diff", "pin", "rollback")),
    ],
    ids=" ".join,
)  # fmt: skip
def test_every_command_has_help_with_an_example_and_stands_in_a_document(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    assert f"Example: tta-cloud {' '.join(words)}" in text
    assert "Exit codes: 0 ok" in text
    pages = "".join((REPOSITORY / "docs" / name).read_text() for name in ("cloud.md", "commands.md"))
    assert f"tta-cloud {' '.join(words)}" in pages


# --- agreement ------------------------------------------------------------------------------------


def test_the_newest_answers_of_an_edge_count(tmp_path: Path) -> None:
    with Kept(tmp_path / "data") as kept:
        kept.call(agreement.note({EDGE: [True] * 3 + [False]}, 5))
        kept.call(agreement.note({OTHER: [False]}, 6))
        found = kept.read(agreement.known)
        assert (found[EDGE].share, found[EDGE].samples, found[EDGE].updated_ms) == (0.75, 4, 5)
        assert found[OTHER].share == 0
        kept.call(agreement.note({EDGE: [True] * agreement.RECENT}, 7))
        found = kept.read(agreement.known)
        assert (found[EDGE].share, found[EDGE].samples) == (1.0, agreement.RECENT)


def test_a_damaged_agreement_is_left_out_and_begun_anew(tmp_path: Path) -> None:
    def flip(db: sqlite3.Connection) -> None:
        db.execute("UPDATE agreement SET answers = '1111'")

    with Kept(tmp_path / "data") as kept:
        kept.call(agreement.note({EDGE: [False] * 4}, 5))
        kept.call(Operation("flip", flip))
        assert kept.read(agreement.known) == {}
        kept.call(agreement.note({EDGE: [True]}, 6))
        assert kept.read(agreement.known)[EDGE].samples == 1


def test_a_base_is_compared_with_the_teacher_on_the_samples_that_it_answered(bundle: Path) -> None:
    engines = open_student(bundle)
    learner = Learner(engines, engines, LearnerOptions())
    x = images(1, 12)
    theta0 = np.array(engines.bundle.theta0)
    other = theta0.copy()
    other[: other.size // 2] = np.float32(0.1)
    expected = learner.predict(other, x).argmax(axis=1) == learner.teach(x).argmax(axis=1)
    rows = [
        Stored(
            number=i + 1, received_ms=1, used=0,
            sample=Sample(
                key=f"{i:032x}", edge=EDGE if i % 2 else OTHER, group="yard", stream="s", taken_ms=1, seq=i % 3,
                entropy=0.1, encoding="raw", dtype="float32", shape=x.shape[1:], x=x[i].tobytes(),
            ),
        )
        for i in range(len(x))
    ]  # fmt: skip
    found = agreement.compare(learner, {0: theta0, 1: other}.get, rows)
    for key, parity in ((EDGE, 1), (OTHER, 0)):
        mine = [
            i for i in range(len(x)) if i % 2 == parity and i % 3 != 2
        ]  # what base 2 was nobody knows any more
        assert found[key] == [True if i % 3 == 0 else bool(expected[i]) for i in mine]
    assert not expected.all(), "else nothing has been told apart"
    assert agreement.compare(learner, lambda seq: None, rows) == {}


@pytest.mark.parametrize("version", range(1, schema.VERSION))
def test_a_store_of_a_version_before_gets_what_is_new(tmp_path: Path, version: int) -> None:
    with Kept(tmp_path / "data") as kept:
        kept.insert(1, 2)
    path = tmp_path / "data" / "cloud.db"
    db = sqlite3.connect(path)
    for table in ("agreement", "origins")[version - 1 :]:
        db.execute(f"DROP TABLE {table}")
    schema.put_meta(db, "version", version)
    db.commit()
    db.close()
    with Kept(tmp_path / "data") as kept:
        assert kept.told == []
        assert len(kept.unused()) == 2
        kept.call(agreement.note({EDGE: [True]}, 5))
        assert kept.read(agreement.known)[EDGE].share == 1
        assert kept.read(origins.listed) == []
        assert kept.read(lambda db: schema.meta(db, "version")) == schema.VERSION


def test_the_fleet_is_behind_in_numbers_and_in_time(tmp_path: Path) -> None:
    def made(seq: int, at_ms: int) -> Patch:
        return msgspec.structs.replace(
            patch(seq, "yard"), entry=msgspec.structs.replace(patch(seq, "yard").entry, created_ms=at_ms)
        )

    with Kept(tmp_path / "data") as kept:
        kept.call(edges.register(EDGE, "camera", "yard", now_ms=1000))
        for seq, at_ms in ((1, 10_000), (2, 20_000), (3, 30_000)):
            kept.call(ledger.append(made(seq, at_ms)))
        kept.call(edges.report(EDGE, epoch=1, seq=1, theta_digest="", progress="", now_ms=21_000))
        kept.call(agreement.note({EDGE: [True, False, True, True]}, 5))
    (row,) = fleet(tmp_path, now_ms=50_000)
    assert (row["lag"], row["lag_s"], row["last_seen_s"]) == (2, 30.0, 29.0)
    assert (row["agreement"], row["agreement_samples"]) == (0.75, 4)
    said = CliRunner().invoke(app, ["fleet", "--store", str(tmp_path)]).stdout
    assert "agrees 75% of 4" in said
    assert "lag 2 (" in said
    with Kept(tmp_path / "data") as kept:
        kept.call(edges.report(EDGE, epoch=1, seq=3, theta_digest="", progress="", now_ms=21_000))
    (row,) = fleet(tmp_path, now_ms=50_000)
    assert (row["lag"], row["lag_s"]) == (0, 0)
