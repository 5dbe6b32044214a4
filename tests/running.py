"""Start the real daemon, in this process or its own, wait until it is ready, stop it. Nothing sleeps."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from tta_edge.config import Config
from tta_edge.service import Server
from tta_runtime.atomic import DISK, Disk

PATIENCE_S = 60.0
REPOSITORY = Path(__file__).resolve().parents[1]


class Runs(Protocol):
    """What a service of either kind offers to those who start it."""

    ready: threading.Event

    def run(self) -> None:
        """Until it is stopped."""

    def stop(self) -> None:
        """End `run`; for any thread."""


@contextmanager
def running(bundle: Path, *, disk: Disk = DISK, **settings: object) -> Iterator[Server]:
    """A daemon on a free port in a thread of this process; its `endpoint` says where.

    What makes it fail to start, or to stop, is raised here.
    """
    defaults = {"bundle": str(bundle), "bind": "tcp://127.0.0.1:0", "http": "off", "threads": 1}
    server = Server(Config(**{**defaults, **settings}), disk=disk)
    with threaded(server, "the daemon"):
        yield server


@contextmanager
def threaded(server: Runs, name: str) -> Iterator[None]:
    """A service in a thread of this process, ready; stopped at the end. What made it fail is raised here."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            server.run()
        except BaseException as error:  # noqa: BLE001 - raised in the test's own thread below
            failures.append(error)
            server.ready.set()

    thread = threading.Thread(target=run, name=f"{name} under test", daemon=True)
    thread.start()
    assert server.ready.wait(PATIENCE_S), f"{name} is not ready"
    try:
        if failures:
            raise failures[0]
        yield
    finally:
        server.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), f"{name} does not stop"
    if failures:
        raise failures[0]


class Daemon:
    """`tta-edge serve` in a process of its own.

    Attributes:
        process: the process.
        endpoint: where it listens; empty if it ended before it was ready.
        log: what it has written to stderr, line by line.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.endpoint = ""
        self.log: list[str] = []
        self._ready = threading.Event()
        assert process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(process.stderr,), daemon=True)
        self._reader.start()
        assert self._ready.wait(PATIENCE_S), "the daemon neither is ready nor ends"

    def _read(self, stderr: IO[str]) -> None:
        for line in stderr:
            self.log.append(line.rstrip("\n"))
            found = re.search(r'ready (tcp://[^\s"]+)', line)
            if found:
                self.endpoint = found[1]
                self._ready.set()
        self._ready.set()

    def wait(self) -> int:
        """The exit status, when it has ended by itself or after a signal; its log is complete then."""
        status = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return status

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end."""
        self.process.send_signal(number)
        return self.wait()


@contextmanager
def daemon(*arguments: str | Path, bind: str = "tcp://127.0.0.1:0", **environment: str) -> Iterator[Daemon]:
    """`tta-edge serve ARGUMENTS` as a process, ready or already ended; killed at the end if it still runs."""
    command = [sys.executable, "-m", "tta_edge", "serve", "--bind", bind, *map(str, arguments)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=process_environment(**environment), cwd=REPOSITORY
    )
    try:
        yield Daemon(process)
    finally:
        process.kill()
        process.wait(PATIENCE_S)


def run_cli(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`tta-edge ARGUMENTS` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "tta_edge", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=process_environment(**environment),
        cwd=REPOSITORY,
        check=False,
    )


def process_environment(**changes: str) -> dict[str, str]:
    """This process's environment without TTA_* settings, with the packages of the working tree importable."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TTA_")}
    folders = [REPOSITORY / name for name in ("runtime", "adapters", "exporters", "edge", "cloud")]
    path = os.pathsep.join([*map(str, folders), *filter(None, [clean.get("PYTHONPATH", "")])])
    common = {"PYTHONPATH": path, "NO_COLOR": "1", "COLUMNS": "120", "TTA_HTTP": "off"}
    return {**clean, **common, **changes}
