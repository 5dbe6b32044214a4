"""Where networks come from: FILE.py:factory, timm:NAME, torchvision:NAME, hf:DIR, each with optional weights."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tta_exporters.errors import ExtraMissing, SourceError, WeightsDoNotFit, in_one_line

_CONTAINERS = ("state_dict", "model", "model_state_dict", "net")
_WRAPPER = "module."
"""What torch's DataParallel puts before every name."""


def load_network(source: str, weights: Path | None = None) -> nn.Module:
    """Builds a network and loads its weights.

    Args:
        source: "FILE.py:factory" (a function without arguments that returns the module), "timm:NAME",
            "torchvision:NAME" or "hf:DIR" (an image classifier saved by transformers, weights included). A Python
            file is executed: use only files you trust.
        weights: a safetensors file, or a state dict saved by torch, read without unpickling code.

    Returns:
        The network in eval mode.

    Raises:
        SourceError: the source is malformed, missing, or its factory fails.
        ExtraMissing: the library the source needs is not installed.
        WeightsDoNotFit: names or shapes differ; lists the first of each kind.
    """
    kind, separator, name = source.partition(":")
    if not separator or not name:
        raise SourceError(
            f"{source!r} is no model source",
            "Write FILE.py:factory, timm:NAME, torchvision:NAME or hf:DIR",
        )
    file, _, factory = source.rpartition(":")
    if file.endswith(".py"):
        network = _from_file(Path(file), factory)
    elif kind in _LIBRARIES:
        network = _LIBRARIES[kind](name)
    else:
        raise SourceError(
            f"unknown kind of model source {kind!r}", "Use FILE.py:factory, timm:, torchvision: or hf:"
        )
    if weights is not None:
        load_weights(network, weights)
    return network.eval()


