"""What a user gets: the wheel's content, and every command's help in an install of the core packages only."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from email import message_from_string
from importlib import metadata
from pathlib import Path, PurePosixPath

import pytest

from running import REPOSITORY

FOLDERS = {
    "runtime": "tta_runtime",
    "adapters": "tta_adapters",
    "exporters": "tta_exporters",
    "edge": "tta_edge",
    "cloud": "tta_cloud",
}
COMMANDS = {
    "tta-edge": [
        "serve", "status", "streams", "top", "adapt", "reset", "rollback", "reload", "events", "doctor", "config",
        "stream", "evaluate", "demo",
    ],
    "tta-export": ["build", "check", "info"],
}  # fmt: skip
CORE = {
    "numpy",
    "pyzmq",
    "msgpack",
    "msgspec",
    "cryptography",
    "safetensors",
    "typer",
    "rich",
    "prometheus-client",
}
WEIGHTS = {".bin", ".onnx", ".safetensors", ".npz", ".npy", ".pt", ".pth", ".pkl", ".h5"}
PATIENCE_S = 600
NO_INDEX = (
    "NewConnectionError",
    "Temporary failure in name resolution",
    "Failed to establish",
    "ConnectTimeout",
)


def run(*command, **options):
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        **options,
    )


def setuptools_is_here():
    try:
        return int(metadata.version("setuptools").split(".")[0]) >= 77
    except metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the working tree, built from a copy so that nothing is left in it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    leave = shutil.ignore_patterns("*.egg-info", "build", "*_cache")
    for folder in FOLDERS:
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=leave)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / file, source)
    isolation = ["--no-build-isolation"] if setuptools_is_here() else []
    built = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", *isolation, "-w", out, source)
    skip_without_index(built)
    assert built.returncode == 0, built.stderr
    (file,) = out.iterdir()
    return file


def skip_without_index(result):
    if result.returncode != 0 and any(sign in result.stderr for sign in NO_INDEX):
        pytest.skip("no package index can be reached from here")


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {PurePosixPath(name) for name in archive.namelist()}


def sources(folder, package):
    """The files of a package in the working tree, as the wheel names them."""
    root = REPOSITORY / folder
    return {
        PurePosixPath(path.relative_to(root).as_posix())
        for path in (root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(names):
    expected = set().union(*(sources(folder, package) for folder, package in FOLDERS.items()))
    packed = {name for name in names if not name.parts[0].endswith(".dist-info")}
    empty = {name for name in expected if name.parts[0] not in {n.parts[0] for n in packed}}
    assert {name.name for name in empty} <= {"py.typed"}, "a whole package is left out"
    assert packed == expected - empty


def test_every_package_is_typed_and_no_test_is_shipped(names):
    packages = {name.parts[0] for name in names if not name.parts[0].endswith(".dist-info")}
    assert packages <= set(FOLDERS.values())
    for package in packages:
        assert PurePosixPath(package, "py.typed") in names
    assert not [name for name in names if "test" in name.parts[0] or name.name.startswith("test_")]


def test_the_only_weights_are_the_built_in_bundles_own(names):
    weights = {name for name in names if name.suffix in WEIGHTS}
    builtin = PurePosixPath("tta_edge/builtin")
    assert weights
    assert all(builtin in name.parents for name in weights)
    assert any(name.name == "ATTRIBUTION.md" for name in names if builtin in name.parents)
    assert PurePosixPath("tta_edge/builtin/digits/bundle/manifest.json") in names


def test_the_metadata_names_licence_commands_and_only_the_core(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        described = message_from_string(archive.read(f"{info}/METADATA").decode())
        commands = archive.read(f"{info}/entry_points.txt").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert described["License-Expression"] == "Apache-2.0"
    assert described["Requires-Python"] == ">=3.10"
    required = [line for line in described.get_all("Requires-Dist") if "extra ==" not in line]
    assert {line.split(">=")[0].strip() for line in required if "python_version" not in line} == CORE
    for command in COMMANDS:
        assert f"{command} = " in commands


# --- a bare install ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """The folder of commands of a new environment with the wheel and its core dependencies, nothing more."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    binaries = folder / ("Scripts" if sys.platform == "win32" else "bin")
    installed = run(binaries / "python", "-m", "pip", "install", "--quiet", wheel, cwd=folder)
    skip_without_index(installed)
    assert installed.returncode == 0, installed.stderr
    return binaries


def bare_run(bare, command, *arguments):
    """A command of the bare environment, away from the working tree and its settings."""
    environment = {"PATH": str(bare), "HOME": str(bare.parent), "NO_COLOR": "1", "COLUMNS": "120"}
    return run(bare / command, *arguments, cwd=bare.parent, env=environment)


def test_a_bare_install_has_no_engine_and_no_torch(bare):
    for name in ("torch", "onnx", "onnxruntime", "PIL", "matplotlib", "scipy"):
        assert bare_run(bare, "python", "-c", f"import {name}").returncode != 0
    imported = bare_run(bare, "python", "-c", "import tta_runtime, tta_edge; print(tta_edge.__file__)")
    assert imported.returncode == 0, imported.stderr
    assert Path(imported.stdout.strip()).is_relative_to(bare.parent)


@pytest.mark.parametrize(
    ("command", "subcommand"),
    [(command, sub) for command, subs in COMMANDS.items() for sub in (None, *subs)],
)
def test_help_works_in_a_bare_install(bare, command, subcommand):
    result = bare_run(bare, command, *filter(None, [subcommand]), "--help")
    assert result.returncode == 0, result.stderr
    assert f"Usage: {command}" in result.stdout


def assert_names_the_extra(result, extra):
    assert result.returncode not in (0, 1), result.stdout
    assert f"tta-runtime[{extra}]" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_without_an_engine_the_daemon_names_the_extra(bare):
    assert_names_the_extra(bare_run(bare, "tta-edge", "serve", "--bind", "tcp://127.0.0.1:0"), "cpu")


def test_without_torch_the_exporter_names_the_extra(bare, tmp_path):
    (tmp_path / "models.py").write_text("def net():\n    return None\n")
    build = [
        "build",
        f"{tmp_path / 'models.py'}:net",
        "--input",
        "3x8x8",
        "--classes",
        "2",
        "-o",
        tmp_path / "out",
    ]
    assert_names_the_extra(bare_run(bare, "tta-export", *build), "export")
    assert not (tmp_path / "out").exists()
