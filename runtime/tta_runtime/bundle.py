"""Reading a bundle directory, clause by clause of docs/spec/bundle.md, cheap checks before expensive ones.

Nothing is written by reading. A bundle that opened is immutable: the manifest, theta and the anchor are in
memory, and the graphs are files whose hashes were checked.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from . import manifest_check, tensors, theta
from .atomic import write_atomic
from .errors import (
    AnchorMismatch,
    BundleError,
    FileMissing,
    FileTampered,
    FileTruncated,
    FileUnlisted,
    FileUnreadable,
    GraphsMissing,
    LayoutMismatch,
    ManifestMissing,
    ManifestTooLarge,
    NonFiniteTheta,
    PathEscapes,
    ThetaMismatch,
)
from .files import open_regular, read_at_most, reason
from .manifest import (
    ANCHOR,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    THETA,
    FileEntry,
    Manifest,
    decode,
    encode,
)

MAX_ANCHOR_BYTES = 1 << 30
_CHUNK_BYTES = 1 << 20
_PERMISSIONS = "Check the permissions, or copy the bundle again"
_COPY_AGAIN = "Copy the bundle again from where it was built"


@dataclass(frozen=True, eq=False)
class Bundle:
    """An opened bundle: everything an edge needs to run, read-only."""

    path: Path
    manifest: Manifest
    theta0: NDArray[np.float32]
    """The source theta, [P], read-only."""
    anchor: Mapping[str, NDArray[Any]]
    """Read-only facts of the source, by name."""
    digest: str
    """sha256 (hex) of manifest.json, which in turn names the hash of every other file."""

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> Bundle:
        """Read and check a bundle.

        Args:
            path: the directory.
            verify: False skips the sha256 of the graphs and their weights (clause B13), for a bundle that
                this process has verified before; every other check is always made.

        Raises:
            BundleError: the subclass that names the first clause that is broken.
        """
        path = Path(path)
        data = _read_manifest(path)
        manifest = decode(data)
        manifest_check.check(manifest)
        _check_listing(path, manifest)
        _check_sizes(path, manifest)
        theta0 = _read_theta(path, manifest)
        anchor = _read_anchor(path, manifest)
        if verify:
            # Smallest first: a damaged graph is found before the weights are read.
            for name in sorted(manifest.files, key=lambda n: manifest.files[n].bytes):
                if name not in (THETA, ANCHOR):
                    _check_hash(path, name, manifest.files[name])
        return cls(path, manifest, theta0, anchor, hashlib.sha256(data).hexdigest())

    def file(self, graph: str) -> Path:
        """Path of a graph's ONNX file."""
        return self.path / self.manifest.graphs[graph].file

    def tensorrt_file(self, graph: str) -> Path:
        """Path of the ONNX file that TensorRT is given for a graph.

        Raises:
            GraphsMissing: the bundle was built without.
        """
        name = self.manifest.graphs[graph].tensorrt
        if name is None:
            raise GraphsMissing(
                f"{self.path} holds no TensorRT variant of graph `{graph}`",
                "Build the bundle with `tta-export build --tensorrt`, or choose engine `cuda` or `cpu`",
            )
        return self.path / name

    def content(self, name: str) -> bytes:
        """The bytes of a small listed file, hashed as they are read (B16).

        Raises:
            BundleError: it cannot be read, or is no longer what the manifest lists.
        """
        return _read_listed(self.path, name, self.manifest.files[name])


# ------------------------------------------------------------------------------------------ reading


def _read_manifest(path: Path) -> bytes:
    file = path / MANIFEST
    try:
        data = read_at_most(file, MAX_MANIFEST_BYTES)
    except OSError as error:
        raise ManifestMissing(
            f"{file} cannot be read: {reason(error)}", "Give the directory that `tta-export build` wrote"
        ) from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestTooLarge(
            f"{file} has more than the allowed {MAX_MANIFEST_BYTES} bytes", "Build the bundle again"
        )
    return data


def _check_listing(path: Path, manifest: Manifest) -> None:
    """B10, B11: the directory holds exactly the listed files."""
    found = set(_names(path))
    if missing := sorted(manifest.files.keys() - found):
        raise FileMissing(f"{path} lacks {', '.join(missing[:5])}, which {MANIFEST} lists", _COPY_AGAIN)
    if unlisted := sorted(found - manifest.files.keys()):
        raise FileUnlisted(
            f"{path} holds {', '.join(unlisted[:5])}, which {MANIFEST} does not list",
            "Remove it: a graph could read weights from a file that no hash covers",
        )


def _check_sizes(path: Path, manifest: Manifest) -> None:
    """B6, B12: regular files inside the directory, of the listed sizes; theta and anchor small enough."""
    root = os.path.realpath(path)
    for name, entry in manifest.files.items():
        file = path / name
        if file.is_symlink() and os.path.dirname(os.path.realpath(file)) != root:
            raise PathEscapes(
                f"{file} is a symbolic link to {os.readlink(file)}, outside of the bundle",
                "Copy the file itself into the bundle",
            )
        with _open(file) as stream:
            size = os.fstat(stream.fileno()).st_size
        if size != entry.bytes:
            raise FileTruncated(f"{file} has {size} bytes, {MANIFEST} lists {entry.bytes}", _COPY_AGAIN)
    limit = 4 * manifest.theta.size + tensors.MAX_OVERHEAD_BYTES
    if manifest.files[THETA].bytes > limit:
        raise ThetaMismatch(
            f"{THETA} has {manifest.files[THETA].bytes} bytes, a theta of {manifest.theta.size} elements "
            f"needs at most {limit}",
            manifest_check.REBUILD,
        )
    if manifest.files[ANCHOR].bytes > MAX_ANCHOR_BYTES:
        raise AnchorMismatch(
            f"{ANCHOR} has {manifest.files[ANCHOR].bytes} bytes, the limit is {MAX_ANCHOR_BYTES}",
            manifest_check.REBUILD,
        )


