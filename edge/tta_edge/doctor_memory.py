"""How much memory the daemon will take: one stream measured in a real daemon, the others worked out."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.filesize import decimal

from tta_edge import hosting
from tta_edge.adapt import CHECKPOINTS
from tta_edge.client import Client
from tta_edge.config import HTTP_OFF, Config
from tta_edge.demo import daemon
from tta_edge.doctor_bundle import noise, sample_bytes
from tta_edge.errors import Busy
from tta_edge.wire import StatusReply, StreamStatus
from tta_runtime import Bundle, Manifest
from tta_runtime.checks import Check, fail, ok, warn
from tta_runtime.errors import TtaError

STREAM = "doctor"
VECTORS = 2 + CHECKPOINTS
"""Thetas (and states) of a stream: the active one, the one before it, the checkpoints."""
OBJECTS_BYTES = 24 * 1024
"""Of a stream beside its arrays: the model, its guards and counters, in Python objects."""
POLL_S = 0.05
MEASURE_S = 60.0
"""Longest time for the requests of a measurement."""
MIN_STEPS, MIN_REQUESTS, MAX_REQUESTS = CHECKPOINTS + 2, 8, 64
"""A measurement has at least so many of each; the engine's memory has grown to its size by then."""
WORTH_SAYING = 0.02
"""Share of the whole from which full windows are mentioned."""
FULL = 0.8
"""Share of the free memory over which a daemon is tight."""


@dataclass(frozen=True)
class Prediction:
    """Resident memory of a daemon, in bytes.

    Attributes:
        one: measured with one stream.
        stream: of each further stream.
        streams: how many it holds.
        windows: that full windows of all streams would add.
    """

    one: int
    stream: int
    streams: int
    windows: int

    @property
    def total(self) -> int:
        """With all streams, their windows as full as those that were measured."""
        return self.one + self.stream * (self.streams - 1)

    @property
    def worst(self) -> int:
        """With all streams and full windows."""
        return self.total + self.windows


