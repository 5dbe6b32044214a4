"""Where networks come from: FILE.py:factory, timm:NAME, torchvision:NAME, hf:DIR, each with optional weights."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tta_exporters.errors import ExtraMissing, SourceError, WeightsDoNotFit

_CONTAINERS = ("state_dict", "model", "model_state_dict", "net")


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
            "write FILE.py:factory, timm:NAME, torchvision:NAME or hf:DIR",
        )
    if kind.endswith(".py"):
        network = _from_file(Path(kind), name)
    elif kind in _LIBRARIES:
        network = _LIBRARIES[kind](name)
    else:
        raise SourceError(
            f"unknown kind of model source {kind!r}", "use FILE.py:factory, timm:, torchvision: or hf:"
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
    state = _read_state(path)
    own = network.state_dict()
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
            "pass the weights of this very architecture (same number of classes)",
        )
    network.load_state_dict(state, strict=False)


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise SourceError(f"there is no weights file {path}", "check the path")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise SourceError(
            f"{path.name} cannot be read: {str(error).splitlines()[0]}", "save it again as safetensors"
        ) from error
    except Exception as error:
        # torch signals refused content by pickle's own exception, which we do not import.
        if type(error).__name__ != "UnpicklingError":
            raise
        raise SourceError(
            f"{path.name} holds more than tensors, and executing it is not an option",
            "save network.state_dict() as safetensors",
        ) from error
    for key in _CONTAINERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise SourceError(f"{path.name} is no state dict", "save network.state_dict()")
    return {str(name).removeprefix("module."): value for name, value in loaded.items()}


def load_attribute(path: Path, name: str) -> Callable[..., object]:
    """A function or class of a Python file, which is executed: use only files you trust.

    Raises:
        SourceError: the file is missing, fails on import, or has no such callable.
    """
    if not path.is_file():
        raise SourceError(f"there is no file {path}", "check the path before the colon")
    spec = importlib.util.spec_from_file_location(f"tta_source_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise SourceError(f"{path} cannot be imported", "name a Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and the like look their module up by name while it is being executed.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError, NameError, AttributeError, TypeError, ValueError, OSError) as error:
        raise SourceError(
            f"{path.name} fails on import: {type(error).__name__}: {error}", "run it with python"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        known = [
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == spec.name and not key.startswith("_")
        ]
        raise SourceError(f"{path.name} has no function or class {name!r}", f"it has {', '.join(known[:12])}")
    return cast("Callable[..., object]", found)


def _from_file(path: Path, factory: str) -> nn.Module:
    return _built(load_attribute(path, factory), source=f"{path.name}:{factory}")


def _built(make: Callable[[], object], *, source: str) -> nn.Module:
    try:
        network = make()
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise SourceError(
            f"{source} fails: {type(error).__name__}: {error}",
            "the factory takes no arguments and returns a module",
        ) from error
    if not isinstance(network, nn.Module):
        raise SourceError(
            f"{source} returned {type(network).__name__}, not a torch.nn.Module", "return the network"
        )
    return network


def _torchvision() -> ModuleType:
    """torchvision, also where its compiled operators do not match this torch: classifiers need none of them."""
    try:
        return importlib.import_module("torchvision")
    except ImportError as error:
        raise ExtraMissing("torchvision is not installed", "pip install torchvision") from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _declare_missing_operators()
    return importlib.import_module("torchvision")


def _declare_missing_operators() -> None:
    signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", signature)


def _from_torchvision(name: str) -> nn.Module:
    models = importlib.import_module(f"{_torchvision().__name__}.models")
    if name not in models.list_models():
        raise SourceError(f"torchvision has no model {name!r}", "see torchvision.models.list_models()")
    return _built(lambda: models.get_model(name, weights=None), source=f"torchvision:{name}")


def _from_timm(name: str) -> nn.Module:
    _torchvision()
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ExtraMissing("timm is not installed", "pip install timm") from error
    if not timm.is_model(name):
        raise SourceError(f"timm has no model {name!r}", f"see timm.list_models('*{name[:6]}*')")
    return _built(lambda: timm.create_model(name, pretrained=False), source=f"timm:{name}")


class _LogitsOnly(nn.Module):
    """A transformers classifier as a plain function from images to logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(pixel_values=x).logits  # type: ignore[no-any-return]


def _from_hf(directory: str) -> nn.Module:
    if not (Path(directory) / "config.json").is_file():
        raise SourceError(f"{directory} holds no config.json", "name a directory saved by save_pretrained")
    _torchvision()
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ExtraMissing("transformers is not installed", "pip install transformers") from error
    try:
        network = transformers.AutoModelForImageClassification.from_pretrained(
            directory, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(
            f"{directory} is no image classifier transformers can load: {error}", "check its config.json"
        ) from error
    return _LogitsOnly(network)


_LIBRARIES: Mapping[str, Callable[[str], nn.Module]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "hf": _from_hf,
}
