"""`evaluate --report`: one file that needs nothing else, says what the JSON says, and escapes what it is given."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from running import PATIENCE_S, process_environment, run_cli
from snapshots import unchanged
from tta_edge.builtin import builtin_bundle
from tta_edge.comparison import Difference, compare, paired_difference
from tta_edge.evaluate import Evaluation, Plan, Row, evaluate, parse_shifts
from tta_edge.figure import error_bars
from tta_edge.report import Facts, command_line, host_facts, render, verdict
from tta_edge.streams.errors import ShiftNotGiven, UnknownShift
from tta_edge.streams.measures import gap_recovered
from tta_edge.streams.shifts import Shift
from tta_edge.streams.source import Source
from tta_edge.streams.sources import open_source

pytest.importorskip("matplotlib")

FOG, DARK = Shift("fog", 5), Shift("contrast", 3)
MADE = datetime(2030, 1, 2, 3, 4, tzinfo=timezone.utc)
HOSTILE = "</title><script>alert(1)</script><img src=x onerror='y'>&\"$\\frac{"


class Page(HTMLParser):
    """A report as a reader's program sees it: elements with attributes, tables, text."""

    VOID = ("meta",)

    def __init__(self, text):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[tuple[str, list[float]]]]] = {}
        self.open: list[str] = []
        self.text = ""
        self._caption = ""
        self.feed(text)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "caption":
            self._caption = ""
        elif tag == "tr":
            self.tables.setdefault(self._caption, []).append([])
        elif tag in ("td", "th"):
            self.tables[self._caption][-1].append(("", []))
        elif tag == "data":
            self.tables[self._caption][-1][-1][1].append(float(attributes["value"]))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if "caption" in self.open:
            self._caption += data
        elif "td" in self.open or "th" in self.open:
            row = self.tables[self._caption][-1]
            row[-1] = (row[-1][0] + data, row[-1][1])

    def table(self, caption):
        (rows,) = [rows for name, rows in self.tables.items() if name.startswith(caption)]
        return rows


def assert_self_contained(text):
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image", "a"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} {name}"
            if name.split(":")[-1] in ("src", "href", "action", "data", "srcset"):
                assert tag == "use", f"{tag} {name}"
                assert value.startswith("#"), value
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert not re.search(r"(https?:)?//\w", text), "no address of any kind"


def assert_ids_hold_together(page):
    """No id stands twice, and what refers to one finds it."""
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for name, value in attributes.items():
            if name == "aria-labelledby":
                assert set(value.split()) <= set(ids)
            elif name.split(":")[-1] == "href":
                assert value[1:] in ids
            for target in re.findall(r"url\(#([^)]*)\)", value or ""):
                assert target in ids


# ---------------------------------------------------------------------------------------- an invented evaluation


def patterns(errors, samples=100, seed=0):
    """For each error, so many wrong predictions out of `samples`, at drawn places."""
    rng = np.random.default_rng(seed)
    found = []
    for error in errors:
        wrong = np.zeros(samples, bool)
        wrong[rng.permutation(samples)[: round(error * samples)]] = True
        found.append(wrong)
    return found


def invented(model="m", stream="memory", setting="online", shifts=(None, FOG, DARK), samples=100, **refused):
    """source, helps (better under both shifts), harms (worse under contrast, refused there)."""
    errors = {
        "source": (0.10, 0.60, 0.30),
        "helps": (0.10, 0.20, 0.05),
        "harms": (0.11, 0.50, 0.90),
    }
    source = Source(stream, samples, (4, 4, 1), lambda i: np.zeros((len(i), 4, 4, 1), np.uint8))
    plan = Plan(source, shifts, tuple(errors), batch=10, setting=setting, hyper={"helps": {"lr": 0.5}})
    wrong = {method: patterns(values, samples) for method, values in errors.items()}
    rows = [
        Row(
            "none" if shift is None else shift.name,
            None if shift is None else shift.severity,
            method,
            wrong[method][k],
            0 if method == "source" else 10,
            (0, 1, 2, 7) if (method, shift) == ("harms", DARK) else (),
        )
        for k, shift in enumerate(shifts)
        for method in errors
    ]
    return Evaluation(model, "ab" * 32, "source", tuple(rows), plan, {"helps": {"lr": 0.5, "decay": 0.25}})


