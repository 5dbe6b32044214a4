"""The fleet's processes: a cloud, and the commands with which an edge becomes known to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tta_runtime.errors import TtaError

PATIENCE_S = 120.0
"""Until a process is ready, ended, or has done what is waited for."""
LAST_WORDS = 20


class FleetFailed(TtaError):
    """A process of the fleet did not do its part."""

    code = "fleet-failed"


def environment() -> dict[str, str]:
    """This process's, without the settings of daemons: the example is the same everywhere."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TTA_")}


def command(module: str, *words: str | Path) -> str:
    """What `python -m MODULE WORDS` prints.

    Raises:
        FleetFailed: it ended with another status than 0.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, words)], env=environment(), capture_output=True, text=True,
        timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    if done.returncode:
        said = done.stderr.strip().splitlines()[-3:]
        raise FleetFailed(f"{module} {words[0]} ended with {done.returncode}: {' / '.join(said)}")
    return done.stdout


@dataclass(frozen=True)
class Cloud:
    """A service that runs.

    Attributes:
        store: its directory.
        door: where edges enrol.
        process: the process.
        log: its last words.
    """

    store: Path
    door: str
    process: subprocess.Popen[str]
    log: deque[str]

    def enrol(self, name: str, state: Path) -> None:
        """Make an edge with a state directory known, in a group of its own.

        Raises:
            FleetFailed: a command failed.
        """
        words = ("enroll", name, "--group", name, "--door", self.door, "--store", self.store, "--json")
        token: str = json.loads(command("tta_cloud", *words))["token"]
        command("tta_edge", "enroll", token, "--state-dir", state)


@contextmanager
def cloud(
    student: Path, teacher: Path, store: Path, settings: Mapping[str, Any] | None = None
) -> Iterator[Cloud]:
    """`tta-cloud serve` on free ports of this machine.

    Args:
        student: bundle of the edges.
        teacher: bundle.
        store: its directory; keys are made in it.
        settings: further keys of its configuration; tables as mappings.

    Raises:
        FleetFailed: it did not become ready; its last words are in the cause.
    """
    command("tta_cloud", "keys", "init", "--store", store)
    file = store / "cloud.toml"
    file.write_text(
        toml({"bind": "tcp://127.0.0.1:0", "enroll_bind": "tcp://127.0.0.1:0", **(settings or {})})
    )
    words = ("--student", student, "--teacher", teacher, "--store", store, "--config", file)
    process = subprocess.Popen(
        [sys.executable, "-m", "tta_cloud", "serve", *map(str, words)], stderr=subprocess.PIPE, text=True,
        env=environment(),
    )  # fmt: skip
    log: deque[str] = deque(maxlen=LAST_WORDS)
    try:
        yield Cloud(store, _ready(process, log)[1], process, log)
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(process: subprocess.Popen[str], log: deque[str]) -> list[str]:
    """The words after `ready`. What it says later is read too, else it would stand still."""
    found: list[list[str]] = []
    settled = threading.Event()

    def read(stderr: IO[str]) -> None:
        for line in stderr:
            log.append(line.strip())
            if line.startswith("ready ") and not found:
                found.append(line.split()[1:])
                settled.set()
        settled.set()

    assert process.stderr is not None
    threading.Thread(target=read, args=(process.stderr,), daemon=True).start()
    settled.wait(PATIENCE_S)
    if not found:
        said = " / ".join(list(log)[-3:]) or "it said nothing"
        raise FleetFailed(f"the cloud is not ready: {said}", "Run tta-cloud serve by itself to see why")
    return found[0]


def toml(settings: Mapping[str, Any]) -> str:
    """Settings as a TOML document: strings, numbers, truth values, and tables of them."""
    plain = [
        f"{key} = {json.dumps(value)}" for key, value in settings.items() if not isinstance(value, Mapping)
    ]
    tables = [f"[{key}]\n{toml(value)}" for key, value in settings.items() if isinstance(value, Mapping)]
    return "\n".join([*plain, *tables]) + "\n"
