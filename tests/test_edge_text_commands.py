"""`tta-edge text` and `tta-edge stream text:FILE` as processes, and the client where parts of a text are lost."""

from __future__ import annotations

import json
import math
import queue
import threading
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest

import tiny_text
from bad_text_bundles import WORDS, tokenizer
from peers import HANG_UP, Fake, error, info
from running import run_cli, running
from tiny_text import CHUNK, CONTEXT
from tta_edge import wire
from tta_edge.cli import main
from tta_edge.client import Client, Retry, TextScore
from tta_edge.errors import Busy, ConnectionLost, DeadlineExceeded
from tta_edge.text_stream import Row, pieces, rates
from tta_runtime.errors import BadValue, InvalidUtf8

TEXT = "Grüße: the quick brown fox jumps over the lazy dog, again and again."


@pytest.fixture(scope="module")
def server(text_bundle, tmp_path_factory):
    with running(text_bundle, state_dir=str(tmp_path_factory.mktemp("text") / "state")) as server:
        yield server


@pytest.fixture
def client(server):
    with Client(server.endpoint, timeout_s=30.0) as client:
        yield client


@pytest.fixture
def cli(capsys):
    """A command in this process: its output and its exit status."""

    def run(server, *arguments):
        capsys.readouterr()
        try:
            main([*map(str, arguments), "--to", server.endpoint])
        except SystemExit as end:
            status = end.code or 0
        return Ran(status, *capsys.readouterr())

    return run


class Ran(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def form(result):
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


# --- commands -----------------------------------------------------------------------------------------


def test_a_session_from_its_first_text_to_its_export_and_back(cli, server, client, tmp_path):
    file, out = tmp_path / "text.txt", tmp_path / "one.session"
    file.write_text(TEXT)
    done = form(cli(server, "text", "absorb", file, "--session", "one", "--json"))
    assert (done["absorbed"], done["durable"]) == (len(TEXT.encode()), True)
    said = cli(server, "text", "absorb", "--text", "more", "--session", "one").stdout
    assert f"session one has absorbed {len(TEXT.encode()) + 4} tokens, 4 of them now" in said
    listed = form(cli(server, "text", "sessions", "--json"))
    assert [each["id"] for each in listed["sessions"]] == ["one"]
    assert "one" in cli(server, "text", "sessions").stdout
    assert "1 sessions in memory" in cli(server, "status").stdout
    assert form(cli(server, "text", "export", "one", out, "--json"))["bytes"] == out.stat().st_size
    assert form(cli(server, "text", "import", out, "two", "--json"))["absorbed"] == done["absorbed"] + 4
    again = cli(server, "text", "import", out, "two")
    assert (again.returncode, again.stderr.startswith("error (session-exists)")) == (2, True)
    scores = [
        form(cli(server, "text", "score", file, "--session", name, "--json")) for name in ("one", "two")
    ]
    assert scores[0]["bits"] == scores[1]["bits"] == client.score(TEXT, "one").bits
    for name in ("one", "two"):
        assert cli(server, "reset", "--stream", name).returncode == 0
    gone = cli(server, "text", "score", file, "--session", "one")
    assert (gone.returncode, gone.stderr.startswith("error (unknown-session)")) == (2, True)


def test_generate_shows_the_text_and_what_it_was(cli, server, client):
    arguments = ("text", "generate", "--text", TEXT[:20], "--max-tokens", "20", "--seed", "3")
    stream = client.generate(TEXT[:20], max_tokens=20, seed=3)
    expected = "".join(stream)
    assert run_cli(*arguments, "--to", server.endpoint).stdout == expected + "\n"
    shown = form(cli(server, *arguments, "--json"))
    assert (shown["text"], shown["reason"], shown["tokens"]) == (expected, "max-tokens", 20)


def test_score_with_a_context(cli, server, client, tmp_path):
    (tmp_path / "before.txt").write_text(TEXT)
    result = cli(server, "text", "score", "--text", "again", "--context", tmp_path / "before.txt")
    found = client.score("again", context=TEXT)
    assert f"{found.bits_per_byte:.4f} bits per byte" in result.stdout
    assert f"after {len(TEXT.encode()) + 1} tokens" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "status"),
    [
        (("score",), "bad-value", 2),
        (("score", "no-such-file"), "bad-value", 2),
        (("score", "tests/test_docs.py", "--text", "x"), "bad-value", 2),
        (("score", "--text", "x" * (CONTEXT + 1)), "context-too-long", 4),
        (("absorb", "--text", "x", "--session", "../x"), "bad-field", 2),
        (("generate", "--text", "x", "--top-p", "0"), "bad-field", 2),
        (("export", "nobody", "/tmp/nobody.session"), "unknown-session", 2),
        (("export", "nobody", "/no/such/directory"), "output-unwritable", 2),
        (("import", "tests/test_docs.py", "new"), "state-malformed", 4),
    ],
)
def test_what_is_wrong_has_a_code_and_an_exit_status(cli, server, arguments, code, status):
    result = cli(server, "text", *arguments)
    assert result.stderr.startswith(f"error ({code})"), result.stderr
    assert result.returncode == status


