"""examples/stream_text: texts from catalogues, what is measured and how; training itself takes most of an hour."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from running import REPOSITORY

EXAMPLE = REPOSITORY / "examples" / "stream_text"
MODULES = ("run", "corpus", "curve", "tasks", "pretraining", "train")
LOREM = (
    "The quick brown fox jumps over the lazy dog; then it sleeps. " * 12
    + "Every file that was opened is closed again, whatever happened meanwhile. " * 12
)


@pytest.fixture(scope="module")
def modules():
    """The example's scripts as modules; like scripts, they import their neighbours."""
    before, sys.path = sys.path, [str(EXAMPLE), *sys.path]
    import corpus
    import pretraining
    import run
    import tasks
    import train

    yield {"run": run, "corpus": corpus, "tasks": tasks, "pretraining": pretraining, "train": train}
    sys.path = before
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Where the example's bundles are made, once."""
    return tmp_path_factory.mktemp("stream_text") / "bundles"


def catalogue(messages, order="<", charset="UTF-8"):
    """The bytes of a .mo file."""
    pairs = [(b"", f"Content-Type: text/plain; charset={charset}\n".encode())]
    pairs += [(said.encode(), translated.encode(charset)) for said, translated in messages]
    start = 28 + 16 * len(pairs)
    tables: list[list[bytes]] = [[], []]
    text = b""
    for pair in pairs:
        for table, value in zip(tables, pair, strict=True):
            table.append(struct.pack(f"{order}2I", len(value), start + len(text)))
            text += value + b"\0"
    head = struct.pack(f"{order}7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    return head + b"".join(tables[0]) + b"".join(tables[1]) + text


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("charset", ["UTF-8", "ISO-8859-1"])
def test_a_catalogue_is_read_whatever_its_byte_order_and_charset(modules, order, charset):
    data = catalogue(
        [
            ("no such file", "não há tal\n  ficheiro"),
            ("one file\0many files", "um ficheiro só\0muitos ficheiros"),
            ("untranslated text", "untranslated text"),
            ("menu\x04open", "abrir"),  # shorter than what is taken
        ],
        order,
        charset,
    )
    assert list(modules["corpus"].messages(data)) == [
        "não há tal ficheiro",
        "um ficheiro só",
        "muitos ficheiros",
    ]


def test_a_catalogue_of_another_charset_than_it_says_is_refused(modules):
    good = catalogue([("no such file", "não há ficheiro")], charset="ISO-8859-1")
    with pytest.raises(ValueError, match="decode"):
        list(modules["corpus"].messages(good.replace(b"ISO-8859-1", b"UTF-8\n    ")))
    with pytest.raises(ValueError, match="unknown"):
        list(modules["corpus"].messages(good.replace(b"ISO-8859-1", b"NO-SUCH-01")))


@given(st.data())
def test_a_damaged_catalogue_is_refused_or_read(modules, data):
    good = bytearray(catalogue([("no such file", "kein solches Programm"), ("again", "noch einmal bitte")]))
    for _ in range(data.draw(st.integers(0, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(good[: data.draw(st.integers(0, len(good)))])
    try:
        lines = list(modules["corpus"].messages(cut))
    except ValueError:
        return
    assert all(8 <= len(line.encode()) <= 160 and "\n" not in line for line in lines)


def test_documents_leave_out_lists_short_texts_and_languages_that_are_not_asked_for(modules, tmp_path):
    many = [(f"message {index}", f"eine Meldung mit der Nummer {index}") for index in range(200)]
    few = many[:5]
    for language, program, content in (
        ("de", "tool", many),
        ("de", "short", few),
        ("de", "iso_639", many),
        ("en_GB", "tool", many),
        ("ja", "tool", many),
        ("hu", "tool", many),
    ):
        file = tmp_path / language / "LC_MESSAGES" / f"{program}.mo"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(catalogue(content))
    (tmp_path / "de" / "LC_MESSAGES" / "damaged.mo").write_bytes(b"no catalogue at all, not one")
    found = list(modules["corpus"].documents(tmp_path))
    assert [(language, program) for language, program, _ in found] == [("de", "tool"), ("hu", "tool")]
    lines = found[0][2].decode().splitlines()
    assert sorted(lines) == sorted(translated for _, translated in many)
    assert lines != sorted(lines)
    sets = modules["run"].machine_texts(tmp_path)
    assert list(sets) == ["unknown languages"]  # no program is held out among these
    with pytest.raises(SystemExit, match="--text"):
        modules["run"].machine_texts(tmp_path / "nothing")


@given(st.integers(1, 40), st.lists(st.integers(0, 9000), min_size=1, max_size=6))
def test_pieces_lie_in_their_text_and_have_as_much_before_them_as_there_is(modules, count, sizes):
    run = modules["run"]
    texts = {f"t{index}": np.random.default_rng(index).bytes(size) for index, size in enumerate(sizes)}
    if all(size < 256 + run.PIECE for size in sizes):
        with pytest.raises(SystemExit, match="too short"):
            run.cut(texts, count, 4096)
        return
    pieces = run.cut(texts, count, 4096)
    assert len(pieces) == count
    for piece in pieces:
        text = texts[piece.document]
        assert len(piece.text) == run.PIECE
        assert piece.before + piece.text in text
        assert len(piece.before) == min(4096, len(text) - run.PIECE)


def test_the_interval_is_of_documents_not_of_pieces(modules):
    """Eight pieces that agree within a document tell no more than one."""
    generator = np.random.default_rng(0)
    of_document = generator.random((12, 1)) + np.array([[3.0, 2.8, 2.8, 2.5, 2.6, 2.0]])
    once = modules["run"].intervals(of_document, [f"d{index}" for index in range(12)])
    often = modules["run"].intervals(
        np.repeat(of_document, 8, axis=0), [f"d{index}" for index in range(12) for _ in range(8)]
    )
    assert np.array(list(once.values())) == pytest.approx(np.array(list(often.values())))
    low, high = once["gap_closed"]
    assert low == pytest.approx(0.5)
    assert high == pytest.approx(0.5)
    assert np.diff(once["stream_bpb"]) > 0.1


def test_the_command_measures_a_text_of_the_users(bundles, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(LOREM)
    command = [
        sys.executable,
        str(EXAMPLE / "run.py"),
        "--text",
        str(text),
        "--pieces",
        "3",
        "--out",
        str(bundles),
    ]
    subprocess.run(
        [*command, "--json", "rows.json", "--figure", "rows.svg"], cwd=tmp_path, check=True, timeout=300
    )
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["context_bytes"] for row in rows] == [256, 1024]  # the text has no 4,096 bytes
    for row in rows:
        assert {"no_context_bpb", "window_bpb", "stream_bpb", "delta_rule_bpb", "full_context_bpb"} < set(row)
        closed = (row["no_context_bpb"] - row["stream_bpb"]) / (
            row["no_context_bpb"] - row["full_context_bpb"]
        )
        assert row["gap_closed"] in (None, pytest.approx(closed))
        low, high = row["intervals"]["no_context_bpb - full_context_bpb"]
        assert (row["gap_closed"] is None) == (low <= 0)
        assert low <= row["no_context_bpb"] - row["full_context_bpb"] <= high
        assert row["ms_per_token"] > 0
        assert row["pieces"] == 3
    assert (
        rows[0]["no_context_bpb"] == rows[1]["no_context_bpb"]
    )  # the same pieces, whatever stands before them
    assert rows[0]["stream_bpb"] != rows[1]["stream_bpb"]
    assert (tmp_path / "rows.svg").read_text().count("<path") > 10


def test_absorbing_helps_on_texts_that_the_mappers_did_not_see(modules, bundles):
    run = modules["run"]
    if not any(run.LOCALE.glob("*/LC_MESSAGES/bash.mo")):
        pytest.skip("this machine has no message catalogues")
    from tta_runtime import TextModel

    models = {m: TextModel.open(run.build(EXAMPLE, m, bundles)) for m in ("attention", "delta")}
    pieces = run.cut(run.machine_texts(run.LOCALE)["unseen programs"], 24, 1024)
    row = run.measure("unseen programs", models, pieces, 1024)
    assert row.full_context_bpb < row.stream_bpb < row.no_context_bpb
    assert row.delta_rule_bpb < row.no_context_bpb
    assert row.stream_bpb < row.window_bpb


def test_the_command_that_makes_the_weights_in_small(modules, tmp_path, monkeypatch):
    """Everything but its size; what is there is not made again."""
    from tta_adapters.decoder import DecoderConfig
    from tta_exporters.language_sources import load_language
    from tta_exporters.train_stream import read_mapper

    train, phase = modules["train"], modules["pretraining"].Phase
    out = tmp_path / "out"
    for name in ("de/tool", "de/bash", "fr/tool"):
        file = out / "corpus" / "learned" / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{name}: {LOREM}")
    small = DecoderConfig(257, 1, 16, 2, 2, 8, 24, 256)
    for name, value in {
        "CONFIG": small,
        "PHASES": (phase(2, 32, 2),),
        "LENGTHEN": (phase(1, 64, 1),),
        "STEPS": 2,
        "CHUNK": 16,
        "CHUNKS": 2,
        "TEXTS": 4,
        "SETTINGS": {"attention": ("rank=2", "width=8"), "delta": ("rank=2",)},
    }.items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", "-o", str(out)])
    train.main()
    decoder = load_language(str(out / "decoder.safetensors")).decoder
    for kind in ("attention", "delta"):
        mapper, facts = read_mapper(out / f"{kind}.safetensors", decoder)
        assert (mapper.name, mapper.rank, facts["steps"]) == (kind, 2, 2)
    before = {file: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    train.main()
    assert {file: file.stat().st_mtime_ns for file in out.glob("*.safetensors")} == before


def test_pretraining_repeats_itself_and_learns(modules):
    tasks, pretraining = modules["tasks"], modules["pretraining"]
    from tta_adapters.decoder import DecoderConfig

    def run() -> tuple[list[float], dict[str, torch.Tensor]]:
        decoder = pretraining.fresh(DecoderConfig(tasks.BEGIN + 1, 1, 32, 2, 2, 16, 48, 64), 0)
        losses: list[float] = []

        def draw(phase, step):
            asked, answers, _ = tasks.recall(
                phase.texts, phase.length // 2, torch.Generator().manual_seed(step)
            )
            return tasks.tokens_of(asked, answers)

        pretraining.pretrain(
            decoder,
            draw,
            tasks.BEGIN,
            [pretraining.Phase(8, 16, 40), pretraining.Phase(4, 32, 40)],
            progress=lambda step, steps, loss: losses.append(loss),
        )
        return losses, decoder.state_dict()

    (losses, weights), (again, same) = run(), run()
    assert losses == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert losses[-1] < losses[0] - 0.5


def test_a_table_answers_its_questions_and_a_line_lies_near_its_noise(modules):
    tasks = modules["tasks"]
    generator = torch.Generator().manual_seed(0)
    asked, answers, right = tasks.recall(50, 64, generator)
    assert torch.equal(answers, right)
    for text in range(50):
        pairs = set(zip(asked[text].tolist(), answers[text].tolist(), strict=True))
        assert len(pairs) == len({question for question, _ in pairs})
    tokens = tasks.tokens_of(asked, answers)
    assert torch.equal((tokens[:, 1::2] - tasks.POINTS) // tasks.ANSWERS, asked)
    assert tokens.max() < tasks.BEGIN

    asked, shown, right = tasks.regression(4000, 65, generator)
    apart = (shown - right).double() * 2 / (tasks.ANSWERS - 1)
    assert apart.std() == pytest.approx(tasks.NOISE, rel=0.15)
    few, many = (tasks.share_of_least_squares(asked[:, -n:], shown[:, -n:], right[:, -1], 1) for n in (5, 65))
    assert few < many
    assert many > 0.99


def test_what_two_answers_differ_by_does_not_depend_on_the_question(modules):
    tasks = modules["tasks"]
    from tta_adapters.decoder import DecoderConfig

    config = DecoderConfig(tasks.BEGIN + 1, 1, 32, 2, 2, 16, 48, 64)
    weight = tasks.composed(modules["pretraining"].fresh(config, 0)).embedding.weight
    both = weight[tasks.POINTS : tasks.BEGIN].reshape(tasks.POINTS, tasks.ANSWERS, -1)
    assert torch.allclose(both - both[:, :1], (both[:1] - both[:1, :1]).expand_as(both), atol=1e-5)
    questions = weight[: tasks.POINTS]
    assert torch.allclose(both[:, 3] - both[:1, 3], questions - questions[:1], atol=1e-5)
    assert both.flatten(0, 1).unique(dim=0).shape[0] == tasks.POINTS * tasks.ANSWERS


def test_the_command_of_the_tasks_in_small(modules, tmp_path, monkeypatch):
    tasks, table = modules["tasks"], tmp_path / "tasks.json"
    sizes = ["--steps", "6", "--mapper-steps", "2", "--texts", "40"]
    monkeypatch.setattr(sys, "argv", ["tasks.py", "--tasks", "regression", *sizes, "--json", str(table)])
    tasks.main()
    result = json.loads(table.read_text())
    rows = result["rows"]
    assert [row["demonstrations"] for row in rows] == list(tasks.SHOWN)
    assert result["trained"] in tasks.SHOWN
    for row in rows:
        assert row["task"] == "regression"
        shares = [row[name] for name in ("no_context", "in_context", "attention", "delta", "least_squares")]
        assert all(0 <= share <= 1 for share in shares)
    nothing = rows[0]
    assert nothing["attention"] == nothing["delta"] == nothing["in_context"] == nothing["no_context"]
    assert rows[-1]["least_squares"] > 0.9  # what is there to be learned can be learned
