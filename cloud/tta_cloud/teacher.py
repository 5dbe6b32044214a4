"""Opening students and teachers: a teacher that is no bundle yet is compiled into one, once."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tta_cloud.errors import StudentUnfit, TeacherRefused
from tta_cloud.learner import METHOD
from tta_runtime.bundle import Bundle
from tta_runtime.engine import EngineOptions
from tta_runtime.errors import TtaError
from tta_runtime.files import reason
from tta_runtime.manifest import InputSpec
from tta_runtime.model import Engines

log = logging.getLogger(__name__)


def open_student(path: Path, options: EngineOptions | None = None) -> Engines:
    """The graphs of the edges' bundle.

    Raises:
        BundleError, EngineError: it cannot be used.
        StudentUnfit: it has no `distill`.
    """
    bundle = Bundle.open(path)
    if METHOD not in bundle.manifest.methods:
        raise StudentUnfit(
            f"the bundle {path} has the methods {', '.join(bundle.manifest.methods)}, no `{METHOD}`",
            f"Build it again with `--methods ...,{METHOD}`; edges must serve the very same bundle",
        )
    return Engines.load(bundle, methods=[METHOD], options=options)


def open_teacher(
    source: str,
    like: Engines,
    cache: Path,
    *,
    weights: Path | None = None,
    options: EngineOptions | None = None,
    progress: Callable[[str], None] = log.info,
) -> Engines:
    """The graphs of a teacher.

    Args:
        source: a bundle's directory with `distill`, or a network: `FILE.py:factory`, `timm:NAME`, `torchvision:NAME`.
        like: the student, whose input and classes the teacher is compiled for.
        cache: directory where a compiled teacher stays.
        weights: of a `FILE.py:factory`.
        options: of the engines.
        progress: told what is being done.

    Raises:
        BundleError, EngineError: the bundle cannot be used.
        TeacherRefused: it is neither a bundle with `distill` nor a network that can be compiled.
    """
    if Path(source).is_dir():
        bundle = Bundle.open(source)
        if METHOD not in bundle.manifest.methods:
            raise TeacherRefused(
                f"the teacher {source} has the methods {', '.join(bundle.manifest.methods)}, no `{METHOD}`",
                f"Build it again with `--methods source,{METHOD}`",
            )
    else:
        bundle = Bundle.open(_compiled(source, like, cache, weights, progress))
    return Engines.load(bundle, methods=[METHOD], options=options)


def _compiled(
    source: str, like: Engines, cache: Path, weights: Path | None, progress: Callable[[str], None]
) -> Path:
    """The bundle of a network, compiled unless it is in the cache."""
    if ":" not in source:
        raise TeacherRefused(
            f"the teacher {source!r} is no directory and names no network",
            "Give a bundle's directory, FILE.py:factory or timm:NAME",
        )
    if importlib.util.find_spec("torch") is None:
        raise TeacherRefused(
            f"the teacher {source!r} has to be compiled, and PyTorch is not installed",
            "Install `tta-runtime[cloud]`, or give a bundle that was built elsewhere",
        )
    # Only now: a cloud whose teacher is a bundle needs no PyTorch.
    from tta_exporters.build import BuildOptions, InputOptions, build
    from tta_exporters.preprocess import Preprocess
    from tta_exporters.sources import load_network

    spec, classes = like.bundle.manifest.input, like.bundle.manifest.classes
    place = cache / f"teacher-{_fingerprint(source, weights, spec, classes)}"
    if (place / "manifest.json").is_file():
        return place
    progress(f"compiling the teacher {source}; this is done once")
    made = place.with_name(place.name + ".new")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            shutil.rmtree(made)
        network = load_network(source, weights)
        known = getattr(network, "pretrained_cfg", None) or {}  # timm's networks say how they were trained
        pre = Preprocess(spec.low, spec.high, tuple(known.get("mean", ())), tuple(known.get("std", ())))
        shape = tuple(int(length) for length in spec.shape[1:])
        build(
            network,
            BuildOptions(
                model_id=source.rsplit(":", 1)[-1],
                input=InputOptions(shape, spec.dtype, pre),
                classes=classes,
                methods=["source", METHOD],
            ),
            made,
            progress=progress,
        )
        made.rename(place)
    except TtaError as error:
        raise TeacherRefused(
            f"the teacher {source!r} cannot be compiled: {error.cause}", error.fix
        ) from error
    except OSError as error:
        raise TeacherRefused(
            f"the compiled teacher cannot be put into {cache}: {reason(error)}",
            "Free space, or choose another --store",
        ) from error
    return place


def _fingerprint(source: str, weights: Path | None, spec: InputSpec, classes: int) -> str:
    """Names a compiled teacher: another file, other weights or another input are another teacher."""
    digest = hashlib.sha256(f"{source}\n{spec}\n{classes}".encode())
    for path in (Path(source.rpartition(":")[0]), weights):
        if path is not None and path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
