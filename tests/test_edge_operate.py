"""The operator commands against a real daemon, and what they say when something is wrong."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.console import Console

import tiny_bundle
from running import PATIENCE_S, REPOSITORY, daemon, process_environment, run_cli, running
from snapshots import files
from tta_edge.cli import main
from tta_edge.client import Client
from tta_edge.status_view import duration, events_view, findings, status_form, status_view, streams_view
from tta_edge.wire import BundleStatus, CloudInfo, EventEntry, Requests, StatusReply, StreamStatus
from tta_runtime.exit_codes import ExitCode

STREAM_KEYS = {"id", "method", "steps", "theta_digest", "distance", "entropy", "state", "last_event"}
NOBODY = "tcp://127.0.0.1:9"


def samples(seed=0, n=32):
    return tiny_bundle.samples(n, seed=seed, shift=0.5)[0]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    tiny_bundle.build(path)
    return path


@pytest.fixture
def served(bundle, tmp_path):
    """A daemon with a state directory and two streams that have stepped."""
    with running(
        bundle, method="tent", state_dir=str(tmp_path / "state"), checkpoint_steps=2, max_distance=100.0
    ) as server:
        with Client(server.endpoint) as client:
            for seed in range(4):
                client.predict(samples(seed), stream="cam1")
            client.predict(samples(), stream="cam2")
        yield server


@pytest.fixture
def edge(capsys):
    """`tta-edge ARGUMENTS` in this process: exit status, stdout, stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(each) for each in arguments])
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return run


