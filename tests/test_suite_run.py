"""A whole suite: on the digits, in worker processes, interrupted and resumed; what the command refuses."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

import tiny_bundle
from running import run_cli
from snapshots import files, unchanged
from tta_edge.builtin import builtin_bundle, builtin_digits
from tta_edge.commands_suite import seats_of
from tta_edge.suite.catalogue import limited, scale_of
from tta_edge.suite.errors import GivenMalformed, StoreMalformed, SuiteOption, UnknownPlayer, WorkerLost
from tta_edge.suite.given import read_given
from tta_edge.suite.run import Plan, Seat, Setup, Store, run
from tta_edge.suite.stage import Stage
from tta_edge.suite.summary import summarise
from tta_edge.suite.workers import in_order, in_parallel
from tta_runtime.errors import TtaError, UnknownMethod

LIMIT = 130
DIGITS = str(builtin_bundle())


def setup_of(path, *patterns, limit=LIMIT, seed=0):
    return Setup(limited(scale_of("quick"), limit), seed, str(path / "images"), patterns)


def plan_of(path, *patterns, methods=("source", "tent"), again=(), **options):
    return Plan([Seat(DIGITS, "digits")], setup_of(path, *patterns, **options), methods, again)


def errors(board):
    return {
        (name, player): each.error
        for name, results in board.streams.items()
        for player, each in results.items()
    }


def stripped(board):
    """Everything but how long it took."""
    form = summarise(board).to_json()
    for each in form["streams"]:
        for cell in each["players"].values():
            del cell["seconds"]
    return form


# --------------------------------------------------------------------------------------- playing


def test_a_run_repeats_and_workers_change_nothing(tmp_path):
    """Alone, and in two worker processes."""
    patterns = ("online/fog:5", "sorted/none", "nan", "batch-1/none")
    (alone,) = run(plan_of(tmp_path / "a", *patterns), Store(None), jobs=1)
    (apart,) = run(plan_of(tmp_path / "b", *patterns), Store(tmp_path / "store"), jobs=2)
    assert stripped(alone) == stripped(apart)
    assert alone.players == ("source", "tent")
    assert set(alone.streams) == set(patterns)
    assert errors(alone)["online/fog:5", "tent"] < errors(alone)["online/fog:5", "source"]
    assert errors(alone)["sorted/none", "tent"] > errors(alone)["sorted/none", "source"]


def test_what_is_stored_is_not_played_again(tmp_path):
    store, told = Store(tmp_path), []

    def again(**changes):
        told.clear()
        plan = plan_of(tmp_path, "clean", **changes)
        return run(plan, Store(tmp_path), jobs=1, progress=lambda *each: told.append(each))

    (first,) = run(plan_of(tmp_path, "clean"), store, jobs=1)
    with unchanged(tmp_path):
        (second,) = again()
    assert told == []
    assert stripped(first) == stripped(second)
    again(methods=("source", "norm", "tent"))
    assert told[-1] == ("streams", LIMIT, LIMIT), "only the new player plays"
    again(again=("tent",))
    assert told[-1] == ("streams", LIMIT, LIMIT)
    again(seed=1)
    assert told[-1] == ("streams", 2 * LIMIT, 2 * LIMIT), "another seed is another stream"
    again(limit=LIMIT - 1)
    assert told[-1] == ("streams", 2 * (LIMIT - 1), 2 * (LIMIT - 1)), "and so is another length"


def test_an_interrupted_suite_goes_on(tmp_path):
    """Ctrl-C in the middle: whole results are there, the rest is played next time."""
    (wanted,) = run(plan_of(tmp_path / "whole", "online/f*"), Store(None), jobs=1)

    def interrupt(what, done, total):
        if what == "streams" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan_of(tmp_path, "online/f*"), Store(tmp_path), jobs=1, progress=interrupt)
    before = {name for name in files(tmp_path) if name.endswith(".json")}
    assert 0 < len(before) < 4
    (board,) = run(plan_of(tmp_path, "online/f*"), Store(tmp_path), jobs=1)
    assert stripped(board) == stripped(wanted)
    assert before < {name for name in files(tmp_path) if name.endswith(".json")}


def test_a_damaged_result_stops_the_run_before_anything_is_played(tmp_path):
    run(plan_of(tmp_path, "clean"), Store(tmp_path), jobs=1)
    (path, *_) = sorted((tmp_path / "results").rglob("*.json"))
    path.write_text("{")
    with unchanged(tmp_path), pytest.raises(StoreMalformed, match=path.name):
        run(plan_of(tmp_path, "clean", "jpeg"), Store(tmp_path), jobs=1)


def test_damaged_images_are_refused_by_name(tmp_path):
    run(plan_of(tmp_path, "jpeg"), Store(None), jobs=1)
    (path,) = (tmp_path / "images").iterdir()
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(StoreMalformed, match="jpeg_compression-1"):
        run(plan_of(tmp_path, "jpeg"), Store(None), jobs=1)


def test_methods_that_a_bundle_lacks(tmp_path):
    with pytest.raises(UnknownMethod, match="did you mean `tent`"):
        run(plan_of(tmp_path, "clean", methods=("source", "tnet")), Store(None), jobs=1)
    with pytest.raises(UnknownMethod, match="did you mean `norm`"):
        run(plan_of(tmp_path, "clean", again=("nrom",)), Store(None), jobs=1)
    with pytest.raises(SuiteOption, match="two bundles are called digits"):
        run(Plan([Seat(DIGITS, "digits")] * 2, setup_of(tmp_path, "clean")), Store(None), jobs=1)


def test_a_model_of_bytes_gets_no_nan(tmp_path):
    tiny_bundle.build(tmp_path / "tiny", dtype="uint8")
    x, y = tiny_bundle.samples(120)
    images = (np.clip((x + 2) / 6, 0, 1) * 255).astype(np.uint8).reshape(-1, 2, 4, 1)
    np.savez(tmp_path / "s.npz", x=images, y=y)
    stage = Stage(Seat(str(tmp_path / "tiny"), f"npz:{tmp_path / 's.npz'}"), setup_of(tmp_path, limit=100))
    names = {spec.name for spec in stage.specs}
    assert "nan" not in names
    assert "dead-camera" in names


# --------------------------------------------------------------------------------------- other domains


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """The digits in two files, the second one dimmed."""
    folder = tmp_path_factory.mktemp("halves")
    with np.load(builtin_digits()) as digits:
        x, y = digits["x"], digits["y"]
    np.savez(folder / "here.npz", x=x[:400], y=y[:400])
    np.savez(folder / "there.npz", x=x[400:800] // 2, y=y[400:800])
    return folder


def test_a_natural_domain(tmp_path, halves):
    seat = Seat(DIGITS, f"npz:{halves / 'here.npz'}", f"npz:{halves / 'there.npz'}")
    plan = Plan([seat], setup_of(tmp_path, "*/natural"), ("norm",))
    (board,) = run(plan, Store(None), jobs=1)
    assert set(board.streams) == {
        f"{name}/natural" for name in ("online", "series", "sorted", "dirichlet", "batch-1")
    }
    phases = [phase.name for phase in board.streams["series/natural"]["norm"].phases]
    assert phases == ["none", "natural", "none", "natural"]
    assert board.players == ("source", "norm"), "the frozen source always plays"


def malicious(path, **changes):
    with np.load(builtin_digits()) as digits:
        x, y = digits["x"][:96].copy(), digits["y"][:96]
    mask = np.arange(96) % 5 == 0
    x[mask] = 255 - x[mask]
    np.savez(path, **{"x": x, "y": y, "malicious": mask, "batch": np.int64(32), **changes})
    return path


def test_malicious_samples_do_not_count(tmp_path):
    file = malicious(tmp_path / "evil.npz")
    seat = Seat(DIGITS, "digits", None, (str(file),))
    (board,) = run(Plan([seat], setup_of(tmp_path, "malicious"), ("norm",)), Store(None), jobs=1)
    (name,) = board.streams
    assert name == "malicious/evil"
    found = board.streams[name]["norm"]
    assert (found.samples, found.counted, found.batches) == (96, 96 - 20, 3)
    verdict = summarise(board).verdict("norm")
    assert verdict is not None
    assert list(verdict.malicious) == ["malicious/evil"]
    assert verdict.ruined == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"malicious": np.zeros(96)}, "is float64"),
        ({"malicious": np.zeros(95, bool)}, r"bool \[95\], expected bool \[96\]"),
        ({"malicious": np.ones(96, bool)}, "no honest sample"),
        ({"batch": np.int64(0)}, "expected a whole number from 1"),
        ({"batch": np.zeros(2, np.int64)}, "expected a whole number from 1"),
        ({"y": np.full(96, 11)}, "the label 11"),
    ],
)
def test_a_malformed_malicious_stream(tmp_path, changes, words):
    file = malicious(tmp_path / "evil.npz", **changes)
    with pytest.raises(GivenMalformed, match=words):
        read_given(file, 10)


def test_a_malicious_stream_without_its_mask(tmp_path):
    np.savez(tmp_path / "evil.npz", x=np.zeros((2, 8, 8), np.uint8), y=np.zeros(2, np.int64))
    with pytest.raises(GivenMalformed, match="no array `malicious`, it holds x, y"):
        read_given(tmp_path / "evil.npz", 10)


def test_whose_data_are_whose(tmp_path):
    tiny_bundle.build(tmp_path / "tiny")
    both = [DIGITS, str(tmp_path / "tiny")]
    digits, tiny = seats_of(both, ["digits", "tiny=npz:a=b.npz"], [], ["m.npz", "tiny=t1.npz", "tiny=t2.npz"])
    assert (digits.source, digits.given) == ("digits", ("m.npz",))
    assert (tiny.source, tiny.given) == ("npz:a=b.npz", ("t1.npz", "t2.npz"))
    with pytest.raises(SuiteOption, match="did you mean `tiny`"):
        seats_of(both, ["digits", "tny=npz:x"], [], [])
    with pytest.raises(SuiteOption, match="digits has no images"):
        seats_of(both, ["tiny=npz:x"], [], [])
    with pytest.raises(SuiteOption, match="digits has two --stream"):
        seats_of([DIGITS], ["digits", "npz:x"], [], [])


# --------------------------------------------------------------------------------------- workers


class Actor:
    """Doubles numbers; some tasks go wrong."""

    def do(self, task, progress):
        if task == "refuse":
            raise UnknownPlayer("no such player", "Take another")
        if task == "die":
            os._exit(7)
        progress(task)
        return 2 * task


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_all_tasks_are_done(jobs):
    done, samples = [], []
    if jobs == 1:
        in_order(Actor, range(5), done.append, samples.append)
    else:
        in_parallel(Actor, range(5), done.append, samples.append, jobs=jobs)
    assert sorted(done) == [0, 2, 4, 6, 8]
    assert sum(samples) == sum(range(5))


def test_a_refusal_in_a_worker_arrives_as_itself():
    with pytest.raises(UnknownPlayer) as caught:
        in_parallel(Actor, ["refuse", 1], lambda _: None, lambda _: None, jobs=2)
    assert (caught.value.cause, caught.value.fix) == ("no such player", "Take another")


def test_a_worker_that_dies_is_noticed():
    with pytest.raises(WorkerLost, match="status 7"):
        in_parallel(Actor, ["die", 1], lambda _: None, lambda _: None, jobs=2)
    assert issubclass(WorkerLost, TtaError)


# --------------------------------------------------------------------------------------- the command


def flat(text):
    return " ".join(text.split())


def test_the_command(tmp_path):
    pytest.importorskip("matplotlib")
    words = (
        "evaluate", "--suite", "quick", "--streams", "clean,sorted/none,long", "--limit", 100, "--jobs", 2,
        "--methods", "source,norm,tent", "--store", tmp_path / "store", "--seed", 2,
        "--json", tmp_path / "s.json", "--report", tmp_path / "s.html",
    )  # fmt: skip
    done = run_cli(*words)
    assert done.returncode == 0, done.stderr
    assert "digits: error in %" in flat(done.stdout)
    assert "sorted/none" in done.stdout
    form = json.loads((tmp_path / "s.json").read_text())
    (model,) = form["models"]
    assert [stream["name"] for stream in model["streams"]] == ["clean", "sorted/none", "long"]
    assert form["seed"] == 2
    assert {verdict["player"] for verdict in model["verdicts"]} == {"norm", "tent"}
    assert "--suite quick" in (tmp_path / "s.html").read_text()
    before = files(tmp_path / "store")
    again = run_cli(*words)
    assert again.returncode == 0, again.stderr
    assert flat(again.stdout) == flat(done.stdout)
    assert files(tmp_path / "store") == before


def test_without_malicious_streams_the_command_says_so(tmp_path):
    done = run_cli(
        "evaluate", "--suite", "quick", "--limit", 4, "--methods", "source", "--jobs", 1, TTA_FROST_DIR=""
    )
    assert done.returncode == 0, done.stderr
    assert "no malicious streams are played" in flat(done.stderr)
    assert "tta-export attack" in flat(done.stderr)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--suite", "qiuck"], 2, "did you mean `quick`"),
        (["--suite", "quick", "--streams", "sortd"], 2, "did you mean `sorted`"),
        (["--suite", "quick", "--methods", "source,tnet"], 2, "did you mean `tent`"),
        (["--suite", "quick", "--batch", "64"], 2, "--batch does not go with a suite"),
        (["--suite", "quick", "--shifts", "fog:5"], 2, "--shifts does not go with a suite"),
        (["--suite", "quick", "--stream", "npz:nowhere.npz"], 4, "there is no file nowhere.npz"),
        (["--suite", "quick", "--malicious", "nowhere.npz"], 4, "there is no file nowhere.npz"),
        (["--suite", "quick", "--report", "no/such/s.html"], 2, "has no directory"),
        (["--store", "x"], 2, "no --suite is named"),
        (["a", "b"], 2, "2 bundles"),
        (["--stream", "digits", "--stream", "digits"], 2, "2 streams are named"),
    ],
)
def test_what_the_command_refuses(tmp_path, arguments, status, words):
    with unchanged(tmp_path):
        done = run_cli("evaluate", *arguments)
    assert done.returncode == status, done.stderr
    assert words in flat(done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
def test_the_whole_quick_suite_on_the_digits(tmp_path):
    """Every stream, with and without guards; batch statistics ruin what they are known to ruin."""
    plan = plan_of(tmp_path, methods=("source", "norm", "tent", "tent+guards"), limit=400)
    (board,) = run(plan, Store(tmp_path / "store"))
    norm = summarise(board).verdict("norm")
    assert norm is not None
    assert {"sorted/none", "batch-1/none"} <= set(norm.ruined)
    assert norm.online is not None
    assert norm.online < summarise(board).cells["online/fog:5"]["source"].result.error
    assert all(results["source"].error <= 1 for results in board.streams.values())
