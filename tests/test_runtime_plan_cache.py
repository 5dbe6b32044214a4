"""Plans on disk, with real ones of TensorRT for RTX: used again, built anew, never from where others could write."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

import gpu_stand_ins as stand_ins
from snapshots import snapshot
from tta_runtime import Bundle, errors, trt_library
from tta_runtime.plan_build import Batches, Request, build_plan
from tta_runtime.plan_cache import Key, PlanCache, default_directory

KEY = Key(
    graph="forward ab12", profile="batch 1..16", gpu="GPU 8.9", library="tensorrt_rtx 1.7", driver="580.1"
)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Of a tiny graph, built here for a GPU that is not."""
    pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")
    return build(stand_ins.tensorrt_bundle(tmp_path_factory.mktemp("bundle") / "b"))


def build(bundle: Bundle) -> bytes:
    request = Request(
        "forward",
        bundle.tensorrt_file("forward"),
        bundle.manifest.graphs["forward"],
        Batches(1, 4, 16),
        ((8, 9),),
    )
    made, timing = build_plan(trt_library.load(["tensorrt_rtx"]), request)
    assert timing == b""  # asking for one would ask the GPU
    return made


@pytest.fixture
def cache(tmp_path: Path) -> PlanCache:
    return PlanCache(tmp_path / "plans")


def never() -> bytes:
    raise AssertionError("built although there is a plan")


def file_of(cache: PlanCache, key: Key = KEY) -> Path:
    return cache.directory / f"{key.name}.plan"


def test_a_plan_is_built_once(cache, plan):
    first = cache.get(KEY, lambda: plan)
    assert (first.plan, first.built) == (plan, True)
    again = PlanCache(cache.directory).get(KEY, never)
    assert (again.plan, again.built) == (plan, False)
    assert file_of(cache).stat().st_mode & 0o777 == 0o600
    assert cache.directory.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("field", "value"), [("driver", "590.2"), ("library", "tensorrt_rtx 1.8")])
def test_after_an_update_the_plan_is_built_anew_in_the_same_place(field, value, cache, plan, caplog):
    cache.get(KEY, lambda: b"old")
    changed = msgspec.structs.replace(KEY, **{field: value})
    with caplog.at_level(logging.WARNING):
        assert cache.get(changed, lambda: plan).built
    assert f"it was built for {field} {getattr(KEY, field)}, now it is {value}" in caplog.text
    assert list(cache.directory.glob("*.plan")) == [file_of(cache)]
    assert cache.get(changed, never).plan == plan


@pytest.mark.parametrize("field", ["graph", "profile", "gpu"])
def test_other_graphs_profiles_and_gpus_have_plans_beside_it(field, cache, plan):
    other = msgspec.structs.replace(KEY, **{field: "another"})
    cache.get(KEY, lambda: plan)
    assert cache.get(other, lambda: b"other").built
    assert cache.get(KEY, never).plan == plan
    assert cache.get(other, never).plan == b"other"


def flip(at: int) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 0x40
        path.write_bytes(data)

    return spoil


def linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def renamed(path: Path) -> None:
    """The header says that the plan is for another graph."""
    data = path.read_bytes()
    path.write_bytes(data.replace(b"forward ab12", b"forward ab13"))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (flip(0), "no plan file"),
        (flip(12), "no plan file"),
        (flip(13), "header cannot be read"),
        (flip(-1), "hash is wrong"),
        (flip(-1000), "hash is wrong"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes of a plan of"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes of a plan of"),
        (lambda path: path.write_bytes(b""), "no plan file"),
        (lambda path: path.write_bytes(b"tta-plan\n\xff\xff\x00\x00"), "header cannot be read"),
        (renamed, "it was built for graph forward ab13, now it is forward ab12"),
        (lambda path: path.chmod(0o660), "others may write to it"),
        (lambda path: path.chmod(0o602), "others may write to it"),
        (linked, "symbolic link"),
        (piped, "no regular file"),
    ],
)
def test_what_is_damaged_or_could_be_anybodys_is_built_anew_with_a_warning(spoil, why, cache, plan, caplog):
    cache.get(KEY, lambda: plan)
    spoil(file_of(cache))
    with caplog.at_level(logging.WARNING):
        found = cache.get(KEY, lambda: plan)
    assert found.built
    assert why in caplog.text
    assert len(caplog.records) == 1
    assert cache.get(KEY, never).plan == plan
    assert file_of(cache).stat().st_mode & 0o777 == 0o600
    assert not file_of(cache).is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_what_belongs_to_another_user_is_not_used(cache, plan, caplog):
    cache.get(KEY, lambda: plan)
    os.chown(file_of(cache), 12345, -1)
    assert cache.get(KEY, lambda: plan).built
    assert "it belongs to user 12345" in caplog.text
    os.chown(cache.directory, 12345, -1)
    with pytest.raises(errors.PlanCacheRefused, match="belongs to user 12345"):
        PlanCache(cache.directory)


