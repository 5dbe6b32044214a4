"""Plans on disk: built once on the machine that runs them, and taken from nowhere else, for a plan is machine code.

A file is a header (JSON: what the plan was built for, its size and sha256) and the plan. It is used only where it
belongs to this user and nobody else may write it, where it was built for exactly what is asked for now, and where its
hash is right. Anything else is built anew and replaced, one builder at a time, whoever they are.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from .atomic import write_atomic
from .errors import PlanCacheRefused
from .files import reason

_log = logging.getLogger(__name__)

_MAGIC = b"tta-plan\n"
_MAX_HEADER_BYTES = 1 << 16
MAX_PLAN_BYTES = 4 << 30
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a plan depends on."""

    graph: str
    """Name and sha256 of the graph's file and of its weights."""
    profile: str
    """Bounds of the batch, and flags of the build."""
    gpu: str
    """Name and compute capability."""
    library: str
    """Which TensorRT."""
    driver: str

    @property
    def name(self) -> str:
        """Of the file: what changes with an update of driver or library is not part of it, so that it is replaced."""
        flavour = self.library.split()[0]
        text = msgspec.json.encode([self.graph, self.profile, self.gpu, flavour])
        return hashlib.sha256(text).hexdigest()[:32]


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: Key
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Cached:
    """A plan, and whether it had to be built."""

    plan: bytes
    built: bool


def default_directory(environment: dict[str, str] | None = None) -> Path:
    """Where plans are kept unless another place is set: the service's cache directory, or the user's.

    Args:
        environment: of the process; None: the real one.
    """
    given = os.environ if environment is None else environment
    if service := given.get("CACHE_DIRECTORY", "").partition(":")[0]:  # systemd's CacheDirectory=
        return Path(service) / "plans"
    base = given.get("XDG_CACHE_HOME") or os.path.join(given.get("HOME", str(Path.home())), ".cache")
    return Path(base) / "tta-runtime" / "plans"


class PlanCache:
    """The plans of one directory, for any number of processes.

    Args:
        directory: made with mode 0700 if it is not there.

    Raises:
        PlanCacheRefused: it cannot be made, belongs to another user, or others may write to it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = directory.stat()
        except OSError as error:
            raise PlanCacheRefused(
                f"{directory} cannot be used for plans: {reason(error)}",
                "Set plan_cache to a directory of your own",
            ) from error
        if problem := _problem(found):
            raise PlanCacheRefused(
                f"{directory} cannot be used for plans: {problem}",
                "Set plan_cache to another one, mode 0700",
            )

    def get(self, key: Key, build: Callable[[], bytes]) -> Cached:
        """The plan for a key, from the file or from `build`, of which only one runs at a time for a key.

        Args:
            key: what is asked for.
            build: makes the plan; what it raises leaves the cache as it was.

        Raises:
            PlanCacheRefused: the directory cannot be read or locked.
        """
        path = self.directory / f"{key.name}.plan"
        try:
            plan = _read(path, key, quiet=True)
            if plan is not None:
                return Cached(plan, built=False)
            with _locked(path.with_suffix(".lock")):
                plan = _read(path, key, quiet=False)  # another process may have built it meanwhile
                if plan is not None:
                    return Cached(plan, built=False)
                plan = build()
                self._write(path, key, plan)
        except OSError as error:
            raise PlanCacheRefused(
                f"{self.directory}: {reason(error)}",
                "Correct its permissions, or set plan_cache to another directory",
            ) from error
        return Cached(plan, built=True)

    def timing(self, key: Key) -> bytes:
        """The timing cache of earlier builds on this GPU with this library; empty if there is none."""
        try:
            return _read(self._timing_path(key), _timing_key(key), quiet=True) or b""
        except OSError:
            return b""

    def keep_timing(self, key: Key, data: bytes) -> None:
        """Keep a timing cache. Of two builders that end together the later one's stays: it only saves time."""
        if data:
            self._write(self._timing_path(key), _timing_key(key), data)

    def _timing_path(self, key: Key) -> Path:
        return self.directory / f"{_timing_key(key).name}.timing"

    def _write(self, path: Path, key: Key, data: bytes) -> None:
        header = msgspec.json.encode(_Header(key, hashlib.sha256(data).hexdigest(), len(data)))
        try:
            write_atomic(path, [_MAGIC, len(header).to_bytes(4, "little"), header, data], mode=0o600)
        except (
            OSError
        ) as error:  # a full disk: the plan is good all the same, and is built anew the next time
            _log.warning("a plan cannot be kept in %s: %s", path, reason(error))


def _timing_key(key: Key) -> Key:
    return msgspec.structs.replace(key, graph="timing", profile="")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits until no other process or thread holds the lock; the system lets go of it however its holder ends."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | _FLAGS, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


class _Unusable(Exception):
    """Why a file is not used."""


def _read(path: Path, key: Key, *, quiet: bool) -> bytes | None:
    """The plan of a file; None where there is none, or with a warning that says why it is not used.

    Args:
        path: of the file.
        key: what it must have been built for.
        quiet: say nothing: it is looked at again when the lock is held.
    """
    try:
        return _checked(path, key)
    except FileNotFoundError:
        return None
    except (_Unusable, OSError) as error:  # OSError: a symbolic link, or not ours to read
        if not quiet:
            _log.warning("%s is not used and built anew: %s", path, reason(error))
        return None


def _checked(path: Path, key: Key) -> bytes:
    fd = os.open(path, os.O_RDONLY | _FLAGS)
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise _Unusable("it is no regular file")
        if problem := _problem(found):
            raise _Unusable(problem)
        if found.st_size > MAX_PLAN_BYTES:
            raise _Unusable(f"it has {found.st_size} bytes, the limit is {MAX_PLAN_BYTES}")
        begin = file.read(len(_MAGIC) + 4)
        size = int.from_bytes(begin[len(_MAGIC) :], "little")
        if not begin.startswith(_MAGIC) or size > _MAX_HEADER_BYTES:
            raise _Unusable("it is no plan file")
        try:
            header = msgspec.json.decode(file.read(size), type=_Header)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _Unusable("its header cannot be read") from error
        if header.key != key:
            raise _Unusable(_difference(header.key, key))
        plan = file.read()
    if len(plan) != header.bytes:
        raise _Unusable(f"it holds {len(plan)} bytes of a plan of {header.bytes}")
    if hashlib.sha256(plan).hexdigest() != header.sha256:
        raise _Unusable("its hash is wrong")
    return plan


def _difference(was: Key, wanted: Key) -> str:
    """What a plan was built for, and what is asked for now."""
    pairs = [(name, getattr(was, name), getattr(wanted, name)) for name in Key.__struct_fields__]
    return "; ".join(f"it was built for {name} {a}, now it is {b}" for name, a, b in pairs if a != b)


def _problem(found: os.stat_result) -> str:
    """Why a file or directory may hold what somebody else wrote; empty if it may not."""
    if found.st_uid != os.geteuid():
        return f"it belongs to user {found.st_uid}, this process runs as {os.geteuid()}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to it (mode {stat.S_IMODE(found.st_mode):o})"
    return ""
