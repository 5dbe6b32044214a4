"""The libraries that ONNX Runtime's GPU providers need: loading those that pip installed, naming what is missing."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

_FILES = {
    "CUDAExecutionProvider": "libonnxruntime_providers_cuda.so",
    "TensorrtExecutionProvider": "libonnxruntime_providers_tensorrt.so",
}


def preload(ort: Any) -> None:
    """Loads the CUDA and cuDNN that came as packages; the loader does not look for them by itself.

    Args:
        ort: the module onnxruntime.
    """
    load = getattr(ort, "preload_dlls", None)
    if load is None:  # onnxruntime before 1.21
        return
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it prints what it does not find
        load()
    if text := " ".join(said.getvalue().split()):
        _log.debug("onnxruntime: %s", text)


def why_not(ort: Any, provider: str) -> str:
    """What the dynamic loader misses for a provider, e.g. "libcublasLt.so.13: cannot open shared object file"; else "".

    Args:
        ort: the module onnxruntime.
        provider: e.g. "CUDAExecutionProvider".
    """
    name = _FILES.get(provider)
    if name is None:
        return ""
    folder = Path(ort.__file__).parent / "capi"
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / name))
    except OSError as error:
        return str(error)
    return ""
