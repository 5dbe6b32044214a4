"""Import directions, read from the imports themselves, and the runtime and the edge at work without torch."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import tiny_bundle
from snapshots import unchanged

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "tta_runtime": "runtime",
    "tta_adapters": "adapters",
    "tta_exporters": "exporters",
    "tta_edge": "edge",
    "tta_cloud": "cloud",
}

# What each package may import besides the standard library and itself.
MAY_IMPORT = {
    "tta_runtime": {"numpy", "onnxruntime", "tensorrt", "msgpack", "msgspec", "cryptography", "safetensors"}
    | {"prometheus_client", "tomli", "tokenizers", "PIL"},
    "tta_edge": {"tta_runtime", "numpy", "zmq", "typer", "rich", "msgpack", "msgspec"}
    | {"prometheus_client", "tomli", "matplotlib"},
    "tta_adapters": {"torch"},
    "tta_exporters": {"tta_adapters", "tta_runtime", "torch", "onnx", "onnxscript", "onnx_ir", "onnxruntime"}
    | {"numpy", "msgspec", "safetensors", "typer", "rich", "timm", "torchvision", "transformers"}
    | {"tensorrt", "tensorrt_rtx"},
    "tta_cloud": {"tta_runtime", "tta_adapters", "tta_exporters", "torch", "numpy", "zmq", "typer", "rich"}
    | {"msgpack", "msgspec", "cryptography", "safetensors", "prometheus_client", "tomli"},
}

# What is in no core install: imported inside functions only, where its absence gets a named error.
ONLY_IN_FUNCTIONS = {
    "tta_runtime": {"onnxruntime", "tensorrt", "tokenizers", "PIL"},
    "tta_edge": {"matplotlib"},
    "tta_exporters": {"timm", "torchvision", "transformers", "tensorrt", "tensorrt_rtx"},
}

# An adapter or a method is a pure function of tensors.
IO_MODULES = {
    "os",
    "io",
    "pathlib",
    "shutil",
    "socket",
    "subprocess",
    "tempfile",
    "urllib",
    "http",
    "sqlite3",
}
NEVER = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}

ABSENT = ["torch", "onnx", "onnxscript", "onnx_ir", "scipy", "sklearn", "tta_adapters", "tta_exporters"]


@dataclass(frozen=True)
class Import:
    """One import as it stands in the code."""

    module: str
    line: int
    in_function: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def imports(code: str) -> Iterator[Import]:
    """Every absolute import: statements, those for type checking as well, and calls with a literal name."""

    def walk(node: ast.AST, inside: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield Import(node.module or "", node.lineno, inside)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield Import(str(node.args[0].value), node.lineno, inside)
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from walk(ast.parse(code), False)


def violations(package: str, name: str, code: str) -> list[str]:
    """What a module imports that its package must not."""
    found = []
    for item in imports(code):
        own = item.top == package or item.top in sys.stdlib_module_names
        if item.top in NEVER:
            found.append(f"{name}:{item.line} imports {item.module}, which runs code from data")
        if not own and item.top not in MAY_IMPORT[package]:
            found.append(f"{name}:{item.line} imports {item.module}, {package} must not")
        if item.top in ONLY_IN_FUNCTIONS.get(package, ()) and not item.in_function:
            found.append(f"{name}:{item.line} imports {item.module} at the top, it belongs into a function")
        if package == "tta_adapters" and item.top in IO_MODULES:
            found.append(f"{name}:{item.line} imports {item.module}, adapters do no I/O")
    return found


def modules(package: str) -> list[Path]:
    return sorted((ROOT / FOLDERS[package] / package).rglob("*.py"))


@pytest.mark.parametrize("package", FOLDERS)
def test_import_directions(package):
    found = []
    for file in modules(package):
        found += violations(package, str(file.relative_to(ROOT)), file.read_text())
    assert found == []


@pytest.mark.parametrize(
    ("package", "code", "says"),
    [
        ("tta_runtime", "import torch", "imports torch, tta_runtime must not"),
        ("tta_runtime", "def f():\n    from torch.nn import Module", "m.py:2 imports torch.nn"),
        ("tta_runtime", "import importlib\nimportlib.import_module('onnx')", "m.py:2 imports onnx"),
        ("tta_runtime", "import onnxruntime", "belongs into a function"),
        ("tta_runtime", "import tta_edge.wire", "imports tta_edge.wire"),
        ("tta_edge", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", "m.py:3"),
        ("tta_edge", "from tta_adapters import norm", "tta_edge must not"),
        ("tta_edge", "from tta_cloud import ledger", "tta_edge must not"),
        ("tta_adapters", "import pathlib", "no I/O"),
        ("tta_adapters", "import zmq", "tta_adapters must not"),
        ("tta_adapters", "from tta_runtime import Model", "tta_adapters must not"),
        ("tta_exporters", "import tta_edge", "tta_exporters must not"),
        ("tta_cloud", "import pickle", "runs code from data"),
    ],
)
def test_a_wrong_import_would_be_seen(package, code, says):
    """The companion: the test above must be able to fail."""
    assert any(says in line for line in violations(package, "m.py", code))


def test_every_package_is_there_and_nothing_else_is_beside_it():
    for package, folder in FOLDERS.items():
        assert modules(package), package
        beside = {
            p.name for p in (ROOT / folder).iterdir() if not p.name.endswith((".egg-info", "__pycache__"))
        }
        assert beside == {package}


# ---------------------------------------------------------------------------------- without torch


def cpu_install() -> list[metadata.Distribution]:
    """The distributions of `pip install tta-runtime[cpu]`, with what they require in turn."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [Requirement(r) for r in (*project["dependencies"], *project["optional-dependencies"]["cpu"])]
    found: dict[str, metadata.Distribution] = {}
    while waiting:
        requirement = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found[name] = metadata.distribution(name)
        waiting += [Requirement(r) for r in found[name].requires or ()]
    return list(found.values())


