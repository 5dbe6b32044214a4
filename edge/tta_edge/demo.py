"""The demonstration: the built-in bundle in a daemon of its own process, clean digits, then seven shifts."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from tta_edge.client import Client
from tta_edge.errors import StartError
from tta_edge.live import PATIENT, OnBatch, Phase, Result, Streamer, StreamPlan, results, to_json
from tta_edge.streams.measures import Recovery
from tta_edge.streams.shifts import Shift
from tta_edge.streams.sources import open_source

SHIFTS = (
    "gaussian_noise", "impulse_noise", "defocus_blur", "contrast", "brightness", "fog", "pixelate",
)  # fmt: skip
SEVERITY = 5
BATCH = 64
METHOD = "tent"
MIN_GAP_RECOVERED = 0.5
MAX_CLEAN_LOSS = 0.01
START_S, STOP_S = 60.0, 10.0
"""How long the daemon may take to be ready, and to end."""


class DaemonFailed(StartError):
    """The daemon of the demonstration did not become ready."""

    code = "daemon-failed"


@dataclass(frozen=True)
class Demo:
    """What the demonstration saw.

    Attributes:
        phases: the clean part and the shifts, sample by sample.
        clean: figures of the clean part.
        shifted: figures of the shifts.
        recovery: definition of the recovery time.
        method: served by the daemon.
        seed: of the shifts.
    """

    phases: Sequence[Phase]
    clean: Result
    shifted: Sequence[Result]
    recovery: Recovery
    method: str
    seed: int

    def to_json(self) -> dict[str, Any]:
        """The machine-readable form."""
        return to_json(
            self.clean, self.shifted, self.recovery,
            model="digits", method=self.method, batch=BATCH, seed=self.seed, severity=SEVERITY,
        )  # fmt: skip

    @property
    def passed(self) -> bool:
        """Whether adapting regained enough under the shifts and cost nothing much without them."""
        form = self.to_json()
        gap, loss = form["mean_gap_recovered"], form["clean_loss"]
        return gap is not None and gap >= MIN_GAP_RECOVERED and loss <= MAX_CLEAN_LOSS


def run(
    *, method: str = METHOD, seed: int = 0, recovery: Recovery | None = None, on_batch: OnBatch | None = None
) -> Demo:
    """Start the daemon, stream, stop the daemon.

    The clean images come first, then the same images under each shift; before each part the stream is
    reset to the source model, so that every figure stands for itself.

    Args:
        method: of the built-in bundle.
        seed: of the shifts.
        recovery: definition of the recovery time.
        on_batch: told after each batch.

    Raises:
        DaemonFailed: the daemon did not become ready; its last words are in the cause.
        TtaError: what streaming raises.
    """
    recovery = recovery or Recovery()
    shifts = (None, *(Shift(name, SEVERITY) for name in SHIFTS))
    plan = StreamPlan(
        open_source("digits"), shifts, batch=BATCH, seed=seed, stream="demo", reset_between=True
    )
    with daemon("--method", method) as endpoint, Client(endpoint, timeout_s=START_S, retry=PATIENT) as client:
        phases = Streamer(client, plan, on_batch).run()
    clean, shifted = results(phases, recovery)
    if clean is None:
        raise DaemonFailed("the daemon answered nothing", "Run the demonstration again")
    return Demo(phases, clean, shifted, recovery, method, seed)


@contextmanager
def daemon(*arguments: str) -> Iterator[str]:
    """`tta-edge serve ARGUMENTS` on a free port of this machine, in a process of its own; gives its endpoint.

    TTA_* variables of this process do not reach it, so that the demonstration is the same everywhere.

    Raises:
        DaemonFailed: it ended, or was silent for too long, before it was ready.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TTA_")}
    serve = ["serve", "--bind", "tcp://127.0.0.1:0", "--http", "off"]
    command = [sys.executable, "-m", "tta_edge", *serve, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield _endpoint(process)
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _endpoint(process: subprocess.Popen[str]) -> str:
    """Where the daemon listens, from its line `ready ENDPOINT`. Its later words are read and dropped."""
    said: list[str] = []
    found: list[str] = []
    settled = threading.Event()

    def read(stderr: IO[str]) -> None:
        for line in stderr:
            if not settled.is_set():
                said.append(line.strip())
                if line.startswith("ready "):
                    found.append(line.split()[1])
                    settled.set()
        settled.set()

    assert process.stderr is not None
    threading.Thread(target=read, args=(process.stderr,), daemon=True).start()
    settled.wait(START_S)
    if not found:
        words = " / ".join(said[-3:]) or "it said nothing"
        raise DaemonFailed(f"the daemon is not ready: {words}", "Run tta-edge serve by itself to see why")
    return found[0]
