"""The command line: what it makes and prints, its exit codes, and one line for everything that goes wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import typer
from onnx import helper, numpy_helper
from safetensors.torch import save_file

from bad_bundles import edited, flip_byte, reseal
from running import PATIENCE_S, process_environment
from snapshots import unchanged
from tta_exporters.cli import app, main
from tta_exporters.sources import load_network
from tta_exporters.tensorrt import TARGETS
from tta_runtime import Bundle, Model
from tta_runtime.errors import FileTampered

COMMANDS = ("build", "check", "info", "warm-up", "attack", "train-stream", "build-text")

MODELS = """
import torch
from torch import nn

calls = 0

def tiny(*last):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3), *last)

class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)

class Interrupted(nn.Module):
    "As if the user pressed Ctrl-C while the network is traced."
    def forward(self, x):
        global calls
        calls += 1
        if calls > 1:
            raise KeyboardInterrupt
        return x

class Sorts(nn.Module):
    def forward(self, x):
        return x + torch.linalg.eigvalsh(x[:, :, None] * x[:, None, :])

class Decides(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

def noisy(): return tiny(Noise())
def interrupted(): return tiny(Interrupted())
def sorts(): return tiny(Sorts())
def decides(): return tiny(Decides())
def raises(): raise RuntimeError("Error(s) in loading:\\n\\tMissing key [0]\\n")
"""


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """`tta-export ARGUMENTS` in this process."""

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return call


def run_process(*arguments: object) -> Result:
    """`tta-export ARGUMENTS` as the installed script runs it."""
    script = "import sys; from tta_exporters.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
        env=process_environment(),
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def assert_one_line(text: str, code: str) -> str:
    """An error is one line with its code, its cause and its fix, the last of all, and no trace."""
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("error (")] == lines[-1:], text
    assert lines[-1].startswith(f"error ({code}): "), text
    assert re.search(r"[.?] [A-Z]", lines[-1]), f"no fix in {lines[-1]}"
    assert "Traceback" not in text
    return lines[-1]


@dataclass(frozen=True)
class Exported:
    folder: Path
    built: Result

    @property
    def bundle(self) -> Path:
        return self.folder / "out" / "bundle"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """One bundle built by the command in a process of its own."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "models.py").write_text(MODELS)
    state = load_network(f"{folder}/models.py:tiny").state_dict()
    save_file({name: value + 0.25 for name, value in state.items()}, folder / "w.safetensors")
    built = run_process(
        "build",
        f"{folder}/models.py:tiny",
        "--weights",
        folder / "w.safetensors",
        "--methods",
        "source, tent",
        "--set",
        "tent.lr=0.05",
        "--set",
        "tent.statistics=running",
        "--input",
        "6",
        "--classes",
        "3",
        "--class-names",
        "cat, dog,[red]",
        "--id",
        "tiny [v1]",
        "--parity",
        "2",
        "--json",
        "-o",
        folder / "out" / "bundle",
    )
    return Exported(folder, built)


@pytest.fixture
def builder() -> None:
    pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models.py").write_text(MODELS)
    return tmp_path


@pytest.fixture
def bundle(exported: Exported, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(exported.bundle, tmp_path / "bundle"))


# --- the good way -----------------------------------------------------------------------------------


def test_build_makes_a_bundle_and_prints_json(exported: Exported) -> None:
    assert exported.built.status == 0, exported.built.err
    printed = json.loads(exported.built.out)
    assert printed["bundle"] == str(exported.bundle)
    assert printed["bytes"] == sum(
        file.stat().st_size for file in exported.bundle.iterdir() if file.name != "manifest.json"
    )
    assert printed["theta"] == 4 * 8
    assert set(printed["parity"]) == {"source", "tent"}
    assert all(0 <= entry["error"] < 1e-4 and entry["output"] for entry in printed["parity"].values())
    # What it does meanwhile is told on the other channel.
    assert "step.tent: tracing" in exported.built.err
    assert "error" not in exported.built.err


def test_the_bundle_is_what_the_options_say(exported: Exported) -> None:
    model = Model.open(exported.bundle)
    manifest = model.manifest
    assert (manifest.model_id, manifest.default_method) == ("tiny [v1]", "tent")
    assert manifest.class_names == ["cat", "dog", "[red]"]
    assert model.hyper["lr"] == 0.05
    assert manifest.provenance["source"] == "models.py:tiny"
    assert manifest.provenance["weights"] == "w.safetensors"
    network = load_network(f"{exported.folder}/models.py:tiny", exported.folder / "w.safetensors")
    x = np.random.default_rng(0).random((3, 6), dtype=np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(model.predict(x).logits, expected, rtol=1e-4, atol=1e-5)


def test_info_prints_json(exported: Exported, run) -> None:
    with unchanged(exported.bundle):
        result = run("info", exported.bundle, "--json")
    assert result.status == 0
    assert json.loads(result.out) == json.loads((exported.bundle / "manifest.json").read_text())


def test_info_describes_for_people(exported: Exported, run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = run("info", exported.bundle, "--theta")
    assert result.status == 0
    for text in (
        "tiny [v1]",
        "['batch', 6]",
        "lr=0.05",
        "tent (default)",
        "1.running_var",
        "[8]",
        "3 classes",
    ):
        assert text in result.out, text


def test_check_prints_a_line_for_each_check_and_writes_json(exported: Exported, tmp_path: Path, run) -> None:
    with unchanged(exported.bundle):
        result = run("check", exported.bundle, "--json", tmp_path / "result.json")
    assert result.status == 0, result.out
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["ok"] is True
    assert [(entry["graph"], entry["check"]) for entry in written["checks"]] == [
        ("forward", "onnx checker"),
        ("step.tent", "onnx checker"),
        ("forward", "runs (source)"),
        ("step.tent", "runs (tent)"),
    ]
    assert len([line for line in result.out.splitlines() if line.startswith("ok")]) == 4


def test_bytes_get_their_own_range_by_default_and_a_text_for_people(folder: Path, run) -> None:
    arguments = ["--dtype", "uint8", "--methods", "source", "--input", "6", "--classes", "3"]
    result = run("build", f"{folder}/models.py:tiny", *arguments, "--parity", "1", "-o", folder / "bundle")
    assert result.status == 0, result.err
    assert "methods source" in result.out
    assert "source: worst deviation" in result.out
    manifest = Model.open(folder / "bundle").manifest
    assert (manifest.input.low, manifest.input.high, manifest.model_id) == (0.0, 255.0, "tiny")


# --- help -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_names_the_exit_codes_and_an_example(command: str | None, run, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = run(*filter(None, [command]), "--help")
    words = " ".join(result.out.split())
    assert result.status == 0
    assert "Exit codes: 0 done; 1 a check failed or a warm-up diverged; 2 wrong usage" in words
    if command:
        assert f"Example: tta-export {command} " in words


def test_every_command_and_option_is_documented() -> None:
    commands = typer.main.get_command(app).commands
    assert tuple(commands) == COMMANDS
    for name, command in commands.items():
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_help_needs_neither_torch_nor_onnx() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'onnx', 'onnxruntime', 'onnx_ir']));"
        "from tta_exporters.cli import main; main(sys.argv[1:])"
    )

    def without(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=process_environment(),
            check=False,
            timeout=PATIENCE_S,
        )

    result = without("build", "--help")
    assert (result.returncode, "--weights" in result.stdout) == (0, True), result.stderr
    result = without("build", "models.py:tiny", "--input", "6", "--classes", "3", "-o", "nowhere")
    assert result.returncode == 3
    assert "tta-runtime[export]" in assert_one_line(result.stderr, "missing")


