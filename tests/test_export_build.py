"""Bundles: what is in them and that they run; what cannot become one is refused by name and leaves nothing behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import snapshots
from exported import built
from networks import CLASSES, NETWORKS, SIZE
from running import REPOSITORY
from tta_exporters.build import BuildOptions, Built, InputOptions, build
from tta_exporters.check import example_batch
from tta_exporters.errors import (
    ExportError,
    NetworkRefused,
    OperatorNotSupported,
    OptionError,
    OutputExists,
    OutputUnwritable,
    SourceError,
    TraceFailed,
)
from tta_exporters.preprocess import Preprocess
from tta_runtime import Bundle, Model
from tta_runtime.errors import BatchTooSmall

FEATURES = 6
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def tiny(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    first = (nn.Linear(FEATURES, 8), nn.BatchNorm1d(8))
    return nn.Sequential(*first, *middle, nn.ReLU(), nn.Linear(8, 3)).eval()


def tiny_options(**changes: Any) -> BuildOptions:
    return replace(BuildOptions("tiny", InputOptions((FEATURES,)), 3, ["source", "tent"]), **changes)


@contextlib.contextmanager
def same_network(network: nn.Module) -> Iterator[None]:
    """Values, modes and hooks are the same at the end of the block."""

    def state() -> object:
        return (
            {name: value.numpy().tobytes() for name, value in network.state_dict().items()},
            {name: value.requires_grad for name, value in network.named_parameters()},
            {
                name: (module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
                for name, module in network.named_modules()
            },
        )

    before = state()
    yield
    assert state() == before


@contextlib.contextmanager
def untouched(folder: Path, network: nn.Module) -> Iterator[None]:
    """Nothing is left behind: the folder's files and the network are as they were."""
    with same_network(network), snapshots.unchanged(folder):
        yield


def refused(
    network: nn.Module, options: BuildOptions, folder: Path, error: type[ExportError], says: str
) -> Any:
    with untouched(folder, network), pytest.raises(error, match=says) as caught:
        build(network, options, folder / "new" / "bundle", progress=lambda _: None)
    assert caught.value.fix[:1].isupper()
    return caught.value


# --- what is in a bundle ----------------------------------------------------------------------------


