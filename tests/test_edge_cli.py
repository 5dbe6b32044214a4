"""The command line: `serve` as a process with signals and exit codes, help that needs nothing installed."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import typer

import tiny_bundle
from running import daemon, process_environment, run_cli
from tta_edge.client import Client
from tta_edge.config import KEYS
from tta_edge.settings import settings

X = np.zeros((16, 8), np.float32)
COMMANDS = [
    "serve", "status", "streams", "top", "adapt", "reset", "rollback", "reload", "events", "enroll", "doctor",
    "stream", "evaluate", "demo", "config", "spool", "text",
]  # fmt: skip
GROUPS = {
    "config": ["show", "check"],
    "spool": ["ls", "rm"],
    "text": ["score", "generate", "absorb", "sessions", "export", "import"],
}
"""Commands of commands."""
IN_GROUPS = [f"{group} {name}" for group, names in GROUPS.items() for name in names]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    tiny_bundle.build(path)
    return path


def assert_one_line(text, code):
    """An error is one line with its code, its cause and its fix, and no trace."""
    lines = [line for line in text.splitlines() if line.startswith("error (")]
    assert len(lines) == 1, text
    assert lines[0].startswith(f"error ({code}): ")
    assert re.search(r"[.?] [A-Z]", lines[0]), f"no fix in {lines[0]}"
    assert "Traceback" not in text


# --- serve ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_answers_until_a_signal_and_ends_with_zero(bundle, tmp_path, number):
    ready = tmp_path / "ready"
    with daemon(bundle, "--method", "tent", "--set", "lr=0.01", "--ready-file", ready) as process:
        assert process.endpoint.startswith("tcp://127.0.0.1:")
        assert ready.read_text() == f"{process.endpoint}\n"
        with Client(process.endpoint) as client:
            assert client.info().hyper["lr"] == 0.01
            assert client.predict(X).adapted
        assert process.stop(number) == 0
        assert not ready.exists()
        assert not any("Traceback" in line for line in process.log)


def test_serve_takes_its_settings_from_file_environment_and_flags(bundle, tmp_path):
    file = tmp_path / "edge.toml"
    file.write_text(
        f'bundle = "{bundle}"\nmethod = "source"\nmax_batch = 7\nseed = 3\n[hyper.tent]\nlr = 0.5\n'
    )
    settings = {"TTA_METHOD": "tent", "TTA_MAX_BATCH": "8"}
    with daemon("--config", file, **settings) as process, Client(process.endpoint) as client:
        info = client.info()
        assert (info.method, info.limits.max_batch, info.hyper["lr"]) == ("tent", 8, 0.5)


def test_logs_can_be_json_lines_with_the_guards_events(bundle):
    with daemon(bundle, "--log-format", "json", "--max-distance", "1e-9") as process:
        with Client(process.endpoint) as client:
            assert client.predict(X).reason == "ball"
        assert process.stop() == 0
        lines = [json.loads(line) for line in process.log]
    (ready,) = [line for line in lines if "endpoint" in line]
    assert ready == {"message": f"ready {process.endpoint}", "endpoint": process.endpoint}
    (event,) = [line for line in lines if "reason" in line]
    assert (event["level"], event["stream"], event["action"], event["reason"]) == (
        "warning",
        "default",
        "refuse",
        "ball",
    )


def test_serve_without_a_bundle_serves_the_built_in_one():
    with daemon() as process, Client(process.endpoint) as client:
        info = client.info()
        assert info.classes == 10
        low = np.zeros([16, *info.input.shape[1:]], info.input.dtype)
        assert client.predict(low).logits.shape == (16, 10)


def damaged(tmp_path, file, change):
    path = tmp_path / "tiny"
    tiny_bundle.build(path)
    (path / file).write_bytes(change((path / file).read_bytes()))
    return path


def flip(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def newer(data):
    return data.replace(b'"format_version": 1', b'"format_version": 99')


def test_a_port_in_use_ends_with_3(bundle):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        bind = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        result = run_cli("serve", bundle, "--bind", bind)
    assert result.returncode == 3
    assert_one_line(result.stderr, "address-in-use")
    assert bind in result.stderr


def test_a_bind_that_others_can_reach_ends_with_3(bundle):
    result = run_cli("serve", bundle, "--bind", "tcp://0.0.0.0:0")
    assert result.returncode == 3
    assert_one_line(result.stderr, "remote-bind-refused")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--method", "tnet"], "unknown-method"),
        (["--set", "rl=0.1"], "unknown-hyper"),
        (["--set", "lr"], "bad-value"),
        (["--threads", "0"], "bad-value"),
        (["--config", "missing.toml"], "bad-value"),
        (["--ready-file", "/nowhere/ready"], "bad-value"),
    ],
)
def test_usage_and_configuration_errors_end_with_2(bundle, arguments, code):
    result = run_cli("serve", bundle, "--bind", "tcp://127.0.0.1:0", *arguments)
    assert result.returncode == 2
    assert_one_line(result.stderr, code)


def test_a_misspelt_key_or_flag_ends_with_2_and_a_suggestion(bundle, tmp_path):
    file = tmp_path / "edge.toml"
    file.write_text("max_bacth = 4")
    result = run_cli("serve", bundle, "--config", file)
    assert result.returncode == 2
    assert "unknown key `max_bacth`, did you mean `max_batch`" in result.stderr
    result = run_cli("serve", bundle, "--max-bacth", "4")
    assert result.returncode == 2
    assert "--max-batch" in result.stderr


@pytest.mark.parametrize(
    ("file", "change", "code"),
    [
        ("weights.bin", lambda data: data[:-1], "file-truncated"),
        ("weights.bin", flip, "file-tampered"),
        ("forward.onnx", flip, "file-tampered"),
        ("theta.safetensors", flip, "file-tampered"),
        (
            "manifest.json",
            lambda data: data.replace(b'"format_version": 1', b'"format_version": 99'),
            "newer-format",
        ),
        ("manifest.json", lambda data: data[:100], "manifest-malformed"),
    ],
)
def test_a_bad_bundle_ends_with_4_and_stays_as_it_is(tmp_path, file, change, code):
    path = damaged(tmp_path, file, change)
    before = {entry.name: entry.read_bytes() for entry in path.iterdir()}
    result = run_cli("serve", path, "--bind", "tcp://127.0.0.1:0")
    assert result.returncode == 4
    assert_one_line(result.stderr, code)
    assert {entry.name: entry.read_bytes() for entry in path.iterdir()} == before


def test_a_directory_that_is_no_bundle_ends_with_4(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        result = run_cli("serve", path, "--bind", "tcp://127.0.0.1:0")
        assert result.returncode == 4
        assert_one_line(result.stderr, "manifest-missing")


# --- help -------------------------------------------------------------------------------------------


def parser():
    from tta_edge.cli import app

    return typer.main.get_command(app)


def test_version():
    result = run_cli("--version")
    assert result.returncode == 0
    assert result.stdout.startswith("tta-edge ")


@pytest.mark.parametrize("command", ["", *COMMANDS, *IN_GROUPS])
def test_help_names_the_exit_codes_and_an_example(command):
    result = run_cli(*command.split(), "--help")
    assert result.returncode == 0
    words = " ".join(result.stdout.split())
    assert "Exit codes: 0 ok" in words
    if command:
        assert f"tta-edge {command}" in words.split("Usage:", 1)[1].split("Usage:")[-1]
        assert "Example" in words


def test_every_command_and_option_is_documented():
    commands = dict(parser().commands)
    assert commands.keys() == set(COMMANDS)
    for group, names in GROUPS.items():
        assert commands[group].commands.keys() == set(names)
        commands |= commands[group].commands
    for name, command in commands.items():
        assert command.help
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_every_setting_has_a_flag_and_every_flag_a_setting():
    names = {parameter.name for parameter in parser().commands["serve"].params}
    assert names - {"config", "settings"} - {"help"} == set(KEYS) - {"hyper"}


def test_the_help_of_a_setting_is_what_stands_below_it_in_the_code():
    options = {parameter.name: parameter for parameter in parser().commands["serve"].params}
    for key, setting in settings().items():
        assert setting.doc.endswith("."), f"config.py says nothing about `{key}`"
        if key not in ("hyper", "bundle"):
            assert options[key].help.startswith(setting.doc)
    assert "Default: 64." in options["step_batch"].help
    assert "One of " in options["policy"].help


def test_every_kind_of_setting_can_be_given_as_a_flag(bundle):
    flags = [
        "--no-adapt", "--policy", "every", "--budget", "0.5", "--step-batch", "8", "--window", "32",
        "--bundle", f"night={bundle}", "--bundle", f"fog={bundle}", "--http", "off",
    ]  # fmt: skip
    with daemon(bundle, *flags) as process, Client(process.endpoint) as client:
        status = client.status()
        assert (status.adapt, status.policy) == (False, "every")
        assert [each.name for each in status.bundles] == ["default", "night", "fog"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--bundle", "night"], "bad-value"),
        (["--bundle", "a=x", "--bundle", "a=y"], "bad-value"),
        (["--bundle", "../up=x"], "bad-value"),
        (["--policy", "sometimes"], "bad-value"),
        (["--budget", "2"], "bad-value"),
    ],
)
def test_a_wrong_value_of_a_flag_is_named_with_the_flag(bundle, arguments, code):
    result = run_cli("serve", bundle, *arguments)
    assert result.returncode == 2
    assert_one_line(result.stderr, code)
    assert arguments[0] in result.stderr


def test_help_comes_soon():
    """Against this machine's own start of numpy, which every command needs: what we add must stay small."""

    def fastest_s(*command):
        times = []
        for _ in range(5):
            began_s = time.perf_counter()
            subprocess.run(command, capture_output=True, env=process_environment(), check=True)
            times.append(time.perf_counter() - began_s)
        return min(times)

    bare_s = fastest_s(sys.executable, "-c", "import numpy, rich.console, rich.table, rich.panel, typer")
    assert fastest_s(sys.executable, "-m", "tta_edge", "--help") < 2.5 * bare_s + 0.2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_nothing_that_it_does_not_need(command):
    code = (
        "import contextlib, sys; from tta_edge.cli import main\n"
        f"with contextlib.suppress(SystemExit): main([{command!r}, '--help'])\n"
        "print('loaded', sorted({'zmq', 'onnxruntime', 'tta_edge.service', 'tta_edge.client'} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=process_environment(), check=True
    )
    assert result.stdout.splitlines()[-1] == "loaded []"


def test_help_needs_neither_engine_nor_torch():
    code = (
        "import sys; absent = ['onnxruntime', 'torch', 'onnx', 'PIL', 'matplotlib'];"
        "sys.modules.update(dict.fromkeys(absent));"
        "from tta_edge.cli import main; main(['serve', '--help'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=process_environment(), check=False
    )
    assert result.returncode == 0, result.stderr
    assert "--bind" in result.stdout


def test_without_an_engine_serve_says_what_to_install(bundle):
    code = (
        "import sys; sys.modules['onnxruntime'] = None;"
        f"from tta_edge.cli import main; main(['serve', {str(bundle)!r}, '--bind', 'tcp://127.0.0.1:0'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=process_environment(), check=False
    )
    assert result.returncode == 3
    assert_one_line(result.stderr, "engine-missing")
    assert "tta-runtime[cpu]" in result.stderr
