"""`evaluate`: its rows against a loop written from the formulas, its settings, its refusals."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

import tiny_bundle
from tta_edge.builtin import builtin_bundle
from tta_edge.evaluate import Plan, Row, check_setting, evaluate, spread
from tta_edge.streams.errors import InputMismatch, LabelsMissing, ShiftNotGiven
from tta_edge.streams.order import order
from tta_edge.streams.shifts import Shift
from tta_edge.streams.source import Source, rows
from tta_edge.streams.sources import open_source
from tta_runtime.bundle import Bundle
from tta_runtime.engine import EngineOptions
from tta_runtime.errors import BadValue, UnknownHyper, UnknownMethod

OPTIONS = EngineOptions(threads=1)
N = 50
DARK, BRIGHT = Shift("dark", 1), Shift("bright", 2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    tiny_bundle.build(path)
    return path


def images(shift=0.0):
    """The tiny bundle's samples as uint8 images 2x4x1 and their labels."""
    x, y = tiny_bundle.samples(N, shift=shift)
    return (np.clip((x + 2) / 6, 0, 1) * 255).astype(np.uint8).reshape(N, 2, 4, 1), y


@pytest.fixture(scope="module")
def source():
    clean, y = images()
    dark, bright = images(0.5)[0], images(1.0)[0]
    given = {DARK: lambda i: rows(dark, i), BRIGHT: lambda i: rows(bright, i)}
    return Source("memory", N, (2, 4, 1), lambda i: rows(clean, i), y.astype(np.int64), None, given)


@pytest.fixture(scope="module")
def plain(source):
    return Source("memory", N, (2, 4, 1), source.read, source.labels)


def run(bundle, source, **changes):
    plan = {"shifts": (DARK, BRIGHT), "methods": ("source", "tent"), "batch": 8, **changes}
    return evaluate(bundle, Plan(source, **plan), options=OPTIONS)


def errors(evaluation):
    return {(row.shift, row.method): row.error for row in evaluation.rows}


def snapshot(path):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}


def reference(source, shifts, batch, *, places=None, reset=True, min_batch=2):
    """Errors of tent by the formulas of tiny_bundle.reference_tent, without engines, models or `evaluate`."""
    places = np.arange(N) if places is None else places
    start = np.concatenate([np.ones(8), np.zeros(8), np.full(8, 0.5)]).astype(np.float32)
    theta, momentum = start, np.zeros(16, np.float32)
    result = []
    for shift in shifts:
        if reset:
            theta, momentum = start, np.zeros(16, np.float32)
        wrong = 0
        for k in range(0, len(places), batch):
            part = places[k : k + batch]
            x = source.given[shift](part).reshape(len(part), 8).astype(np.float32) / np.float32(255)
            logits, *new = tiny_bundle.reference_tent(x, np.ones(len(part), np.float32), theta, momentum)
            if len(part) >= min_batch:
                theta, momentum = new
            wrong += int((logits.argmax(1) != source.labels[part]).sum())
        result.append(wrong / len(places))
    return result


# ------------------------------------------------------------------------------------------ what it measures


@pytest.mark.parametrize("batch", [8, 7, 49, 50, 64])
@pytest.mark.parametrize("setting", ["online", "continual"])
def test_against_the_formulas(bundle, source, batch, setting):
    """Batch 7 and 49 leave a last batch of one, which tent cannot step on but which counts."""
    evaluation = run(bundle, source, batch=batch, setting=setting)
    got = errors(evaluation)
    wanted = reference(source, (DARK, BRIGHT), batch, reset=setting == "online")
    assert [got["dark", "tent"], got["bright", "tent"]] == wanted
    assert all(row.samples == N for row in evaluation.rows)


def test_rows_and_what_adapted(bundle, source):
    evaluation = run(bundle, source, batch=7)
    assert [(row.shift, row.severity, row.method) for row in evaluation.rows] == [
        ("dark", 1, "source"),
        ("dark", 1, "tent"),
        ("bright", 2, "source"),
        ("bright", 2, "tent"),
    ]
    assert [row.adapted for row in evaluation.rows] == [0, 7, 0, 7], "the last batch of one is only predicted"
    assert all(row.refused == 0 for row in evaluation.rows)


def test_online_shifts_do_not_see_each_other(bundle, source):
    both, alone = errors(run(bundle, source)), errors(run(bundle, source, shifts=(BRIGHT,)))
    assert {key: value for key, value in both.items() if key[0] == "bright"} == alone


def test_continual_shifts_do(bundle, source):
    """The second shift starts from the theta that the first one left, and from nothing else."""
    hard = {"shifts": (BRIGHT, DARK), "methods": ("tent",), "hyper": {"tent": {"lr": 1.0}}, "batch": 10}
    online, continual = (errors(run(bundle, source, setting=s, **hard)) for s in ("online", "continual"))
    assert online["bright", "tent"] == continual["bright", "tent"]
    assert online["dark", "tent"] != continual["dark", "tent"]


def test_limit_and_shuffle(bundle, source):
    evaluation = run(bundle, source, limit=20)
    assert {row.samples for row in evaluation.rows} == {20}
    assert errors(evaluation)["dark", "tent"] == reference(source, (DARK,), 8, places=np.arange(20))[0]
    places = order(N, shuffle=True, seed=3)
    shuffled = errors(run(bundle, source, shuffle=True, seed=3))
    assert shuffled["dark", "tent"] == reference(source, (DARK,), 8, places=places)[0]


def test_without_a_shift_the_row_is_named_none(bundle, plain):
    (row,) = evaluate(bundle, Plan(plain, (None,), ("source",)), options=OPTIONS).rows
    assert isinstance(row, Row)
    assert (row.shift, row.severity, row.method, row.samples) == ("none", None, "source", N)