def test_a_file_that_is_no_text(cli, server, tmp_path):
    (tmp_path / "bad").write_bytes(b"abc\xff")
    for arguments in (("text", "absorb", tmp_path / "bad"), ("stream", f"text:{tmp_path / 'bad'}")):
        result = cli(server, *arguments)
        assert result.stderr.startswith("error (invalid-utf-8)"), result.stderr
        assert "byte 3 is 0xff" in result.stderr
        assert result.returncode == 4


def test_the_doctor_tries_a_language_model(tmp_path, capsys):
    tiny_text.build(tmp_path / "bundle")
    with pytest.raises(SystemExit) as end:
        main(["doctor", str(tmp_path / "bundle"), "--json", "--bind", "tcp://127.0.0.1:0", "--http", "off"])
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert not end.value.code
    for kind in ("score", "generate", "absorb"):
        assert "a second, all finite" in found[f"{kind} default"]["text"]
    assert "1024 sessions in memory" in found["sessions default"]["text"]
    assert "memory" not in found


# --- a streamed text ----------------------------------------------------------------------------------


def test_stream_measures_what_the_client_does(cli, server, client, tmp_path):
    text = (TEXT + " ") * 5
    (tmp_path / "text.txt").write_text(text)
    out = tmp_path / "out.json"
    source = f"text:{tmp_path / 'text.txt'}"
    result = cli(server, "stream", source, "--piece-bytes", "24", "--limit", "6", "--json", out)
    assert result.returncode == 0, result.stderr
    found = json.loads(out.read_text())
    parts = pieces(text.encode(), 24, 6)
    assert [row["bytes"] for row in found["rows"]] == [len(part.encode()) for part in parts]
    assert (found["context_tokens"], found["interrupted"], found["method"]) == (CONTEXT, False, "stream")
    before = ""
    for row, part in zip(found["rows"], parts, strict=True):
        assert row["context_bytes"] == len(before.encode())
        assert row["no_context_bits"] == client.score(part).bits
        if before:
            assert row["stream_bits"] == client.score(part, "mine").bits
            assert row["full_context_tokens"] <= CONTEXT
        client.absorb(part, "mine")
        before += part
    last = found["rows"][-1]
    assert last["full_context_tokens"] > CONTEXT - 24 - 3  # as much as fits
    assert last["stream_tokens"] <= CHUNK
    mean = found["mean"]
    assert mean["no_context_bpb"] == pytest.approx(
        sum(row["no_context_bits"] for row in found["rows"]) / sum(row["bytes"] for row in found["rows"])
    )
    assert f"at most the {CONTEXT} tokens" in result.stdout
    assert f"no context {mean['no_context_bpb']:.4f}" in result.stdout


def test_a_last_piece_too_short_to_be_scored_goes_with_the_one_before(cli, tmp_path):
    tiny_text.build(tmp_path / "bytes", begin=None)
    tiny_text.build(tmp_path / "words", begin=None)
    tokenizer(json.dumps(WORDS).encode())(tmp_path / "words")
    cases = {"bytes": ("a" * 64 + "b", 32, [32, 33]), "words": ("hello world " * 2 + "hello", 12, [12, 17])}
    file, out = tmp_path / "text.txt", tmp_path / "out.json"
    for name, (text, size, expected) in cases.items():
        file.write_text(text)
        with running(tmp_path / name) as server:
            result = cli(server, "stream", f"text:{file}", "--piece-bytes", size, "--json", out)
            assert result.returncode == 0, result.stderr
            found = json.loads(out.read_text())
            assert [row["bytes"] for row in found["rows"]] == expected
            assert not found["interrupted"]
            out.unlink()


