"""Run a bundle: predict, adapt, reset, swap, roll back, save and load, without PyTorch.

model = Model.open("digits.bundle", method="tent")
step = model.adapt(x)                  # x: [batch, ...] as model.manifest.input says
step.logits, step.report, model.distance
"""

from __future__ import annotations

from importlib import metadata

from .bundle import Bundle
from .engine import Engine, EngineOptions
from .engine_ort import OrtEngine
from .errors import (
    BundleError,
    ConfigError,
    EngineError,
    InputError,
    MethodError,
    StateError,
    ThetaError,
    TtaError,
)
from .inputs import Limits
from .manifest import (
    FORMAT_VERSION,
    FileEntry,
    Graph,
    HyperSpec,
    InputSpec,
    Manifest,
    MethodSpec,
    Port,
    StateSpec,
    TextSpec,
    ThetaEntry,
    ThetaLayout,
)
from .model import Checkpoint, Engines, Model, Prediction, Step
from .sampling import Sampling
from .text_model import TextModel, TextSession

try:
    __version__ = metadata.version("tta-runtime")
except metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "FORMAT_VERSION",
    "Bundle",
    "BundleError",
    "Checkpoint",
    "ConfigError",
    "Engine",
    "EngineError",
    "EngineOptions",
    "Engines",
    "FileEntry",
    "Graph",
    "HyperSpec",
    "InputError",
    "InputSpec",
    "Limits",
    "Manifest",
    "MethodError",
    "MethodSpec",
    "Model",
    "OrtEngine",
    "Port",
    "Prediction",
    "Sampling",
    "StateError",
    "StateSpec",
    "Step",
    "TextModel",
    "TextSession",
    "TextSpec",
    "ThetaEntry",
    "ThetaError",
    "ThetaLayout",
    "TtaError",
    "__version__",
]