@pytest.fixture(scope="module")
def cpu_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site-packages with links to exactly those distributions: what is not of [cpu] is really not there."""
    site = tmp_path_factory.mktemp("cpu-site")
    for distribution in cpu_install():
        assert distribution.files
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    for package in ("tta_runtime", "tta_edge"):
        (site / package).symlink_to(ROOT / FOLDERS[package] / package)
    return site


def run_in(site: Path, code: str, *arguments: str | Path) -> dict[str, object]:
    """Run code in an interpreter that sees the standard library and `site` only; its last line is JSON.

    -I and -S leave out the environment, the user's site, the virtual environment's site-packages and the
    working directory.
    """
    start = f"import sys\nsys.path.append({str(site)!r})\n"
    command = [sys.executable, "-I", "-S", "-c", start + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=site)
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


# The end of each program below: what cannot be found, and what was loaded all the same.
PROOF = f"""
import importlib.util, json
absent = {{name: importlib.util.find_spec(name) is None for name in {ABSENT!r}}}
result["absent"] = absent
result["loaded"] = [name for name in sys.modules if name.partition(".")[0] in absent]
print(json.dumps(result))
"""

ADAPT = """
import numpy as np
from tta_runtime import Model
x = np.load(sys.argv[2])
model = Model.open(sys.argv[1], method="tent")
before = model.predict(x).logits
for _ in range(3):
    step = model.adapt(x)
after = model.predict(x).logits
model.save(sys.argv[3])
again = Model.open(sys.argv[1], method="tent")
again.load(sys.argv[3])
result = {
    "steps": model.steps, "distance": model.distance, "digest": model.digest, "again": again.digest,
    "changed": bool((before != after).any()), "finite": bool(np.isfinite(after).all()),
}
"""

SERVE = """
import threading
import numpy as np
from tta_edge.client import Client
from tta_edge.config import Config
from tta_edge.service import Server
x = np.load(sys.argv[2])
server = Server(Config(bundle=sys.argv[1], bind="tcp://127.0.0.1:0", threads=1))
thread = threading.Thread(target=server.run)
thread.start()
assert server.ready.wait(60)
try:
    with Client(server.endpoint, timeout_s=30.0) as client:
        replies = [client.predict(x) for _ in range(3)]
finally:
    server.stop()
    thread.join(60)
result = {"steps": replies[-1].steps, "adapted": replies[-1].adapted, "distance": replies[-1].distance}
"""


@pytest.fixture(scope="module")
def bundle_and_batch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    import numpy as np

    folder = tmp_path_factory.mktemp("tiny")
    tiny_bundle.build(folder / "bundle")
    np.save(folder / "x.npy", tiny_bundle.samples(16, shift=1.0)[0])
    return folder / "bundle", folder / "x.npy"


def assert_without_torch(result: dict[str, object]) -> None:
    assert importlib.util.find_spec("onnx"), "here it is installed, so its absence there is the site's doing"
    assert result["absent"] == dict.fromkeys(ABSENT, True)
    assert result["loaded"] == []


def test_the_runtime_predicts_and_adapts_where_torch_is_absent(cpu_site, bundle_and_batch, tmp_path):
    bundle, batch = bundle_and_batch
    with unchanged(bundle):
        result = run_in(cpu_site, ADAPT + PROOF, bundle, batch, tmp_path / "state")
    assert_without_torch(result)
    assert result["steps"] == 3
    assert result["changed"]
    assert result["finite"]
    assert result["distance"] > 0
    assert result["again"] == result["digest"]


def test_the_edge_serves_and_adapts_where_torch_is_absent(cpu_site, bundle_and_batch):
    bundle, batch = bundle_and_batch
    with unchanged(bundle):
        result = run_in(cpu_site, SERVE + PROOF, bundle, batch)
    assert_without_torch(result)
    assert result["adapted"]
    assert result["steps"] == 3
    assert result["distance"] > 0


def test_every_module_of_runtime_and_edge_imports_where_torch_is_absent(cpu_site):
    names = [
        ".".join(file.relative_to(ROOT / FOLDERS[package]).with_suffix("").parts).removesuffix(".__init__")
        for package in ("tta_runtime", "tta_edge")
        for file in modules(package)
        if file.name != "__main__.py"
    ]
    code = (
        "import importlib\nresult = {'names': [importlib.import_module(n).__name__ for n in sys.argv[1:]]}\n"
    )
    result = run_in(cpu_site, code + PROOF, *names)
    assert_without_torch(result)
    assert result["names"] == names


def test_the_proof_would_see_torch(cpu_site):
    """The companion: a site where something named torch is found and imported is reported as such."""
    spoilt = (
        "import types\nimport importlib.machinery as m\nsys.modules['torch'] = types.ModuleType('torch')\n"
    )
    spoilt += "sys.modules['torch'].__spec__ = m.ModuleSpec('torch', None)\nresult = {}\n"
    result = run_in(cpu_site, spoilt + PROOF)
    with pytest.raises(AssertionError):
        assert_without_torch(result)
    assert result["loaded"] == ["torch"]
