"""The commands `evaluate`, `stream` and `demo` as a user runs them: figures, JSON, exit codes, Ctrl-C."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from running import PATIENCE_S, REPOSITORY, process_environment, run_cli, running
from stream_images import smooth
from tta_edge.builtin import builtin_bundle, builtin_digits
from tta_edge.client import Client
from tta_edge.live import Streamer, StreamPlan, results, to_json
from tta_edge.streams.errors import InputMismatch
from tta_edge.streams.measures import Recovery, gap_recovered
from tta_edge.streams.shifts import Shift
from tta_edge.streams.sources import open_source
from tta_edge.view import LiveView, sparkline, stream_table
from tta_runtime.errors import BadValue

RESULT_KEYS = {"shift", "clean", "source", "adapted", "gap_recovered", "recovery_samples"}
FOG = Shift("fog", 5)


@pytest.fixture(scope="module")
def daemon():
    with running(builtin_bundle(), method="tent") as server:
        yield server


@pytest.fixture(scope="module")
def client(daemon):
    with Client(daemon.endpoint, timeout_s=PATIENCE_S) as connected:
        yield connected


def flat(text):
    """The output without line breaks, which depend on the width."""
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------------ evaluate


def test_evaluate_prints_a_table_and_writes_json(tmp_path):
    done = run_cli(
        "evaluate", builtin_bundle(), "--stream", "digits", "--shifts", "fog:5,contrast:5", "--limit", 130,
        "--methods", "source,tent", "--batch", 50, "--setting", "continual", "--seed", 3, "--threads", 1,
        "--set", "tent.lr=0.01", "--json", tmp_path / "e.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "fog:5" in done.stdout
    assert "error, continual, batch 50, seed 3" in done.stdout
    form = json.loads((tmp_path / "e.json").read_text())
    assert (form["batch"], form["seed"], form["setting"]) == (50, 3, "continual")
    assert form["hyper"]["tent"]["lr"] == 0.01
    assert [(row["shift"], row["method"], row["samples"]) for row in form["rows"]] == [
        ("fog", "source", 130),
        ("fog", "tent", 130),
        ("contrast", "source", 130),
        ("contrast", "tent", 130),
    ]
    assert all(0 <= row["error"] <= 1 for row in form["rows"])


def test_evaluate_takes_the_stream_as_it_is(tmp_path):
    done = run_cli("evaluate", "--limit", 64, "--json", tmp_path / "e.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert {row["shift"] for row in rows} == {"none"}
    assert [row["method"] for row in rows] == ["source", "norm", "tent"]


def test_folders_sorted_by_class_come_with_a_note(tmp_path):
    image = pytest.importorskip("PIL.Image")
    with np.load(builtin_digits()) as digits:
        for k, (picture, label) in enumerate(zip(digits["x"][:40], digits["y"][:40], strict=True)):
            (tmp_path / "set" / str(label)).mkdir(parents=True, exist_ok=True)
            image.fromarray(picture[..., 0]).save(tmp_path / "set" / str(label) / f"{k}.png")
    done = run_cli("evaluate", "--stream", f"images:{tmp_path / 'set'}", "--methods", "source")
    assert done.returncode == 0, done.stderr
    assert "sorted by class" in flat(done.stderr)
    shuffled = run_cli(
        "evaluate", "--stream", f"images:{tmp_path / 'set'}", "--methods", "source", "--shuffle"
    )
    assert "sorted by class" not in flat(shuffled.stderr)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--stream", "digit"], 2, "did you mean `digits`"),
        (["--stream", "npz:nowhere.npz"], 4, "there is no file nowhere.npz"),
        (["--shifts", "foog:5"], 2, "did you mean `fog`"),
        (["--shifts", "fog:7"], 2, "severity `7`"),
        (["--shifts", "frost:1"], 2, "TTA_FROST_DIR"),
        (["--shifts", "saturate:1"], 4, "three channels"),
        (["--methods", "source,tnet"], 2, "did you mean `tent`"),
        (["--setting", "onlin"], 2, "did you mean `online`"),
        (["--set", "tent.lrr=1"], 2, "did you mean `lr`"),
        (["--set", "lr"], 2, "is not a hyper-parameter setting"),
        (["--batch", "0"], 2, "--batch"),
        (["--json", "nowhere/e.json"], 2, "has no directory"),
        (["--json", "."], 2, "is a directory"),
        (["nowhere"], 4, "nowhere"),
    ],
)
def test_evaluate_refuses_by_name(arguments, status, words):
    done = run_cli("evaluate", *arguments)
    assert done.returncode == status, done.stderr
    assert words in flat(done.stderr)
    assert "Traceback" not in done.stderr


# -------------------------------------------------------------------------------------------------- stream


def test_stream_shows_the_fall_and_the_recovery(daemon, tmp_path):
    done = run_cli(
        "stream",
        "digits",
        "--shift",
        "contrast:5,fog:5",
        "--to",
        daemon.endpoint,
        "--json",
        tmp_path / "s.json",
    )
    assert done.returncode == 0, done.stderr
    assert "gap recovered" in done.stdout
    form = json.loads((tmp_path / "s.json").read_text())
    contrast, fog = form["shifts"]
    assert set(contrast) >= RESULT_KEYS
    assert (contrast["shift"], fog["shift"]) == ("contrast", "fog")
    for row in (contrast, fog):
        assert row["source"] < 0.3 < row["adapted"]
        assert row["gap_recovered"] == pytest.approx(
            (row["adapted"] - row["source"]) / (row["clean"] - row["source"])
        )
        assert row["recovery_samples"] >= form["recovery"]["window"]
        assert row["samples"] == 899
    assert (contrast["steps"], fog["steps"]) == (28, 42), "unannounced: no reset between the parts"
    assert form["clean_loss"] <= 0.01
    assert (form["method"], form["batch"], form["seed"]) == ("tent", 64, 0)


def test_stream_without_labels(daemon, tmp_path):
    with np.load(builtin_digits()) as digits:
        np.savez(tmp_path / "u.npz", x=digits["x"][:200])
    done = run_cli(
        "stream",
        f"npz:{tmp_path / 'u.npz'}",
        "--shift",
        "fog:5",
        "--to",
        daemon.endpoint,
        "--json",
        tmp_path / "s.json",
    )
    assert done.returncode == 0, done.stderr
    assert "agreement" in done.stdout
    assert "gap recovered" not in done.stdout
    (row,) = json.loads((tmp_path / "s.json").read_text())["shifts"]
    assert [row[key] for key in RESULT_KEYS - {"shift"}] == [None] * 5
    assert 0 <= row["agreement"] < 1
    assert row["entropy"] > 0
    assert row["drift"] > 0.3


def test_a_published_directory_streams_as_it_is(daemon, tmp_path):
    """No unshifted images there: no clean accuracy, no gap, but accuracies."""
    with np.load(builtin_digits()) as digits:
        np.save(tmp_path / "fog.npy", np.concatenate([digits["x"][:40]] * 5))
        np.save(tmp_path / "labels.npy", np.concatenate([digits["y"][:40]] * 5))
    done = run_cli(
        "stream",
        f"cifar10c:{tmp_path}",
        "--shift",
        "fog:1",
        "--to",
        daemon.endpoint,
        "--json",
        tmp_path / "s.json",
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "s.json").read_text())["shifts"]
    assert (row["clean"], row["gap_recovered"]) == (None, None)
    assert row["source"] > 0.9


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["digit"], 2, "did you mean `digits`"),
        (["digits", "--shift", "foog"], 2, "did you mean `fog`"),
        (["digits", "--to", "tcp://127.0.0.1:9", "--timeout-s", "0.3"], 3, "Start the daemon"),
        (["digits", "--to", "nonsense"], 3, "nonsense"),
        (["digits", "--json", "nowhere/s.json"], 2, "has no directory"),
    ],
)
def test_stream_refuses_by_name(arguments, status, words):
    done = run_cli("stream", *arguments)
    assert done.returncode == status, done.stderr
    assert words in flat(done.stderr)
    assert "Traceback" not in done.stderr


def test_images_that_do_not_fit_change_nothing_in_the_daemon(daemon, client, tmp_path):
    np.savez(tmp_path / "big.npz", x=smooth(4, 28, 1))
    before = client.status().streams
    done = run_cli("stream", f"npz:{tmp_path / 'big.npz'}", "--to", daemon.endpoint)
    assert done.returncode == 4
    assert "the images are 1x28x28 (channels, height, width), the model takes 1x8x8" in flat(done.stderr)
    assert client.status().streams == before


def test_ctrl_c_ends_a_repeating_stream_with_its_figures(daemon, tmp_path):
    """The daemon's counter says when a whole round is over; the signal comes in a later one."""
    command = [
        sys.executable, "-m", "tta_edge", "stream", "digits", "--shift", "fog:5", "--repeat",
        "--limit", "128", "--stream", "endless", "--to", daemon.endpoint, "--json", str(tmp_path / "s.json"),
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=process_environment(),
        cwd=REPOSITORY,
    )
    try:
        with Client(daemon.endpoint, timeout_s=PATIENCE_S) as watcher:
            while not any(s.id == "endless" and s.steps >= 9 for s in watcher.status().streams):
                assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait(PATIENCE_S)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    form = json.loads((tmp_path / "s.json").read_text())
    assert form["interrupted"] is True
    assert form["shifts"][0]["samples"] == 128, "the last complete round"
    assert "fog:5" in out


