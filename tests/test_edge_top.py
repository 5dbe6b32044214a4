"""`tta-edge top`: rates from differences, frames from values, and the real thing on a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
import xml.dom.minidom
from contextlib import contextmanager, suppress

import pytest
from rich.console import Console

import tiny_bundle
from running import PATIENCE_S, REPOSITORY, daemon, process_environment, run_cli, running
from test_edge_operate import NOBODY, status, stream
from tta_edge.client import Client
from tta_edge.errors import Unreachable
from tta_edge.output import OutputUnwritable
from tta_edge.terminal import Keys
from tta_edge.top import EVENTS, Feed, View, by_activity, frame, frame_form, rates, save_svg, watch
from tta_edge.wire import EventEntry, Requests


def samples(seed=0, n=32):
    return tiny_bundle.samples(n, seed=seed, shift=0.5)[0]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    tiny_bundle.build(path)
    return path


def drawn(view, rows=20):
    console = Console(width=160, file=io.StringIO(), highlight=False, markup=False, emoji=False)
    console.print(frame(view, rows))
    return console.file.getvalue()


# --- rates ------------------------------------------------------------------------------------------


def test_rates_are_differences_over_time():
    before = status(stream(samples=100), requests=Requests(ok=10, failed=1), uptime_s=5.0)
    now = status(
        stream(samples=300), stream("new", samples=60), requests=Requests(ok=14, failed=3), uptime_s=7.0
    )
    found = rates(before, now, 2.0)
    assert (found.requests, found.samples) == (3.0, 130.0)
    assert found.streams == {("default", "cam1"): 100.0, ("default", "new"): 30.0}


def test_a_stream_that_came_back_from_disk_counts_from_its_beginning():
    found = rates(status(stream(samples=500)), status(stream(samples=10), uptime_s=6.0), 1.0)
    assert found.samples == 10.0


def test_streams_of_one_name_in_two_bundles_are_two():
    both = status(stream(samples=1), stream(bundle="night", samples=9), uptime_s=6.0)
    assert rates(status(), both, 1.0).streams == {("default", "cam1"): 1.0, ("night", "cam1"): 9.0}


@pytest.mark.parametrize(
    ("before", "seconds"), [(None, 1.0), (status(uptime_s=9.0), 1.0), (status(), 0.0)],
    ids=["first", "restarted", "no-time"],
)  # fmt: skip
def test_there_are_no_rates_without_two_statuses_of_one_run(before, seconds):
    assert rates(before, status(), seconds) is None


def test_the_busiest_stream_comes_first_then_the_most_recently_used():
    streams = [stream("a", samples=9), stream("b"), stream("c", samples=99), stream("d")]
    assert [each.id for each in by_activity(streams, None)] == ["d", "c", "b", "a"]
    found = rates(status(), status(*streams[:1], streams[2], uptime_s=6.0), 1.0)
    assert [each.id for each in by_activity(streams, found)] == ["c", "a", "d", "b"]


# --- frames -----------------------------------------------------------------------------------------


def test_a_frame_says_how_many_streams_it_leaves_out():
    text = drawn(View(NOBODY, status(*(stream(f"cam{k}") for k in range(5)))), rows=3)
    assert "cam4" in text
    assert "cam1" not in text
    assert "and 2 less active ones" in text


def test_a_frame_shows_what_is_wrong_and_the_newest_events():
    events = [
        EventEntry(seq=k, time="2026-01-01T10:00:00.000+00:00", bundle="default", stream="cam1", action="refuse",
                   reason="ball", detail=f"[event {k}]")
        for k in range(EVENTS + 2)
    ]  # fmt: skip
    text = drawn(View(NOBODY, status(stream(state="frozen")), events))
    assert "suspended by its guards" in text
    assert "[event 1]" not in text
    assert f"[event {EVENTS + 1}]" in text


def test_a_daemon_that_has_gone_is_said_above_its_last_figures():
    error = Unreachable("nobody is there", "Start it")
    text = drawn(View(NOBODY, status(stream()), error=error, silent_s=65.0))
    assert (
        "no answer for 1 min 5 s, still trying; the figures below are its last. nobody is there. Start it."
        in text
    )
    assert "cam1" in text
    assert "cam1" not in drawn(View(NOBODY, error=error))


def test_a_frame_as_json_is_json():
    view = View(
        NOBODY, status(stream(samples=7)), rates=rates(status(), status(stream(samples=7), uptime_s=6.0), 1.0)
    )
    form = json.loads(json.dumps(frame_form(view), allow_nan=False))
    assert form["streams"][0]["samples_per_s"] == 7.0
    assert (form["samples_per_s"], form["requests_per_s"]) == (7.0, 0.0)


# --- asking -----------------------------------------------------------------------------------------


def test_a_monitor_finds_its_daemon_again(bundle):
    with daemon(bundle, "--method", "tent") as first, Feed(first.endpoint, timeout_s=1.0) as feed:
        with Client(first.endpoint) as client:
            client.predict(samples(), stream="cam1")
        assert feed.poll().rates is None
        assert feed.poll().rates is not None
        first.stop(signal.SIGKILL)
        gone = feed.poll()
        assert gone.error is not None
        assert [each.id for each in gone.status.streams if each.id == "cam1"], "its last figures stay"
        assert gone.rates is None
        with daemon(bundle, "--method", "tent", bind=first.endpoint):
            back = feed.poll()
            while back.error is not None:
                back = feed.poll()
            assert back.rates is None, "a difference to another run means nothing"
            assert "cam1" not in {each.id for each in back.status.streams}
            assert feed.poll().rates is not None


def test_watching_ends_when_it_is_told_and_gives_the_last_view(bundle):
    class Twice:
        left = 2

        def ended(self, timeout_s):
            assert timeout_s == 0.1
            self.left -= 1
            return not self.left

    console = Console(width=160, file=io.StringIO(), markup=False)
    with running(bundle, method="tent") as server, Feed(server.endpoint, timeout_s=5.0) as feed:
        view = watch(feed, console, Twice(), 0.1)
    assert view.rates is not None
    assert "policy inline" in console.file.getvalue()


# --- the command ------------------------------------------------------------------------------------


def test_once_prints_one_frame_and_saves_it_as_a_picture(bundle, tmp_path):
    with running(bundle, method="tent") as server:
        with Client(server.endpoint) as client:
            client.predict(samples(), stream="cam-1")
        picture = tmp_path / "top.svg"
        done = run_cli("top", "--once", "--to", server.endpoint, "--interval-s", "0.1", "--svg", picture)
        assert done.returncode == 0, done.stderr
        assert "cam-1" in done.stdout
        assert re.search(r"samples +\d+/s", done.stdout)
        assert xml.dom.minidom.parse(str(picture)).documentElement.tagName == "svg"
        assert "cam-1" in picture.read_text()
        assert "url(http" not in picture.read_text(), "looking at a picture calls nobody"
        form = json.loads(run_cli("top", "--json", "--to", server.endpoint, "--interval-s", "0.1").stdout)
        assert form["requests_per_s"] >= 0


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(OutputUnwritable, match="nowhere"):
        save_svg(tmp_path / "nowhere" / "top.svg", View(NOBODY, status()))
    assert list(tmp_path.iterdir()) == []


def test_a_picture_in_no_directory_ends_with_2_before_anything_is_asked(tmp_path):
    done = run_cli(
        "top", "--once", "--to", NOBODY, "--timeout-s", "0.1", "--svg", tmp_path / "nowhere" / "top.svg"
    )
    assert done.returncode == 2
    assert "output-unwritable" in done.stderr


class Screen:
    """A program on a terminal of its own."""

    def __init__(self, *arguments):
        self.main, self.other = pty.openpty()
        self.before = termios.tcgetattr(self.other)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tta_edge", *map(str, arguments)],
            stdin=self.other, stdout=self.other, stderr=self.other, cwd=REPOSITORY,
            env=process_environment(TERM="xterm", LINES="40", COLUMNS="150"), start_new_session=True,
        )  # fmt: skip
        self.text = ""

    def until(self, word):
        """Read what is drawn from now on until a word is in it."""
        self.text, end_s = "", time.monotonic() + PATIENCE_S
        while word not in self.text:
            assert time.monotonic() < end_s, self.text[-2000:]
            if select.select([self.main], [], [], 1.0)[0]:
                self.text += os.read(self.main, 65536).decode(errors="replace")

    def type(self, keys):
        os.write(self.main, keys)

    def wait(self):
        """The exit status; what is still drawn must be read, or the program waits for its reader."""
        end_s = time.monotonic() + PATIENCE_S
        while self.process.poll() is None and time.monotonic() < end_s:
            if select.select([self.main], [], [], 0.1)[0]:
                with suppress(OSError):
                    os.read(self.main, 65536)
        return self.process.wait(1.0)


@contextmanager
def screen(*arguments):
    opened = Screen(*arguments)
    try:
        yield opened
    finally:
        opened.process.kill()
        opened.process.wait()
        os.close(opened.main)
        os.close(opened.other)


def test_on_a_terminal_it_survives_its_daemon_and_q_ends_it(bundle):
    with daemon(bundle, "--method", "tent") as first:
        arguments = ["--to", first.endpoint, "--interval-s", "0.1", "--timeout-s", "0.5"]
        with screen("top", *arguments) as shown:
            shown.until("policy inline")
            first.stop(signal.SIGKILL)
            shown.until("still trying")
            with daemon(bundle, "--method", "tent", bind=first.endpoint) as second:
                with Client(second.endpoint) as client:
                    client.predict(samples(), stream="afterwards")
                shown.until("afterwards")
                shown.type(b"xq")
                assert shown.wait() == 0
            assert termios.tcgetattr(shown.other) == shown.before, "the terminal is as it was"


def test_ctrl_c_ends_it_and_leaves_the_terminal_as_it_was(bundle):
    with running(bundle, method="tent") as server, screen("top", "--to", server.endpoint) as shown:
        shown.until("policy inline")
        shown.process.send_signal(signal.SIGINT)
        assert shown.wait() == 0
        assert termios.tcgetattr(shown.other) == shown.before


def test_it_waits_for_a_daemon_that_is_not_there_yet():
    with screen("top", "--to", NOBODY, "--timeout-s", "0.1", "--interval-s", "0.05") as shown:
        shown.until("still trying")
        shown.type(b"q")
        assert shown.wait() == 0


def test_a_pipe_has_no_keys():
    with Keys(io.StringIO("q")) as keys:
        assert not keys.ended(0.0)
