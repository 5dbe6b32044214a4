"""What results say, from made-up results; their JSON form; the page."""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone

import numpy as np
import pytest

from snapshots import unchanged
from tta_edge.comparison import paired_difference
from tta_edge.report import Facts
from tta_edge.suite.catalogue import SCALES
from tta_edge.suite.errors import StoreMalformed, StoreUnwritable
from tta_edge.suite.form import to_json
from tta_edge.suite.result import Key, PhaseForm, Result, decode, encode
from tta_edge.suite.run import Board
from tta_edge.suite.store import MAX_BYTES, Store
from tta_edge.suite.summary import best_fixed, collapsed, summarise

N = 400
LONG = 4000


def result(
    stream,
    player,
    error,
    *,
    forwards=1.0,
    diversity=1.0,
    true_diversity=1.0,
    phases=(("none", 0),),
    n=N,
    tail=None,
):
    """A result with so many wrong answers spread evenly; `tail` is the error of the last quarter."""
    wrong = np.zeros(n, bool)
    wrong[np.round(np.arange(0, n, 1 / error) if error else []).astype(int).clip(0, n - 1)] = True
    if tail is not None:
        wrong[-n // 4 :] = np.arange(n // 4) < tail * n / 4
    return Result(
        key=Key(bundle="b" * 64, stream=stream, player=player, seed=0, fingerprint="f"),
        model="m",
        samples=n,
        counted=n,
        batches=7,
        phases=tuple(PhaseForm(*phase) for phase in phases),
        wrong=np.packbits(wrong).tobytes(),
        forwards=None if forwards is None else forwards * n,
        adapted=3,
        refused=0,
        diversity=diversity,
        true_diversity=true_diversity,
        seconds=0.5,
    )


def stream(name, errors, **options):
    return {player: result(name, player, error, **options) for player, error in errors.items()}


LONG_PHASES = (("none", 0), ("fog:5", LONG // 2))


@pytest.fixture
def board():
    streams = {
        "online/fog:5": stream("online/fog:5", {"source": 0.5, "norm": 0.3, "tent": 0.2, "auto": 0.25}),
        "online/contrast:5": stream(
            "online/contrast:5", {"source": 0.5, "norm": 0.1, "tent": 0.2, "auto": 0.25}
        ),
        "continual": stream("continual", {"source": 0.5, "norm": 0.2, "tent": 0.25, "auto": 0.125}),
        "sorted/fog:5": stream("sorted/fog:5", {"source": 0.5, "norm": 0.8, "tent": 0.8, "auto": 0.4}),
        "sorted/none": stream("sorted/none", {"source": 0.1, "norm": 0.8, "tent": 0.8, "auto": 0.1}),
        "malicious/a": stream("malicious/a", {"source": 0.1, "norm": 0.5, "tent": 0.5, "auto": 0.11}),
        "long": {
            player: result("long", player, error, forwards=cost, phases=LONG_PHASES, n=LONG)
            for player, error, cost in (("source", 0.5, 1.0), ("tent", 0.2, 3.0), ("auto", 0.2, 1.2))
        },
    }
    return Board("m", "b" * 64, "npz:x", 10, "source", ("source", "norm", "tent", "auto"), streams)


# --------------------------------------------------------------------------------------- judging


def test_differences_are_paired(board):
    cell = summarise(board).cells["online/fog:5"]["norm"]
    rows = board.streams["online/fog:5"]
    wanted = paired_difference([rows["norm"].wrong_flags], [rows["source"].wrong_flags])
    assert cell.difference == wanted
    assert wanted.value == pytest.approx(-0.2)
    assert summarise(board).cells["online/fog:5"]["source"].difference is None


def test_the_verdict_of_auto(board):
    verdict = summarise(board).verdict("auto")
    assert verdict is not None
    assert verdict.streams == 6
    assert verdict.ruined == ()
    assert verdict.collapsed == ()
    assert verdict.worst is not None
    assert verdict.worst[0] == "sorted/none"
    assert verdict.worst[1].value == 0
    # norm: online 0.2, continual 0.2; tent: 0.2 and 0.25.
    assert verdict.best == "norm"
    assert verdict.gap_online == pytest.approx(0.05)
    assert verdict.gap_continual == pytest.approx(-0.075)
    (share,) = verdict.shares
    assert share.stream == "sorted/fog:5"
    assert share.share == pytest.approx(0.1 / 0.2)
    assert verdict.malicious["malicious/a"].value == pytest.approx(0.01)
    assert verdict.forwards_long == pytest.approx(1.2)
    (back,) = verdict.returns
    assert (back.shift, back.samples, back.reference) == ("fog:5", 256, 256)


def test_the_verdict_of_a_fixed_method(board):
    verdict = summarise(board).verdict("norm")
    assert verdict is not None
    assert verdict.ruined == ("sorted/fog:5", "sorted/none"), "a malicious stream is no honest one"
    assert verdict.worst is not None
    assert verdict.worst[0] == "sorted/none"
    assert verdict.returns == ()
    assert verdict.forwards_long is None
    assert summarise(board).verdict("source") is None


def test_auto_and_guarded_methods_are_no_fixed_ones(board):
    cells = summarise(board).cells
    assert best_fixed(cells, board) == "norm"
    online = stream("online/fog:5", {"source": 0.5, "tent+guards": 0.1, "auto": 0.1})
    alone = Board("m", "b", "x", 10, "source", ("source", "tent+guards", "auto"), {"online/fog:5": online})
    assert best_fixed(summarise(alone).cells, alone) is None
    verdict = summarise(alone).verdict("auto")
    assert verdict is not None
    assert (verdict.best, verdict.gap_online) == (None, None)


@pytest.mark.parametrize(
    ("tail", "diversity", "true_diversity", "source", "expected"),
    [
        (0.90, 1.0, 1.0, 0.3, True),  # as often wrong as a guess
        (0.80, 1.0, 1.0, 0.3, False),  # bad, but no guess and varied
        (0.80, 0.4, 1.0, 0.3, True),  # poor in classes
        (0.80, 0.4, 0.5, 0.3, False),  # so is the truth
        (0.90, 0.1, 1.0, 0.88, False),  # the source is hardly better
    ],
)
def test_collapse(tail, diversity, true_diversity, source, expected):
    mine = result("s", "tent", 0.1, tail=tail, diversity=diversity, true_diversity=true_diversity)
    assert collapsed(mine, result("s", "source", 0.1, tail=source), 10) is expected


def test_an_early_failure_that_healed_is_no_collapse():
    mine = result("s", "tent", 0.9, tail=0.1)
    assert not collapsed(mine, result("s", "source", 0.1), 10)


def test_an_unknown_cost(board):
    board.streams["long"]["auto"] = result("long", "auto", 0.2, forwards=None, phases=LONG_PHASES, n=LONG)
    verdict = summarise(board).verdict("auto")
    assert verdict is not None
    assert (verdict.forwards, verdict.forwards_long) == (None, None)


# --------------------------------------------------------------------------------------- forms


def test_the_json_form(board):
    form = json.loads(
        json.dumps(to_json([summarise(board)], suite="quick", seed=3, scale=SCALES["quick"]), allow_nan=False)
    )
    assert {"format", "format_version", "version", "suite", "seed", "scale", "definitions", "models"} == set(
        form
    )
    (model,) = form["models"]
    assert {"model", "bundle", "source", "frozen", "players", "streams", "verdicts"} == set(model)
    online = model["streams"][0]
    assert {"name", "family", "samples", "counted", "batches", "phases", "players"} == set(online)
    assert set(online["players"]["tent"]) == {
        "error", "difference", "standard_error", "ruined", "collapsed", "forwards_per_sample", "adapted", "refused",
        "diversity", "true_diversity", "seconds",
    }  # fmt: skip
    assert online["players"]["source"]["difference"] is None
    auto = next(each for each in model["verdicts"] if each["player"] == "auto")
    assert auto["worst"]["stream"] == "sorted/none"
    assert auto["recovered"][0]["share"] == pytest.approx(0.5)
    assert auto["recovery"] == [{"shift": "fog:5", "samples": 256, "every_batch": 256}]


def test_the_page(board):
    pytest.importorskip("matplotlib")
    from tta_edge.suite.page import render

    # Names come from files and command lines.
    odd = Board("m<&>", board.bundle, "npz:<x>", 10, board.frozen, board.players, board.streams)
    facts = Facts("tta-edge evaluate <b>", datetime(2024, 1, 2, tzinfo=timezone.utc), {"CPUs": "2"})
    text = render([summarise(odd), summarise(board)], facts, suite="quick", seed=0)
    assert text.startswith("<!DOCTYPE html>")
    assert "m&lt;&amp;&gt;" in text
    assert "<x>" not in text
    assert "<b>" not in text
    assert "auto ruins 0 of 6 honest streams" in text
    assert "norm ruins 2 of 5 honest streams" in text
    assert "<script" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)
    assert text == render([summarise(odd), summarise(board)], facts, suite="quick", seed=0)


# --------------------------------------------------------------------------------------- the store


def test_a_stored_result_is_found_again(tmp_path):
    first = result("online/fog:5", "tent+guards", 0.25)
    Store(tmp_path).put(first)
    assert Store(tmp_path).find(first.key) == first
    other = Key(bundle="b" * 64, stream="online/fog:5", player="tent+guards", seed=1, fingerprint="f")
    assert Store(tmp_path).find(other) is None
    np.testing.assert_array_equal(decode(encode(first), "x").wrong_flags, first.wrong_flags)


def test_a_store_without_a_directory_keeps_results_in_memory(tmp_path):
    store, first = Store(None), result("clean", "tent", 0.25)
    with unchanged(tmp_path):
        store.put(first)
    assert store.find(first.key) == first
    assert store.path(first.key) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[: len(data) // 2], "is no result of a suite"),
        (lambda data: b"", "is no result of a suite"),
        (lambda data: b"[" * 100_000, "is no result of a suite"),
        (lambda data: data.replace(b'"counted": 400', b'"counted": 800'), "flags for 800 of 400 samples"),
        (lambda data: data.replace(b'"counted": 400', b'"counted": -1'), "is no result of a suite"),
        (lambda data: data.replace(b'"model"', b'"modell"'), "modell"),
        (lambda data: data.replace(b'"format_version": 1', b'"format_version": 9'), "format version 9"),
        (lambda data: data.replace(b'"stream": "clean"', b'"stream": "other"'), "tent on other"),
        (lambda data: data + b" " * MAX_BYTES, "the limit is"),
    ],
)
def test_a_malformed_file_is_refused_by_name(tmp_path, change, words):
    first = result("clean", "tent", 0.25)
    store = Store(tmp_path)
    store.put(first)
    path = store.path(first.key)
    assert path is not None
    path.write_bytes(change(path.read_bytes()))
    with unchanged(tmp_path), pytest.raises(StoreMalformed, match=words) as caught:
        Store(tmp_path).find(first.key)
    assert str(path) in str(caught.value)
    assert "Remove" in str(caught.value)


def test_an_unwritable_store(tmp_path):
    (tmp_path / "file").write_text("")
    with unchanged(tmp_path), pytest.raises(StoreUnwritable):
        Store(tmp_path / "file").put(result("clean", "tent", 0.25))