def page_of(evaluation):
    text = render(evaluation, Facts("tta-edge evaluate", MADE, {"CPUs": "2"}, "9.9"))
    assert_self_contained(text)
    page = Page(text)
    assert_ids_hold_together(page)
    return page


def test_paired_difference_by_hand():
    """Images a..d under two shifts; differences summed per image first: (-1, -1), (0, 0), (0, 1), (0, 0)."""
    wrong = [np.array([0, 1, 0, 0], bool), np.array([0, 1, 1, 0], bool)]
    source = [np.array([1, 1, 0, 0], bool), np.array([1, 1, 0, 0], bool)]
    found = paired_difference(wrong, source)
    each = [-1.0, 0.0, 0.5, 0.0]
    mean = sum(each) / 4
    assert found.value == mean == -0.125
    variance = sum((value - mean) ** 2 for value in each) / 3
    assert found.standard_error == pytest.approx(math.sqrt(variance / 4))
    assert paired_difference([wrong[0][:1]], [source[0][:1]]) == Difference(-1.0, None)


def test_pairing_makes_the_standard_error_smaller_than_independent_samples_would():
    """The companion: the same two errors, paired with shuffled images, are less certain."""
    (source,) = patterns([0.5], 1000)
    method = source.copy()
    method[:50] = False
    shuffled = np.random.default_rng(1).permutation(method)
    paired, loose = (paired_difference([each], [source]) for each in (method, shuffled))
    assert paired.value == loose.value
    assert paired.standard_error < 0.5 * loose.standard_error


@pytest.mark.parametrize(
    ("value", "standard_error", "sign"),
    [
        (-0.05, 0.02, "better"),
        (0.05, 0.02, "worse"),
        (-0.05, 0.03, "unclear"),
        (0.0, 0.0, "unclear"),
        (-0.1, 0.0, "better"),
        (-1.0, None, "unclear"),
    ],
)
def test_what_is_clear(value, standard_error, sign):
    assert Difference(value, standard_error).sign == sign


def test_the_summary_leaves_the_clean_row_out_of_the_mean():
    source, helps, harms = compare(invented())
    assert (source.error, source.clean) == (pytest.approx(0.45), 0.1)
    assert source.difference is None
    assert source.gap_recovered is None
    assert helps.error == pytest.approx(0.125)
    assert helps.difference.value == pytest.approx(0.125 - 0.45)
    assert helps.gap_recovered == pytest.approx(
        (gap_recovered(0.9, 0.4, 0.8) + gap_recovered(0.9, 0.7, 0.95)) / 2
    )
    assert [cell.best for cell in helps.cells] == [True, True, True]
    assert [cell.best for cell in harms.cells] == [False] * 3
    assert (harms.refused, harms.adapted) == (4, 30)
    without = compare(invented(shifts=(FOG, DARK)))
    assert [method.gap_recovered for method in without] == [None] * 3
    assert [method.clean for method in without] == [None] * 3


def test_the_verdict_in_plain_words():
    evaluation = invented()
    helps, harms, refused = verdict(evaluation, compare(evaluation))
    assert helps.startswith("helps helps on average: error 12.5 %, −32.5 ± ")
    assert "Clearly better under fog:5, contrast:3; no clear difference under none (no shift)." in helps
    assert harms.startswith("harms loses on average: error 70.0 %, +25.0 ± ")
    assert "clearly worse under contrast:3" in harms.replace("Clearly", "clearly")
    assert "4 steps under contrast:3 thrown away" in refused
    assert "(batch 0-2, 7)" in refused


def test_the_verdict_without_a_frozen_source_says_so():
    evaluation = invented()
    rows = tuple(row for row in evaluation.rows if row.method == "helps")
    alone = replace(evaluation, frozen=None, rows=rows, plan=replace(evaluation.plan, methods=("helps",)))
    lines = verdict(alone, compare(alone))
    assert "was not evaluated" in lines[0]
    assert lines[1:] == ["No step was refused."]
    page = page_of(alone)
    assert "above the frozen source" not in page.text


