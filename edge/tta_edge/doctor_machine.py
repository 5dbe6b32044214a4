"""Checks of the machine that concern the daemon: cores, disk, ports, memory. What they look at is passed in where a
test could not change it otherwise.
"""

from __future__ import annotations

import errno
import shutil
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from rich.filesize import decimal

from tta_edge.config import HTTP_OFF, Config
from tta_edge.errors import StartError
from tta_edge.hosting import divide
from tta_edge.wire import StatusReply
from tta_runtime.checks import Check, fail, ok, warn
from tta_runtime.endpoint import check_bind, parse
from tta_runtime.errors import TtaError
from tta_runtime.machine import SLOW_FSYNC_S, write_time_s

MIN_FREE_BYTES = 256 * 1024 * 1024
ANSWER_S = 1.0
"""Longest wait for whoever listens at the address already."""
CGROUP = Path("/sys/fs/cgroup")
LOCK = "lock"
"""Name of the lock file in a state directory."""


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
        fsync_s = write_time_s(place)
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
