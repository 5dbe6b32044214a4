"""Checks of the machine: Python, packages, cores, disk, ports, limits, clock. What they look at is passed in
where a test could not change it otherwise.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from tta_edge.checks import Check, fail, ok, warn
from tta_edge.config import HTTP_OFF, Config
from tta_edge.endpoint import check_bind, parse
from tta_edge.errors import StartError
from tta_edge.hosting import divide
from tta_edge.wire import StatusReply
from tta_runtime.errors import TtaError

DISTRIBUTION = "tta-runtime"
OLDEST_PYTHON = (3, 10)
ENGINES = ("onnxruntime", "onnxruntime-gpu")
MIN_FREE_BYTES = 256 * 1024 * 1024
SLOW_FSYNC_S = 0.2
MIN_FILES, FEW_FILES = 64, 1024
YEARS = range(2025, 2100)
TICK_S = 1.0
"""Longest wait for a clock to go on."""
ANSWER_S = 1.0
"""Longest wait for whoever listens at the address already."""
CGROUP = Path("/sys/fs/cgroup")
LOCK = "lock"
"""Name of the lock file in a state directory."""

Versions = Callable[[str], str]
"""Version of an installed distribution; raises `PackageNotFoundError`."""


def python(version: tuple[int, ...] = sys.version_info[:3]) -> Check:
    """The interpreter is one that the package supports."""
    text = f"Python {'.'.join(map(str, version))}, {sys.executable}"
    if version < OLDEST_PYTHON:
        return fail("python", text, f"Install Python {'.'.join(map(str, OLDEST_PYTHON))} or later")
    return ok("python", text)


# --- packages ---------------------------------------------------------------------------------------


def packages(versions: Versions = metadata.version) -> Check:
    """This distribution and what it always needs are installed, each recent enough."""
    try:
        own, needed = versions(DISTRIBUTION), metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return warn(
            "packages", f"{DISTRIBUTION} is not installed, it runs from its source", "pip install -e ."
        )
    found, wrong = [], []
    for requirement in needed:
        name, least = _requirement(requirement)
        if name is None:
            continue
        try:
            version = versions(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        found.append(f"{name} {version}")
        if _numbers(version) < _numbers(least):
            wrong.append(f"{name} is {version}, needed is {least} or later")
    if wrong:
        return fail("packages", "; ".join(wrong), f"pip install --upgrade {DISTRIBUTION}")
    return ok("packages", f"{DISTRIBUTION} {own} with {', '.join(found)}")


def _requirement(text: str) -> tuple[str | None, str]:
    """Name and least version of a requirement; no name if it belongs to an extra or to another Python."""
    requirement, _, marker = text.partition(";")
    if "extra" in marker or ("python_version" in marker and sys.version_info >= (3, 11)):
        return None, ""
    match = re.match(r"\s*([A-Za-z0-9._-]+)\s*(?:>=\s*([0-9.]+))?", requirement)
    return (match[1], match[2] or "0") if match else (None, "")


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version: `26.2.1rc1` -> (26, 2, 1)."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, release[0].split("."))) if release else ()


def onnxruntime(versions: Versions = metadata.version, load: Callable[[str], Any] = import_module) -> Check:
    """Exactly one of the wheels that bring ONNX Runtime is installed, and it can be imported.

    The edge itself has no use for it, the runtime has: it is loaded by name, to see whether it can be.
    """
    installed = []
    for name in ENGINES:
        with suppress(metadata.PackageNotFoundError):
            installed.append(f"{name} {versions(name)}")
    if len(installed) > 1:
        return fail(
            "onnxruntime",
            f"{' and '.join(installed)} are both installed and overwrite each other's files",
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install tta-runtime[cpu] (or tta-runtime[gpu])",
        )
    try:
        ort = load("onnxruntime")
    except ImportError as error:
        return fail(
            "onnxruntime",
            f"it cannot be imported: {error}",
            "pip install tta-runtime[cpu], or tta-runtime[gpu] on a machine with CUDA",
        )
    offers = ", ".join(name.removesuffix("ExecutionProvider") for name in ort.get_available_providers())
    return ok(
        "onnxruntime", f"{', '.join(installed) or f'onnxruntime {ort.__version__}'}, built with {offers}"
    )


# --- cores ------------------------------------------------------------------------------------------


def usable_cores(cores: int, cgroup: Path = CGROUP) -> float:
    """Of the cores that this process may run on, the share that its cgroup allows."""
    quota = _quota(cgroup)
    return cores if quota is None else min(float(cores), quota)


def _quota(cgroup: Path) -> float | None:
    """CPU quota in cores, of either version of cgroups; None where there is none."""
    with suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError):
        micros = int((cgroup / "cpu/cpu.cfs_quota_us").read_text())
        return None if micros <= 0 else micros / int((cgroup / "cpu/cpu.cfs_period_us").read_text())
    return None


def threads(config: Config, cores: int, usable: float) -> Check:
    """The engines have no more threads than there are cores.

    Args:
        config: how many are wanted, and whether answers and steps have their own.
        cores: that the daemon counts.
        usable: of them.
    """
    shares = divide(config, cores)
    inline = config.policy == "inline"
    split = f"{shares.serve}" if inline else f"{shares.serve} for answers and {shares.step} for steps"
    text = f"{usable:g} cores can be used, the engines get {split}"
    wanted = max(shares.serve, shares.step) if inline else shares.serve + shares.step
    least = 1 if inline else 2  # with fewer cores there is nothing to divide
    most = max(least, int(usable))
    if wanted > most:
        return warn("threads", text, f"Set threads to {most}: more only wait for each other")
    return ok("threads", text)


# --- disk -------------------------------------------------------------------------------------------


def disk(config: Config, running: StatusReply | None, *, slot_bytes: int = 0) -> Check:
    """The state directory can be made or written, is quick, has room and is nobody else's.

    Args:
        config: its `state_dir` is looked at; what is written there is removed again.
        running: the daemon that answers at `bind`, if there is one.
        slot_bytes: of one stream on disk.
    """
    if config.state_dir is None:
        return warn("disk", "no state directory: a restart forgets what streams learn", "Set state_dir")
    path = Path(config.state_dir)
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return fail(
            "disk", f"{place} is not a directory", "Set state_dir to a directory, or to one that can be made"
        )
    try:
        fsync_s = _write_time_s(place)
    except OSError as error:
        return fail(
            "disk",
            f"{place} cannot be written: {error.strerror}",
            "Let the user that runs the daemon write it (chown, mount options), or set another state_dir",
        )
    if place == path and _locked(path):
        if running is None or Path(running.state_dir).absolute() != path.absolute():
            return fail("disk", f"another daemon uses {path}", "Stop that daemon, or set another state_dir")
        return warn("disk", f"{path} is in use by the daemon that answers at {config.bind}", NOT_A_SECOND)
    free = shutil.disk_usage(place).free
    needed = max(MIN_FREE_BYTES, slot_bytes * config.max_stored_streams)
    text = (
        f"{path}{'' if place == path else ' can be made'}, fsync {fsync_s * 1e3:.1f} ms, {decimal(free)} free"
    )
    if free < slot_bytes + config.max_event_bytes * 2:
        return fail("disk", f"{text}: not enough for one stream and the event log", "Free space")
    if free < needed:
        return warn(
            "disk", f"{text}, {decimal(needed)} are wanted", "Free space, or lower max_stored_streams"
        )
    if fsync_s > SLOW_FSYNC_S:
        return warn("disk", f"{text}: slow", "Use another disk, or raise checkpoint_steps")
    return ok("disk", text)


NOT_A_SECOND = "Nothing, if that is the daemon you mean; a second one needs settings of its own"


def _write_time_s(place: Path) -> float:
    """Seconds that a small durable write takes."""
    with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-") as file:
        began_s = time.perf_counter()
        file.write(b"x" * 4096)
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - began_s


def _locked(path: Path) -> bool:
    """Whether a process holds the lock of the state directory; taking it for a moment disturbs nobody."""
    import fcntl

    try:
        with (path / LOCK).open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


# --- network ----------------------------------------------------------------------------------------


def port(name: str, endpoint: str, config: Config, running: StatusReply | None) -> Check:
    """An address can be bound.

    Args:
        name: of the check, and of the setting.
        endpoint: tcp://HOST:PORT.
        config: whether other machines may reach it.
        running: the daemon that answers at `bind`, if there is one.
    """
    try:
        check_bind(endpoint, allow_remote=config.allow_remote)
        host, number = parse(endpoint)
    except StartError as error:
        return fail(name, error.cause, error.fix)
    if number in ("0", "*"):
        return ok(name, f"{endpoint} takes a free port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            {"lo": "127.0.0.1", "*": "0.0.0.0"}.get(host, host), int(number), type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE and running is not None:
            return warn(
                name,
                f"{endpoint} is in use, and tta-edge {running.version} answers at {config.bind}",
                NOT_A_SECOND,
            )
        if error.errno == errno.EADDRINUSE:
            return fail(
                name,
                f"{endpoint} is in use by another process",
                f"Stop that process, or set {name} to another port",
            )
        return fail(
            name,
            f"{endpoint} cannot be bound: {error.strerror}",
            "Use an address of this machine and a port above 1023",
        )
    return ok(name, f"{endpoint} is free")


def ports(config: Config, running: StatusReply | None) -> list[Check]:
    """Both addresses of the daemon."""
    requests = port("bind", config.bind, config, running)
    if config.http == HTTP_OFF:
        return [requests, ok("http", "off")]
    return [requests, port("http", f"tcp://{config.http}", config, running)]


def whoever_answers(bind: str) -> StatusReply | None:
    """The status of the daemon that listens at an endpoint already; None if none does."""
    from tta_edge.client import Client

    try:
        host, number = parse(bind)
        with socket.create_connection((host, int(number)), ANSWER_S):
            pass  # somebody listens; asking where nobody does would take the whole timeout
        with Client(bind, timeout_s=ANSWER_S) as client:
            return client.status()
    except (OSError, ValueError, TtaError):
        return None


# --- limits and clocks ------------------------------------------------------------------------------


def open_files(limit: int | None = None) -> Check:
    """Each client takes a file descriptor."""
    if limit is None:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    text = f"{limit} open files are allowed"
    if limit < MIN_FILES:
        return fail(
            "open files", text, f"ulimit -n {FEW_FILES}, or LimitNOFILE={FEW_FILES} in the service's unit"
        )
    if limit < FEW_FILES:
        return warn("open files", f"{text}, one for each client", f"ulimit -n {FEW_FILES} for many clients")
    return ok("open files", text)


def clock(
    monotonic: Callable[[], float] = time.monotonic,
    wall: Callable[[], datetime] = lambda: datetime.now().astimezone(),
) -> Check:
    """Durations need a clock that runs, the times of events one that is right."""
    began_s, patience_s = monotonic(), time.perf_counter() + TICK_S
    while (now_s := monotonic()) == began_s and time.perf_counter() < patience_s:
        pass
    if now_s <= began_s:
        return fail(
            "clock", "the monotonic clock stands still or runs back", "Repair the machine's clock source"
        )
    now = wall()
    text = f"{now:%Y-%m-%d %H:%M:%S}, time zone {now:%Z} ({now:%z})"
    if now.year not in YEARS:
        return warn("clock", f"{text}: events will have wrong times", "Set the clock, for example with NTP")
    return ok("clock", text)


# --- memory -----------------------------------------------------------------------------------------


def available_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = CGROUP) -> int | None:
    """Memory that one more process may take: what the machine has free, or its cgroup allows, if less."""
    found = []
    with suppress(OSError, ValueError, IndexError):
        lines: Mapping[str, str] = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):
            found.append(max(0, int((cgroup / limit).read_text()) - int((cgroup / used).read_text())))
    return min(found, default=None)