def camera_network() -> nn.Sequential:
    """Two convolutions, the second adapted in its statistics only; left in training mode on purpose."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    ).train()


@pytest.fixture(scope="module")
def camera(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Built]:
    """A bundle that takes bytes, with all three methods, in a directory that existed and was empty."""
    network = camera_network()
    options = BuildOptions(
        "camera",
        InputOptions((3, 8, 8), "uint8", Preprocess(0.0, 255.0, MEAN, STD)),
        3,
        ["source", "norm", "tent"],
        settings={"tent": {"lr": "0.02"}},
        include=["*"],
        exclude=["4"],
        class_names=["cat", "dog", "[red]"],
        provenance={"source": "camera.py:network"},
    )
    path = tmp_path_factory.mktemp("camera") / "bundle"
    path.mkdir()
    with same_network(network):
        made = build(network, options, path)
    return network, made


def test_the_manifest_says_what_was_built(camera: tuple[nn.Module, Built]) -> None:
    manifest = Bundle.open(camera[1].path).manifest
    assert manifest == camera[1].manifest
    assert (manifest.model_id, manifest.classes, manifest.adapter) == ("camera", 3, "norm")
    assert manifest.class_names == ["cat", "dog", "[red]"]
    assert (manifest.input.dtype, manifest.input.shape) == ("uint8", ["batch", 3, 8, 8])
    assert (manifest.input.low, manifest.input.high, manifest.input.layout) == (0.0, 255.0, "NCHW")
    assert set(manifest.graphs) == {"forward", "step.norm", "step.tent"}
    assert {name: method.step for name, method in manifest.methods.items()} == {
        "source": None,
        "norm": "step.norm",
        "tent": "step.tent",
    }
    assert manifest.default_method == "norm"  # the first that changes anything
    assert {entry.name: entry.default for entry in manifest.methods["tent"].hyper}["lr"] == 0.02


def test_theta_holds_what_is_trained_first_then_all_statistics(camera: tuple[nn.Module, Built]) -> None:
    theta = camera[1].manifest.theta
    assert [(entry.name, entry.offset, entry.kind, entry.trained) for entry in theta.entries] == [
        ("1.weight", 0, "weight", True),
        ("1.bias", 4, "bias", True),
        ("1.running_mean", 8, "mean", False),
        ("4.running_mean", 12, "mean", False),
        ("1.running_var", 18, "var", False),
        ("4.running_var", 22, "var", False),
    ]
    assert (theta.trained, theta.size) == (8, 28)
    state = camera[0].state_dict()
    vector = np.concatenate([state[entry.name].numpy().ravel() for entry in theta.entries])
    np.testing.assert_array_equal(Model.open(camera[1].path).theta, vector)


def test_ports_are_bound_by_name_with_a_free_batch(camera: tuple[nn.Module, Built]) -> None:
    graphs = camera[1].manifest.graphs

    def ports(key: str, side: str) -> list[tuple[object, ...]]:
        return [(port.bind, port.key, port.dtype, port.shape) for port in getattr(graphs[key], side)]

    x = ("batch", "x", "uint8", ["batch", 3, 8, 8])
    assert ports("forward", "inputs") == [x, ("theta", "", "float32", [28])]
    assert ports("forward", "outputs") == [
        ("logits", "", "float32", ["batch", 3]),
        ("features", "", "float32", ["batch", 6]),
    ]
    assert ports("step.tent", "inputs") == [
        x,
        ("batch", "weight", "float32", ["batch"]),
        ("theta", "", "float32", [28]),
        ("state", "momentum", "float32", [8]),
        ("hyper", "", "float32", [4]),
    ]
    outputs = {(bind, key): shape for bind, key, _, shape in ports("step.tent", "outputs")}
    assert outputs == {
        ("logits", ""): ["batch", 3],
        ("theta", ""): [28],
        ("state", "momentum"): [8],
        ("report", ""): [len(camera[1].manifest.methods["tent"].report)],
    }
    assert graphs["forward"].role == "serve"
    assert graphs["step.tent"].role == "step"


def test_every_file_is_listed_with_its_hash(camera: tuple[nn.Module, Built]) -> None:
    path, manifest = camera[1].path, camera[1].manifest
    found = {file.name: file.read_bytes() for file in path.iterdir() if file.name != "manifest.json"}
    assert set(found) == {
        "forward.onnx",
        "step.norm.onnx",
        "step.tent.onnx",
        "weights.bin",
        "theta.safetensors",
        "anchor.safetensors",
    }
    assert {name: (entry.sha256, entry.bytes) for name, entry in manifest.files.items()} == {
        name: (hashlib.sha256(data).hexdigest(), len(data)) for name, data in found.items()
    }


def test_nothing_tells_where_it_was_built(camera: tuple[nn.Module, Built]) -> None:
    path = camera[1].path
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["provenance"].keys() >= {"source", "torch", "onnx", "python", "tta-runtime"}
    places = [str(path.parent), str(REPOSITORY), str(Path.home()), "site-packages"]
    for file in path.iterdir():
        data = file.read_bytes()
        assert not [place for place in places if len(place) > 1 and place.encode() in data], file.name


def test_bytes_are_preprocessed_as_torch_would(camera: tuple[nn.Module, Built]) -> None:
    network, made = camera
    x = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)
    x[0], x[1] = 0, 255
    mean, std = (torch.tensor(value).reshape(1, 3, 1, 1) for value in (MEAN, STD))
    with torch.no_grad():
        expected = camera_network().eval()((torch.from_numpy(x).float() / 255 - mean) / std)
    found = Model.open(made.path).predict(x)
    np.testing.assert_allclose(found.logits, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert network.training


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
def test_a_bundle_serves_and_adapts_at_any_batch(batch: int) -> None:
    made = built("mlp")
    model = Model.open(made.path, method="tent")
    x = example_batch(made.manifest.input, batch, seed=batch)
    with torch.no_grad():
        expected = NETWORKS["mlp"]()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(model.predict(x).logits, expected, rtol=1e-4, atol=1e-5)
    if batch == 1:
        before = snapshots.learnt(model)
        with pytest.raises(BatchTooSmall):
            model.adapt(x)
        assert snapshots.learnt(model) == before
    else:
        assert model.adapt(x).logits.shape == (batch, CLASSES)
        assert model.distance > 0


def test_weights_are_stored_once_for_all_graphs() -> None:
    made = built("mlp")
    frozen = sum(
        value.numel() * value.element_size()
        for name, value in NETWORKS["mlp"]().named_parameters()
        if name not in {entry.name for entry in made.manifest.theta.entries}
    )
    assert frozen > 3 * SIZE * SIZE * 24 * 4
    # Beside the parameters: padding to 64 bytes, and small matrices that the backward pass wants transposed.
    assert made.manifest.files["weights.bin"].bytes < frozen + 4096
    graphs = sum(entry.bytes for name, entry in made.manifest.files.items() if name.endswith(".onnx"))
    assert graphs < 64 * 1024


class Twins(nn.Module):
    """Two layers of equal weights, which are not the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.norm = nn.LayerNorm(64)
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)
        self.two.load_state_dict(self.one.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.norm(self.one(x)))


