"""For tests with a real cloud: the service on free ports, tokens for its edges, images of the size that they take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from networks import SIZE
from running import threaded
from tta_cloud import control, edges, identity
from tta_cloud.config import Config
from tta_cloud.control import LetEnrol
from tta_cloud.learner import LearnerOptions
from tta_cloud.service import CloudServer
from tta_cloud.start import start
from tta_runtime.enrolment import Ticket, encode_ticket

METHODS = ("source", "distill")
FAR_MS = 2**52


def images(seed: int, n: int = 16) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).random((n, 3, SIZE, SIZE), dtype=np.float32)


@contextmanager
def serving(store: Path, bundle: Path, **settings: Any) -> Iterator[CloudServer]:
    """The cloud on free ports in a thread of this process."""
    options: dict[str, Any] = {
        "student": str(bundle), "teacher": str(bundle), "store": str(store), "bind": "tcp://127.0.0.1:0",
        "enroll_bind": "tcp://127.0.0.1:0", "head_every_s": 0.2, "learner": LearnerOptions(new=8, replay=8, rounds=1),
    }  # fmt: skip
    server = start(Config(**{**options, **settings}))
    with threaded(server, "the cloud"):
        yield server


def ticket(
    server: CloudServer, store: Path, name: str = "camera", group: str = "yard", expires_ms: int = FAR_MS
) -> str:
    secret = f"{name}-secret-of-some-length"
    control.leave(store, LetEnrol(edges.hash_of(secret), name, group, expires_ms))
    key = identity.load(store).curve_public
    return encode_ticket(Ticket(door=server.door, server_key=key, secret=secret, name=name))