def _read_theta(path: Path, manifest: Manifest) -> NDArray[np.float32]:
    """B14: exactly the layout's tensors, finite, with the layout's digest."""
    data = _read_listed(path, THETA, manifest.files[THETA])
    try:
        arrays, _ = tensors.decode(data)
        vector = theta.check(manifest.theta, theta.pack(manifest.theta, arrays))
    except (tensors.TensorsMalformed, LayoutMismatch, NonFiniteTheta) as error:
        raise ThetaMismatch(f"{path / THETA}: {reason(error)}", manifest_check.REBUILD) from error
    digest = theta.digest(manifest.theta, vector)
    if digest != manifest.theta.digest:
        raise ThetaMismatch(
            f"{path / THETA} has digest {digest}, {MANIFEST} says {manifest.theta.digest}",
            manifest_check.REBUILD,
        )
    vector.flags.writeable = False
    return vector


def _read_anchor(path: Path, manifest: Manifest) -> Mapping[str, NDArray[Any]]:
    """B15: finite arrays, among them every one that a graph's port is bound to."""
    data = _read_listed(path, ANCHOR, manifest.files[ANCHOR])
    try:
        arrays, _ = tensors.decode(data)
    except tensors.TensorsMalformed as error:
        raise AnchorMismatch(f"{path / ANCHOR}: {error}", manifest_check.REBUILD) from error
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise AnchorMismatch(
                f"{path / ANCHOR}: `{name}` holds values that are not finite", manifest_check.REBUILD
            )
    for key, graph in manifest.graphs.items():
        for port in graph.inputs:
            if port.bind != "anchor":
                continue
            found = arrays.get(port.key)
            if found is None or str(found.dtype) != port.dtype or list(found.shape) != port.shape:
                text = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
                raise AnchorMismatch(
                    f"graph `{key}` needs anchor `{port.key}` {port.dtype} {port.shape}, {ANCHOR} has {text}",
                    manifest_check.REBUILD,
                )
    return MappingProxyType(arrays)


def _read_listed(path: Path, name: str, entry: FileEntry) -> bytes:
    """The bytes of a small listed file; what is hashed is returned, so a later change does not matter."""
    try:
        data = read_at_most(path / name, entry.bytes)
    except OSError as error:
        raise FileUnreadable(f"{path / name}: {reason(error)}", _PERMISSIONS) from error
    if len(data) != entry.bytes:
        raise FileTruncated(
            f"{path / name} has {len(data)} bytes, {MANIFEST} lists {entry.bytes}", _COPY_AGAIN
        )
    _compare(path / name, hashlib.sha256(data).hexdigest(), entry)
    return data


def _check_hash(path: Path, name: str, entry: FileEntry) -> None:
    """B13."""
    _compare(path / name, _hash(path / name), entry)


def _compare(file: Path, sha256: str, entry: FileEntry) -> None:
    if sha256 != entry.sha256:
        raise FileTampered(f"{file} has sha256 {sha256}, {MANIFEST} lists {entry.sha256}", _COPY_AGAIN)


def _hash(file: Path) -> str:
    sha = hashlib.sha256()
    with _open(file) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            sha.update(chunk)
    return sha.hexdigest()


def _names(path: Path) -> list[str]:
    """What the directory holds besides the manifest."""
    try:
        return sorted(entry.name for entry in os.scandir(path) if entry.name != MANIFEST)
    except OSError as error:
        raise FileUnreadable(f"{path}: {reason(error)}", _PERMISSIONS) from error


@contextmanager
def _open(file: Path) -> Iterator[BinaryIO]:
    """A listed file, open for reading; what the operating system refuses has our name."""
    try:
        with open_regular(file) as stream:
            yield stream
    except OSError as error:
        raise FileUnreadable(f"{file}: {reason(error)}", _PERMISSIONS) from error


# ------------------------------------------------------------------------------------------ writing


def hash_files(path: Path | str) -> dict[str, FileEntry]:
    """Hash and size of every file in the directory but manifest.json, each made durable (fsync) on the way.

    Raises:
        BundleError: an entry is not a regular file, or cannot be read.
    """
    path = Path(path)
    entries: dict[str, FileEntry] = {}
    for name in _names(path):
        with _open(path / name) as stream:
            os.fsync(stream.fileno())
            size = os.fstat(stream.fileno()).st_size
        entries[name] = FileEntry(sha256=_hash(path / name), bytes=size)
    return entries


def write_manifest(path: Path | str, manifest: Manifest) -> None:
    """Write manifest.json into the bundle directory, atomically."""
    write_atomic(Path(path) / MANIFEST, encode(manifest))


def write_tensors(file: Path | str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write named arrays as a safetensors file, e.g. theta or the anchor (which may be empty), atomically."""
    write_atomic(Path(file), tensors.encode(arrays))


def seal(path: Path | str, manifest_without_files: Manifest) -> Manifest:
    """Complete a bundle directory: list every file in the manifest, check it, write manifest.json last.

    The manifest is what makes a directory a bundle, so it is written only when everything else is on disk
    and the manifest is consistent. `Bundle.open` remains the full check.

    Raises:
        BundleError: a clause of the specification is broken; manifest.json is as it was.
    """
    manifest = msgspec.structs.replace(manifest_without_files, files=hash_files(path))
    manifest_check.check(manifest)
    write_manifest(path, manifest)
    return manifest


__all__ = ["Bundle", "BundleError", "hash_files", "seal", "write_manifest", "write_tensors"]
