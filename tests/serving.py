"""For tests of how the daemon serves: variants of the tiny bundle, and waiting for what a daemon shows."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import onnx
import zmq
from onnx import helper, numpy_helper
from safetensors.numpy import load_file

import tiny_bundle
from tta_edge import wire
from tta_edge.client import Client
from tta_edge.wire import SessionStatus, StreamStatus
from tta_runtime import bundle as bundles
from tta_runtime import manifest as manifests
from tta_runtime import theta as thetas

PATIENCE_S = 60.0
SIDE = 384  # of the matrices that a slow step multiplies
T = TypeVar("T")


def until(look: Callable[[], T], good: Callable[[T], bool] = bool) -> T:
    """Look again and again; what is looked at must cost a round trip or a wait of its own."""
    end_s = time.monotonic() + PATIENCE_S
    while not good(found := look()):
        assert time.monotonic() < end_s, f"still {found}"
    return found


def stream(client: Client, name: str = "default", bundle: str = "default") -> StreamStatus:
    """What the daemon says of one stream."""
    (found,) = (each for each in client.status().streams if (each.id, each.bundle) == (name, bundle))
    return found


def steps(client: Client, count: int, name: str = "default", bundle: str = "default") -> StreamStatus:
    """Wait until a stream has committed so many steps."""
    return until(lambda: stream(client, name, bundle), lambda found: found.steps >= count)


def manifest(path: Path) -> dict[str, Any]:
    """A bundle's manifest as JSON values."""
    form: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    return form


def reseal(path: Path, **changes: object) -> None:
    """Make the manifest agree with the files again, with some of its fields changed."""
    form = manifest(path)
    (path / "manifest.json").unlink()
    bundles.seal(path, manifests.decode(json.dumps({**form, **changes}).encode()))


def slow(path: Path, rounds: int) -> None:
    """The tiny bundle with a `tent` step that also multiplies large matrices, `rounds` times, to no effect."""
    tiny_bundle.build(path)
    model = onnx.load(path / "step.tent.onnx", load_external_data=False)
    nodes = [
        helper.make_node("ReduceMean", ["logits"], ["slow.mean"], keepdims=0),
        helper.make_node("Expand", ["slow.mean", "slow.shape"], ["slow.0"]),
    ]
    for k in range(rounds):
        nodes += [
            helper.make_node("MatMul", [f"slow.{k}", f"slow.{k}"], [f"slow.product.{k}"]),
            helper.make_node("Tanh", [f"slow.product.{k}"], [f"slow.{k + 1}"]),
        ]
    nodes += [
        helper.make_node("ReduceMean", [f"slow.{rounds}"], ["slow.end"], keepdims=0),
        helper.make_node("Mul", ["slow.end", "slow.zero"], ["slow.nothing"]),
        helper.make_node("Add", ["report.real", "slow.nothing"], ["report"]),
    ]
    for node in model.graph.node:
        if "report" in node.output:
            node.output[0] = "report.real"
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array([SIDE, SIDE], np.int64), "slow.shape"),
            numpy_helper.from_array(np.array(0, np.float32), "slow.zero"),
        ]
    )
    onnx.save(model, path / "step.tent.onnx")
    reseal(path)


def same_source(path: Path) -> None:
    """The tiny bundle, built anew with something else in it: another digest, the same source theta and layout."""
    tiny_bundle.build(path)
    reseal(path, provenance={"made_by": "another build"})


def other_source(path: Path) -> None:
    """The tiny bundle with another source theta."""
    tiny_bundle.build(path)
    tensors = {
        name: array + np.float32(0.25) for name, array in load_file(path / "theta.safetensors").items()
    }
    (path / "theta.safetensors").unlink()
    bundles.write_tensors(path / "theta.safetensors", tensors)
    form = manifest(path)
    layout = manifests.decode((path / "manifest.json").read_bytes()).theta
    digest = thetas.digest(layout, thetas.pack(layout, tensors))
    reseal(path, theta={**form["theta"], "digest": digest})


def other_input(path: Path, width: int = 9) -> None:
    """The tiny bundle for samples of another shape."""
    trained = {"c.trained": np.array([2 * width], np.int64)}
    with (
        mock.patch.multiple(tiny_bundle, D=width, P=3 * width),
        mock.patch.dict(tiny_bundle._CONSTANTS, trained),
    ):
        tiny_bundle.build(path)


class Link:
    """A name for one of several directories, changed in one go as a deployment does it."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path = path
        self.point(target)

    def point(self, target: Path) -> None:
        """Let the name stand for another directory."""
        new = self.path.with_suffix(".new")
        new.symlink_to(target)
        os.replace(new, self.path)


class Pipe:
    """A client that sends several requests before it reads, so that they wait together; a context."""

    def __init__(self, endpoint):
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(endpoint)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, number, array, **fields):
        message = wire.Predict(id=number, x=wire.declare(array), **fields)
        self.socket.send_multipart(wire.encode(message, {"x": array}))

    def replies(self, count):
        found = {}
        for _ in range(count):
            assert self.socket.poll(PATIENCE_S * 1e3), "no reply"
            received = wire.decode_reply(self.socket.recv_multipart())
            assert received.message.id not in found
            found[received.message.id] = received
        return found


def sessions(client: Client) -> dict[str, SessionStatus]:
    """The sessions in memory, by name."""
    return {each.id: each for each in client.status().sessions}
