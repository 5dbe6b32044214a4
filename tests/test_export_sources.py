"""Where networks come from: files, libraries, directories, weights; what is wrong is named, nothing is executed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import pickle
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from networks import CLASSES, SIZE, mlp
from snapshots import unchanged
from tta_exporters import sources
from tta_exporters.build import BuildOptions, InputOptions, prepare
from tta_exporters.errors import ExtraMissing, SourceError, WeightsDoNotFit
from tta_exporters.sources import load_attribute, load_network, load_weights

FACTORIES = """
from __future__ import annotations

from dataclasses import dataclass

from torch import nn

@dataclass
class Width:
    hidden: int = 8

def good():
    width = Width().hidden
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, 3)).train()

def raises():
    raise LookupError("no such\\nmoon")

def leaves():
    raise SystemExit(0)

def needs(depth):
    return good()

def number():
    return 3

def nothing():
    pass

constant = 7
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "models.py"
    path.write_text(FACTORIES)
    return path


def values(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


@contextlib.contextmanager
def network_unchanged(network: nn.Module) -> Iterator[None]:
    before = values(network)
    yield
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- FILE.py:factory --------------------------------------------------------------------------------


def test_a_file_is_executed_and_its_network_put_in_eval_mode(file: Path) -> None:
    network = load_network(f"{file}:good")
    assert not any(module.training for module in network.modules())
    assert network(torch.rand(2, 6)).shape == (2, 3)


def test_a_file_may_import_those_beside_it(tmp_path: Path) -> None:
    (tmp_path / "blocks_beside.py").write_text("from torch import nn\nmake = lambda: nn.Linear(2, 2)\n")
    (tmp_path / "uses.py").write_text("from blocks_beside import make\n")
    path = list(sys.path)
    assert isinstance(load_network(f"{tmp_path}/uses.py:make"), nn.Linear)
    assert sys.path == path


def test_a_colon_in_the_path_is_no_separator(tmp_path: Path) -> None:
    folder = tmp_path / "run:3"
    folder.mkdir()
    (folder / "models.py").write_text(FACTORIES)
    assert isinstance(load_network(f"{folder}/models.py:good"), nn.Sequential)


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("god", r"has no function or class 'god'\. It has Width, good, raises"),
        ("constant", "has no function or class 'constant'"),
        ("raises", r"models\.py:raises fails: LookupError: no such\. The factory takes no arguments"),
        ("leaves", r"models\.py:leaves fails: SystemExit: 0"),
        ("needs", "fails: TypeError: .*missing 1 required positional argument: 'depth'"),
        ("number", r"returned int, not a torch\.nn\.Module"),
        ("nothing", r"returned NoneType, not a torch\.nn\.Module"),
    ],
)
def test_a_factory_that_makes_no_network_is_refused(file: Path, factory: str, says: str) -> None:
    with unchanged(file.parent), pytest.raises(SourceError, match=says):
        load_network(f"{file}:{factory}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def f(:\n    pass\n", "fails on import: SyntaxError"),
        ("import surely_not_installed\n", "fails on import: ModuleNotFoundError: .*surely_not_installed"),
        ("1 / 0\n", "fails on import: ZeroDivisionError"),
        ("{}['weights']\n", "fails on import: KeyError: 'weights'"),
        ("assert False\n", "fails on import: AssertionError"),
        ("import sys\nsys.exit(0)\n", "fails on import: SystemExit: 0"),
        ("\0", "fails on import: "),
        ("", r"has no function or class 'f'\. It has none"),
    ],
)
def test_a_file_that_cannot_be_imported_is_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(text)
    modules, path = set(sys.modules), list(sys.path)
    with pytest.raises(SourceError, match=says) as caught:
        load_network(f"{file}:f")
    assert "\n" not in str(caught.value)
    assert sys.path == path
    # A module that did not get through its import must not be found by whoever imports it next.
    assert set(sys.modules) - modules <= {"tta_source_broken"}
    assert text == "" or "tta_source_broken" not in sys.modules


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with unchanged(tmp_path), pytest.raises(SourceError, match=r"there is no file .*nowhere\.py"):
        load_attribute(tmp_path / "nowhere.py", "good")


@pytest.mark.parametrize("source", ["", "models.py", "models.py:", "timm:", ":good", "keras:resnet", "a:b:c"])
def test_what_is_no_source_is_answered_with_the_forms_there_are(source: str) -> None:
    with pytest.raises(SourceError, match=r"FILE\.py:factory"):
        load_network(source)


# --- libraries --------------------------------------------------------------------------------------