def test_the_live_view_draws_what_was_seen(client):
    console = Console(force_terminal=True, width=90, record=True, file=io.StringIO())
    plan = StreamPlan(open_source("digits"), (None, FOG), limit=192, stream="view")
    with LiveView(console, Recovery(), "a title") as view:
        streamer = Streamer(client, plan, view.update)
        phases = streamer.run()
        console.print(
            view.render(
                phases, client.predict(np.zeros((2, 1, 8, 8), np.float32), stream="view", compare=True)
            )
        )
    clean, shifted = results(phases, Recovery())
    console.print(stream_table(clean, shifted, Recovery()))
    text = console.export_text()
    for word in (
        "a title",
        "frozen source",
        "adapted",
        "agreement",
        "fog:5: 192 samples",
        "steps 6",
        "gap recovered",
    ):
        assert word in text
    assert "…" not in text


def test_sparkline():
    assert sparkline([]) == ""
    assert sparkline([0.0, 0.5, 1.0, 2.0, -1.0]) == "▁▅██▁"
    assert len(sparkline(list(np.linspace(0, 1, 999)), 20)) == 20


def test_figures_of_a_plan_agree_with_the_replies(client):
    """The totals against the daemon's own answers, asked for batch by batch."""
    source = open_source("digits")
    phases = Streamer(
        client, StreamPlan(source, (None, FOG), limit=256, stream="count", reset_between=True)
    ).run()
    clean, (fog,) = results(phases, Recovery())
    images = source.shifted(FOG, 0)(np.arange(256), 0)
    client.reset("count")
    ours = frozen = 0
    for k in range(0, 256, 64):
        x = np.moveaxis(images[k : k + 64], -1, 1).astype(np.float32) / np.float32(255)
        reply = client.predict(x, stream="count", compare=True)
        ours += int((reply.logits.argmax(1) == source.labels[k : k + 64]).sum())
        frozen += int((reply.source_logits.argmax(1) == source.labels[k : k + 64]).sum())
    assert (fog.adapted, fog.source) == (pytest.approx(ours / 256), pytest.approx(frozen / 256))
    assert fog.gap_recovered == gap_recovered(clean.source, fog.source, fog.adapted)
    assert (fog.steps, fog.adapted_batches) == (4, 4)
    form = to_json(clean, [fog], Recovery(), batch=64)
    assert form["mean_gap_recovered"] == fog.gap_recovered
    assert form["clean_loss"] == clean.source - clean.adapted
    json.dumps(form, allow_nan=False)


