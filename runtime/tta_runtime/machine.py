"""Checks of the machine that concern every service: Python, packages, the engine, limits, clock. What they look at is
passed in where a test could not change it otherwise.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from .checks import Check, fail, ok, warn

DISTRIBUTION = "tta-runtime"
OLDEST_PYTHON = (3, 10)
ENGINES = ("onnxruntime", "onnxruntime-gpu")
MIN_FILES, FEW_FILES = 64, 1024
YEARS = range(2025, 2100)
SLOW_FSYNC_S = 0.2
TICK_S = 1.0
"""Longest wait for a clock to go on."""

Versions = Callable[[str], str]
"""Version of an installed distribution; raises `PackageNotFoundError`."""


def python(version: tuple[int, ...] = sys.version_info[:3]) -> Check:
    """The interpreter is one that the package supports."""
    text = f"Python {'.'.join(map(str, version))}, {sys.executable}"
    if version < OLDEST_PYTHON:
        return fail("python", text, f"Install Python {'.'.join(map(str, OLDEST_PYTHON))} or later")
    return ok("python", text)


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

    It is loaded by name, to see whether it can be.
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


def write_time_s(place: Path) -> float:
    """Seconds that a small durable write takes; raises OSError."""
    with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-") as file:
        began_s = time.perf_counter()
        file.write(b"x" * 4096)
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - began_s