def needs(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


@pytest.mark.parametrize(
    ("library", "source", "size"),
    [("timm", "timm:resnet10t", 64), ("torchvision", "torchvision:squeezenet1_0", 64)],
)
def test_a_library_makes_a_network_by_name(library: str, source: str, size: int) -> None:
    needs(library)
    network = load_network(source)
    assert not network.training
    assert network(torch.rand(2, 3, size, size)).shape == (2, 1000)


@pytest.mark.parametrize(
    ("library", "name", "hint"),
    [
        ("timm", "resnet10x", r"See timm\.list_models\('\*resnet\*'\)"),
        ("torchvision", "resnet19", r"See torchvision\.models\.list_models"),
        # Not a classifier; making it would download a backbone.
        ("torchvision", "fasterrcnn_resnet50_fpn", "has no classifier 'fasterrcnn_resnet50_fpn'"),
    ],
)
def test_a_name_that_a_library_does_not_have_is_refused_with_a_hint(
    library: str, name: str, hint: str
) -> None:
    needs(library)
    with pytest.raises(SourceError, match=hint) as caught:
        load_network(f"{library}:{name}")
    assert name in caught.value.cause


@pytest.mark.parametrize("library", ["timm", "torchvision", "transformers"])
def test_a_library_that_is_not_installed_is_named(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    name = f"hf:{tmp_path}" if library == "transformers" else f"{library}:resnet18"
    monkeypatch.setitem(sys.modules, library, None)
    with unchanged(tmp_path), pytest.raises(ExtraMissing, match=f"{library} is not installed") as caught:
        load_network(name)
    assert f"pip install {library}" in caught.value.fix


# --- hf:DIR -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    needs("transformers")
    return sources.load_transformers()


def tiny_config(transformers: ModuleType) -> Any:
    return transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=SIZE,
        patch_size=8,
        num_labels=5,
    )


@pytest.fixture
def saved(transformers: ModuleType, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    transformers.ViTForImageClassification(tiny_config(transformers)).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_a_directory_saved_by_transformers_gives_its_logits(transformers: ModuleType, saved: Path) -> None:
    original = transformers.ViTForImageClassification.from_pretrained(saved).eval()
    network = load_network(f"hf:{saved}")
    x = torch.rand(3, 3, SIZE, SIZE)
    assert not network.training
    torch.testing.assert_close(network(x), original(x).logits)
    options = BuildOptions("vit", InputOptions((3, SIZE, SIZE)), 5, ["source", "tent"])
    adapter, _ = prepare(network, options)
    assert adapter.trained == 3 * 2 * 16  # three LayerNorms


def test_a_directory_saved_in_half_precision_is_read_in_single(
    transformers: ModuleType, tmp_path: Path
) -> None:
    transformers.ViTForImageClassification(tiny_config(transformers)).half().save_pretrained(tmp_path / "vit")
    network = load_network(f"hf:{tmp_path}/vit")
    assert {value.dtype for value in network.parameters()} == {torch.float32}


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    with unchanged(tmp_path), pytest.raises(SourceError, match=r"holds no config\.json"):
        load_network(f"hf:{tmp_path}")


def _cut(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-100])


def _config(path: Path, changes: Mapping[str, object]) -> None:
    known = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**known, **changes}))


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (_cut, SourceError, "transformers can load: SafetensorError"),
        (lambda path: (path / "model.safetensors").unlink(), SourceError, "no file named model"),
        (lambda path: (path / "config.json").write_text("{"), SourceError, "transformers can load: "),
        (lambda path: _config(path, {"model_type": "nope"}), SourceError, "transformers can load: "),
        (lambda path: _config(path, {"hidden_size": 32}), WeightsDoNotFit, "of another shape"),
    ],
)
def test_a_damaged_directory_is_refused(saved: Path, spoil: Any, error: type[SourceError], says: str) -> None:
    spoil(saved)
    with unchanged(saved), pytest.raises(error, match=says) as caught:
        load_network(f"hf:{saved}")
    assert "\n" not in str(caught.value)


def test_a_backbone_without_classifier_gets_no_random_one(transformers: ModuleType, tmp_path: Path) -> None:
    transformers.ViTModel(tiny_config(transformers)).save_pretrained(tmp_path / "vit")
    with unchanged(tmp_path), pytest.raises(WeightsDoNotFit, match=r"2 missing \['classifier\.bias'"):
        load_network(f"hf:{tmp_path}/vit")


def test_code_that_a_directory_brings_along_is_not_executed(saved: Path) -> None:
    executed = saved.parent / "executed"
    (saved / "code.py").write_text(f"open({str(executed)!r}, 'w')\n")
    _config(
        saved,
        {
            "model_type": "mine",
            "auto_map": {"AutoConfig": "code.C", "AutoModelForImageClassification": "code.M"},
        },
    )
    with unchanged(saved.parent), pytest.raises(SourceError, match="custom code"):
        load_network(f"hf:{saved}")
    assert not executed.exists()


# --- weights ----------------------------------------------------------------------------------------


def trained() -> dict[str, Tensor]:
    """Other values than `mlp()` has."""
    generator = torch.Generator().manual_seed(9)
    return {
        name: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in mlp().state_dict().items()
    }


def test_safetensors_are_loaded(tmp_path: Path) -> None:
    save_file(trained(), tmp_path / "w.safetensors")
    network = mlp()
    load_weights(network, tmp_path / "w.safetensors")
    assert all(torch.equal(value, trained()[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "best": 0.9},
        lambda state: {"model": state},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
        lambda state: {name: value.double() for name, value in state.items()},
    ],
    ids=["plain", "state_dict", "model", "module.", "both", "without num_batches_tracked", "float64"],
)
def test_a_state_dict_saved_by_torch_is_loaded(tmp_path: Path, wrap: Any) -> None:
    torch.save(wrap(trained()), tmp_path / "w.pt")
    network = mlp()
    load_weights(network, tmp_path / "w.pt")
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, trained()[name], check_dtype=False)