def test_equal_tensors_are_stored_once_and_building_again_gives_the_same_bytes(tmp_path: Path) -> None:
    options = BuildOptions("twins", InputOptions((64,)), 64, ["source"])
    first = build(Twins(), options, tmp_path / "first").path
    assert 64 * 64 * 4 <= (first / "weights.bin").stat().st_size < 2 * 64 * 64 * 4
    second = build(Twins(), options, tmp_path / "second").path
    assert snapshots.files(first) == snapshots.files(second)
    assert (first.stat().st_mode & 0o777) == 0o755
    x = example_batch(Bundle.open(first).manifest.input, 3, seed=0)
    with torch.no_grad():
        expected = Twins()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(Model.open(first).predict(x).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("preprocess", "x", "expected"),
    [
        (Preprocess(), [0.0, 0.5, 1.0], [0.0, 0.5, 1.0]),
        (Preprocess(0, 255), [0.0, 51.0, 255.0], [0.0, 0.2, 1.0]),
        (Preprocess(-1, 1), [-1.0, 0.0, 1.0], [0.0, 0.5, 1.0]),
        (Preprocess(0, 255, scale=False), [0.0, 51.0, 255.0], [0.0, 51.0, 255.0]),
        (Preprocess(0, 255, (0.5,), (0.25,)), [0.0, 127.5, 255.0], [-2.0, 0.0, 2.0]),
        (Preprocess(0, 1, (0.0, 0.5, 1.0), (1.0, 0.5, 2.0)), [1.0, 1.0, 1.0], [1.0, 1.0, 0.0]),
    ],
)
def test_preprocessing(preprocess: Preprocess, x: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(preprocess(torch.tensor([x])), torch.tensor([expected]))


# --- refusals before anything is compiled -----------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"methods": []}, "no method is named"),
        ({"methods": ["source", "tnet"]}, "unknown method 'tnet', did you mean 'tent'"),
        ({"methods": ["tent", "tent"]}, "two of the methods are named tent"),
        ({"default_method": "norm"}, r"'norm', which is not built\. Methods are source, tent"),
        ({"class_names": ["a", "b"]}, "2 class names for 3 classes"),
        ({"class_names": []}, "0 class names for 3 classes"),
        (
            {"settings": {"norm": {"ema": "0.1"}}},
            r"settings for norm, which is not built\. Methods are source, tent",
        ),
        ({"settings": {"tent": {"lrr": "0.1"}}}, "method tent has no option 'lrr', did you mean 'lr'"),
        ({"settings": {"source": {"lr": "0.1"}}}, "method source has no option 'lr'"),
        ({"settings": {"tent": {"lr": "fast"}}}, "tent.lr='fast' is not a number"),
        ({"settings": {"tent": {"lr": "-1"}}}, "tent.lr is -1, it goes from 0"),
        ({"settings": {"tent": {"lr": "nan"}}}, "tent.lr is nan"),
        ({"settings": {"tent": {"lr": "inf"}}}, "tent.lr is inf"),
        ({"settings": {"tent": {"ema": "5"}}}, "tent.ema is 5, it goes from 0 to 1"),
        ({"settings": {"tent": {"optimizer": "lion"}}}, "choose sgd or adam"),
        ({"settings": {"tent": {"nesterov": "maybe"}}}, "not true or false"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    refused(tiny(), tiny_options(**changes), tmp_path, OptionError, says)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: InputOptions((3, 8, 8), "int8"), "'int8'"),
        (lambda: InputOptions(()), r"shape of the input is \[\]"),
        (lambda: InputOptions((3, 0, 8)), r"\[3, 0, 8\]"),
        (lambda: InputOptions((3, 8, 8), "uint8", Preprocess(-1, 1)), r"-1\.\.1"),
        (lambda: InputOptions((3, 8, 8), "uint8", Preprocess(0, 256)), r"0\.\.256"),
        (
            lambda: InputOptions((3, 8, 8), preprocess=Preprocess(mean=MEAN[:2])),
            "mean has 2 numbers, .* 3 channels",
        ),
        (lambda: InputOptions((1, 8, 8), preprocess=Preprocess(std=STD)), "std has 3 numbers, .* 1 channels"),
        (lambda: Preprocess(1, 1), r"1\.\.1"),
        (lambda: Preprocess(1, 0), r"1\.\.0"),
        (lambda: Preprocess(float("nan"), 1), r"nan\.\.1"),
        (lambda: Preprocess(0, float("inf")), r"0\.\.inf"),
        (lambda: Preprocess(std=(1.0, 0.0, 1.0)), r"\[1\.0, 0\.0, 1\.0\]"),
        (lambda: Preprocess(std=(-1.0,)), r"\[-1\.0\]"),
        (lambda: Preprocess(mean=(float("nan"),)), r"\[nan\]"),
    ],
)
def test_an_input_that_does_not_make_sense_is_refused(make: Any, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        make()


class Answers(nn.Module):
    """Answers something of its own in place of logits, or fails in a way of its own."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer(x)


@pytest.mark.parametrize(
    ("network", "changes", "says"),
    [
        (tiny(), {"classes": 4}, r"returns \[5, 3\], expected logits \[5, 4\]\. Check --classes"),
        (tiny(), {"input": InputOptions((7,))}, r"fails on an input of shape \[5, 7\]: .*Check --input"),
        (tiny(), {"input": InputOptions((3, 8, 8))}, r"shape \[5, 3, 8, 8\].*Check --input"),
        (tiny(Answers(lambda x: (x, x))), {}, "fails on an input of shape"),
        (nn.Sequential(tiny(), Answers(lambda x: (x, x))), {}, "the network returns tuple"),
        (nn.Sequential(tiny(), Answers(lambda x: {"logits": x})), {}, "the network returns dict"),
        (nn.Sequential(tiny(), Answers(lambda x: x.mean())), {}, r"returns \[\], expected"),
        (
            nn.Sequential(tiny(), Answers(lambda x: x / 0)),
            {},
            r"not finite on noise in 0\.\.1\. Check --range",
        ),
        (tiny(Answers(AssertionError())), {}, "AssertionError"),
        (tiny(Answers(KeyError("w"))), {}, "KeyError: 'w'"),
        (tiny(Answers(ZeroDivisionError("by\nzero"))), {}, r"ZeroDivisionError: by\. Check"),
        (nn.Sequential(nn.Linear(FEATURES, 3)), {}, "no module selected"),
        (tiny(), {"exclude": ["*"]}, r"no module selected: .*exclude=\['\*'\]"),
        (tiny(), {"include": ["layer4*"]}, "no module selected.*Check --include"),
        (tiny(), {"head": "fc"}, "head 'fc' is no module"),
        (
            nn.Sequential(nn.Linear(FEATURES, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 3)),
            {},
            "no affine parameters",
        ),
    ],
)
def test_a_network_that_is_not_what_was_declared_is_refused(
    tmp_path: Path, network: nn.Module, changes: dict[str, Any], says: str
) -> None:
    refused(network, tiny_options(**changes), tmp_path, NetworkRefused, says)


@pytest.mark.parametrize("name", ["0.weight", "1.weight", "1.running_var", "3.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, name: str, value: float) -> None:
    network = tiny()
    network.state_dict()[name].view(-1)[0] = value
    refused(network, tiny_options(), tmp_path, NetworkRefused, f"hold NaN or Inf: {name}")


def test_norm_needs_a_batch_norm(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    options = tiny_options(methods=["source", "norm"])
    refused(network, options, tmp_path, OptionError, "takes --methods source,tent")


METHODS = """
from tta_adapters.methods.tent import Tent

class Same(Tent):
    pass

class NoMethod:
    def __init__(self, adapter):
        pass

class Takes:
    def __init__(self):
        pass

def fails(adapter):
    raise KeyError("x")
"""


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("Same", OptionError, "two of the methods are named tent"),
        ("NoMethod", OptionError, "NoMethod cannot be made: AttributeError: .*'spec'"),
        ("Takes", OptionError, "Takes cannot be made: TypeError"),
        ("fails", OptionError, "fails cannot be made: KeyError: 'x'.*check_method"),
        ("Missing", SourceError, "no function or class 'Missing'"),
    ],
)
def test_a_method_of_a_file_that_is_none_is_refused(
    tmp_path: Path, name: str, error: type[ExportError], says: str
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(METHODS)
    refused(tiny(), tiny_options(methods=["tent", f"{file}:{name}"]), tmp_path, error, says)


# --- refusals of the output -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_an_output_that_holds_something_is_refused_and_stays(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "bundle"
    if kind == "file":
        out.write_text("mine")
    else:
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "precious.txt").write_text("mine")
        out.symlink_to("real")
        out = tmp_path / "real" if kind == "directory" else out
    network = tiny()
    with (
        untouched(tmp_path, network),
        pytest.raises(OutputExists, match=f"{out.name} exists and is not empty"),
    ):
        build(network, tiny_options(), out)


def test_an_output_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    network = tiny()
    with untouched(tmp_path, network), pytest.raises(OutputUnwritable, match="cannot be made"):
        build(network, tiny_options(), tmp_path / "file" / "bundle")


# --- refusals of the compiler -----------------------------------------------------------------------


@torch.library.custom_op("tta_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


twice.register_autograd(lambda _, grad: 2 * grad)


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x: x + torch.linalg.eigvalsh(x[:, :, None] * x[:, None, :]), "linalg_eigh"),
        (lambda x: twice(x), "tta_tests.twice"),
    ],
)
@pytest.mark.parametrize("methods", [["source"], ["source", "tent"]])
def test_an_operator_without_onnx_form_is_named_with_its_module(
    tmp_path: Path, function: Any, operator: str, methods: list[str]
) -> None:
    network = tiny(nn.Sequential(nn.Identity(), Answers(function)))
    error = refused(network, tiny_options(methods=methods), tmp_path, OperatorNotSupported, operator)
    assert operator in error.operator
    assert error.module_path == "2.1"
    assert "module '2.1'" in str(error)


def decides(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("function", "module", "says"),
    [
        (decides, "2.1", "data-dependent"),
        (lambda x: x + torch.from_numpy(x.detach().numpy()), "2.1", "numpy"),
        (lambda x: x[:, : int(x.abs().sum())], "2.1", "cannot be traced"),
        # That something fixed the batch shows when all is traced: no module is named.
        (lambda x: x * torch.ones(int(x.shape[0]), 1), "", "batch size was fixed to 5"),
        (lambda x: x + torch.zeros(5, 1), "", "batch size was fixed to 5"),
        (lambda x: x if len(x) == 5 else -x, "", "batch size was fixed to 5"),
    ],
)
def test_what_cannot_be_traced_is_refused(tmp_path: Path, function: Any, module: str, says: str) -> None:
    network = tiny(nn.Sequential(nn.Identity(), Answers(function)))
    error = refused(network, tiny_options(), tmp_path, TraceFailed, says)
    if module:
        assert error.module_path == module


# --- interruption -----------------------------------------------------------------------------------


class Enough(Exception):
    """Raised by whoever watches the progress."""


@pytest.mark.parametrize(("stage", "error"), [("forward", KeyboardInterrupt), ("theta", Enough)])
def test_an_interrupted_build_leaves_nothing(tmp_path: Path, stage: str, error: type[BaseException]) -> None:
    told = []

    def progress(line: str) -> None:
        told.append(line)
        if line.startswith(stage):
            # What has been written so far lies beside the output, never in it.
            assert not (tmp_path / "new" / "bundle").exists()
            assert list((tmp_path / "new").iterdir())
            raise error

    network = tiny()
    with untouched(tmp_path, network), pytest.raises(error):
        build(network, tiny_options(methods=["source"]), tmp_path / "new" / "bundle", progress=progress)
    assert told[-1].startswith(stage)


def test_an_interrupted_build_keeps_the_empty_directory_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()

    def progress(line: str) -> None:
        raise Enough(line)

    network = tiny()
    with untouched(tmp_path, network), pytest.raises(Enough):
        build(network, tiny_options(), tmp_path / "bundle", progress=progress)
