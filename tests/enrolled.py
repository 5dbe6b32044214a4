"""An edge that is enrolled with a cloud that is not there: what its state directory holds then."""

from __future__ import annotations

from pathlib import Path

import msgspec
import zmq

from tta_cloud import identity
from tta_edge.enrol import DIRECTORY, Link
from tta_runtime import sealed as seals
from tta_runtime.signing import write_secret

NOWHERE = "tcp://127.0.0.1:9"
"""A port of this machine on which nobody listens."""


def enrol_with_nobody(state_dir: Path, cloud: Path) -> None:
    """Make an edge's enrolment in `state_dir`, with the keys of a cloud whose directory is made too."""
    keys = identity.create(cloud)
    directory = state_dir / DIRECTORY
    directory.mkdir(parents=True, mode=0o700)
    write_secret(directory / "edge.key", zmq.curve_keypair()[1] + b"\n")
    write_secret(directory / "1.root", seals.encode(keys.roots[0][1]))
    link = Link(endpoint=NOWHERE, server_key=keys.curve_public, group="yard", name="camera-3")
    write_secret(directory / "link.json", msgspec.json.encode(link))
