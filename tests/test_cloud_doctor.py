"""`tta-cloud doctor`: each check with something that is as it should be, and with something that is not."""

from __future__ import annotations

import json
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import exported
from cloud_records import EDGE, Kept, patch
from cloud_server import METHODS, serving
from running import PATIENCE_S, process_environment
from snapshots import unchanged
from tta_cloud import doctor, doctor_store, edges, identity, learners, ledger
from tta_cloud.cli import app
from tta_cloud.config import Config
from tta_cloud.learner import Learner, LearnerOptions
from tta_cloud.teacher import open_student
from tta_runtime.checks import Check, Verdict
from tta_runtime.signing import SecretKey

DAY_S = 86_400
NOW_S = 1_790_000_000.0


@pytest.fixture(scope="module")
def bundle() -> Path:
    return exported.built("resnet", METHODS).path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    identity.create(tmp_path / "cloud", now_s=NOW_S)
    return tmp_path / "cloud"


def looked(config: Config, now_s: float = NOW_S, silent_s: float = DAY_S) -> dict[str, Check]:
    found = list(doctor.checks(lambda: config, silent_s=silent_s, clock_s=lambda: now_s))
    assert len({check.name for check in found}) == len(found)
    for check in found:
        assert bool(check.fix) == (check.verdict is not Verdict.OK), check
    return {check.name: check for check in found}


def config(store: Path, bundle: Path | str = "", **changes: Any) -> Config:
    values = {"store": str(store), "student": str(bundle), "teacher": str(bundle), "bind": "tcp://127.0.0.1:0",
              "enroll_bind": "tcp://127.0.0.1:0"}  # fmt: skip
    return Config(**{**values, **changes})


# --- keys and root --------------------------------------------------------------------------------


def test_keys_that_are_good_and_alone(store: Path) -> None:
    beside, keys = doctor.check_keys(store)
    assert keys is not None
    assert beside.verdict is Verdict.WARN
    assert "root.key is beside the others" in beside.text
    (store / "keys" / "root.key").unlink()
    assert doctor.check_keys(store)[0].verdict is Verdict.OK
    assert doctor.check_root(keys, NOW_S).verdict is Verdict.OK


def test_keys_that_are_not_there_or_that_others_can_read(store: Path, tmp_path: Path) -> None:
    missing, keys = doctor.check_keys(tmp_path / "none")
    assert keys is None
    assert "tta-cloud keys init" in missing.fix
    (store / "keys" / "publisher.key").chmod(0o640)
    found, _ = doctor.check_keys(store)
    assert found.verdict is Verdict.FAIL
    assert "publisher.key has mode 0640" in found.text
    (store / "keys" / "publisher.key").chmod(0o600)
    (store / "keys" / "publisher.key").write_text("x")
    assert doctor.check_keys(store)[0].verdict is Verdict.FAIL


def test_a_root_that_has_ended_or_names_another_key(store: Path) -> None:
    _, keys = doctor.check_keys(store)
    assert keys is not None
    assert doctor.check_root(keys, NOW_S + 340 * DAY_S).verdict is Verdict.WARN
    ended = doctor.check_root(keys, NOW_S + 366 * DAY_S)
    assert (ended.verdict, "keys rotate" in ended.fix) == (Verdict.FAIL, True)
    (store / "keys" / "publisher.key").unlink()
    SecretKey.generate().save(store / "keys" / "publisher.key")
    other, none = doctor.check_keys(store)
    assert (other.verdict, "is no key that root 1 names" in other.text, none) == (Verdict.FAIL, True, None)
    assert doctor.check_root(None, NOW_S).verdict is Verdict.FAIL


# --- the store ------------------------------------------------------------------------------------


def test_a_store_that_is_whole_and_one_that_is_not(store: Path) -> None:
    assert "there is none" in doctor_store.check_store(store, False).text
    with Kept(store / "data") as kept:
        kept.insert(*range(40))
        kept.call(ledger.append(patch(1)))
        good = doctor_store.check_store(store, True)
    assert good.verdict is Verdict.OK
    assert "40 samples of 1 groups; a service holds it" in good.text
    db = sqlite3.connect(store / "data" / "cloud.db")
    db.execute("UPDATE patches SET reason = 'flipped'")
    db.commit()
    db.close()
    assert "1 patches are damaged" in doctor_store.check_store(store, False).text
    (store / "data" / "cloud.db.corrupt-3").write_bytes(b"x")
    aside = doctor_store.check_store(store, False)
    assert (aside.verdict, "cloud.db.corrupt-3" in aside.text) == (Verdict.WARN, True)
    path = store / "data" / "cloud.db"
    data = bytearray(path.read_bytes())
    data[4096 : 4096 + 512] = b"\xff" * 512
    path.write_bytes(bytes(data))
    broken = doctor_store.check_store(store, False)
    assert (broken.verdict, "malformed" in broken.text) == (Verdict.FAIL, True)