def test_pieces_too_small_for_the_bundle_are_refused_before_anything_runs(cli, tmp_path):
    tiny_text.build(tmp_path / "bundle", begin=None)
    (tmp_path / "text.txt").write_text("éab")
    with running(tmp_path / "bundle") as server, Client(server.endpoint) as client:
        client.absorb("kept", "mine")
        arguments = ("stream", f"text:{tmp_path / 'text.txt'}", "--stream", "mine")
        result = cli(server, *arguments, "--piece-bytes", "1", "--json", tmp_path / "out.json")
        assert result.stderr.startswith("error (bad-value)"), result.stderr
        assert "a piece has 1 byte" in result.stderr
        assert "--piece-bytes" in result.stderr
        assert result.returncode == 2
        assert client.status().sessions[0].absorbed == 4
        assert cli(server, *arguments, "--piece-bytes", "2").returncode == 0
    assert not (tmp_path / "out.json").exists()


def test_a_stream_that_an_error_breaks_off_leaves_the_figures_so_far(cli, server, tmp_path):
    (tmp_path / "text.txt").write_text("x" * 200)
    out = tmp_path / "out.json"
    arguments = ("stream", f"text:{tmp_path / 'text.txt'}", "--json", out, "--piece-bytes")
    size = CONTEXT - 6  # what the first piece leaves pending makes the second one too long
    result = cli(server, *arguments, size)
    assert result.stderr.startswith("error (context-too-long)"), result.stderr
    assert result.returncode == 4
    found = json.loads(out.read_text())
    assert [row["bytes"] for row in found["rows"]] == [size]
    assert found["interrupted"]
    assert found["mean"]["no_context_bpb"] == found["rows"][0]["no_context_bpb"]
    assert "bits per byte over" in result.stdout
    out.write_text("figures of before")
    assert cli(server, *arguments, CONTEXT + 1).returncode == 4
    assert out.read_text() == "figures of before"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("text:README.md", "--shift", "fog:3"), "--shift is for images"),
        (("text:README.md", "--batch", "3"), "--batch is for images"),
        (("digits", "--piece-bytes", "3"), "--piece-bytes is for text"),
        (("text:no-such-file",), "cannot be read"),
        (("text:/dev/null",), "the file is empty"),
    ],
)
def test_a_stream_that_makes_no_sense_is_refused(cli, server, arguments, says):
    result = cli(server, "stream", *arguments)
    assert says in result.stderr
    assert result.returncode == 2


def test_pieces_are_the_text_and_cut_no_character():
    text = "aé世👩" * 9
    for size in (1, 2, 3, 7, 1000):
        parts = pieces(text.encode(), size)
        assert "".join(parts) == text
        assert all(len(part.encode()) < size + 4 for part in parts)
    with pytest.raises(InvalidUtf8):
        pieces(b"\xff", 3)
    with pytest.raises(BadValue):
        pieces(b"", 3)


def test_gap_closed_is_none_without_a_gap():
    row = Row(0, 8, 16.0, 8, 16.0, 8, 0, 16.0, 8, 0, 0.0)
    assert rates([row]).gap_closed is None
    assert rates([row, replace(row, stream_bits=12.0, full_context_bits=8.0)]).gap_closed == 0.5


# --- parts --------------------------------------------------------------------------------------------


def part(message, start, text):
    return wire.encode(wire.Generated(id=message.id, start=start, tokens=1, text=text))


def done(message, text):
    data = np.frombuffer(text.encode(), np.uint8)
    reply = wire.GenerateDone(
        id=message.id, reason="end", tokens=3, prompt_tokens=1, compute_ms=1.0, text=wire.declare(data)
    )
    return wire.encode(reply, {"text": data})


def writer(*replies):
    """A daemon that answers `generate` so."""

    def answer(message):
        if isinstance(message, wire.Info):
            return [info(message)]
        if isinstance(message, wire.Cancel):
            return [wire.encode(wire.CancelDone(id=message.id, found=True))]
        return [reply(message) for reply in replies]

    return Fake(answer)


def test_w13_a_part_that_was_lost_comes_with_the_end():
    fake = writer(lambda m: part(m, 0, "é"), lambda m: part(m, 3, "c"), lambda m: done(m, "ébcd"))
    with fake, Client(fake.endpoint) as client:
        stream = client.generate("x")
        assert list(stream) == ["é", "bcd"]
        assert stream.end.text == "ébcd"