def load_weights(network: nn.Module, path: Path) -> None:
    """Loads a state dict into ``network`` strictly.

    Raises:
        SourceError: the file cannot be read as safetensors or as a plain state dict.
        WeightsDoNotFit: missing, unexpected or differently shaped tensors.
    """
    own = network.state_dict()
    state = _unwrapped(_read_state(path), own)
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    differing = [
        f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if missing or unexpected or differing:
        raise WeightsDoNotFit(
            f"{path.name} does not fit the network: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(differing)} of another shape {differing[:3]}",
            "Pass the weights of this very architecture (same number of classes)",
        )
    network.load_state_dict(state, strict=False)


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise SourceError(f"there is no weights file {path}", "Check the path")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Whatever a damaged or hostile file makes of the readers. torch signals content that it refuses to execute by
        # pickle's own exception, and a module that runs code from data is none we import.
        if type(error).__name__ == "UnpicklingError":
            raise SourceError(
                f"{path.name} is damaged or holds more than tensors; nothing in it was executed",
                "Save network.state_dict() as safetensors",
            ) from error
        raise SourceError(
            f"{path.name} cannot be read: {in_one_line(error)}", "Save it again as safetensors"
        ) from error
    for key in _CONTAINERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise SourceError(f"{path.name} is no state dict", "Save network.state_dict()")
    return {str(name): value for name, value in loaded.items()}


def _unwrapped(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` without the wrapper's prefix, unless the network's own names begin with it."""
    wrapped = all(name.startswith(_WRAPPER) for name in state)
    if wrapped and not any(name.startswith(_WRAPPER) for name in own):
        return {name.removeprefix(_WRAPPER): value for name, value in state.items()}
    return dict(state)


def load_attribute(path: Path, name: str) -> Callable[..., object]:
    """A function or class of a Python file, which is executed: use only files you trust.

    Raises:
        SourceError: the file is missing, fails on import, or has no such callable.
    """
    if not path.is_file():
        raise SourceError(f"there is no file {path}", "Check the path before the colon")
    spec = importlib.util.spec_from_file_location(f"tta_source_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise SourceError(f"{path} cannot be imported", "Name a Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and the like look their module up by name while it is being executed.
    sys.modules[spec.name] = module
    try:
        with _neighbours(path):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        # The user's code may raise anything; a script that ends itself must not end us as if all were well.
        del sys.modules[spec.name]
        raise SourceError(
            f"{path.name} fails on import: {in_one_line(error)}", "Run it with python"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        known = [
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == spec.name and not key.startswith("_")
        ]
        raise SourceError(
            f"{path.name} has no function or class {name!r}", f"It has {', '.join(known[:12]) or 'none'}"
        )
    return cast("Callable[..., object]", found)


@contextlib.contextmanager
def _neighbours(path: Path) -> Iterator[None]:
    """Lets a file import those beside it, as it can when python runs it."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _from_file(path: Path, factory: str) -> nn.Module:
    return _built(load_attribute(path, factory), source=f"{path.name}:{factory}")


def _built(make: Callable[[], object], *, source: str) -> nn.Module:
    try:
        network = make()
    except (Exception, SystemExit) as error:
        # As on import: the user's code may raise anything.
        raise SourceError(
            f"{source} fails: {in_one_line(error)}", "The factory takes no arguments and returns a module"
        ) from error
    if not isinstance(network, nn.Module):
        raise SourceError(
            f"{source} returned {type(network).__name__}, not a torch.nn.Module", "Return the network"
        )
    return network


def load_torchvision() -> ModuleType:
    """torchvision, also where its compiled operators do not match this torch: classifiers need none of them."""
    try:
        return importlib.import_module("torchvision")
    except ImportError as error:
        raise ExtraMissing("torchvision is not installed", "Run `pip install torchvision`") from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _declare_missing_operators()
    return importlib.import_module("torchvision")


def load_transformers() -> ModuleType:
    """transformers, also where the torchvision that is installed does not match this torch.

    Raises:
        ExtraMissing: it is not installed.
    """
    with contextlib.suppress(ExtraMissing):
        load_torchvision()  # not needed, but transformers imports it where it is installed
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ExtraMissing("transformers is not installed", "Run `pip install transformers`") from error


def _declare_missing_operators() -> None:
    signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", signature)


def _from_torchvision(name: str) -> nn.Module:
    models = importlib.import_module(f"{load_torchvision().__name__}.models")
    # Of its detectors and the like no adapter can say what the logits are; some download a backbone when made.
    if name not in models.list_models(module=models):
        raise SourceError(
            f"torchvision has no classifier {name!r}", "See torchvision.models.list_models(module=models)"
        )
    return _built(lambda: models.get_model(name, weights=None), source=f"torchvision:{name}")


def _from_timm(name: str) -> nn.Module:
    load_torchvision()
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ExtraMissing("timm is not installed", "Run `pip install timm`") from error
    if not timm.is_model(name):
        raise SourceError(f"timm has no model {name!r}", f"See timm.list_models('*{name[:6]}*')")
    return _built(lambda: timm.create_model(name, pretrained=False), source=f"timm:{name}")


class _LogitsOnly(nn.Module):
    """A transformers classifier as a plain function from images to logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(pixel_values=x).logits  # type: ignore[no-any-return]


def pretrained(directory: str, auto: str, kind: str) -> nn.Module:
    """What `transformers` makes of a directory, in float32.

    Args:
        directory: written by ``save_pretrained``.
        auto: the class of `transformers` that loads it.
        kind: what it loads, for messages.

    Raises:
        ExtraMissing: transformers is not installed.
        SourceError: the directory holds no such model.
        WeightsDoNotFit: weights are missing or of another shape.
    """
    if not (Path(directory) / "config.json").is_file():
        raise SourceError(f"{directory} holds no config.json", "Name a directory saved by save_pretrained")
    transformers = load_transformers()
    try:
        network, found = getattr(transformers, auto).from_pretrained(
            directory,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:
        # Damaged files reach us as whatever the library, safetensors or json raise.
        raise SourceError(
            f"{directory} is no {kind} transformers can load: {in_one_line(error)}",
            "Check its config.json and model.safetensors",
        ) from error
    # transformers only warns about weights that it did not find, and makes random ones.
    missing, differing = sorted(found["missing_keys"]), sorted(str(key) for key in found["mismatched_keys"])
    if missing or differing:
        raise WeightsDoNotFit(
            f"the weights in {directory} do not fit its config.json: {len(missing)} missing {missing[:3]}, "
            f"{len(differing)} of another shape {differing[:3]}",
            f"Save the {kind} itself, not only its backbone",
        )
    return cast("nn.Module", network.float())


def _from_hf(directory: str) -> nn.Module:
    return _LogitsOnly(pretrained(directory, "AutoModelForImageClassification", "image classifier"))


_LIBRARIES: Mapping[str, Callable[[str], nn.Module]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "hf": _from_hf,
}