def test_a_disk_with_room_and_one_without(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_store.check_disk(store, 1).verdict is Verdict.OK
    assert doctor_store.check_disk(store, 1 << 60).verdict is Verdict.WARN
    monkeypatch.setattr(doctor_store, "MIN_FREE_BYTES", 1 << 60)
    assert doctor_store.check_disk(store, 1).verdict is Verdict.FAIL
    monkeypatch.setattr(doctor_store, "SLOW_FSYNC_S", -1.0)
    monkeypatch.setattr(doctor_store, "MIN_FREE_BYTES", 0)
    assert "slow" in doctor_store.check_disk(store, 1).text


def test_a_clock_that_was_set_back(store: Path) -> None:
    with Kept(store / "data") as kept:
        assert doctor_store.check_dates(store, NOW_S).verdict is Verdict.OK
        kept.insert(1, received_ms=int(NOW_S * 1000))
    assert doctor_store.check_dates(store, NOW_S).verdict is Verdict.OK
    assert doctor_store.check_dates(store, NOW_S - 30).verdict is Verdict.OK
    behind = doctor_store.check_dates(store, NOW_S - 10 * DAY_S)
    assert (behind.verdict, "set back by 10 d" in behind.text) == (Verdict.FAIL, True)


def test_samples_that_nobody_learns_from(store: Path) -> None:
    then_ms = int((NOW_S - 2 * DAY_S) * 1000)
    with Kept(store / "data") as kept:
        kept.insert(*range(70), received_ms=then_ms)
        waits = doctor_store.check_learning(store, 32, NOW_S)
        assert (waits.verdict, "70 samples wait since 2 d" in waits.text) == (Verdict.WARN, True)
        assert doctor_store.check_learning(store, 64, NOW_S).verdict is Verdict.OK, "too few for a round"
        kept.call(learners.save("g", b"x", kept.unused(10), after=0, saved_ms=int(NOW_S * 1000)))
        found = doctor_store.check_learning(store, 16, NOW_S)
        assert (found.verdict, "last at 20" in found.text) == (Verdict.OK, True)


def test_edges_that_have_not_been_heard_of(store: Path) -> None:
    with Kept(store / "data") as kept:
        assert "none is enrolled" in doctor_store.check_edges(store, DAY_S, NOW_S).text
        kept.call(edges.register(EDGE, "camera-3", "yard", now_ms=int((NOW_S - 3 * DAY_S) * 1000)))
        kept.call(edges.activate(EDGE))
        silent = doctor_store.check_edges(store, DAY_S, NOW_S)
        assert (silent.verdict, "camera-3 (3 d)" in silent.text) == (Verdict.WARN, True)
        assert doctor_store.check_edges(store, 4 * DAY_S, NOW_S).verdict is Verdict.OK
        kept.call(edges.revoke(EDGE))
        assert doctor_store.check_edges(store, DAY_S, NOW_S).verdict is Verdict.OK


# --- bundles --------------------------------------------------------------------------------------


def test_bundles_that_fit_and_learners_that_go_on(store: Path, bundle: Path) -> None:
    engines = open_student(bundle)
    with Kept(store / "data") as kept:
        snapshot = Learner(engines, engines, LearnerOptions()).snapshot()
        kept.call(learners.save("yard", snapshot, [], after=0, saved_ms=int(NOW_S * 1000)))
    found = looked(config(store, bundle))
    for name in ("student", "teacher", "learners", "store", "learning", "edges", "dates", "bind", "http"):
        assert found[name].verdict is Verdict.OK, found[name]
    assert found["learners"].text == "1 go on with these bundles"
    with Kept(store / "data") as kept:
        kept.call(learners.save("yard", b"of another bundle", [], after=1, saved_ms=int(NOW_S * 1000)))
    stale = looked(config(store, bundle))["learners"]
    assert (stale.verdict, "yard" in stale.text) == (Verdict.WARN, True)


def test_bundles_that_are_missing_or_do_not_fit(store: Path, bundle: Path, tmp_path: Path) -> None:
    found = looked(config(store))
    assert "`student` is not set" in found["student"].text
    assert "`teacher` is not set" in found["teacher"].text
    found = looked(config(store, tmp_path / "nowhere"))
    assert found["student"].verdict is Verdict.FAIL
    engines = open_student(bundle)
    wrong = doctor.check_teacher(config(store, bundle, teacher="nowhere"), engines)[0]
    assert "names no network" in wrong.text
    later = doctor.check_teacher(config(store, bundle, teacher="timm:resnet18"), engines)[0]
    assert (later.verdict, "compiled when" in later.text) == (Verdict.OK, True)
    plain = exported.built("resnet").path
    unfit = doctor.check_teacher(config(store, bundle, teacher=str(plain)), engines)[0]
    assert "no `distill`" in unfit.text
    assert "no `distill`" in doctor.check_student(config(store, plain))[0].text


# --- addresses ------------------------------------------------------------------------------------


def test_addresses_that_are_free_taken_wrong_or_open(store: Path) -> None:
    def address(endpoint: str, *, keys: bool = True, running: bool = False) -> Check:
        return doctor.check_address("bind", endpoint, keys, running)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        used = address(f"tcp://127.0.0.1:{port}")
        assert (used.verdict, "another process" in used.text) == (Verdict.FAIL, True)
        assert address(f"tcp://127.0.0.1:{port}", running=True).verdict is Verdict.OK
        http = doctor.check_http(config(store, http=f"127.0.0.1:{port}"), False)
        assert http.verdict is Verdict.FAIL
    assert address(f"tcp://127.0.0.1:{port}").verdict is Verdict.OK
    assert "this machine only" in address("tcp://127.0.0.1:0").text
    assert address("tcp://0.0.0.0:0").verdict is Verdict.OK
    assert "keys init" in address("tcp://0.0.0.0:0", keys=False).fix
    assert address("ipc:///tmp/x").verdict is Verdict.FAIL
    assert address("tcp://192.0.2.1:80").verdict is Verdict.FAIL
    assert address("").text == "off"
    assert doctor.check_http(config(store), False).text == "off"
    for http, allow, verdict in (
        ("127.0.0.1:0", False, Verdict.OK),
        ("0.0.0.0:0", False, Verdict.FAIL),
        ("0.0.0.0:0", True, Verdict.OK),
        ("nonsense", False, Verdict.FAIL),
    ):
        assert doctor.check_http(config(store, http=http, allow_remote=allow), False).verdict is verdict


# --- the command ----------------------------------------------------------------------------------


def test_beside_a_service_that_runs_nothing_is_wrong_and_nothing_changes(store: Path, bundle: Path) -> None:
    identity_only = store / "keys"
    with serving(store, bundle, http="127.0.0.1:0") as server, unchanged(identity_only):
        done = _process(
            store, "--json", TTA_CLOUD_BIND=server.endpoint, TTA_CLOUD_ENROLL_BIND=server.door,
            TTA_CLOUD_HTTP=server.http_endpoint.removeprefix("http://"),
        )  # fmt: skip
    form = json.loads(done.stdout)
    wrong = [check for check in form["checks"] if check["verdict"] == "fail"]
    assert (done.returncode, form["passed"], wrong) == (0, True, [])
    by_name = {check["name"]: check["text"] for check in form["checks"]}
    assert "a service holds it" in by_name["store"]
    assert "fits the student" in by_name["teacher"], "the bundles are those of the service"
    assert "is in use, and a service runs" in by_name["bind"]
    assert [check["number"] for check in form["checks"]] == list(range(1, len(form["checks"]) + 1))


def test_a_failure_ends_with_1_and_a_wrong_setting_with_2(store: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    result = runner.invoke(app, ["doctor", "--store", str(store)])
    assert result.exit_code == 1
    assert "-> Give --student or set it" in result.stdout
    page = tmp_path / "cloud.toml"
    page.write_text("thread = 2\n")
    result = runner.invoke(app, ["doctor", "--config", str(page), "--json"])
    assert result.exit_code == 2
    failed = [check for check in json.loads(result.stdout)["checks"] if check["verdict"] == "fail"]
    assert [(check["name"], "did you mean `threads`" in check["text"]) for check in failed] == [
        ("settings", True)
    ]


def _process(store: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tta_cloud", "doctor", "--store", str(store), *words],
        env=process_environment(**environment), capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