def asked(edge, server, *arguments):
    """The JSON that a command prints, alone on stdout."""
    code, out, err = edge(*arguments, "--to", server.endpoint, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def said(edge, server, *arguments):
    code, out, err = edge(*arguments, "--to", server.endpoint)
    assert code == 0, err
    return out


# --- what they do -----------------------------------------------------------------------------------


def test_status_as_json_has_a_stable_form(edge, served):
    form = asked(edge, served, "status")
    assert {"version", "uptime_s", "bundles", "streams", "requests", "latency_ms"} <= form.keys()
    assert form.keys() == set(StatusReply.__struct_fields__) - {"id"}
    assert {"ok", "failed"} <= form["requests"].keys()
    assert form["latency_ms"].keys() == {"p50", "p99"}
    by_id = {stream["id"]: stream for stream in form["streams"]}
    assert by_id.keys() >= {"cam1", "cam2"}
    for stream in form["streams"]:
        assert stream.keys() >= STREAM_KEYS
    assert (by_id["cam1"]["steps"], by_id["cam1"]["state"], by_id["cam1"]["method"]) == (
        4,
        "adapting",
        "tent",
    )
    assert by_id["cam1"]["distance"] > 0
    assert form["requests"]["failed"] == 0
    assert form["rss_bytes"] > 1e6


def test_status_as_json_has_the_same_form_before_the_first_request(edge, bundle):
    with running(bundle, method="tent") as server:
        form = asked(edge, server, "status")
    assert form["latency_ms"] == {"p50": None, "p99": None}
    assert form["requests"]["open"] >= 0


def test_status_for_people(edge, served):
    text = said(edge, served, "status")
    for word in ("cam1", "adapting", "policy inline", "p50", "tent", "streams only there"):
        assert word in text
    assert "!" not in text, "nothing is wrong"


def test_streams_lists_them(edge, served):
    assert asked(edge, served, "streams").keys() == {"streams", "stored_streams"}
    text = said(edge, served, "streams")
    assert "cam1" in text
    assert "diversity" in text


def test_the_switch_of_the_whole_daemon(edge, served):
    assert asked(edge, served, "adapt", "off") == {"on": False, "stream": "", "durable": True}
    with Client(served.endpoint) as client:
        before = client.status().streams
        assert not client.predict(samples(9), stream="cam1").adapted
        assert {each.id: each.theta_digest for each in client.status().streams} == {
            each.id: each.theta_digest for each in before
        }
    text = said(edge, served, "status")
    assert "switched off for the whole daemon" in text
    assert "tta-edge adapt on" in text
    assert "adaptation is on for the whole daemon" in said(edge, served, "adapt", "on")
    with Client(served.endpoint) as client:
        assert client.predict(samples(9), stream="cam1").adapted


def test_the_switch_of_one_stream(edge, served):
    assert "off for stream cam2" in said(edge, served, "adapt", "off", "--stream", "cam2")
    states = {each["id"]: each["state"] for each in asked(edge, served, "status")["streams"]}
    assert (states["cam1"], states["cam2"]) == ("adapting", "off")
    assert "tta-edge adapt on --stream cam2" in said(edge, served, "status")


def test_a_stream_that_is_on_in_a_daemon_that_is_off_is_told(edge, served):
    said(edge, served, "adapt", "off")
    code, out, err = edge("adapt", "on", "--stream", "cam1", "--to", served.endpoint)
    assert (code, "on for stream cam1" in out) == (0, True)
    assert "the whole daemon is switched off" in err


def test_a_switch_that_a_restart_forgets_says_so(edge, bundle):
    with running(bundle, method="tent") as server:
        code, out, err = edge("adapt", "off", "--to", server.endpoint)
        assert code == 0
        assert "adaptation is off" in out
        assert "a restart forgets this" in err


def test_reset_and_rollback(edge, served):
    rolled = asked(edge, served, "rollback", "--stream", "cam1")
    assert rolled.keys() == {"stream", "theta_digest", "steps", "to", "durable"}
    assert (rolled["stream"], rolled["to"]) == ("cam1", "checkpoint")
    assert "back at the source" in said(edge, served, "rollback", "--stream", "cam2")
    text = said(edge, served, "reset", "--stream", "cam1")
    steps = {each["id"]: each["steps"] for each in asked(edge, served, "status")["streams"]}
    assert "cam1 is back at the source" in text
    assert steps["cam1"] == 0
    assert asked(edge, served, "reset", "--stream", "cam1").keys() == {"stream", "theta_digest", "durable"}


def test_events_come_oldest_first(edge, served):
    said(edge, served, "reset", "--stream", "cam1")
    said(edge, served, "adapt", "off")
    form = asked(edge, served, "events", "--limit", 2)["events"]
    assert [each["action"] for each in form] == ["reset", "switch"]
    assert form[0].keys() == set(EventEntry.__struct_fields__)
    assert len(asked(edge, served, "events", "--limit", 1)["events"]) == 1
    text = said(edge, served, "events")
    assert text.index("reset") < text.index("switch")


def test_reload_serves_what_is_there_now(edge, bundle, tmp_path):
    path = tmp_path / "moving"
    tiny_bundle.build(path)
    with running(path, method="tent") as server:
        form = asked(edge, server, "reload")
        assert (form["bundle"], form["changed"]) == ("default", False)
        assert "the same bundle as before" in said(edge, server, "reload", "--bundle", "default")


def test_sighup_reloads(bundle):
    with daemon(bundle, "--method", "tent") as process, Client(process.endpoint, timeout_s=30) as client:
        process.process.send_signal(signal.SIGHUP)
        end_s = time.monotonic() + PATIENCE_S
        while not any(each.action == "reload" for each in client.events().events):
            assert time.monotonic() < end_s, "nothing was reloaded"
        assert client.status().bundles[0].loads == 2
        assert process.stop() == 0


# --- what is refused --------------------------------------------------------------------------------


def refused(edge, *arguments):
    code, out, err = edge(*arguments)
    assert out == ""
    assert "Traceback" not in err
    found = re.match(r"error \(([a-z-]+)\): ", err)
    return code, found and found[1], err


COMMANDS = [
    ["status"], ["streams"], ["adapt", "on"], ["reset"], ["rollback"], ["reload"], ["events"], ["top", "--once"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_nobody_listens(edge, command, form):
    code, name, err = refused(edge, *command, *form, "--to", NOBODY, "--timeout-s", "0.2")
    assert (code, name) == (3, "unreachable")
    assert "tta-edge serve" in err


@pytest.mark.parametrize("command", ["reset", "rollback"])
def test_an_unknown_stream_is_a_mistake_of_the_caller_and_changes_nothing(edge, served, tmp_path, command):
    with Client(served.endpoint) as client:
        before = {each.id: each.theta_digest for each in client.status().streams}
        code, name, err = refused(edge, command, "--stream", "cam3", "--to", served.endpoint)
        assert (code, name) == (2, "unknown-stream")
        assert "did you mean `cam" in err
        assert {each.id: each.theta_digest for each in client.status().streams} == before


@pytest.mark.parametrize(
    "command",
    [["reset"], ["rollback"], ["reload"], ["adapt", "off", "--stream", "cam1"]],
    ids=lambda words: words[0],
)
def test_an_unknown_bundle_is_a_mistake_of_the_caller(edge, served, command):
    code, name, _ = refused(edge, *command, "--bundle", "other", "--to", served.endpoint)
    assert (code, name) == (2, "unknown-bundle")


def test_a_switch_for_an_unknown_stream_leaves_the_daemon_alone(edge, served):
    code, name, _ = refused(edge, "adapt", "off", "--stream", "cam3", "--to", served.endpoint)
    assert (code, name) == (2, "unknown-stream")
    assert asked(edge, served, "status")["adapt"] is True


def test_a_damaged_bundle_is_not_reloaded(edge, tmp_path):
    path = tmp_path / "moving"
    tiny_bundle.build(path)
    with running(path, method="tent") as server:
        weights = path / "weights.bin"
        weights.write_bytes(weights.read_bytes()[:-1])
        before = files(path)
        code, name, _ = refused(edge, "reload", "--to", server.endpoint)
        assert (code, name) == (4, "file-truncated")
        with Client(server.endpoint) as client:
            assert client.predict(samples(), stream="cam1").adapted, "the old one goes on"
        assert files(path) == before


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["status", "--json", "status.json"], "status.json"),
        (["adapt"], "Missing argument"),
        (["adapt", "perhaps"], "on|off"),
        (["reset", "cam1"], "cam1"),
        (["reset", "--stream"], "--stream"),
        (["events", "--limit", "0"], "1"),
        (["events", "--limit", "many"], "--limit"),
        (["status", "--timeout-s", "0"], "0"),
        (["top", "--interval-s", "0"], "0"),
        (["status", "--too", "x"], "--to"),
    ],
)
def test_wrong_usage_ends_with_2_and_names_what_is_wrong(edge, arguments, word):
    code, out, err = edge(*arguments)
    assert (code, out) == (2, "")
    assert word in err


