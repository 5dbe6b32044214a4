"""examples/adapters: what the comparison computes, draws and refuses; the comparison itself takes most of an hour."""

from __future__ import annotations

import json
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from running import REPOSITORY

EXAMPLE = REPOSITORY / "examples" / "adapters"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def run(monkeypatch):
    """The example's script as a module; like scripts, it and examples/safety import their neighbours."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLE), *sys.path])
    import run

    yield run
    for name in ("run", "curve", "data", "safety"):
        sys.modules.pop(name, None)


def test_variants_share_a_bundle_only_where_it_is_the_same(run):
    variants = [*run.ONLINE, *run.CONTINUAL]
    built = {
        (
            variant.adapter,
            variant.adapter_set,
            variant.include,
            variant.warm,
            variant.method,
            variant.structure,
        )
        for variant in variants
    }
    names = {variant.bundle for variant in variants}
    assert len(names) == len(built) == len(variants) - 2
    assert all(character not in name for name in names for character in "=/ ")


def test_the_error_of_a_difference_counts_an_image_once(run):
    source = np.zeros((2, 100), bool)
    wrong = np.zeros((2, 100), bool)
    wrong[:, :10] = True
    assert run.difference(source, source) == "+0.00 ± 0.00"
    assert run.difference(wrong, source) == "+10.00 ± 3.02"  # as of 100 images, not of 200 predictions


def test_the_first_of_equal_settings_is_chosen_and_what_is_there_is_not_made_again(run, tmp_path):
    shop = run.Workshop(run.Place(tmp_path / "data", tmp_path), run.Sizes(2, 2, 2))
    variant = run.ONLINE[0]
    folder = tmp_path / "results" / variant.bundle
    folder.mkdir(parents=True)
    for lr, wrong in (("0.0001", [[1, 1]]), ("0.001", [[0, 1]]), ("0.01", [[1, 0]])):
        (folder / f"online-speckle_noise-tent-lr{lr}.json").write_text(json.dumps({"wrong": wrong}))
    assert shop.chosen(variant, "online") == {"lr": 1e-3}


def test_results_of_other_sizes_are_refused(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "sizes.json").write_text('{"online": 1, "continual": 2, "warm_up": 3}')
    monkeypatch.setattr(sys, "argv", ["run.py", "--data", str(tmp_path), "-o", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 2
    assert "holds results of other sizes" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["sizes.json"]


def test_a_table_is_markdown_with_its_figures_to_the_right(run):
    rows = [{"": "a", "mean": "1.0"}, {"": "b", "mean": "2.0"}]
    assert run.markdown(rows) == "|  | mean |\n| --- | ---: |\n| a | 1.0 |\n| b | 2.0 |\n"
    assert run.transposed(rows) == [{"": "mean", "a": "1.0", "b": "2.0"}]


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [-0.4, 0.2, 1.1], [-30.0, 5.0, 8.0]])
def test_curves_are_svg_inside_their_frame(run, values):
    text = run.curve.drawn({"low & high": values, "both": [0.5, 0.5, 0.5]}, ["a", "b_c", "d"], "x < y")
    root = ElementTree.fromstring(text)
    lines = root.findall(f"{SVG}polyline")
    assert len(lines) == 2
    for line in lines:
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert run.curve.LEFT <= x <= run.curve.WIDTH - run.curve.RIGHT
            assert run.curve.TOP - 0.1 <= y <= run.curve.HEIGHT - run.curve.BOTTOM + 0.1
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert {"low & high", "both", "b c", "x < y"} <= set(words)
