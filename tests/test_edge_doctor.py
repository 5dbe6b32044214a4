"""`tta-edge doctor`: each check on a set-up that is really broken, and the memory that it predicts."""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import socket
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata

import msgspec
import numpy as np
import pytest

import tiny_bundle
from running import PATIENCE_S, REPOSITORY, daemon, process_environment, run_cli, running
from snapshots import files
from tta_edge import doctor_machine as machine
from tta_edge.builtin import builtin_bundle, builtin_digits
from tta_edge.client import Client
from tta_edge.config import BundleConfig, Config, resolve
from tta_edge.doctor import checks
from tta_edge.doctor_bundle import batches, check_bundle
from tta_edge.doctor_memory import VECTORS, measure, memory, predict, predict_for, state_bytes, toml_of
from tta_runtime import Bundle
from tta_runtime import machine as common
from tta_runtime.checks import Verdict, passed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OK, WARN, FAIL = Verdict.OK, Verdict.WARN, Verdict.FAIL


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    tiny_bundle.build(path)
    return path


def doctor(*arguments, **environment):
    """Exit status and name -> check."""
    done = run_cli("doctor", "--json", *arguments, **environment)
    assert done.stderr == ""
    form = json.loads(done.stdout)
    assert form["passed"] == (done.returncode == 0)
    assert [each["number"] for each in form["checks"]] == list(range(1, len(form["checks"]) + 1))
    for each in form["checks"]:
        assert bool(each["fix"]) == (each["verdict"] != "ok"), each
    return done.returncode, {each["name"]: each for each in form["checks"]}


FREE = ["--bind", "tcp://127.0.0.1:0", "--no-measure"]


def failing(found):
    return {name for name, each in found.items() if each["verdict"] == "fail"}


# --- all is well ------------------------------------------------------------------------------------


def test_a_good_set_up_passes_and_nothing_is_changed(bundle, tmp_path):
    before = files(tmp_path), files(bundle)
    code, found = doctor(
        bundle, "--bind", "tcp://127.0.0.1:0", "--state-dir", tmp_path / "state", "--batch", 32
    )
    assert code == 0, failing(found)
    assert {
        "python", "packages", "onnxruntime", "settings", "gpu", "bundle default", "engine default", "forward default",
        "step default", "batches default", "threads", "disk", "bind", "http", "open files", "clock", "memory",
    } == found.keys()  # fmt: skip
    assert "step.tent runs on cpu" in found["engine default"]["text"]
    assert re.search(r"\d+\.\d ms for 32 samples", found["step default"]["text"])
    assert re.search(r"one stream [\d.]+ MB .* 64 streams [\d.]+ MB", found["memory"]["text"])
    assert (files(tmp_path), files(bundle)) == before


def test_the_report_for_people_numbers_its_lines_and_says_what_to_do(bundle):
    done = run_cli("doctor", bundle, *FREE)
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    assert " 1. ok python" in f" {text}"
    assert "-> Set state_dir." in text
    assert re.search(r"\d+ ok, \d+ warn, 0 fail$", text)


def test_several_bundles_are_each_looked_at(bundle):
    code, found = doctor("--bundle", f"day={bundle}", "--bundle", f"night={builtin_bundle()}", *FREE)
    assert code == 0
    assert {"bundle day", "bundle night", "step night"} <= found.keys()


# --- broken set-ups, through the command --------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "change", "code"),
    [
        ("weights.bin", lambda data: data[:-1], "file-truncated"),
        ("forward.onnx", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "file-tampered"),
        ("manifest.json", lambda data: data[:100], "manifest-malformed"),
    ],
)
def test_a_damaged_bundle_fails_and_the_other_checks_go_on(tmp_path, file, change, code):
    path = tmp_path / "tiny"
    tiny_bundle.build(path)
    (path / file).write_bytes(change((path / file).read_bytes()))
    status, found = doctor(path, "--bind", "tcp://127.0.0.1:0")
    assert status == 1
    assert failing(found) == {"bundle default"}
    assert found["bundle default"]["text"].startswith(f"{code}: ")
    assert "disk" in found
    assert "memory" not in found, "nothing can be measured"


def test_a_port_that_somebody_else_has_fails(bundle):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        status, found = doctor(bundle, "--bind", f"tcp://{place}", "--http", place, "--no-measure")
    assert status == 1
    assert failing(found) == {"bind", "http"}
    assert "in use by another process" in found["bind"]["text"]


def test_a_running_daemon_of_ours_is_a_warning(bundle, tmp_path):
    state = tmp_path / "state"
    with running(bundle, method="tent", state_dir=str(state)) as server:
        status, found = doctor(bundle, "--bind", server.endpoint, "--state-dir", state, "--no-measure")
    assert status == 0
    assert found["bind"]["verdict"] == found["disk"]["verdict"] == "warn"
    assert "answers" in found["bind"]["text"]