@pytest.mark.parametrize("place", ["127.0.0.1:5555", "http://127.0.0.1:5555", "tcp://127.0.0.1:99999"])
def test_a_malformed_endpoint_is_named(edge, place):
    code, name, err = refused(edge, "status", "--to", place)
    assert (code, name) == (3, "bad-endpoint")
    assert place in err


@pytest.mark.parametrize(("name", "code"), [("cam 1", "bad-field"), ("../x", "bad-field")])
def test_a_name_that_cannot_be_one_is_refused(edge, served, name, code):
    _, found, _ = refused(edge, "reset", "--stream", name, "--to", served.endpoint)
    assert found == code


def test_the_endpoint_may_come_from_the_environment(served):
    done = run_cli("status", "--json", TTA_TO=served.endpoint)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["version"]


def test_a_closed_pipe_is_no_defect(served):
    line = f"{sys.executable} -m tta_edge status --to {served.endpoint} | true"
    done = subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        env=process_environment(),
        cwd=REPOSITORY,
        check=False,
    )
    assert "Traceback" not in done.stderr


# --- what they say ----------------------------------------------------------------------------------


def stream(name="cam1", **changes):
    values = {
        "id": name, "bundle": "default", "method": "tent", "steps": 3, "theta_digest": "0" * 64, "distance": 0.1,
        "state": "adapting", "restored": "source", "samples": 96,
    }  # fmt: skip
    return StreamStatus(**{**values, **changes})


def status(*streams, **changes):
    values = {
        "id": 1, "version": "0", "uptime_s": 5.0, "adapt": True, "policy": "inline", "streams": list(streams),
        "bundles": [
            BundleStatus(name="default", model_id="m", digest="1" * 64, method="tent", provider="cpu", loads=1)
        ],
        "stored_streams": 0, "requests": Requests(ok=1, failed=0), "latency_ms": {}, "rss_bytes": 10**8,
    }  # fmt: skip
    return StatusReply(**{**values, **changes})


def shown(view):
    console = Console(width=200, file=io.StringIO(), highlight=False, markup=False, emoji=False)
    console.print(view)
    return console.file.getvalue()


def test_a_healthy_daemon_has_no_findings():
    assert findings(status(stream(), stream("cam2", state="source"))) == []


def cloud(**changes):
    values = {
        "phase": "online", "group": "yard", "problem": "", "stale": False, "head": "1.7", "seen": 100, "chosen": 11,
        "sent": 10, "refused": 0, "dropped": 0, "waiting": 1, "patches_refused": 0,
    }  # fmt: skip
    return CloudInfo(**{**values, **changes})


