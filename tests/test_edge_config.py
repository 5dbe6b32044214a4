"""Settings: which source wins, where each value came from, and every way to get one wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from running import run_cli
from tta_edge.config import KEYS, Config, parse_bundles, parse_settings, resolve
from tta_edge.options import given as flags_given
from tta_edge.settings import GROUPS, field_docs, settings
from tta_runtime.errors import BadValue, ConfigError, UnknownKey


@pytest.fixture
def toml(tmp_path):
    def write(text):
        file = tmp_path / "edge.toml"
        file.write_text(text)
        return file

    return write


def test_defaults():
    resolved = resolve()
    assert resolved.config == Config()
    assert set(resolved.origin) == set(KEYS)
    assert set(resolved.origin.values()) == {"default"}


def test_flags_beat_the_environment_beats_the_file(toml):
    file = toml("threads = 1\nseed = 1\nmax_batch = 1\nmax_queue = 7")
    resolved = resolve(
        flags={"threads": 3, "seed": None},
        environment={"TTA_THREADS": "2", "TTA_SEED": "2", "HOME": "/", "TTA_SHARED_DATA": "/x"},
        file=file,
    )
    config = resolved.config
    assert (config.threads, config.seed, config.max_batch, config.max_queue, config.drain_s) == (
        3,
        2,
        1,
        7,
        5.0,
    )
    assert resolved.origin["threads"] == "flag --threads"
    assert resolved.origin["seed"] == "environment TTA_SEED"
    assert resolved.origin["max_batch"] == f"file {file}"
    assert resolved.origin["drain_s"] == "default"


def test_the_environment_can_name_the_file(toml):
    file = toml("seed = 5")
    assert resolve(environment={"TTA_CONFIG": str(file)}).config.seed == 5


def test_a_bundle_in_the_file_is_relative_to_the_file(toml):
    file = toml('bundle = "models/digits"')
    assert resolve(file=file).config.bundle == str(file.parent / "models/digits")
    assert resolve(flags={"bundle": "x"}, file=file).config.bundle == "x"
    assert resolve(file=toml('bundle = "/srv/digits"')).config.bundle == str(Path("/srv/digits"))


def test_every_type_can_come_from_the_environment():
    environment = {
        "TTA_ALLOW_REMOTE": "true",
        "TTA_MAX_DISTANCE": "0.5",
        "TTA_METHOD": "tent",
        "TTA_MAX_QUEUE": "3",
    }
    config = resolve(environment=environment).config
    assert (config.allow_remote, config.max_distance, config.method, config.max_queue) == (
        True,
        0.5,
        "tent",
        3,
    )


# --- hyper-parameters ----------------------------------------------------------------------------


def test_hyper_parameters_by_method_and_for_the_one_that_is_served(toml):
    resolved = resolve(
        file=toml("[hyper]\nlr = 0.1\nmomentum = 0.5\n[hyper.tent]\nlr = 0.2\n[hyper.sar]\nrho = 1"),
    )
    assert resolved.config.hyper_of("tent") == {"lr": 0.2, "momentum": 0.5}
    assert resolved.config.hyper_of("sar") == {"lr": 0.1, "momentum": 0.5, "rho": 1.0}
    assert resolved.config.hyper_methods() == ["tent", "sar"]
    assert resolved.origin["hyper.tent.lr"] == resolved.origin["hyper"]


def test_a_setting_on_the_command_line_is_stronger_than_the_methods_table(toml):
    file = toml("[hyper.tent]\nlr = 0.2\nmomentum = 0.5")
    resolved = resolve(settings=["lr=0.3"], file=file)
    assert resolved.config.hyper_of("tent") == {"lr": 0.3, "momentum": 0.5}
    assert resolved.origin["hyper.lr"] == "flag --set"
    assert "hyper.tent.lr" not in resolved.origin
    assert resolve(settings=["tent.lr=0.4", "lr=0.3"], file=file).config.hyper_of("tent")["lr"] == 0.4


def test_hyper_parameters_from_the_environment(toml):
    resolved = resolve(environment={"TTA_SET": "lr=0.3, tent.momentum=1e-2,"}, file=toml("[hyper]\nlr = 0.1"))
    assert resolved.config.hyper_of("tent") == {"lr": 0.3, "momentum": 0.01}
    assert resolved.origin["hyper.lr"] == "environment TTA_SET"
    assert resolve(settings=["lr=9"], environment={"TTA_SET": "lr=0.3"}).config.hyper_of("x") == {"lr": 9.0}


@given(st.dictionaries(st.from_regex(r"\A[a-z_]{1,8}\Z"), st.floats(allow_nan=False), max_size=5))
def test_settings_read_back(values):
    assert parse_settings([f"{name}={value!r}" for name, value in values.items()], "here") == values


@pytest.mark.parametrize("setting", ["lr", "lr=", "=1", "lr=x", "", ".lr=1", "tent.=1", "."])
def test_a_malformed_setting_is_named(setting):
    with pytest.raises(BadValue, match="flag --set"):
        resolve(settings=[setting])


@pytest.mark.parametrize(
    ("text", "settings"),
    [("[hyper.tent]\nlr=1", ["tent=1"]), ("[hyper]\ntent=1", ["tent.lr=1"]), ("", ["tent=1", "tent.lr=1"])],
)
def test_one_name_cannot_be_a_method_and_a_hyper_parameter(toml, text, settings):
    with pytest.raises(BadValue, match="a number in one place and a table in another"):
        resolve(settings=settings, file=toml(text))


# --- what is refused -----------------------------------------------------------------------------


def test_a_misspelt_key_gets_a_suggestion(toml):
    with pytest.raises(UnknownKey, match="unknown key `max_bacth`, did you mean `max_batch`"):
        resolve(file=toml("max_bacth = 4"))


def test_a_misspelt_variable_gets_a_suggestion_and_foreign_ones_are_left_alone():
    with pytest.raises(UnknownKey, match="`TTA_METHDO`, did you mean `TTA_METHOD`"):
        resolve(environment={"TTA_METHDO": "tent"})
    resolve(environment={"TTA_SHARED_DATA": "/x", "TTA_SOMETHING_ELSE": "1"})


@pytest.mark.parametrize(
    "text",
    [
        "threads = 0",
        "threads = 1.5",
        'threads = "2"',
        "threads = true",
        "max_distance = 0",
        "max_distance = -1.0",
        "reset_every_steps = -1",
        "max_request_bytes = 10",
        "drain_s = -1",
        'log_level = "loud"',
        'allow_remote = "yes"',
        "method = 3",
        "hyper = 3",
        '[hyper]\nlr = "x"',
        "[hyper.tent]\nlr = [1]",
        "[method]\ntent = 1",
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_named_with_its_place(toml, text):
    file = toml(text)
    with pytest.raises(BadValue, match=str(file)):
        resolve(file=file)


@pytest.mark.parametrize(
    "environment", [{"TTA_THREADS": "many"}, {"TTA_THREADS": "0"}, {"TTA_ALLOW_REMOTE": "perhaps"}]
)
def test_a_bad_variable_is_named(environment):
    with pytest.raises(BadValue, match=next(iter(environment))):
        resolve(environment=environment)


def test_a_bad_flag_is_named():
    with pytest.raises(BadValue, match="flag --log-level"):
        resolve(flags={"log_level": "loud"})


def test_files_that_cannot_be_read(tmp_path, toml):
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    for file in (tmp_path / "missing.toml", tmp_path, toml("= 1"), toml("a = 1\na = 2"), binary):
        with pytest.raises(ConfigError) as caught:
            resolve(file=file)
        assert caught.value.fix


# --- what each setting is ------------------------------------------------------------------------


def test_every_setting_is_described_in_words():
    for key, setting in settings().items():
        assert setting.key == key
        assert len(setting.doc) > 10
        assert setting.doc.endswith(".")
        assert "  " not in setting.doc
    assert list(settings()) == list(KEYS)


def test_kinds_choices_and_units_follow_from_the_declaration():
    known = settings()
    kinds = {
        key: known[key].kind
        for key in ("bind", "adapt", "threads", "budget", "state_dir", "hyper", "bundles")
    }
    assert kinds == {
        "bind": str, "adapt": bool, "threads": int, "budget": float, "state_dir": str, "hyper": None, "bundles": None,
    }  # fmt: skip
    assert set(known["log_level"].choices) == {"debug", "info", "warning", "error"}
    assert (known["drain_s"].unit, known["batch_wait_ms"].unit) == ("seconds", "milliseconds")
    assert (known["max_batch"].unit, known["max_window_bytes"].unit) == ("", "bytes")


def test_without_its_source_the_code_still_runs(monkeypatch):
    import inspect

    def absent(_):
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsource", absent)
    assert set(field_docs(Config).values()) == {""}


def test_bundles_from_the_command_line_say_so():
    resolved = resolve(flags=flags_given({"bundles": ["night=/n"], "bundle": "/d"}))
    assert resolved.config.bundles["night"].path == "/n"
    assert (resolved.origin["bundles"], resolved.origin["bundle"]) == ("flag --bundle", "argument BUNDLE")
    assert flags_given({"bundles": None}) == {"bundles": None}


@pytest.mark.parametrize("text", ["", "night", "=x", "night=", "a=x,a=y"])
def test_a_malformed_bundle_is_named(text):
    with pytest.raises(BadValue, match="NAME=DIRECTORY"):
        parse_bundles(text.split(","), "here")


# --- config show and config check ----------------------------------------------------------------


def test_show_tells_every_key_its_value_and_its_origin(toml):
    file = toml('max_batch = 7\n[hyper.tent]\nlr = 0.5\n[bundles.night]\npath = "n"\n')
    done = run_cli("config", "show", "--json", "--config", file, "--set", "momentum=0.5", TTA_SEED="3")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert rows.keys() >= set(KEYS)
    assert all(row.keys() == {"value", "unit", "origin", "doc"} for row in rows.values())
    found = {key: (rows[key]["value"], rows[key]["origin"]) for key in rows}
    assert found["max_batch"] == (7, f"file {file}")
    assert found["seed"] == (3, "environment TTA_SEED")
    assert found["hyper.momentum"] == (0.5, "flag --set")
    assert found["hyper.tent.lr"] == (0.5, f"file {file}")
    assert found["window"] == (256, "default")
    assert found["bundles"][0]["night"]["path"] == str(file.parent / "n")
    assert rows["drain_s"]["unit"] == "seconds"


def test_show_for_people(toml):
    done = run_cli("config", "show", "--config", toml('bind = "tcp://127.0.0.1:7000"'), COLUMNS="160")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "tcp://127.0.0.1:7000" in text
    assert "Most samples in one request." in text
    assert "environment TTA_HTTP" in text


def test_check_says_what_a_file_sets(toml):
    done = run_cli("config", "check", toml("max_batch = 7\n[hyper]\nlr = 1"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("is right and sets hyper, max_batch")
    assert "nothing" in run_cli("config", "check", toml("")).stdout


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("max_bacth = 7", "unknown-key", "did you mean `max_batch`"),
        ("max_batch = 0", "bad-value", "max_batch"),
        ("= 1", "bad-value", "not a TOML file"),
        ('[bundles."../up"]\npath = "x"', "bad-value", "bundles"),
        ('[bundles.a]\npaht = "x"', "bad-value", "paht"),
    ],
)
def test_check_and_show_refuse_what_serve_refuses(toml, text, code, words):
    file = toml(text)
    for arguments in (["check", file], ["show", "--config", file], ["show", "--json", "--config", file]):
        done = run_cli("config", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error ({code}): ")
        assert words in done.stderr


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('bind = "127.0.0.1:5555"', "bad-endpoint"),
        ('bind = "tcp://0.0.0.0:5555"', "remote-bind-refused"),
        ('http = "5556"', "bad-endpoint"),
        ('http = "0.0.0.0:5556"', "remote-bind-refused"),
    ],
)
def test_check_refuses_addresses_that_serve_would_refuse(toml, text, code):
    done = run_cli("config", "check", toml(text))
    assert done.returncode == 3
    assert done.stderr.startswith(f"error ({code}): ")
    assert run_cli("config", "check", toml(f"allow_remote = true\n{text}")).returncode == (
        3 if code == "bad-endpoint" else 0
    )


def test_every_setting_has_a_group_whose_first_key_exists():
    assert set(GROUPS) <= set(KEYS)
    assert {setting.group for setting in settings().values()} == set(GROUPS.values())


def test_check_looks_at_the_file_alone(toml):
    assert run_cli("config", "check", toml("seed = 1"), TTA_SEED="many").returncode == 0
    assert run_cli("config", "show", "--config", toml("seed = 1"), TTA_SEED="many").returncode == 2
    assert run_cli("config", "check").returncode == 2
    assert run_cli("config", "check", toml("").parent / "missing.toml").returncode == 2
