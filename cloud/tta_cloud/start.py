"""From a configuration to a service that can run: bundles opened, keys loaded, addresses checked."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from tta_cloud.config import Config
from tta_cloud.errors import CannotServe
from tta_cloud.identity import load
from tta_cloud.learner import METHOD, check_fit
from tta_cloud.reading import Served, remember
from tta_cloud.service import CloudServer
from tta_cloud.teacher import open_student, open_teacher
from tta_runtime.engine import EngineOptions
from tta_runtime.errors import BadValue
from tta_runtime.model import Model


def start(config: Config, *, clock_s: Callable[[], float] = time.time) -> CloudServer:
    """A service that is ready to `run`.

    Args:
        config: of the service.
        clock_s: seconds since 1970.

    Raises:
        BadValue: the configuration names no student or no teacher, or a hold-out that cannot be read.
        IdentityMissing: the store has no keys; without keys nothing is served, on any address.
        TtaError: a bundle, the store or a key cannot be used.
    """
    for key in ("student", "teacher"):
        if not getattr(config, key):
            raise BadValue(f"`{key}` is not set", f"Give --{key} or set it in the file of --config")
    for endpoint in (config.bind, config.enroll_bind):
        check_endpoint(endpoint)
    store = Path(config.store)
    identity = load(store)
    options = EngineOptions(threads=config.threads)
    student = open_student(Path(config.student), options)
    weights = None if config.teacher_weights is None else Path(config.teacher_weights)
    teacher = open_teacher(config.teacher, student, store / "teachers", weights=weights, options=options)
    check_fit(Model(student, METHOD), Model(teacher, METHOD))
    server = CloudServer(config, identity, student, teacher, clock_s=clock_s, labelled=_labelled(config))
    named = Path(config.teacher)
    remember(
        store,
        Served(
            str(Path(config.student).resolve()), str(named.resolve()) if named.exists() else config.teacher
        ),
    )
    return server


def check_endpoint(endpoint: str) -> None:
    """Whether an address is of a form that can be bound; raises CannotServe. Empty: none is."""
    if not endpoint:
        return
    host = urlsplit(endpoint).hostname or ""
    if not endpoint.startswith("tcp://") or not host:
        raise CannotServe(f"{endpoint!r} is not tcp://HOST:PORT", "Write for example tcp://127.0.0.1:7610")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if host not in ("localhost", "*"):
            raise CannotServe(
                f"{endpoint!r} names a host, not an address", "Give an address of this machine"
            ) from None


def _labelled(config: Config) -> tuple[np.ndarray, np.ndarray] | None:
    if config.holdout is None:
        return None
    try:
        with np.load(config.holdout, allow_pickle=False) as found:
            return np.asarray(found["x"]), np.asarray(found["y"]).astype(np.int64)
    except (OSError, ValueError, KeyError) as error:
        raise BadValue(
            f"the hold-out {config.holdout} cannot be read: {error}",
            "Give an npz with x (as edges send it) and y",
        ) from error