def test_the_link_to_the_cloud_is_shown():
    text = shown(status_view(status(stream(), cloud=cloud()), "tcp://x"))
    assert "online, group yard, newest patch 1.7, 10 of 100 samples sent, 1 wait" in text
    assert findings(status(cloud=cloud())) == []
    assert "nothing is sent" in shown(status_view(status(cloud=cloud(seen=0)), "tcp://x"))
    assert "cloud" not in shown(status_view(status(stream()), "tcp://x"))


@pytest.mark.parametrize(
    ("reply", "what", "fix"),
    [
        (
            status(cloud=cloud(problem="silent: nothing was heard")),
            "no link to the cloud (silent",
            "keys list",
        ),
        (
            status(cloud=cloud(problem="busy: store-full: it cannot grow")),
            "takes no samples now",
            "on its disk",
        ),
        (status(cloud=cloud(stale=True)), "no patch for ten minutes", "hold its messages back"),
        (status(disk_error="No space left on device", state_dir="/s"), "No space left", "Free space"),
        (
            status(stream(state="frozen", last_event="suspend: collapse")),
            "suspended by its guards",
            "reset --stream cam1",
        ),
        (status(stream(events={"state-tampered": 1})), "quarantined", "events"),
        (status(stream(state="off")), "cam1 is switched off", "adapt on --stream cam1"),
        (status(stream(state="off"), adapt=False), "the whole daemon", "tta-edge adapt on"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(reply, what, fix):
    (found,) = findings(reply)
    assert what in found.what
    assert fix in found.fix
    for view in (status_view(reply, NOBODY), streams_view(reply)):
        text = " ".join(shown(view).split())
        assert what in text
        assert fix in text


def test_what_is_broken_comes_before_what_is_chosen():
    reply = status(stream(state="off"), stream("cam2", state="frozen"), disk_error="x", state_dir="/s")
    assert [found.bad for found in findings(reply)] == [True, True, False]


def test_many_findings_are_counted_and_not_shown():
    reply = status(*(stream(f"cam{k}", state="frozen") for k in range(20)))
    assert len(findings(reply)) == 20
    text = shown(status_view(reply, NOBODY))
    assert text.count("suspended by its guards") == 8
    assert "and 12 more like these" in text


def test_failed_requests_are_told_by_their_codes():
    reply = status(requests=Requests(ok=5, failed=3, failures={"busy": 2, "draining": 1}))
    assert "5 ok, 3 failed (busy 2, draining 1)" in shown(status_view(reply, NOBODY))


def test_the_fix_names_the_bundle_where_there_are_several():
    both = [
        BundleStatus(name=name, model_id="m", digest="1" * 64, method="tent", provider="cpu", loads=1)
        for name in ("day", "night")
    ]
    (found,) = findings(status(stream(state="frozen", bundle="night"), bundles=both))
    assert "--stream cam1 --bundle night" in found.fix


def test_numbers_that_json_does_not_have_become_null():
    form = status_form(
        status(stream(distance=np.inf, entropy=float("nan")), latency_ms={"p50": 1.0, "p99": 2.0})
    )
    assert json.loads(json.dumps(form, allow_nan=False)) == form
    assert form["streams"][0]["distance"] is None
    assert form["streams"][0]["entropy"] is None
    assert form["latency_ms"] == {"p50": 1.0, "p99": 2.0}


def test_the_documented_form_is_the_real_one():
    page = (REPOSITORY / "docs" / "commands.md").read_text()
    shown = json.loads(page.split("```json\n")[1].split("```")[0])
    real = status_form(status(stream(), latency_ms={"p50": 1.0, "p99": 2.0}))

    def keys(value):
        if isinstance(value, dict):
            return {key: keys(each) for key, each in value.items()}
        return [keys(each) for each in value] if isinstance(value, list) else None

    assert keys(shown) == keys(real)


def test_the_documented_exit_codes_are_the_real_ones():
    page = (REPOSITORY / "docs" / "commands.md").read_text()
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.M)} == {int(code) for code in ExitCode}


def test_what_comes_from_clients_is_never_taken_for_markup():
    event = EventEntry(
        seq=1, time="t", bundle="b", stream="s", action="refuse", reason="[red]", detail="[/nope] [1]"
    )
    text = shown(events_view([event]))
    assert "[red]" in text
    assert "[/nope] [1]" in text
    assert "[bold]" in shown(status_view(status(stream(last_event="[bold]")), NOBODY))


def test_no_events_is_said():
    assert "nothing has happened" in shown(events_view([]))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (3725, "1 h 2 min"),
        (86_400 * 3 + 30, "3 d"),
        (86_460, "1 d"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