def test_a_prefix_that_the_network_has_itself_stays(tmp_path: Path) -> None:
    network = nn.ModuleDict({"module": mlp()})
    save_file({f"module.{name}": value for name, value in trained().items()}, tmp_path / "w.safetensors")
    load_weights(network, tmp_path / "w.safetensors")
    assert torch.equal(network.state_dict()["module.1.weight"], trained()["1.weight"])


def test_weights_of_a_source_are_loaded(tmp_path: Path, file: Path) -> None:
    state = {name: value + 1 for name, value in load_network(f"{file}:good").state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    network = load_network(f"{file}:good", tmp_path / "w.safetensors")
    assert torch.equal(network.state_dict()["0.weight"], state["0.weight"])


def without(*names: str) -> dict[str, Tensor]:
    return {name: value for name, value in trained().items() if name not in names}


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (without("1.weight"), r"1 missing \['1\.weight'\], 0 unexpected \[\], 0 of another shape"),
        (without("2.running_var"), r"1 missing \['2\.running_var'\]"),
        ({**trained(), "fc.weight": torch.zeros(2)}, r"0 missing \[\], 1 unexpected \['fc\.weight'\]"),
        (
            {**trained(), "7.weight": torch.zeros(CLASSES + 1, 12)},
            rf"1 of another shape \['7\.weight \[{CLASSES + 1}, 12\] instead of \[{CLASSES}, 12\]",
        ),
        ({"a.b": torch.zeros(1)}, r"14 missing \['1\.weight', .* 1 unexpected \['a\.b'\]"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_none_is_loaded(
    tmp_path: Path, state: dict[str, Tensor], says: str
) -> None:
    save_file(state, tmp_path / "w.safetensors")
    network = mlp()
    with (
        unchanged(tmp_path),
        network_unchanged(network),
        pytest.raises(WeightsDoNotFit, match=says) as caught,
    ):
        load_weights(network, tmp_path / "w.safetensors")
    assert "w.safetensors" in str(caught.value)


class Opens:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.path, "w")


class Runs(Opens):
    """Unpickling it runs a command."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:  # type: ignore[override]
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", [Opens, Runs])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["w.pt", "w.bin", "w.safetensors"])
def test_a_malicious_pickle_is_refused_and_not_executed(
    tmp_path: Path, kind: type[Opens], zipped: bool, name: str
) -> None:
    executed = tmp_path / "executed"
    content = {**trained(), "extra": kind(executed)}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    network = mlp()
    says = "cannot be read" if name.endswith("safetensors") else "nothing in it was executed"
    with unchanged(tmp_path), network_unchanged(network), pytest.raises(SourceError, match=says):
        load_weights(network, tmp_path / name)
    assert not executed.exists()
    # The trap is one: plain unpickling springs it.
    torch.load(io.BytesIO((tmp_path / name).read_bytes()), weights_only=False)
    assert executed.exists()


def test_a_whole_pickled_network_is_refused(tmp_path: Path) -> None:
    torch.save(mlp(), tmp_path / "w.pt")
    network = mlp()
    with network_unchanged(network), pytest.raises(SourceError, match="holds more than tensors"):
        load_weights(network, tmp_path / "w.pt")


@pytest.mark.parametrize("content", [[torch.zeros(3)], {"epoch": 3}, torch.zeros(3), {"a": [torch.ones(1)]}])
def test_tensors_that_are_no_state_dict_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    network = mlp()
    with network_unchanged(network), pytest.raises(SourceError, match="is no state dict"):
        load_weights(network, tmp_path / "w.pt")


def write_good(path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file(trained(), path)
    else:
        torch.save(trained(), path, _use_new_zipfile_serialization=path.stem != "old")


@pytest.mark.parametrize("name", ["good.safetensors", "good.pt", "old.pt"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-10],
        lambda data: data[: len(data) // 2],
        lambda data: data[:9],
        lambda data: b"",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: b"PK\x03\x04 and no more",
        lambda data: b"these are no weights at all",
        lambda data: pickle.dumps({"a": 1}, protocol=2)[:-1],
    ],
    ids=["cut", "half", "head", "empty", "huge header", "zip magic", "text", "cut pickle"],
)
def test_damaged_weights_are_refused(tmp_path: Path, name: str, damage: Any) -> None:
    write_good(tmp_path / name)
    load_weights(mlp(), tmp_path / name)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    network = mlp()
    with (
        unchanged(tmp_path),
        network_unchanged(network),
        pytest.raises(SourceError, match=name) as caught,
    ):
        load_weights(network, tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.pt", "folder.pt"])
def test_missing_weights_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.pt").mkdir()
    with unchanged(tmp_path), pytest.raises(SourceError, match=f"there is no weights file .*{name}"):
        load_weights(mlp(), tmp_path / name)
