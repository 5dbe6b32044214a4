"""One literal bad bundle for each rule of docs/spec/bundle.md, and more where a rule has several parts.

Each entry spoils a good tiny bundle in one way. Where the damage is in a file's content, the manifest is
sealed again around it, so that only the rule in question is broken.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tiny_bundle
from tta_runtime import errors, manifest, tensors
from tta_runtime.errors import TtaError

Json = dict[str, Any]


@dataclass(frozen=True)
class Bad:
    """A way to spoil a bundle and the one error that must come of it."""

    name: str
    rule: str
    error: type[TtaError]
    spoil: Callable[[Path], None]
    says: tuple[str, ...] = ()
    """What the message must contain: the values, found and expected."""
    at_load: bool = False
    """True: found when the engine loads, not when the bundle opens."""


def edited(change: Callable[[Json], object]) -> Callable[[Path], None]:
    """Change the manifest's JSON and leave the files alone."""

    def spoil(path: Path) -> None:
        file = path / "manifest.json"
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))

    return spoil


def resealed(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """Change files, then list their new hashes and sizes."""

    def spoil(path: Path) -> None:
        change(path)
        reseal(path)

    return spoil


def reseal(path: Path) -> None:
    """List hash and size of the files as they are now, whatever they contain."""

    def hashes(data: Json) -> None:
        data["files"] = {
            f.name: {"sha256": hashlib.sha256(f.read_bytes()).hexdigest(), "bytes": f.stat().st_size}
            for f in sorted(path.iterdir())
            if f.name != "manifest.json"
        }

    edited(hashes)(path)


def put(*keys: str | int, value: object) -> Callable[[Path], None]:
    """Set one value in the manifest: put("theta", "size", value=3)."""

    def change(data: Json) -> None:
        at: Any = data
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value

    return edited(change)


def drop(*keys: str | int) -> Callable[[Path], None]:
    """Remove one key from the manifest."""

    def change(data: Json) -> None:
        at: Any = data
        for key in keys[:-1]:
            at = at[key]
        del at[keys[-1]]

    return edited(change)


def raw(data: bytes) -> Callable[[Path], None]:
    """Replace manifest.json."""
    return lambda path: _void((path / "manifest.json").write_bytes(data))


def rename_file(old: str, new: str) -> Callable[[Path], None]:
    """List a file by another name; the file stays."""

    def change(data: Json) -> None:
        data["files"][new] = data["files"].pop(old)
        for graph in data["graphs"].values():
            graph["file"] = new if graph["file"] == old else graph["file"]

    return edited(change)


def tensors_file(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the arrays of a safetensors file and seal again."""

    def spoil(path: Path) -> None:
        arrays = {k: v.copy() for k, v in tensors.decode((path / name).read_bytes())[0].items()}
        change(arrays)
        (path / name).write_bytes(tensors.encode(arrays))
        reseal(path)

    return spoil


def swap_order(data: Json) -> None:
    """The entry that is not trained first, offsets adjusted: contiguous, but what is learnt is no slice."""
    scale, bias, mean = data["theta"]["entries"]
    data["theta"]["entries"] = [mean | {"offset": 0}, scale | {"offset": 8}, bias | {"offset": 16}]


def link_outside(path: Path) -> None:
    outside = path.parent / "outside.bin"
    (path / "weights.bin").rename(outside)
    (path / "weights.bin").symlink_to(outside)


def as_pipe(name: str) -> Callable[[Path], None]:
    """Reading it would wait for ever."""

    def spoil(path: Path) -> None:
        (path / name).unlink()
        os.mkfifo(path / name)

    return spoil


def as_directory(name: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        (path / name).unlink()
        (path / name).mkdir()

    return spoil


def as_link_to_itself(path: Path) -> None:
    (path / "weights.bin").unlink()
    (path / "weights.bin").symlink_to(path / "weights.bin")


def huge_anchor(path: Path) -> None:
    """Takes no room on the disk, and must take none in memory."""
    os.truncate(path / "anchor.safetensors", 2 << 30)
    put("files", "anchor.safetensors", "bytes", value=2 << 30)(path)


def flip_byte(path: Path, name: str = "weights.bin") -> None:
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)


def graph_with(location: str) -> Callable[[Path], None]:
    """forward.onnx reads its weights from somewhere else; otherwise it is in order, and so are the hashes."""

    def change(path: Path) -> None:
        (path.parent / "weights.bin").write_bytes((path / "weights.bin").read_bytes())
        where = str(path.parent / "weights.bin") if location == "ABSOLUTE" else location
        graph = manifest.decode((path / "manifest.json").read_bytes()).graphs["forward"]
        tiny_bundle.save_graph(path, graph, tiny_bundle.forward_nodes("float32"), ("h",), where)

    return resealed(change)


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda path: _void((path / name).write_bytes(data))


def _void(_: object) -> None:
    return None


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda arrays: arrays.__setitem__(key, value)


_STEP = ("graphs", "step.tent")
_NAN = np.array([np.nan] + [0.0] * 7, np.float32)
_HUGE_HEADER = (1 << 62).to_bytes(8, "little") + b"{}"

# (rule, error, found only when the engine loads, {name: (spoil, what the message must contain...)})
_GROUPS: list[tuple[str, type[TtaError], bool, dict[str, tuple[Any, ...]]]] = [
    (
        "B1",
        errors.ManifestMissing,
        False,
        {
            "no manifest": (lambda p: (p / "manifest.json").unlink(), "No such file"),
            "manifest is a directory": (as_directory("manifest.json"),),
            "manifest is a pipe": (as_pipe("manifest.json"), "not a regular file"),
        },
    ),
    (
        "B2",
        errors.ManifestTooLarge,
        False,
        {
            "5 MiB manifest": (raw(b" " * (5 << 20)), "4194304"),
        },
    ),
    (
        "B3",
        errors.ManifestMalformed,
        False,
        {
            "empty manifest": (raw(b""),),
            "half a manifest": (lambda p: raw((p / "manifest.json").read_bytes()[:900])(p),),
            "not UTF-8": (raw(b'{"format": "\xff\xfe"}'),),
            "a list": (raw(b"[]"), "object", "array"),
            "nested 100000 deep": (raw(b'{"x":' + b"[" * 100_000),),
            "misspelt key": (put("clases", value=3), "clases", "did you mean `classes`?"),
            "misspelt inner key": (
                put("methods", "tent", "min_bacth", value=3),
                "min_bacth",
                "did you mean `min_batch`?",
            ),
            "missing key": (drop("theta"), "theta"),
            "text for a number": (put("classes", value="three"), "$.classes", "int", "str"),
            "negative size": (put("theta", "size", value=-1), "$.theta.size"),
            "size beyond 2^53": (put("files", "weights.bin", "bytes", value=10**30), "bytes"),
            "version 0": (put("format_version", value=0), "0"),
        },
    ),
    (
        "B4",
        errors.UnknownFormat,
        False,
        {
            "another format": (put("format", value="tta-patch"), "tta-patch", "tta-bundle"),
        },
    ),
    (
        "B5",
        errors.NewerFormat,
        False,
        {
            "newer version": (put("format_version", value=2), "2", "1", "Upgrade tta-runtime"),
            "newer version with unknown keys": (
                raw(b'{"format": "tta-bundle", "format_version": 7, "shards": []}'),
                "7",
            ),
        },
    ),
    (
        "B6",
        errors.PathEscapes,
        False,
        {
            "parent directory": (rename_file("weights.bin", "../weights.bin"), "../weights.bin"),
            "absolute path": (rename_file("forward.onnx", "/etc/passwd"), "/etc/passwd"),
            "subdirectory": (rename_file("weights.bin", "sub/weights.bin"),),
            "backslash": (rename_file("weights.bin", "..\\weights.bin"),),
            "hidden file": (rename_file("weights.bin", ".weights.bin"),),
            "newline at the end": (rename_file("weights.bin", "weights.bin\n"),),
            "manifest lists itself": (rename_file("weights.bin", "manifest.json"),),
            "link out of the bundle": (link_outside, "outside.bin"),
        },
    ),
    (
        "B7",
        errors.LayoutMalformed,
        False,
        {
            "gap": (put("theta", "entries", 1, "offset", value=9), "9", "8", "norm.bias"),
            "overlap": (put("theta", "entries", 1, "offset", value=7), "7", "8"),
            "size too large": (put("theta", "size", value=25), "25", "24"),
            "trained after frozen": (edited(swap_order), "norm.scale"),
            "trained too small": (put("theta", "trained", value=8), "8", "16"),
            "same name twice": (put("theta", "entries", 1, "name", value="norm.scale"), "norm.scale"),
            "empty dimension": (put("theta", "entries", 0, "shape", value=[8, 0]),),
            "more elements than any machine holds": (
                put("theta", "entries", 0, "shape", value=[1 << 50] * 50),
            ),
            "no entries": (put("theta", value={"size": 0, "trained": 0, "digest": "0" * 64, "entries": []}),),
            "digest is no digest": (put("theta", "digest", value="abc"), "abc"),
        },
    ),
    (
        "B8",
        errors.ManifestInconsistent,
        False,
        {
            "unknown default method": (put("default_method", value="tnet"), "tnet", "did you mean `tent`?"),
            "unknown step graph": (
                put("methods", "tent", "step", value="step.tnt"),
                "step.tnt",
                "did you mean `step.tent`?",
            ),
            "step graph that serves": (put("methods", "tent", "serve", value="step.tent"), "step.tent"),
            "no forward graph": (
                edited(lambda d: d["graphs"].update(fwd=d["graphs"].pop("forward"))),
                "forward",
            ),
            "unknown role": (put(*_STEP, "role", value="train"), "train"),
            "graph file not listed": (put(*_STEP, "file", value="tent.onnx"), "tent.onnx"),
            "theta not listed": (drop("files", "theta.safetensors"), "theta.safetensors"),
            "hash is no hash": (put("files", "weights.bin", "sha256", value="Z" * 64),),
            "two class names for three classes": (put("class_names", value=["a", "b"]), "2", "3"),
            "unknown task": (put("task", value="detection"), "detection"),
            "no model id": (put("model_id", value=""),),
            "no adapter": (put("adapter", value=""),),
            "no classes": (put("classes", value=0),),
            "unknown input dtype": (put("input", "dtype", value="float16"), "float16"),
            "unknown input layout": (put("input", "layout", value="NHWC"), "NHWC"),
            "input without batch": (put("input", "shape", value=[8, 8]),),
            "input of another rank": (put("input", "shape", value=["batch", 8, 1]),),
            "empty range": (put("input", "low", value=1.0), "1.0"),
            "hyper twice": (put("methods", "tent", "hyper", 1, "name", value="lr"), "lr"),
            "hyper default out of range": (
                put("methods", "tent", "hyper", 0, "default", value=-1),
                "-1",
                "lr",
            ),
            "hyper default no float32": (put("methods", "tent", "hyper", 0, "default", value=1e300),),
            "cost below 0": (put("methods", "tent", "forwards", value=-1), "-1", "backwards 1"),
            "cost no number": (put("methods", "tent", "backwards", value=1e7), "10000000", "1e+06"),
            "half of the cost": (drop("methods", "tent", "backwards"), "forwards 1", "None"),
            "cost of no step": (
                edited(lambda d: d["methods"]["source"].update(forwards=1, backwards=0)),
                "no step",
            ),
            "report twice": (put("methods", "tent", "report", value=["loss", "loss", "a", "b"]),),
            "unknown state dtype": (put("methods", "tent", "state", 0, "dtype", value="object"),),
            "unknown state init": (put("methods", "tent", "state", 0, "init", value="random"),),
            "state starts as theta in another shape": (
                put("methods", "tent", "state", 0, "init", value="theta"),
            ),
            "serves a state it has not": (
                put("methods", "tent", "serve_vector", value="state:average"),
                "state:average",
            ),
            "serves a state that is no theta": (
                put("methods", "tent", "serve_vector", value="state:momentum"),
            ),
            "logits neither before nor after": (put("methods", "tent", "logits", value="now"), "now"),
            "batch below min_batch": (put("methods", "tent", "batch", value=1),),
            "too many random numbers": (put("methods", "teacher", "rand", value=1 << 40),),
            "window without a target": (
                put("methods", "tent", "window", value=128),
                "128",
                "takes no target",
            ),
            "window too long": (put("methods", "tent", "window", value=1 << 20), "1048576", "4096"),
            "method with a slash": (
                edited(lambda d: d["methods"].update({"a/b": d["methods"]["source"]})),
                "a/b",
            ),
        },
    ),
    (
        "B9",
        errors.GraphMismatch,
        False,
        {
            "theta port too small": (put(*_STEP, "inputs", 2, "shape", value=[23]), "23", "24"),
            "unknown bind": (put(*_STEP, "inputs", 2, "bind", value="params"), "params"),
            "target of another shape": (put(*_STEP, "inputs", 1, "key", value="target"), "weight", "3"),
            "bind without key": (put(*_STEP, "inputs", 0, "key", value=""),),
            "two ports for theta": (put(*_STEP, "inputs", 4, "bind", value="theta"),),
            "two ports of one name": (put(*_STEP, "inputs", 4, "name", value="theta"),),
            "unknown port dtype": (put(*_STEP, "inputs", 2, "dtype", value="float64"),),
            "input of another dtype": (put("input", "dtype", value="uint8"), "uint8", "float32"),
            "state the method has not": (put("methods", "tent", "state", value=[]), "momentum"),
            "state that no output returns": (
                edited(lambda d: d["graphs"]["step.tent"]["outputs"].pop(2)),
                "state momentum",
            ),
            "no theta returned": (edited(lambda d: d["graphs"]["step.tent"]["outputs"].pop(1)),),
            "one hyper too few": (edited(lambda d: d["methods"]["tent"]["hyper"].pop()), "[3]", "[2]"),
            "report too short": (edited(lambda d: d["methods"]["tent"]["report"].pop()),),
            "other number of classes": (
                edited(lambda d: d.update(classes=4, class_names=None)),
                "['batch', 3]",
            ),
            "forward needs hyper": (
                edited(
                    lambda d: d["graphs"]["forward"]["inputs"].append(
                        {"name": "h", "dtype": "float32", "shape": [3], "bind": "hyper"}
                    )
                ),
                "hyper",
            ),
            "fixed batch for any batch": (put(*_STEP, "inputs", 0, "shape", value=[4, 8]), "[4, 8]"),
        },
    ),
    (
        "B9",
        errors.GraphMismatch,
        True,
        {
            "ONNX value of another name": (
                put("graphs", "forward", "inputs", 0, "name", value="input"),
                "input",
                "x",
            ),
            "ONNX output not listed": (edited(lambda d: d["graphs"]["forward"]["outputs"].pop()), "features"),
            "ONNX output of another shape": (
                put("graphs", "forward", "outputs", 1, "shape", value=["batch", 9]),
                "8",
                "9",
            ),
            "ONNX output of another dtype": (
                put("graphs", "forward", "outputs", 1, "dtype", value="int64"),
                "int64",
                "float",
            ),
        },
    ),
    (
        "B9",
        errors.EngineFailed,
        True,
        {
            "graph is no ONNX file": (resealed(write("forward.onnx", b"not a graph")), "forward"),
            "graph is empty": (resealed(write("forward.onnx", b"")),),
            "weights too short for the graph": (resealed(write("weights.bin", b"1234")),),
        },
    ),
    (
        "B10",
        errors.FileMissing,
        False,
        {
            "weights missing": (lambda p: (p / "weights.bin").unlink(), "weights.bin"),
        },
    ),
    (
        "B11",
        errors.FileUnlisted,
        False,
        {
            "unlisted file": (write("extra.bin", b"1"), "extra.bin"),
            "unlisted hidden file": (write(".extra", b"1"), ".extra"),
        },
    ),
    (
        "B12",
        errors.FileTruncated,
        False,
        {
            "weights truncated": (lambda p: os.truncate(p / "weights.bin", 50), "50", "108"),
            "weights longer": (lambda p: os.truncate(p / "weights.bin", 109), "109", "108"),
        },
    ),
    (
        "B12",
        errors.FileUnreadable,
        False,
        {
            "weights are a pipe": (as_pipe("weights.bin"), "not a regular file"),
            "weights are a directory": (as_directory("weights.bin"),),
            "link to itself": (as_link_to_itself,),
        },
    ),
    (
        "B12",
        errors.ThetaMismatch,
        False,
        {
            "theta far too large": (resealed(lambda p: os.truncate(p / "theta.safetensors", 2 << 20)), "24"),
        },
    ),
    (
        "B12",
        errors.AnchorMismatch,
        False,
        {
            "anchor far too large": (huge_anchor, str(2 << 30)),
        },
    ),
    (
        "B13",
        errors.FileTampered,
        False,
        {
            "one bit of the weights": (flip_byte, "weights.bin", "sha256"),
            "one bit of a graph": (lambda p: flip_byte(p, "step.tent.onnx"), "step.tent.onnx"),
            "one bit of theta": (lambda p: flip_byte(p, "theta.safetensors"), "theta"),
            "one bit of the anchor": (lambda p: flip_byte(p, "anchor.safetensors"), "anchor"),
        },
    ),
    (
        "B14",
        errors.ThetaMismatch,
        False,
        {
            "theta lacks a tensor": (
                tensors_file("theta.safetensors", lambda a: a.pop("norm.bias")),
                "norm.bias",
            ),
            "theta has one more": (
                tensors_file("theta.safetensors", _set("extra", np.ones(1, np.float32))),
                "extra",
            ),
            "theta of another shape": (
                tensors_file("theta.safetensors", _set("norm.bias", np.zeros((2, 4), np.float32))),
                "[2, 4]",
                "[8]",
            ),
            "theta of another dtype": (
                tensors_file("theta.safetensors", _set("norm.bias", np.zeros(8, np.int64))),
                "int64",
            ),
            "theta with NaN": (
                tensors_file("theta.safetensors", _set("norm.bias", _NAN)),
                "norm.bias",
                "not finite",
            ),
            "theta of another model": (
                tensors_file("theta.safetensors", _set("norm.bias", np.full(8, 0.5, np.float32))),
                "digest",
            ),
            "theta is no safetensors file": (
                resealed(write("theta.safetensors", b"hello")),
                "theta.safetensors",
            ),
            "theta with a huge header": (resealed(write("theta.safetensors", _HUGE_HEADER)), str(1 << 62)),
        },
    ),
    (
        "B15",
        errors.AnchorMismatch,
        False,
        {
            "anchor lacks an array": (tensors_file("anchor.safetensors", lambda a: a.clear()), "center"),
            "anchor of another shape": (
                tensors_file("anchor.safetensors", _set("center", np.ones(3, np.float32))),
                "[3]",
                "[24]",
            ),
            "anchor of another dtype": (
                tensors_file("anchor.safetensors", _set("center", np.ones(24, np.int64))),
                "int64",
            ),
            "anchor with Inf": (
                tensors_file("anchor.safetensors", _set("more", np.full(2, np.inf, np.float32))),
                "more",
            ),
            "anchor is no safetensors file": (
                resealed(write("anchor.safetensors", b"\0" * 16)),
                "anchor.safetensors",
            ),
        },
    ),
    (
        "B11",
        errors.EngineFailed,
        True,
        {
            "weights from the parent directory": (graph_with("../weights.bin"), "escapes"),
            "weights from an absolute path": (graph_with("ABSOLUTE"),),
            "weights from a file that is not there": (graph_with("other.bin"),),
        },
    ),
]

BAD_BUNDLES = [
    Bad(name, rule, error, entry[0], entry[1:], at_load)
    for rule, error, at_load, entries in _GROUPS
    for name, entry in entries.items()
]