def test_a_state_directory_of_another_daemon_fails(bundle, tmp_path):
    with running(bundle, method="tent", state_dir=str(tmp_path)):
        status, found = doctor(bundle, *FREE, "--state-dir", tmp_path)
    assert status == 1
    assert failing(found) == {"disk"}
    assert "another daemon" in found["disk"]["text"]


def test_a_bind_that_others_can_reach_fails(bundle):
    status, found = doctor(bundle, "--bind", "tcp://0.0.0.0:0", "--no-measure")
    assert status == 1
    assert failing(found) == {"bind"}
    assert "--allow-remote" in found["bind"]["fix"]


def test_an_unknown_method_fails(bundle):
    status, found = doctor(bundle, "--method", "tnet", *FREE)
    assert status == 1
    assert "did you mean `tent`" in found["engine default"]["text"]


def test_a_wrong_setting_fails_and_the_machine_is_looked_at(tmp_path):
    file = tmp_path / "edge.toml"
    file.write_text("max_bacth = 4")
    status, found = doctor("--config", file)
    assert status == 1
    assert failing(found) == {"settings"}
    assert "did you mean `max_batch`" in found["settings"]["text"]
    assert {"python", "clock"} <= found.keys()
    assert failing(doctor("--set", "lr")[1]) == {"settings"}


def test_an_unreadable_measurement_fails(bundle, monkeypatch):
    config = Config(bundle=str(bundle), method="tent", hyper={"tent": {"lr": 0.1}})
    monkeypatch.setattr(sys, "executable", "/bin/false")
    found = memory(config, 16, None)
    assert found.verdict is FAIL
    assert "could not be measured" in found.text


def test_too_few_open_files_fail(bundle):
    line = f"ulimit -n 60; exec {sys.executable} -m tta_edge doctor {bundle} {' '.join(FREE)}"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=PATIENCE_S, env=process_environment(),
        cwd=REPOSITORY, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.search(r"fail +open files +60 open files", done.stdout)