def test_best_and_worse_are_marked_with_signs_and_words_not_by_colour_alone():
    rows = {row[0][0]: [cell for cell, _ in row[1:]] for row in page_of(invented()).table("Error in %")}
    source, helps, harms = rows["contrast:3"]
    assert "★" in helps
    assert "lowest" in helps
    assert "▲" in harms
    assert "worse than the source" in harms
    assert not set("★▲") & set(source)
    assert [("▲" in cell, "★" in cell) for cell in rows["fog:5"]] == [
        (False, False),
        (False, True),
        (False, False),
    ], "harms is better than the source under fog"
    assert ["★" in cell for cell in rows["none"]] == [True, True, False], "a tie has two best"


def test_plots_are_named_and_described_and_follow_the_page_into_the_dark():
    text = render(invented(), Facts("c", MADE, {}))
    page = Page(text)
    plots = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(plots) == 2
    for plot in plots:
        assert plot["role"] == "img"
        title, desc = plot["aria-labelledby"].split()
        assert {("title", title), ("desc", desc)} <= {
            (tag, attributes.get("id")) for tag, attributes in page.elements
        }
    assert "prefers-color-scheme: dark" in text
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    strays = set(re.findall(r"(?:stroke|fill): (#[0-9a-f]{6})", drawn))
    assert strays == set(), "every colour of a plot is one of the page's"
    assert drawn.count("var(--series-0") > 2
    for words in ("contrast:3", "harms", "error over the last 20 samples"):
        assert words in page.text


@pytest.mark.parametrize("setting", ["online", "continual"])
def test_the_setting_is_said_and_shown(setting):
    page = page_of(invented(setting=setting))
    assert ("3. contrast:3" in page.text) == (setting == "continual")
    assert ("carry on from one shift to the next" in page.text) == (setting == "continual")
    assert ("start from the source model under each shift" in page.text) == (setting == "online")


def test_hostile_names_are_text():
    evaluation = invented(model=HOSTILE, stream=f"npz:{HOSTILE}.npz")
    command = command_line(evaluation.plan, bundle=HOSTILE, threads=None, report=Path("r.html"))
    text = render(evaluation, Facts(command, MADE, {HOSTILE: HOSTILE}, HOSTILE))
    assert_self_contained(text)
    page = Page(text)
    assert "<script" not in text
    assert f"Evaluation of {HOSTILE}" in page.text
    assert f"npz:{HOSTILE}.npz" in page.text
    assert command in page.text


def test_hostile_names_in_a_plot_are_text():
    """Names of methods and shifts are checked where they come from; the plot does not count on it."""
    plot = error_bars([HOSTILE], {HOSTILE: [0.5]}, samples=4, frozen=None, title=HOSTILE, description=HOSTILE)
    page = Page(plot)
    assert {tag for tag, _ in page.elements} <= {"svg", "title", "desc", "g", "path", "use", "defs", "text"} | {
        "clippath", "rect", "pattern",
    }  # fmt: skip
    assert page.text.count(HOSTILE.replace("_", " ")) >= 3


def test_the_rows_of_bars_share_a_scale_that_holds_the_tallest():
    errors = [0.1] * 39 + [0.9]
    labels = [f"s{k}" for k in range(40)]
    plot = error_bars(labels, {"m": errors}, samples=100, frozen=None, title="t", description="d")
    ticks = re.findall(r">(\d+)</text>", plot)
    assert ticks.count("80") == 2, "both rows go up to the tallest bar, which stands in the second"


def test_the_same_evaluation_gives_the_same_page():
    facts = Facts("c", MADE, {})
    assert render(invented(), facts) == render(invented(), facts)


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_tiny_streams(samples):
    page = page_of(invented(samples=samples))
    assert f"{samples} for each shift" in page.text


def test_many_shifts_and_methods():
    shifts = tuple(Shift(f"s{k}", 1) for k in range(15))
    methods = tuple(f"m{k}" for k in range(9))
    wrong = patterns(np.linspace(0, 1, 135), 50)
    rows = [
        Row(s.name, 1, m, wrong[9 * i + j], 0, ())
        for i, s in enumerate(shifts)
        for j, m in enumerate(methods)
    ]
    base = invented()
    plan = replace(base.plan, shifts=shifts, methods=methods, hyper=None)
    page = page_of(replace(base, rows=tuple(rows), plan=plan, frozen="m3", hyper={}))
    assert len(page.table("Error in %")) == 1 + 15 + 1
    assert page.text.count("s14:1") >= 3


# --------------------------------------------------------------------------------------------- the command line