def test_a_text_without_parts_comes_whole():
    with writer(lambda m: done(m, "abc")) as fake, Client(fake.endpoint) as client:
        assert list(client.generate("x")) == ["abc"]


def test_silence_after_a_part_ends_at_the_deadline_and_the_daemon_is_told_to_stop():
    with writer(lambda m: part(m, 0, "a")) as fake, Client(fake.endpoint, timeout_s=0.3) as client:
        stream = client.generate("x")
        assert next(stream) == "a"
        with pytest.raises(DeadlineExceeded):
            next(stream)
        fake.wait(3)
        assert isinstance(fake.requests[-1], wire.Cancel)
        assert fake.requests[-1].request == fake.requests[-2].id


def test_a_text_that_nobody_reads_any_more_is_cancelled():
    with writer(lambda m: part(m, 0, "a")) as fake, Client(fake.endpoint) as client:
        with client.generate("x") as stream:
            assert next(stream) == "a"
        fake.wait(3)
        assert fake.requests[-1] == wire.Cancel(id=3, request=2)
        assert stream.end is None
        assert list(stream) == []


@pytest.mark.parametrize("parts", [[], ["a"]], ids=["before a part", "after a part"])
def test_a_text_that_another_thread_closes_ends_and_is_cancelled(parts):
    replies = [lambda m, start=start, text=text: part(m, start, text) for start, text in enumerate(parts)]
    with writer(*replies) as fake, Client(fake.endpoint) as client:
        stream = client.generate("x")
        heard = queue.SimpleQueue()
        with reading(stream, heard):
            assert [heard.get(timeout=20) for _ in parts] == parts
            fake.wait(2)  # its thread waits for the next part now
            stream.close()
        assert heard.empty()
        fake.wait(1)
        assert fake.requests[-1] == wire.Cancel(id=3, request=2)
        assert stream.end is None
        assert list(stream) == []
        stream.close()


def test_a_text_that_waits_to_be_asked_for_again_is_closed_by_another_thread():
    fake = writer(lambda m: error(m, Busy.code, 3600.0))
    patient = Retry(attempts=3, wait_s=3600.0, max_wait_s=3600.0)
    with fake, Client(fake.endpoint, retry=patient) as client:
        stream = client.generate("x")
        with reading(stream, queue.SimpleQueue()):
            fake.wait(2)
            stream.close()
        assert list(stream) == []
        assert sum(isinstance(message, wire.Generate) for message in fake.requests) == 1


def test_a_text_that_was_closed_is_not_asked_for():
    with writer(lambda m: part(m, 0, "a")) as fake, Client(fake.endpoint) as client:
        stream = client.generate("x")
        stream.close()
        assert list(stream) == []
        assert fake.requests == []


@contextmanager
def reading(stream, heard):
    """A thread that reads a text; at the end it must have ended, and without an error."""
    failures = []

    def read():
        try:
            for each in stream:
                heard.put(each)
        except BaseException as failure:  # noqa: BLE001 - raised in the test's own thread below
            failures.append(failure)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    yield
    thread.join(20)
    assert not thread.is_alive()
    assert failures == []


def test_a_refused_text_is_asked_for_again_and_one_that_broke_off_is_not():
    refusals = iter([Busy.code, Busy.code])

    def answer(message):
        code = next(refusals, None)
        return done(message, "abc") if code is None else error(message, code, 0.01)

    with writer(answer) as fake, Client(fake.endpoint, retry=Retry(attempts=3)) as client:
        assert list(client.generate("x")) == ["abc"]
        assert sum(isinstance(message, wire.Generate) for message in fake.requests) == 3
    broken = writer(lambda m: part(m, 0, "a"), lambda _: HANG_UP)
    with broken as fake, Client(fake.endpoint, retry=Retry(attempts=3)) as client:
        stream = client.generate("x")
        assert next(stream) == "a"
        with pytest.raises(ConnectionLost):
            next(stream)


def test_a_rate_of_nothing_is_not_a_number():
    score = TextScore(
        bits=0.0, bytes=0, nats=np.zeros(0, np.float32), skipped=1, before=0, compute_ms=0, latency_ms=0
    )
    assert math.isnan(score.bits_per_byte)