def test_without_an_engine_it_names_the_extra(bundle):
    code = (
        "import sys; sys.modules['onnxruntime'] = None;"
        f"from tta_edge.cli import main; main(['doctor', {str(bundle)!r}, '--no-measure', '--bind', 'tcp://127.0.0.1:0'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=process_environment(), check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(r"fail +onnxruntime", done.stdout)
    assert "tta-runtime[cpu]" in done.stdout


# --- the checks by themselves -------------------------------------------------------------------------


def test_an_old_python_fails():
    assert common.python((3, 9, 18)).verdict is FAIL
    assert common.python((3, 10, 0)).verdict is OK


def versions(**known):
    def look(name):
        if name.replace("-", "_") not in known:
            raise metadata.PackageNotFoundError(name)
        return known[name.replace("-", "_")]

    return look


def test_a_missing_or_old_package_fails():
    def changed(name, version):
        def look(wanted):
            if wanted != name:
                return metadata.version(wanted)
            if version is None:
                raise metadata.PackageNotFoundError(name)
            return version

        return look

    assert common.packages().verdict is OK
    missing = common.packages(changed("pyzmq", None))
    assert (missing.verdict, missing.text) == (FAIL, "pyzmq is missing")
    old = common.packages(changed("pyzmq", "25.1.2"))
    assert old.verdict is FAIL
    assert "pyzmq is 25.1.2, needed is 26.2.1 or later" in old.text
    assert common.packages(changed("pyzmq", "100.0rc1")).verdict is OK
    assert common.packages(versions()).verdict is WARN, "a source tree"


def test_both_wheels_of_onnxruntime_fail():
    found = common.onnxruntime(versions(onnxruntime="1.22.0", onnxruntime_gpu="1.22.0"))
    assert found.verdict is FAIL
    assert "onnxruntime 1.22.0 and onnxruntime-gpu 1.22.0 are both installed" in found.text
    assert "pip uninstall" in found.fix


def test_an_onnxruntime_that_does_not_load_fails():
    def broken(name):
        raise ImportError(f"{name}: libcudart.so.12: cannot open shared object file")

    found = common.onnxruntime(load=broken)
    assert found.verdict is FAIL
    assert "libcudart" in found.text


@pytest.mark.parametrize(
    ("written", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu.max": "900000 100000\n"}, 4),
        ({"cpu.max": "nonsense"}, 4),
        ({}, 4),
    ],
)
def test_usable_cores(tmp_path, written, cores):
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine.usable_cores(4, tmp_path) == cores


def test_more_threads_than_cores_are_a_warning():
    assert machine.threads(Config(threads=8), 2, 2.0).verdict is WARN
    assert machine.threads(Config(threads=2), 2, 2.0).verdict is OK
    assert "1 for answers and 1 for steps" in machine.threads(Config(policy="always"), 2, 2.0).text
    assert machine.threads(Config(policy="always"), 1, 1.0).verdict is OK
    share = machine.threads(Config(), 4, 0.5)
    assert (share.verdict, "Set threads to 1" in share.fix) == (WARN, True)


def test_a_state_directory_that_is_a_file_fails(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        assert machine.disk(Config(state_dir=str(path)), None).verdict is FAIL
    assert files(tmp_path).keys() == {"file"}


@pytest.mark.skipif(not os.path.isdir("/proc/sys"), reason="needs a directory that nobody can write")
def test_a_read_only_state_directory_fails():
    for path in ("/proc/sys", "/proc/sys/tta-state"):
        found = machine.disk(Config(state_dir=path), None)
        assert found.verdict is FAIL
        assert "cannot be written" in found.text


def test_a_disk_without_room_fails(tmp_path):
    found = machine.disk(Config(state_dir=str(tmp_path)), None, slot_bytes=2**60)
    assert (found.verdict, found.fix) == (FAIL, "Free space")
    tight = machine.disk(Config(state_dir=str(tmp_path), max_stored_streams=10**9), None, slot_bytes=2**20)
    assert (tight.verdict, "max_stored_streams" in tight.fix) == (WARN, True)
    assert machine.disk(Config(state_dir=str(tmp_path)), None).verdict is OK
    assert list(tmp_path.iterdir()) == []


def test_the_lock_is_only_looked_at(tmp_path):
    lock = tmp_path / machine.LOCK
    lock.write_text("")
    assert machine.disk(Config(state_dir=str(tmp_path)), None).verdict is OK
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert machine.disk(Config(state_dir=str(tmp_path)), None).verdict is FAIL
    with lock.open() as free:
        fcntl.flock(free, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("bind", "word"),
    [
        ("127.0.0.1:5555", "not an endpoint"),
        ("tcp://127.0.0.1:70000", "not an endpoint"),
        ("tcp://nowhere.invalid:1", "reached"),
    ],
)
def test_an_address_that_cannot_be_bound_fails(bind, word):
    found, _ = machine.ports(Config(bind=bind), None)
    assert found.verdict is FAIL
    assert word in found.text


def test_an_address_of_another_machine_fails():
    found = machine.port("bind", "tcp://192.0.2.1:5555", Config(allow_remote=True), None)
    assert (found.verdict, "cannot be bound" in found.text) == (FAIL, True)


def test_open_files():
    assert [common.open_files(limit).verdict for limit in (10, 256, 1024)] == [FAIL, WARN, OK]
    assert str(resource.getrlimit(resource.RLIMIT_NOFILE)[0]) in common.open_files().text


def test_clocks():
    assert common.clock().verdict is OK
    assert common.clock(monotonic=lambda: 1.0).verdict is FAIL
    reset = common.clock(wall=lambda: datetime(1970, 1, 1, tzinfo=timezone.utc))
    assert (reset.verdict, "1970" in reset.text, "NTP" in reset.fix) == (WARN, True, True)


def test_available_memory_is_the_smaller_of_machine_and_cgroup(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:  2000 kB\n")
    assert machine.available_bytes(meminfo, tmp_path) == 2000 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert machine.available_bytes(meminfo, tmp_path) == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_bytes(meminfo, tmp_path) == 2000 * 1024
    assert machine.available_bytes(tmp_path / "none", tmp_path / "none") is None


# --- bundles ------------------------------------------------------------------------------------------


def verdict(check, batch, method="tent", **settings):
    manifest = Bundle.open(check).manifest
    return batches("default", manifest, method, Config(**settings), batch)


def test_batches_that_suit_the_method(bundle):
    assert verdict(builtin_bundle(), 64).verdict is OK
    assert "steps of 64 samples, in the background" in verdict(builtin_bundle(), 1).text
    assert verdict(builtin_bundle(), 1, "source").verdict is OK


def test_small_batches_and_batchnorm_are_a_warning(bundle):
    small = verdict(builtin_bundle(), 4, inline_min_batch=1)
    assert (small.verdict, "BatchNorm" in small.text) == (WARN, True)
    assert verdict(builtin_bundle(), 1, step_batch=8).verdict is WARN
    assert "needs 2" in verdict(builtin_bundle(), 1, inline_min_batch=1).text


def test_a_step_that_never_fits_its_window_fails(bundle):
    found = verdict(builtin_bundle(), 1, policy="always", step_batch=64, window=32)
    assert (found.verdict, found.fix) == (FAIL, "Set window to 64 or more")


def test_a_method_compiled_for_one_batch(tmp_path):
    tiny_bundle.build(tmp_path / "fixed", fixed_batch=16)
    assert verdict(tmp_path / "fixed", 32).verdict is WARN
    assert verdict(tmp_path / "fixed", 16).verdict is OK
    assert verdict(tmp_path / "fixed", 1, window=8).verdict is FAIL


def test_outputs_that_are_not_finite_fail(tmp_path):
    """A bundle whose hashes are right and whose weights are not: every forward gives NaN."""
    from tta_runtime import bundle as writer

    path = tmp_path / "nan"
    manifest = tiny_bundle.build(path)
    weights = np.frombuffer((path / "weights.bin").read_bytes(), np.float32).copy()
    weights[:] = np.nan
    (path / "weights.bin").write_bytes(weights.tobytes())
    (path / "manifest.json").unlink()
    writer.seal(path, msgspec.structs.replace(manifest, files={}))
    found, _ = check_bundle("default", BundleConfig(path=str(path), method="tent"), Config(), 16)
    failed = {each.name for each in found if each.verdict is FAIL}
    assert failed == {"forward default", "step default"}


def test_two_bundles_of_one_name_fail(bundle):
    found = list(
        checks(
            lambda: resolve(flags={"bundle": str(bundle), "bundles": {"default": {"path": "x"}}}),
            16,
            measure=False,
        )
    )
    assert not passed(found)
    assert next(each.name for each in found if each.verdict is FAIL) == "bundles"


# --- memory -------------------------------------------------------------------------------------------


def test_the_prediction_counts_what_a_stream_holds():
    numbers = {"theta": 1000, "state": 4000, "sample_bytes": 100, "window": 50, "max_window_bytes": 10**9}
    none = predict(10**8, 8, waiting=0, **numbers)
    some = predict(10**8, 8, waiting=20, **numbers)
    assert some.stream - none.stream == 20 * 100
    assert (
        none.stream - VECTORS * 8000 == predict(0, 1, waiting=0, **{**numbers, "theta": 0, "state": 0}).stream
    )
    assert none.total == 10**8 + 7 * none.stream
    assert none.worst == none.total + 8 * 50 * 100
    assert predict(10**8, 1, waiting=0, **numbers).total == 10**8


def test_windows_are_bounded_over_all_streams():
    found = predict(
        0, 100, theta=0, state=0, sample_bytes=1000, waiting=500, window=1000, max_window_bytes=10**6
    )
    assert found.worst - found.total <= 10**6
    assert found.stream < 10**6 // 100 + 10**5


def test_the_state_is_counted(bundle):
    manifest = Bundle.open(bundle).manifest
    assert state_bytes(manifest, "source") == 0
    assert state_bytes(manifest, "tent") > 0


def test_too_little_memory_fails_and_tight_memory_warns(bundle):
    config = Config(bundle=str(bundle), method="tent", max_streams=2)
    status = measure(config, 16)
    assert status.rss_bytes > 10**7
    needed = predict_for(config, status).worst
    assert memory(config, 16, 2 * needed).verdict is OK
    assert memory(config, 16, int(1.1 * needed)).verdict is WARN
    assert memory(config, 16, needed // 2).verdict is FAIL


@pytest.mark.parametrize("settings", [{}, {"policy": "always"}], ids=["inline", "background"])
def test_the_prediction_is_within_a_tenth_of_a_real_daemon(tmp_path, settings):
    """32 streams under max_streams 8, each stepped and with checkpoints, against the measurement of one."""
    batch, streams, held = 64, 32, 8
    config = Config(method="tent", threads=1, max_streams=held, state_dir=str(tmp_path / "s"), **settings)
    predicted = predict_for(config, measure(config, batch)).total
    x = np.load(builtin_digits())["x"].transpose(0, 3, 1, 2).astype(np.float32) / 255
    options = [f"--policy={settings['policy']}"] if settings else []
    with (
        daemon(
            "--method", "tent", "--threads", 1, "--max-streams", held, "--state-dir", tmp_path / "s",
            "--checkpoint-steps", 2, *options,
        ) as served,
        Client(served.endpoint, timeout_s=PATIENCE_S) as client,
    ):  # fmt: skip
        for k in range(streams):
            for part in range(6):
                client.predict(x[part * batch : (part + 1) * batch], stream=f"cam{k}")
        real = client.status()
    assert len(real.streams) == held
    assert predicted == pytest.approx(real.rss_bytes, rel=0.1)


def test_settings_survive_the_way_through_a_file(tmp_path):
    config = Config(
        bundle='/with "quotes" and \\ and é and \x7f',
        bundles={"night": BundleConfig(path="/n", method="norm")},
        hyper={"lr": 0.5, "tent": {"momentum": 0.25}},
        max_distance=float("inf"), allow_remote=True, threads=2, policy="every",
    )  # fmt: skip
    assert msgspec.convert(tomllib.loads(toml_of(config)), Config) == config
    (tmp_path / "edge.toml").write_text(toml_of(config), encoding="utf-8")
    assert resolve(file=tmp_path / "edge.toml").config == config