# --- usage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["build"], "source"),
        (["build", "models.py:tiny", "--input", "6", "--classes", "3"], "--out"),
        (["build", "models.py:tiny", "--input", "6", "-o", "bundle"], "--classes"),
        (["build", "models.py:tiny", "--input", "6", "--classes", "1", "-o", "bundle"], "--classes"),
        (["build", "models.py:tiny", "--inptu", "6", "--classes", "3", "-o", "bundle"], "--input"),
        (["check"], "bundle"),
        (["check", "bundle", "--tensort"], "--tensorrt"),
        (["deploy"], "deploy"),
    ],
)
def test_wrong_usage_ends_with_2(
    folder: Path, run, arguments: Sequence[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with unchanged(folder):
        result = run(*arguments)
    assert result.status == 2
    assert says in result.err
    assert result.out == ""


GOOD = {"--input": "6", "--classes": "3", "--methods": "source,tent"}


@pytest.mark.parametrize(
    ("option", "value", "status", "code", "says"),
    [
        ("--set", "lr=0.1", 2, "option", "Write METHOD.OPTION=VALUE"),
        ("--set", "tent.lr", 2, "option", "Write METHOD.OPTION=VALUE"),
        ("--set", "tent.=1", 2, "option", "Write METHOD.OPTION=VALUE"),
        ("--set", ".lr=1", 2, "option", "Write METHOD.OPTION=VALUE"),
        ("--set", "tent.lr=", 2, "option", "Write METHOD.OPTION=VALUE"),
        ("--set", "", 2, "option", "Write METHOD.OPTION=VALUE"),
        ("--set", "tent.lrr=0.1", 2, "option", "did you mean 'lr'"),
        ("--set", "tent.lr=fast", 2, "option", "not a number"),
        ("--set", "tent.ema=2", 2, "option", "from 0 to 1"),
        ("--set", "norm.ema=0.1", 2, "option", "norm, which is not built"),
        ("--methods", "tnet", 2, "option", "did you mean 'tent'"),
        ("--methods", ",", 2, "option", "no method is named"),
        ("--methods", "nowhere.py:Mine", 4, "model-source", "nowhere.py"),
        ("--default-method", "norm", 2, "option", "Methods are source, tent"),
        ("--input", "3x", 2, "option", "3x32x32"),
        ("--input", "0x6", 2, "option", "3x32x32"),
        ("--input", "six", 2, "option", "'six'"),
        ("--input", "7", 4, "network-refused", "Check --input"),
        ("--classes", "4", 4, "network-refused", "Check --classes"),
        ("--class-names", "a,b", 2, "option", "2 class names for 3 classes"),
        ("--dtype", "int8", 2, "option", "Choose float32 or uint8"),
        ("--range", "1", 2, "option", "--range has 1 numbers, expected 2"),
        ("--range", "a:b", 2, "option", "'a:b'"),
        ("--range", "1:1", 2, "option", "1..1"),
        ("--mean", "a", 2, "option", "--mean is 'a'"),
        ("--mean", ".1,.2", 2, "option", "mean has 2 numbers"),
        ("--std", "0", 2, "option", "positive"),
        ("--include", "layer9*", 4, "network-refused", "no module selected"),
        ("--exclude", "*", 4, "network-refused", "no module selected"),
        ("--head", "fc", 4, "network-refused", "head 'fc' is no module"),
        ("--weights", "nowhere.safetensors", 4, "model-source", "nowhere.safetensors"),
        ("--weights", "models.py", 4, "model-source", "models.py is damaged or holds more than tensors"),
        ("--out", "models.py", 2, "output-exists", "models.py exists and is not empty"),
        ("--out", ".", 2, "output-exists", "exists and is not empty"),
        ("--out", "models.py/bundle", 2, "output-unwritable", "Choose another -o"),
    ],
)
def test_an_option_that_does_not_fit_is_one_line(
    folder: Path,
    run,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    value: str,
    status: int,
    code: str,
    says: str,
) -> None:
    monkeypatch.chdir(folder)
    options = {**GOOD, "--out": "new/bundle", option: value}
    with unchanged(folder):
        result = run("build", "models.py:tiny", *(part for pair in options.items() for part in pair))
    assert result.status == status, result.err
    assert says in assert_one_line(result.err, code)
    assert result.out == ""


@pytest.mark.parametrize(
    ("source", "status", "code", "says"),
    [
        ("models.py", 4, "model-source", "is no model source"),
        ("keras:resnet", 4, "model-source", "unknown kind of model source 'keras'"),
        ("nowhere.py:tiny", 4, "model-source", "there is no file nowhere.py"),
        ("models.py:tny", 4, "model-source", "It has tiny"),
        ("models.py:raises", 4, "model-source", "RuntimeError: Error(s) in loading:"),
        ("models.py:Noise", 4, "network-refused", "no module selected"),
        ("models.py:sorts", 4, "operator-not-supported", "aten._linalg_eigh.default in module '4'"),
        ("models.py:decides", 4, "trace-failed", "in module '4'"),
        ("models.py:noisy", 1, "parity", "do not ship this bundle"),
        ("hf:.", 4, "model-source", "holds no config.json"),
    ],
)
def test_a_source_that_cannot_become_a_bundle_is_one_line(
    folder: Path, run, monkeypatch: pytest.MonkeyPatch, source: str, status: int, code: str, says: str
) -> None:
    monkeypatch.chdir(folder)
    options = ["--input", "6", "--classes", "3", "--methods", "source", "-o", "new/bundle"]
    with unchanged(folder):
        (folder / "new").mkdir(exist_ok=True)
        result = run("build", source, *options)
        (folder / "new").rmdir()  # fails if anything was left in it
    assert result.status == status, result.err
    line = result.err.splitlines()[-1]
    assert line.startswith(f"error ({code}): ")
    assert says in line
    assert "Traceback" not in result.err
    assert result.out == ""


def test_weights_of_another_network_are_one_line(folder: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    save_file({"0.weight": torch.zeros(8, 7), "fc.bias": torch.zeros(3)}, folder / "w.safetensors")
    options = ["--input", "6", "--classes", "3", "-o", "bundle", "--weights", "w.safetensors"]
    with unchanged(folder):
        result = run("build", "models.py:tiny", *options)
    assert result.status == 4
    line = assert_one_line(result.err, "weights-do-not-fit")
    assert all(name in line for name in ("'fc.bias'", "0.weight [8, 7] instead of [8, 6]", "'0.bias'"))


def test_an_interrupted_build_ends_with_130_and_leaves_nothing(
    folder: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with unchanged(folder):
        result = run("build", "models.py:interrupted", "--input", "6", "--classes", "3", "-o", "new/bundle")
    assert result.status == 130
    assert "forward: tracing" in result.err
    assert "Traceback" not in result.err


# --- bundles that are none, graphs that fail --------------------------------------------------------


@pytest.mark.parametrize("command", [["check"], ["check", "--tensorrt"], ["info"], ["info", "--json"]])
@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda path: flip_byte(path, "step.tent.onnx"), "file-tampered"),
        (lambda path: flip_byte(path, "theta.safetensors"), "file-tampered"),
        (lambda path: (path / "forward.onnx").write_bytes(b"cut"), "file-truncated"),
        (lambda path: (path / "theta.safetensors").unlink(), "file-missing"),
        (lambda path: (path / "extra").write_text("x"), "file-unlisted"),
        (edited(lambda data: data.update(format_version=99)), "newer-format"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest-malformed"),
        (shutil.rmtree, "manifest-missing"),
    ],
)
def test_a_bad_bundle_ends_with_4_and_stays_as_it_is(bundle: Path, run, command, spoil, code: str) -> None:
    spoil(bundle)
    with unchanged(bundle.parent):
        result = run(*command, bundle)
    assert result.status == 4
    assert_one_line(result.err, code)
    assert result.out == ""


def not_finite(path: Path) -> None:
    """The logits of the step become NaN, and the manifest vouches for it."""
    file = path / "step.tent.onnx"
    model = onnx.load(file, load_external_data=False)
    for node in model.graph.node:
        node.output[:] = ["before" if name == "logits" else name for name in node.output]
        node.input[:] = ["before" if name == "logits" else name for name in node.input]
    model.graph.initializer.append(numpy_helper.from_array(np.array(np.nan, np.float32), "nan"))
    model.graph.node.append(helper.make_node("Mul", ["before", "nan"], ["logits"]))
    onnx.save(model, file)


def no_graph(path: Path) -> None:
    (path / "step.tent.onnx").write_bytes(b"no graph [at all]" * 9)


@pytest.mark.parametrize(
    ("spoil", "failed"), [(not_finite, ["runs (tent)"]), (no_graph, ["onnx checker", "runs (tent)"])]
)
def test_check_ends_with_1_when_a_graph_fails(bundle: Path, run, tmp_path: Path, spoil, failed) -> None:
    spoil(bundle)
    reseal(bundle)
    with unchanged(bundle):
        result = run("check", bundle, "--json", tmp_path / "result.json")
    assert result.status == 1
    assert "Traceback" not in result.err
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["ok"] is False
    bad = [entry for entry in written["checks"] if not entry["ok"]]
    assert [(entry["graph"], entry["check"]) for entry in bad] == [("step.tent", name) for name in failed]
    lines = [line for line in result.out.splitlines() if line.startswith("FAIL step.tent")]
    # Every word is printed, whatever brackets it holds.
    assert [line.endswith(entry["detail"]) for line, entry in zip(lines, bad, strict=True)] == [True] * len(
        bad
    )


def test_a_result_that_cannot_be_written_is_one_line(exported: Exported, run, tmp_path: Path) -> None:
    with unchanged(tmp_path), unchanged(exported.bundle):
        result = run("check", exported.bundle, "--json", tmp_path / "nowhere" / "result.json")
    assert result.status == 2
    assert_one_line(result.err, "option")


def test_tensorrt_that_is_not_installed_ends_with_3(
    exported: Exported, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with unchanged(exported.bundle):
        result = run("check", exported.bundle, "--tensorrt")
    assert result.status == 3
    assert "tta-runtime[rtx]" in assert_one_line(result.err, "extra-missing")


@pytest.mark.usefixtures("builder")
def test_tensorrt_says_what_it_refuses(bundle: Path, run) -> None:
    assert run("check", bundle, "--tensorrt").status == 0
    file = bundle / "forward.onnx"
    model = onnx.load(file, load_external_data=False)
    model.graph.node.append(helper.make_node("Unique", ["theta"], ["values"], name="unknown_to_tensorrt"))
    onnx.save(model, file)
    reseal(bundle)
    with unchanged(bundle):
        result = run("check", bundle, "--tensorrt")
    assert result.status == 1
    (line,) = [line for line in result.out.splitlines() if line.startswith("FAIL")]
    assert "node unknown_to_tensorrt (Unique)" in line


@pytest.mark.usefixtures("builder")
def test_build_for_tensorrt_writes_each_graph_for_it_too(folder: Path, run) -> None:
    out = folder / "bundle"
    options = ["--methods", "source,tent", "--input", "6", "--classes", "3", "--parity", "0", "--json"]
    for_tensorrt = ["--tensorrt", "--tensorrt-targets", "8.9"]
    result = run("build", f"{folder}/models.py:tiny", *options, *for_tensorrt, "-o", out)
    assert result.status == 0, result.err
    printed = json.loads(result.out)
    bundle = Bundle.open(out)
    graphs = bundle.manifest.graphs
    assert {key: graph.tensorrt for key, graph in graphs.items()} == {
        "forward": "forward.tensorrt.onnx",
        "step.tent": "step.tent.tensorrt.onnx",
    }
    for key, graph in graphs.items():
        assert graph.tensorrt in bundle.manifest.files
        variant = onnx.load(bundle.tensorrt_file(key))
        assert [port.name for port in variant.graph.input] == [port.name for port in graph.inputs]
        assert [port.name for port in variant.graph.output] == [port.name for port in graph.outputs]
    assert printed["bytes"] == sum(
        file.stat().st_size for file in out.iterdir() if file.name != "manifest.json"
    )
    spoilt = Path(shutil.copytree(out, folder / "spoilt"))
    flip_byte(spoilt, "step.tent.tensorrt.onnx")
    with pytest.raises(FileTampered, match=r"step\.tent\.tensorrt\.onnx"):
        Bundle.open(spoilt)


@pytest.mark.usefixtures("builder")
@pytest.mark.parametrize(
    ("targets", "status", "code", "says"),
    [
        ("9.9", 2, "option", "compute capability '9.9' is not one that tensorrt-rtx"),
        ("8.9,turing", 2, "option", "'turing'"),
        (",", 2, "option", "no compute capability is named"),
        (
            "7.5",
            1,
            "check-failed",
            "graph forward: TensorRT's builder refuses it",
        ),  # it has no float32 products
    ],
)
def test_a_bundle_for_a_gpu_that_tensorrt_does_not_build_for_is_not_made(
    folder: Path, run, targets: str, status: int, code: str, says: str
) -> None:
    options = ["--methods", "source", "--input", "6", "--classes", "3", "-o", folder / "bundle"]
    with unchanged(folder):
        result = run(
            "build", f"{folder}/models.py:tiny", *options, "--tensorrt", "--tensorrt-targets", targets
        )
    assert result.status == status, result.err
    assert says in assert_one_line(result.err, code)
    assert result.out == ""


@pytest.mark.parametrize("command", ["build", "check"])
def test_targets_of_tensorrt_are_refused_where_it_is_not_asked_for(folder: Path, run, command: str) -> None:
    options = ["--methods", "source", "--input", "6", "--classes", "3", "-o", folder / "bundle"]
    rest = [f"{folder}/models.py:tiny", *options] if command == "build" else [folder]
    with unchanged(folder):
        result = run(command, *rest, "--tensorrt-targets", "8.9")
    assert result.status == 2
    assert "without --tensorrt" in assert_one_line(result.err, "option")


def test_help_names_the_targets_that_are_built_for_by_default(run) -> None:
    names = ",".join(f"{major}.{minor}" for major, minor in TARGETS)
    for command in ("build", "check"):
        assert f"[default:({names})]" in "".join(run(command, "--help").out.replace("│", " ").split())


def test_build_for_tensorrt_without_a_builder_ends_with_3(
    folder: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    options = ["--methods", "source", "--input", "6", "--classes", "3", "-o", folder / "bundle"]
    with unchanged(folder):
        result = run("build", f"{folder}/models.py:tiny", *options, "--tensorrt")
    assert result.status == 3
    assert "pip install 'tta-runtime[rtx]'" in assert_one_line(result.err, "extra-missing")
