"""Opening students and teachers: a teacher that is no bundle yet is compiled into one, once."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tta_cloud.errors import StudentUnfit, TeacherRefused
from tta_cloud.learner import METHOD
from tta_runtime.bundle import Bundle
from tta_runtime.engine import EngineOptions
from tta_runtime.errors import BundleError, TtaError
from tta_runtime.files import open_regular, reason
from tta_runtime.manifest import InputSpec, Manifest
from tta_runtime.model import Engines

log = logging.getLogger(__name__)

WITHOUT_WEIGHTS = ("timm", "torchvision")
"""Sources whose networks are made with random weights; a teacher needs some."""
_CHUNK_BYTES = 1 << 20


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
        source: a bundle's directory with `distill`, or a network: `FILE.py:factory`, which takes the student's range
            mapped to 0..1, `timm:NAME`, `torchvision:NAME` or `hf:DIR`.
        like: the student, whose input and classes the teacher is compiled for.
        cache: directory where a compiled teacher stays.
        weights: of the network; a `FILE.py:factory` may load its own and `hf:DIR` has them, the others need some.
        options: of the engines.
        progress: told what is being done.

    Raises:
        BundleError, EngineError: the bundle cannot be used.
        TeacherRefused: it is neither a bundle with `distill` nor a network that can be compiled.
    """
    if source and Path(source).is_dir():
        bundle = Bundle.open(source)
        if METHOD not in bundle.manifest.methods:
            raise TeacherRefused(
                f"the teacher {source} has the methods {', '.join(bundle.manifest.methods)}, no `{METHOD}`",
                f"Build it again with `--methods source,{METHOD}`",
            )
    else:
        bundle = _compiled(source, like, cache, weights, progress)
    return Engines.load(bundle, methods=[METHOD], options=options)


def _compiled(
    source: str, like: Engines, cache: Path, weights: Path | None, progress: Callable[[str], None]
) -> Bundle:
    """The bundle of a network, compiled unless it is in the cache."""
    kind, separator, _ = source.partition(":")
    if not separator:
        raise TeacherRefused(
            f"the teacher {source!r} is no directory and names no network",
            "Give a bundle's directory, FILE.py:factory or timm:NAME",
        )
    if weights is None and kind in WITHOUT_WEIGHTS:
        raise TeacherRefused(
            f"the teacher {source!r} would be made with random weights, and has nothing to teach",
            "Give its weights as well, or a bundle's directory",
        )
    if weights is not None and not weights.is_file():
        raise TeacherRefused(f"the teacher's weights {weights} are no file", "Check the path")
    shape = _fixed(like.bundle.manifest.input)
    try:
        name = f"teacher-{_fingerprint(source, weights, like.bundle.manifest)}"
    except OSError as error:
        raise TeacherRefused(
            f"the teacher {source!r} cannot be read: {reason(error)}", "Check the permissions of its files"
        ) from error
    place = cache / name
    if place.is_dir():
        try:
            return Bundle.open(place)
        except BundleError as error:
            # A disk that was full or lost power; what it was made of is at hand.
            progress(f"the compiled teacher in {place} is damaged: {error.cause}")
    progress(f"compiling the teacher {source}; this is done once")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for stale in (place, *cache.glob(f"{name}.new"), *cache.glob(f".{name}.new.*")):
            with suppress(FileNotFoundError):
                shutil.rmtree(stale)
        made = cache / f"{name}.new"
        _build(source, weights, like.bundle.manifest, shape, made, progress)
        made.rename(place)
    except OSError as error:
        raise TeacherRefused(
            f"the compiled teacher cannot be put into {cache}: {reason(error)}",
            "Free space, or choose another --store",
        ) from error
    return Bundle.open(place)


def _build(
    source: str,
    weights: Path | None,
    student: Manifest,
    shape: tuple[int, ...],
    out: Path,
    progress: Callable[[str], None],
) -> None:
    """Compile a network into a new directory, for the student's input and classes."""
    try:
        # Only now: a cloud whose teacher is a bundle needs no PyTorch.
        from tta_exporters.build import BuildOptions, InputOptions, build
        from tta_exporters.preprocess import Preprocess
        from tta_exporters.sources import load_network
    except ImportError as error:
        raise TeacherRefused(
            f"the teacher {source!r} has to be compiled, and {error.name or 'a library'} is not installed",
            "Install `tta-runtime[cloud]`, or give a bundle that was built elsewhere",
        ) from error
    spec = student.input
    try:
        network = load_network(source, weights)
        known = getattr(network, "pretrained_cfg", None)  # timm's networks say how they were trained
        trained: Mapping[str, Any] = known if isinstance(known, Mapping) else {}
        pre = Preprocess(spec.low, spec.high, tuple(trained.get("mean", ())), tuple(trained.get("std", ())))
        options = BuildOptions(
            model_id=source.rpartition(":")[2],
            input=InputOptions(shape, spec.dtype, pre),
            classes=student.classes,
            methods=["source", METHOD],
        )
        build(network, options, out, progress=progress)
    except TtaError as error:
        raise TeacherRefused(
            f"the teacher {source!r} cannot be compiled: {error.cause}", error.fix
        ) from error


def _fixed(spec: InputSpec) -> tuple[int, ...]:
    """The shape of one sample.

    Raises:
        TeacherRefused: a dimension of it is free; a network is compiled for one size.
    """
    lengths = [length for length in spec.shape[1:] if not isinstance(length, str)]
    if len(lengths) < len(spec.shape) - 1:
        raise TeacherRefused(
            f"the student takes {spec.shape}, and a teacher is compiled for fixed lengths only",
            "Give a teacher's bundle that takes the same",
        )
    return tuple(lengths)


def _fingerprint(source: str, weights: Path | None, student: Manifest) -> str:
    """Names a compiled teacher: another file, other weights or another input are another teacher.

    What a factory imports or reads by itself is not looked at.
    """
    digest = hashlib.sha256(f"{source}\n{student.input}\n{student.classes}\n".encode())
    for path in (*_files(source), *([] if weights is None else [weights])):
        digest.update(_sha256(path))
    return digest.hexdigest()[:16]


def _files(source: str) -> Iterable[Path]:
    """What a source is made of on this disk."""
    if source.startswith("hf:"):
        return sorted(path for path in Path(source.partition(":")[2]).glob("*") if path.is_file())
    file = Path(source.rpartition(":")[0])
    return [file] if file.is_file() else []


def _sha256(path: Path) -> bytes:
    """Of a file, which may be larger than memory."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while part := file.read(_CHUNK_BYTES):
            digest.update(part)
    return digest.digest()
