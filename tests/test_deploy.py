"""The files of deploy/: settings, unit and container are what the daemon of this version understands."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections import defaultdict

import pytest
import typer

from running import PATIENCE_S, REPOSITORY, daemon, process_environment, run_cli, running
from tta_edge.cli import app
from tta_edge.client import Client
from tta_edge.config import Config, resolve
from tta_runtime import health
from tta_runtime.exit_codes import ExitCode

DEPLOY = REPOSITORY / "deploy"
SETTINGS = DEPLOY / "edge.toml"
UNIT = DEPLOY / "tta-edge.service"
CONTAINERFILE = DEPLOY / "Containerfile"
HOME = "/opt/tta-edge/bin/"
ANALYZE = shutil.which("systemd-analyze")


def options_of(command):
    form = typer.main.get_command(app).commands[command]
    return {text for each in form.params for text in (*each.opts, *each.secondary_opts)}


def assert_is_a_command(words):
    """A command line of `tta-edge` with a subcommand and options that exist."""
    assert words[0].removeprefix(HOME) == "tta-edge"
    if words[1] == "config":
        assert words[2] == "check"
        return
    flags = [word for word in words[2:] if word.startswith("-")]
    assert set(flags) <= options_of(words[1]), flags


# --- settings -----------------------------------------------------------------------------------------


def test_the_sample_settings_are_right():
    result = run_cli("config", "check", SETTINGS)
    assert result.returncode == 0, result.stderr
    config = resolve(file=SETTINGS).config
    assert config.state_dir == "/var/lib/tta-edge"
    assert not config.allow_remote


def test_what_the_sample_settings_show_in_comments_is_right_as_well(tmp_path):
    lines = SETTINGS.read_text().splitlines()
    shown = [re.sub(r"^# (?=\[|\w+ = )", "", line) for line in lines]
    assert len([line for line in shown if line not in lines]) >= 5
    file = tmp_path / "edge.toml"
    file.write_text("\n".join(shown))
    result = run_cli("config", "check", file)
    assert result.returncode == 0, result.stderr
    assert set(resolve(file=file).config.bundles) == {"night"}


# --- systemd ------------------------------------------------------------------------------------------


def unit():
    """Section -> key -> values."""
    sections = defaultdict(lambda: defaultdict(list))
    section = ""
    for line in UNIT.read_text().splitlines():
        if found := re.fullmatch(r"\[(\w+)\]", line):
            section = found[1]
        elif line and not line.startswith("#"):
            key, _, text = line.partition("=")
            sections[section][key].append(text)
    return sections


def only(section, key):
    (text,) = unit()[section][key]
    return text


def seconds(key, section="Service"):
    return float(only(section, key))


def here(tmp_path, text):
    """The unit with the program of this environment in the place of the installed one."""
    program = tmp_path / "tta-edge"
    program.write_text(f"#!{sys.executable}\n")
    program.chmod(0o755)
    copy = tmp_path / "tta-edge.service"
    copy.write_text(text.replace(f"{HOME}tta-edge", str(program)))
    return copy


def analyze(*arguments):
    return subprocess.run(
        [ANALYZE, *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path):
    result = analyze("verify", here(tmp_path, UNIT.read_text()))
    assert (result.returncode, result.stderr) == (0, "")
    wrong = here(tmp_path, UNIT.read_text().replace("WatchdogSec", "WatchdogSeconds"))
    assert "WatchdogSeconds" in analyze("verify", wrong).stderr, "the companion: a slip would be seen"


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
def test_systemd_calls_the_unit_well_confined(tmp_path):
    copy = here(tmp_path, UNIT.read_text())
    result = analyze("security", "--offline=true", "--threshold=20", copy)
    if "unrecognized option" in result.stderr:
        pytest.skip("this systemd-analyze cannot judge a file")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("Type", "notify"),
        ("Restart", "on-failure"),
        ("WatchdogSec", "30"),
        ("DynamicUser", "yes"),
        ("StateDirectory", "tta-edge"),
        ("ProtectSystem", "strict"),
        ("NoNewPrivileges", "yes"),
        ("CapabilityBoundingSet", ""),
        ("MemoryMax", "2G"),
        ("ExecReload", "/bin/kill -HUP $MAINPID"),
        ("IPAddressDeny", "any"),
    ],
)
def test_the_unit_says(key, expected):
    assert only("Service", key) == expected


def test_the_units_commands_exist_with_their_options():
    for key in ("ExecStartPre", "ExecStart"):
        words = shlex.split(only("Service", key))
        assert_is_a_command(words)
        assert "/etc/tta-edge/edge.toml" in words


def test_the_unit_and_the_settings_agree():
    assert f"/var/lib/{only('Service', 'StateDirectory')}" == resolve(file=SETTINGS).config.state_dir
    assert seconds("TimeoutStopSec") > 2 * Config().drain_s
    assert only("Service", "RestartPreventExitStatus").split() == [
        str(ExitCode.USAGE),
        str(ExitCode.BAD_DATA),
    ]


def test_the_daemon_does_what_systemd_expects_of_it(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_S)
        words = [word.replace("${STATE_DIRECTORY}", str(tmp_path / "state")) for word in exec_start()]
        arguments = [str(SETTINGS) if word == "/etc/tta-edge/edge.toml" else word for word in words[2:]]
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000"}
        with daemon(*arguments, TTA_HTTP="127.0.0.1:0", **environment) as served:
            notices = Notices(manager)
            notices.wait_for("READY=1")
            notices.wait_for("WATCHDOG=1")
            served.process.send_signal(signal.SIGHUP)  # ExecReload
            with Client(served.endpoint, timeout_s=PATIENCE_S) as client:
                while "reload" not in [event.action for event in client.events().events]:
                    notices.wait_for("WATCHDOG=1")
            assert served.stop() == 0, served.log
            notices.wait_for("STOPPING=1")
    assert (tmp_path / "state" / "lock").exists()


def exec_start():
    return shlex.split(only("Service", "ExecStart"))


class Notices:
    """What a daemon says to its service manager, line by line."""

    def __init__(self, manager):
        self._manager = manager

    def wait_for(self, line):
        while line not in self._manager.recv(4096).decode().split("\n"):
            pass


# --- container ----------------------------------------------------------------------------------------


def instructions():
    """(stage, instruction, text) of the Containerfile, continued lines joined, comments dropped."""
    lines = [line for line in CONTAINERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    found, stage = [], ""
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        if line.strip():
            word, _, text = line.partition(" ")
            if word == "FROM":
                stage = text.partition(" AS ")[2] or "final"
            found.append((stage, word, text.strip()))
    return found


def of(word, stage="final"):
    return [text for where, name, text in instructions() if (where, name) == (stage, word)]


def command():
    (entry,), (arguments,) = of("ENTRYPOINT"), of("CMD")
    return json.loads(entry) + json.loads(arguments)


def test_the_container_is_built_in_stages_from_a_wheel():
    stages = [text for _, word, text in instructions() if word == "FROM"]
    assert len(stages) == 2
    assert len({text.split()[0] for text in stages}) == 1, "the environment's interpreter has to be the same"
    assert any("pip wheel" in text for text in of("RUN", "build"))
    assert of("COPY") == ["--from=build /opt/tta-edge /opt/tta-edge"]


def test_every_file_that_the_container_copies_is_there_and_not_ignored():
    sources = [source for text in of("COPY", "build") for source in text.split()[:-1]]
    ignore = (DEPLOY / "Containerfile.dockerignore").read_text().split()
    assert {line[1:] for line in ignore if line.startswith("!")} == set(sources)
    packages = re.findall(r"where = \[(.*?)\]", (REPOSITORY / "pyproject.toml").read_text())[0]
    assert {name.strip('" ') for name in packages.split(",")} <= set(sources)
    for source in sources:
        assert (REPOSITORY / source).exists(), source


@pytest.mark.parametrize("verb", ["wheel", "install"])
def test_the_flags_of_pip_exist(verb):
    ran = " && ".join(of("RUN", "build"))
    (used,) = re.findall(rf"pip {verb} (.*?)(?: && |$)", ran)
    shown = subprocess.run(
        [sys.executable, "-m", "pip", verb, "--help"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    flags = re.findall(r"--[a-z-]+", used)
    assert flags
    for flag in flags:
        assert f"{flag} " in shown.stdout or f"{flag}\n" in shown.stdout, flag


def test_the_container_does_not_run_as_root_and_keeps_its_state():
    user, group = of("USER")[0].split(":")
    assert int(user) > 0
    assert any(f"chown {user}:{group} /var/lib/tta-edge" in text for text in of("RUN"))
    words = command()
    assert of("VOLUME") == [words[words.index("--state-dir") + 1]]


def test_the_container_runs_a_command_that_exists_and_may_be_started():
    words = command()
    assert_is_a_command(words)
    ports = {words[words.index(flag) + 1].rpartition(":")[2] for flag in ("--bind", "--http")}
    assert set(of("EXPOSE")[0].split()) == ports
    assert "--allow-remote" in words


def health_check():
    (text,) = of("HEALTHCHECK")
    options, _, check = text.partition("CMD ")
    words = json.loads(check)
    assert words[0] == "python"
    return options, [sys.executable, *words[1:]]


def test_the_health_check_asks_for_readiness_where_the_daemon_listens():
    options, words = health_check()
    settings = command()
    port = settings[settings.index("--http") + 1].rpartition(":")[2]
    assert f"http://127.0.0.1:{port}/readyz" in words[-1]
    assert set(re.findall(r"--([a-z-]+)=\d+s?", options)) == {
        "interval",
        "timeout",
        "start-period",
        "retries",
    }
    assert int(re.findall(r"--timeout=(\d+)s", options)[0]) > health.TIMEOUT_S


def test_the_health_check_knows_a_daemon_that_serves_from_one_that_does_not():
    _, words = health_check()

    def check(place):
        there = [re.sub(r"http://127\.0\.0\.1:\d+", place, word) for word in words]
        return subprocess.run(
            there, capture_output=True, timeout=PATIENCE_S, check=False, env=process_environment()
        )

    from tta_edge.builtin import builtin_bundle

    with running(builtin_bundle(), http="127.0.0.1:0") as server:
        place = server.http_endpoint
        assert check(place).returncode == 0
    assert check(place).returncode != 0