def test_the_command_line_names_everything():
    evaluation = invented(stream="npz:my file.npz")
    plan = replace(evaluation.plan, shuffle=True, limit=7, seed=3)
    line = command_line(plan, bundle="a b", threads=2, report=Path("r.html"), json=Path("e.json"))
    assert shlex.split(line) == [
        "tta-edge", "evaluate", "a b", "--stream", "npz:my file.npz", "--shifts", "none,fog:5,contrast:3",
        "--methods", "source,helps,harms", "--batch", "10", "--setting", "online", "--seed", "3", "--shuffle",
        "--limit", "7", "--set", "helps.lr=0.5", "--threads", "2", "--report", "r.html", "--json", "e.json",
    ]  # fmt: skip
    plain = command_line(evaluation.plan, bundle=None, threads=None, report=Path("r.html"))
    assert not {"--shuffle", "--limit", "--threads", "--json"} & set(shlex.split(plain))


def test_the_host_is_described_without_naming_the_machine():
    import platform

    facts = host_facts()
    assert facts["Python"] == platform.python_version()
    assert re.fullmatch(r"onnxruntime(-gpu)? \d+\..*", facts["ONNX Runtime"])
    assert int(facts["CPUs"]) >= 1
    assert platform.node() not in facts.values()


def test_none_among_the_shifts_is_the_stream_as_it_is(tmp_path):
    digits = open_source("digits")
    assert parse_shifts(digits, None) == (None,)
    assert parse_shifts(digits, "none") == (None,)
    assert parse_shifts(digits, "fog, none,fog:5,contrast:3") == (FOG, None, DARK)
    assert len(parse_shifts(digits, "none,all:2")) == 16
    with pytest.raises(UnknownShift, match="did you mean `fog`"):
        parse_shifts(digits, "none,fogg")
    given = replace(digits, given={FOG: digits.read})
    assert parse_shifts(given, "fog:5") == (FOG,)
    with pytest.raises(ShiftNotGiven, match="no unshifted images"):
        parse_shifts(given, "none,fog:5")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A continual run of the command with both files: (report, JSON, what it printed)."""
    folder = tmp_path_factory.mktemp("written")
    done = run_cli(
        "evaluate", builtin_bundle(), "--shifts", "none,fog:5,contrast:5", "--limit", 130, "--batch", 50,
        "--setting", "continual", "--methods", "source,norm,tent", "--set", "tent.lr=0.01", "--threads", 1,
        "--report", folder / "r.html", "--json", folder / "e.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in folder.iterdir()) == ["e.json", "r.html"]
    return (folder / "r.html").read_text(encoding="utf-8"), json.loads((folder / "e.json").read_text()), done


def test_the_written_report_needs_nothing_else(written):
    text, _, _ = written
    assert_self_contained(text)
    assert_ids_hold_together(Page(text))
    assert text.startswith("<!DOCTYPE html>")
    assert "default-src 'none'" in text


def test_the_numbers_are_those_of_the_json(written):
    text, form, _ = written
    page = Page(text)
    errors = {(row["shift"], row["method"]): row["error"] for row in form["rows"]}
    head, *body, mean = page.table("Error in %")
    methods = [name for name, _ in head[1:]]
    assert methods == ["source", "norm", "tent"]
    shown = {}
    for (label, _), *cells in body:
        for method, (cell, values) in zip(methods, cells, strict=True):
            shown[label.partition(":")[0], method] = values[0]
            assert f"{100 * values[0]:.1f}" in cell
    assert shown == errors
    means = {m: (errors["fog", m] + errors["contrast", m]) / 2 for m in methods}
    assert [values[0] for _, values in mean[1:]] == [pytest.approx(means[method]) for method in methods]
    summary = page.table("The methods over the whole")
    assert [name.replace("\xa0", " ") for name, _ in summary[0]] == [
        "method", "clean error, %", "mean error, %", "against source, points", "gap recovered",
        "batches adapted", "refused",
    ]  # fmt: skip
    for (name, _), clean, error, difference, gap, adapted, refused in summary[1:]:
        method = name.split()[0]
        rows = [row for row in form["rows"] if row["method"] == method]
        assert clean[1] == [errors["none", method]]
        assert error[1] == [pytest.approx(means[method])]
        assert adapted[0] == f"{sum(row['adapted'] for row in rows)} of 9"
        assert refused[0] == str(sum(row["refused"] for row in rows))
        if method == "source":
            assert difference == gap == ("–", [])
            continue
        assert difference[1] == [pytest.approx(means[method] - means["source"])]
        gaps = [
            gap_recovered(
                1 - errors["none", "source"], 1 - errors[shift, "source"], 1 - errors[shift, method]
            )
            for shift in ("fog", "contrast")
        ]
        assert gap[1] == [pytest.approx(np.mean(gaps))]


def test_the_head_says_how_it_was_made(written):
    text, form, _ = written
    page = Page(text)
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text.split("</header>")[0]))
    assert facts["Bundle"] == form["bundle"]
    assert facts["Model"] == form["model"]
    assert (facts["Batch"], facts["Setting"], facts["Seed"]) == ("50", "continual", "0")
    assert facts["Samples"] == "130 for each shift (of 899)"
    assert facts["Date"].endswith("UTC")
    used = {(row[0][0], row[1][0]): row[2][0] for row in page.table("Hyper-parameters used")[1:]}
    assert used == {
        (method, name): f"{value:g}"
        for method, values in form["hyper"].items()
        for name, value in values.items()
    }
    assert used["tent", "lr"] == "0.01"


def test_the_command_in_the_report_gives_the_same_json(written, tmp_path):
    text, form, _ = written
    line = re.search(r"<pre><code>(.*?)</code></pre>", text, re.S)[1]
    words = shlex.split(line)
    for option, name in (("--report", "again.html"), ("--json", "again.json")):
        words[words.index(option) + 1] = str(tmp_path / name)
    assert words[0] == "tta-edge"
    done = run_cli(*words[1:])
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "again.json").read_text()) == form


def test_the_terminal_shows_the_mean_of_the_shifts_alone(written):
    _, form, done = written
    errors = [row["error"] for row in form["rows"] if row["method"] == "tent" and row["shift"] != "none"]
    (line,) = [line for line in done.stdout.splitlines() if "mean of the shifts" in line]
    assert f"{np.mean(errors):.1%}" in line


def test_refused_steps_are_listed(tmp_path):
    """A learning rate beyond all bounds: every batch is answered, no step is kept, and the report says which."""
    evaluation = evaluate(
        builtin_bundle(),
        Plan(open_source("digits"), (FOG,), ("source", "tent"), limit=192, hyper={"tent": {"lr": 3e38}}),
    )
    (row,) = evaluation.rows_of("tent")
    assert row.refused == len(row.refused_batches) > 0
    assert all(0 <= batch < 3 for batch in row.refused_batches)
    assert evaluation.to_json()["rows"][1]["refused_batches"] == list(row.refused_batches)
    assert f"tent: {row.refused} step" in page_of(evaluation).text


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("place", "words"), [("nowhere/r.html", "has no directory"), (".", "is a directory")]
)
def test_an_unwritable_place_is_refused_before_anything_is_opened(place, words, tmp_path):
    with unchanged(tmp_path):
        done = run_cli("evaluate", "no-such-bundle", "--report", tmp_path / place)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_directory_of_somebody_else_is_refused(tmp_path, monkeypatch):
    """As root every directory is writable, so the system's answer is given for it."""
    from tta_edge import output

    monkeypatch.setattr(output.os, "access", lambda *_: False)
    with pytest.raises(output.OutputUnwritable, match="is not writable"):
        output.check_output(tmp_path / "r.html")


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError("blocked")
sys.meta_path.insert(0, Block())
from tta_edge.cli import main
main(sys.argv[1:])
"""


def without_matplotlib(*arguments):
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, *map(str, arguments)],
        capture_output=True, text=True, timeout=PATIENCE_S, env=process_environment(), check=False,
    )  # fmt: skip


def test_without_matplotlib_a_report_is_refused_at_once_by_the_name_of_the_extra(tmp_path):
    with unchanged(tmp_path):
        done = without_matplotlib("evaluate", "no-such-bundle", "--report", tmp_path / "r.html")
    assert done.returncode == 2
    assert "plots-extra-missing" in done.stderr
    assert "tta-runtime[plots]" in done.stderr
    assert done.stdout == ""


def test_without_matplotlib_everything_else_works(tmp_path):
    done = without_matplotlib("evaluate", "--limit", 20, "--methods", "source", "--json", tmp_path / "e.json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "e.json").exists()