def predict(
    one: int, streams: int, *, theta: int, state: int, sample_bytes: int, waiting: int, window: int,
    max_window_bytes: int,
) -> Prediction:  # fmt: skip
    """A daemon's memory from what one stream took.

    Args:
        one: resident bytes of a daemon with one stream that has stepped and has checkpoints.
        streams: how many it will hold; more go to disk and cost nothing.
        theta: elements of theta, float32.
        state: bytes of the method's state.
        sample_bytes: of one sample.
        waiting: samples that waited in the measured stream's window.
        window: most samples that may wait in one stream.
        max_window_bytes: most bytes that may wait in all streams.

    Returns:
        The prediction; a stream holds `VECTORS` thetas and states, what waits, and some Python objects.
    """
    waits = min(waiting * sample_bytes, max_window_bytes // max(1, streams))
    stream = VECTORS * (4 * theta + state) + waits + OBJECTS_BYTES
    full = min(streams * window * sample_bytes, max_window_bytes)
    return Prediction(one, stream, streams, max(0, full - streams * waits))


def state_bytes(manifest: Manifest, method: str) -> int:
    """Bytes of a method's state."""
    return sum(
        int(np.prod(each.shape, dtype=np.int64)) * np.dtype(each.dtype).itemsize
        for each in manifest.methods[method].state
    )


def stored_bytes(manifest: Manifest, method: str) -> int:
    """Bytes of one stream on disk: two slots of theta and state, and what the guards know of it."""
    if method not in manifest.methods:
        return 0
    return 2 * (4 * manifest.theta.size + state_bytes(manifest, method) + OBJECTS_BYTES)


def memory(config: Config, batch: int, available: int | None) -> Check:
    """Measure and predict; compare with what the machine has.

    Args:
        config: of the daemon to predict.
        batch: samples of a request.
        available: bytes that the daemon may take; None: unknown.
    """
    try:
        status = measure(config, batch)
        found = predict_for(config, status)
    except TtaError as error:
        return fail("memory", f"it could not be measured: {error.code}: {error.cause}", error.fix)
    steps = max(stream.steps for stream in status.streams if stream.id == STREAM)
    text = (
        f"one stream {decimal(found.one)} (measured, batch {batch}, {steps} steps), "
        f"each further {decimal(found.stream)}, {found.streams} streams {decimal(found.total)}"
    )
    if found.windows > WORTH_SAYING * found.total:
        text += f", with full windows {decimal(found.worst)}"
    if available is None:
        return ok("memory", text)
    text += f"; {decimal(available)} are free"
    fix = "Set max_streams, window or max_window_bytes lower, or send smaller batches"
    if found.worst > available:
        return fail("memory", text, fix)
    return warn("memory", text, fix) if found.worst > FULL * available else ok("memory", text)


def predict_for(config: Config, status: StatusReply) -> Prediction:
    """The prediction from the status of a daemon in which each bundle has served a stream of ours.

    Every further stream counts as one of the bundle whose streams are largest.

    Raises:
        BundleError: a bundle cannot be read any more.
    """
    served = hosting.wanted(config)
    return max(
        (
            _predict_for(
                config,
                Bundle.open(served[stream.bundle].path, verify=False).manifest,
                stream,
                status.rss_bytes,
            )
            for stream in status.streams
            if stream.id == STREAM
        ),
        key=lambda prediction: prediction.worst,
    )


def _predict_for(config: Config, manifest: Manifest, stream: StreamStatus, rss_bytes: int) -> Prediction:
    return predict(
        rss_bytes,
        config.max_streams,
        theta=manifest.theta.size,
        state=state_bytes(manifest, stream.method),
        sample_bytes=sample_bytes(manifest.input),
        waiting=stream.window,
        window=manifest.methods[stream.method].window or config.window,
        max_window_bytes=config.max_window_bytes,
    )


def measure(config: Config, batch: int) -> StatusReply:
    """The status of a real daemon with these settings, in a process of its own, after use.

    It listens on a free port, has no HTTP and keeps its state in a temporary directory. One stream of each bundle
    for images gets noise until it has stepped and has checkpoints, or for so long that it will not.

    Raises:
        TtaError: the daemon does not start, or refuses.
    """
    with tempfile.TemporaryDirectory(prefix="tta-doctor-") as folder:
        file = Path(folder, "edge.toml")
        # Steps and checkpoints come sooner than they will; what is held after them is the same.
        changed = msgspec.structs.replace(
            config, bind="tcp://127.0.0.1:0", http=HTTP_OFF, state_dir=str(Path(folder, "state")), ready_file=None,
            checkpoint_steps=1, log_level="error", log_format="text", adapt=True,
            policy="inline" if config.policy == "inline" else "always",
        )  # fmt: skip
        file.write_text(toml_of(absolute(changed)), encoding="utf-8")
        with daemon("--config", str(file)) as endpoint, Client(endpoint, timeout_s=MEASURE_S) as client:
            for bundle in client.status().bundles:
                if bundle.task == "text":
                    continue
                _exercise(client, bundle.name, batch, changed)
            return client.status()


def _exercise(client: Client, bundle: str, batch: int, config: Config) -> None:
    limits, spec = client.info(bundle).limits, client.info(bundle).input
    step_size = limits.batch or max(config.step_batch, limits.min_batch)
    rng, end_s = np.random.default_rng(config.seed), time.monotonic() + MEASURE_S
    for done in range(1, MAX_REQUESTS + 1):
        _send(client, noise(spec, min(limits.batch or batch, limits.max_batch), rng), bundle)
        # A step in the background comes when nothing else is to be done: the next request waits for it.
        # The window of a method that keeps one stays full.
        while (stream := _stream(client, bundle)).auto is None and stream.window >= step_size:
            if time.monotonic() > end_s:
                break
            Event().wait(POLL_S)
        stepped = stream.steps >= MIN_STEPS or stream.state == "source"
        if (done >= MIN_REQUESTS and stepped) or time.monotonic() > end_s:
            return


def _stream(client: Client, bundle: str) -> StreamStatus:
    """Our stream of a bundle."""
    found = {(each.bundle, each.id): each for each in client.status().streams}
    return found[bundle, STREAM]


def _send(client: Client, x: NDArray[Any], bundle: str) -> None:
    """One request; a full daemon is asked again. The client's own deadline bounds each attempt."""
    while True:
        try:
            client.predict(x, STREAM, bundle)
        except Busy as busy:
            Event().wait(busy.retry_after_s or POLL_S)
        else:
            return


# --- settings as a file -----------------------------------------------------------------------------


def absolute(config: Config) -> Config:
    """The same configuration with paths that mean the same from everywhere."""
    bundles = {
        name: msgspec.structs.replace(each, path=str(Path(each.path).absolute()))
        for name, each in config.bundles.items()
    }
    bundle = None if config.bundle is None else str(Path(config.bundle).absolute())
    return msgspec.structs.replace(config, bundle=bundle, bundles=bundles)


def toml_of(config: Config) -> str:
    """A configuration as a TOML file that reads back as the same."""
    values = msgspec.to_builtins(config)
    return "".join(f"{key} = {_value(value)}\n" for key, value in values.items() if value is not None)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_value(k)} = {_value(v)}" for k, v in value.items() if v is not None) + "}"
    # JSON's strings, numbers and booleans are TOML's too; DEL is the one character that only JSON leaves as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f").replace("Infinity", "inf")