def test_a_directory_that_others_may_write_to_is_refused(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    before = snapshot(shared)
    with pytest.raises(errors.PlanCacheRefused, match="others may write to it") as refusal:
        PlanCache(shared)
    assert "plan_cache" in refusal.value.fix
    assert snapshot(shared) == before


def test_a_file_where_the_directory_belongs_is_refused(tmp_path):
    (tmp_path / "plans").write_text("no directory")
    with pytest.raises(errors.PlanCacheRefused):
        PlanCache(tmp_path / "plans")


def test_a_build_that_fails_leaves_no_plan(cache, plan):
    cache.get(msgspec.structs.replace(KEY, graph="other"), lambda: plan)

    def fails() -> bytes:
        raise errors.PlanRefused("no")

    with pytest.raises(errors.PlanRefused):
        cache.get(KEY, fails)
    assert not file_of(cache).exists()
    assert cache.get(KEY, lambda: plan).built


def test_a_plan_that_cannot_be_kept_is_used_all_the_same(cache, plan, caplog):
    file_of(cache).mkdir()
    (file_of(cache) / "in the way").touch()
    assert cache.get(KEY, lambda: plan).plan == plan
    assert "cannot be kept" in caplog.text


BUILDER = """
import sys
from pathlib import Path

import msgspec

from tta_runtime import trt_library
from tta_runtime.bundle import Bundle
from tta_runtime.plan_build import Batches, Request, build_plan
from tta_runtime.plan_cache import Key, PlanCache

bundle = Bundle.open(sys.argv[1])
cache, key = PlanCache(Path(sys.argv[2])), msgspec.json.decode(sys.argv[3], type=Key)
graph = bundle.manifest.graphs["forward"]
request = Request("forward", bundle.tensorrt_file("forward"), graph, Batches(1, 4, 16), ((8, 9),))

def build():
    print("building", flush=True)
    if len(sys.argv) > 4:
        sys.stdin.read()     # until somebody ends this process
    return build_plan(trt_library.load(["tensorrt_rtx"]), request)[0]

print("ready", flush=True)
sys.stdin.readline()
found = cache.get(key, build)
print(len(found.plan), found.built, flush=True)
"""


def builder(bundle: Path, directory: Path, *more: str) -> subprocess.Popen[str]:
    arguments = [str(bundle), str(directory), msgspec.json.encode(KEY).decode(), *more]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def begin(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()


@pytest.mark.usefixtures("plan")
def test_two_processes_that_need_the_same_plan_build_it_once(tmp_path, cache):
    bundle = stand_ins.tensorrt_bundle(tmp_path / "b")
    both = [builder(bundle.path, cache.directory) for _ in range(2)]
    begin(*both)
    said = [process.communicate(timeout=60)[0] for process in both]
    assert sorted(text.count("building") for text in said) == [0, 1]
    assert sorted(text.split()[-1] for text in said) == ["False", "True"]
    assert len(cache.get(KEY, never).plan) == int(said[0].split()[-2])
    assert [path.suffix for path in sorted(cache.directory.iterdir())] == [".lock", ".plan"]


@pytest.mark.usefixtures("plan")
def test_a_builder_that_is_killed_stands_in_nobodys_way(tmp_path, cache, plan):
    bundle = stand_ins.tensorrt_bundle(tmp_path / "b")
    killed = builder(bundle.path, cache.directory, "hang")
    begin(killed)
    assert killed.stdout.readline() == "building\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert cache.get(KEY, lambda: plan).built
    assert cache.get(KEY, never).plan == plan


def test_timings_are_kept_for_each_gpu_library_and_driver(cache):
    assert cache.timing(KEY) == b""
    cache.keep_timing(KEY, b"timings")
    other_graph = msgspec.structs.replace(KEY, graph="other", profile="other")
    assert cache.timing(other_graph) == b"timings"
    assert cache.timing(msgspec.structs.replace(KEY, gpu="other")) == b""
    assert cache.timing(msgspec.structs.replace(KEY, driver="other")) == b""
    (file,) = cache.directory.iterdir()
    flip(-1)(file)
    assert cache.timing(KEY) == b""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HOME": "/home/me"}, "/home/me/.cache/tta-runtime/plans"),
        ({"HOME": "/home/me", "XDG_CACHE_HOME": "/big"}, "/big/tta-runtime/plans"),
        ({"HOME": "/home/me", "CACHE_DIRECTORY": "/var/cache/tta-edge:/other"}, "/var/cache/tta-edge/plans"),
    ],
)
def test_where_plans_are_kept_unless_told(environment, expected):
    assert default_directory(environment) == Path(expected)


def test_the_header_says_what_a_plan_is_for(cache, plan):
    cache.get(KEY, lambda: plan)
    data = file_of(cache).read_bytes()
    size = int.from_bytes(data[9:13], "little")
    header = json.loads(data[13 : 13 + size])
    assert header["key"] == msgspec.to_builtins(KEY)
    assert header["bytes"] == len(plan) == len(data) - 13 - size