@pytest.mark.parametrize("changes", [{"batch": 0}, {"limit": 0}])
def test_plans_that_make_no_sense(client, changes):
    with pytest.raises(BadValue, match="is 0"):
        Streamer(client, StreamPlan(open_source("digits"), (None,), **changes))


def test_labels_that_do_not_fit_are_refused_before_anything_is_sent(client, tmp_path):
    np.savez(tmp_path / "a.npz", x=smooth(4, 8, 1), y=np.array([0, 1, 2, 10]))
    with pytest.raises(InputMismatch, match="label 10"):
        Streamer(client, StreamPlan(open_source(f"npz:{tmp_path / 'a.npz'}"), (None,), stream="never"))
    assert all(stream.id != "never" for stream in client.status().streams)


# ---------------------------------------------------------------------------------------------------- demo


def test_demo_passes_and_writes_json(tmp_path):
    done = run_cli("demo", "--json", tmp_path / "d.json")
    assert done.returncode == 0, done.stderr
    form = json.loads((tmp_path / "d.json").read_text())
    assert [row["shift"] for row in form["shifts"]] == [
        "gaussian_noise", "impulse_noise", "defocus_blur", "contrast", "brightness", "fog", "pixelate"
    ]  # fmt: skip
    assert all(set(row) >= RESULT_KEYS for row in form["shifts"])
    gaps = [row["gap_recovered"] for row in form["shifts"]]
    assert form["mean_gap_recovered"] == pytest.approx(np.mean(gaps))
    assert form["mean_gap_recovered"] >= 0.5
    assert form["clean_loss"] <= 0.01
    assert all(row["clean"] > 0.97 and row["source"] < row["adapted"] for row in form["shifts"])


def test_demo_without_adaptation_is_a_negative_result(tmp_path):
    """The companion: the demonstration can fail. The frozen source recovers nothing."""
    done = run_cli("demo", "--method", "source", "--json", tmp_path / "d.json")
    assert done.returncode == 1
    assert "not enough" in done.stderr
    form = json.loads((tmp_path / "d.json").read_text())
    assert form["mean_gap_recovered"] == 0.0
    assert form["clean_loss"] == 0.0


def test_demo_is_deaf_to_the_environment_of_the_daemon():
    done = run_cli("demo", "--method", "tnet", TTA_METHOD="source", TTA_BIND="nonsense")
    assert done.returncode == 3
    assert "did you mean `tent`" in flat(done.stderr)


def test_demo_draws_the_figure(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg"):
        assert run_cli("demo", "--figure", tmp_path / name).returncode == 0
    first = (tmp_path / "a.svg").read_text()
    assert first == (tmp_path / "b.svg").read_text()
    for words in ("frozen source model", "adapting", "gaussian noise:5", "clean"):
        assert words in first


@pytest.mark.parametrize(
    ("figure", "words"), [("a.gif", ".svg, .png, .pdf"), ("nowhere/a.svg", "has no directory")]
)
def test_demo_refuses_a_figure_before_it_starts(figure, words):
    done = run_cli("demo", "--figure", figure)
    assert done.returncode == 2
    assert words in flat(done.stderr)