def test_a_fixed_batch(tmp_path, source):
    tiny_bundle.build(tmp_path / "fixed", fixed_batch=8)
    evaluation = run(tmp_path / "fixed", source)
    assert [row.adapted for row in evaluation.rows if row.method == "tent"] == [6, 6]
    assert all(row.samples == N for row in evaluation.rows)
    assert {row.adapted for row in run(tmp_path / "fixed", source, batch=9).rows} == {0}


def test_steps_that_would_break_theta_are_thrown_away_and_counted(bundle, source):
    evaluation = run(bundle, source, hyper={"tent": {"lr": 3e38}})
    rows_of_tent = [row for row in evaluation.rows if row.method == "tent"]
    assert all(row.refused > 0 for row in rows_of_tent)
    assert all(0 <= row.error <= 1 for row in rows_of_tent)


def test_repeats_to_the_bit(bundle, source):
    first = run(bundle, source, methods=("source", "tent", "teacher"), seed=4)
    assert run(bundle, source, methods=("source", "tent", "teacher"), seed=4).to_json() == first.to_json()


def test_progress_counts_every_prediction(bundle, source):
    seen: list[tuple[str, int]] = []
    plan = Plan(source, (DARK, BRIGHT), ("source", "tent"), batch=8)
    evaluate(bundle, plan, options=OPTIONS, progress=lambda what, samples: seen.append((what, samples)))
    assert sum(samples for _, samples in seen) == 2 * 2 * N
    assert {what for what, _ in seen} == {"dark:1 source", "dark:1 tent", "bright:2 source", "bright:2 tent"}


def test_machine_readable_form(bundle, source):
    form = run(bundle, source, seed=2, hyper={"tent": {"lr": 0.01}}).to_json()
    assert {key: form[key] for key in ("batch", "seed", "setting")} == {
        "batch": 8,
        "seed": 2,
        "setting": "online",
    }
    assert {"shift", "method", "error", "samples"} <= set(form["rows"][0])
    assert form["hyper"]["tent"]["lr"] == 0.01
    assert "source" not in form["hyper"]


def test_adapting_recovers_accuracy_on_digits():
    """The promise of the demonstration, measured without a daemon."""
    source = open_source("digits")
    names = ("gaussian_noise", "impulse_noise", "defocus_blur", "contrast", "brightness", "fog", "pixelate")
    plan = Plan(source, (None, *(Shift(name, 5) for name in names)), ("source", "norm", "tent"))
    got = errors(evaluate(builtin_bundle(), plan, options=OPTIONS))
    clean = got["none", "source"]
    assert clean <= 0.03
    for method in ("norm", "tent"):
        gaps = [(got[name, "source"] - got[name, method]) / (got[name, "source"] - clean) for name in names]
        assert np.mean(gaps) >= 0.5
        assert min(gaps) > 0
        assert got["none", method] - clean <= 0.01


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"methods": ("tnet",)}, UnknownMethod, "did you mean `tent`"),
        ({"methods": ()}, BadValue, "no method"),
        ({"methods": ("tent", "tent")}, BadValue, "named twice"),
        ({"batch": 0}, BadValue, "batch is 0"),
        ({"limit": 0}, BadValue, "limit is 0"),
        ({"setting": "contiunal"}, BadValue, "did you mean `continual`"),
        ({"hyper": {"tent": {"lrr": 1.0}}}, UnknownHyper, "did you mean `lr`"),
        ({"hyper": {"teacher": {"lr": 1.0}}}, UnknownMethod, "`teacher`, which is not evaluated"),
        ({"hyper": {"tent": {"lr": float("nan")}}}, BadValue, "lr"),
        ({"shifts": (None,)}, ShiftNotGiven, "no unshifted images"),
        ({"shifts": (Shift("dark", 5),)}, ShiftNotGiven, "no dark:5"),
    ],
)
def test_what_makes_no_sense(bundle, source, changes, error, words):
    before = snapshot(bundle)
    with pytest.raises(error) as caught:
        run(bundle, source, **changes)
    assert words in str(caught.value)
    assert snapshot(bundle) == before


def test_no_labels(bundle, plain):
    unlabelled = Source("memory", N, plain.shape, plain.read)
    with pytest.raises(LabelsMissing, match="tta-edge stream"):
        evaluate(bundle, Plan(unlabelled, (None,), ("source",)), options=OPTIONS)


def test_labels_beyond_the_classes(bundle, plain):
    wrong = Source("memory", N, plain.shape, plain.read, plain.labels + 1)
    with pytest.raises(InputMismatch, match=r"label 3, the model's classes are 0\.\.2"):
        evaluate(bundle, Plan(wrong, (None,), ("source",)), options=OPTIONS)


def test_images_of_another_size(bundle):
    with pytest.raises(InputMismatch, match=r"1x8x8 .* takes 8"):
        evaluate(bundle, Plan(open_source("digits"), (None,), ("source",)), options=OPTIONS)


def test_settings_of_the_command_line(bundle):
    manifest = Bundle.open(bundle).manifest
    assert spread({"lr": 0.1}, manifest, ["source", "tent"]) == {"tent": {"lr": 0.1}}
    both = spread({"tent": {"lr": 0.2}, "lr": 0.1, "alpha": 0.3}, manifest, ["tent"])
    assert both == {"tent": {"lr": 0.2, "alpha": 0.3}}, "the specific one wins"
    assert spread({}, manifest, ["tent"]) == {}
    with pytest.raises(UnknownHyper, match="did you mean `alpha`"):
        spread({"alhpa": 0.1}, manifest, ["tent"])
    with pytest.raises(UnknownHyper, match="no evaluated method"):
        spread({"lr": 0.1}, manifest, ["source"])
    assert check_setting("online") == "online"
