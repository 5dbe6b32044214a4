"""What happens on a link to the cloud, as its protocol tells whoever drives it."""

from __future__ import annotations

from dataclasses import dataclass

from tta_runtime.errors import WireError
from tta_runtime.link import Welcome


@dataclass(frozen=True)
class Connect:
    """Open a connection, in place of a former one, and say `connected` or `disconnected`."""


@dataclass(frozen=True)
class Online:
    """The cloud has let the edge in."""

    welcome: Welcome


@dataclass(frozen=True)
class Lost:
    """There is no link; close the connection. `Connect` follows after the wait."""

    code: str
    """`silent`, `unreachable`, `disconnected`, `forgotten`, or the code with which the cloud refused the hello."""
    cause: str
    fix: str
    wait_s: float


@dataclass(frozen=True)
class Acknowledged:
    """The cloud has a sample for good, or does not want it: the spool may forget it."""

    key: str
    stored: bool
    reason: str


@dataclass(frozen=True)
class Held:
    """The cloud can take no sample now; all wait for `wait_s`."""

    code: str
    cause: str
    wait_s: float


@dataclass(frozen=True)
class GivenUp:
    """A request was refused too often and is not repeated; `key` where it was a sample."""

    what: str
    key: str
    code: str
    cause: str


@dataclass(frozen=True)
class HeadCame:
    """A signed head, unverified."""

    sealed: bytes


@dataclass(frozen=True, eq=False)
class PatchCame:
    """A signed patch and its payload, unverified."""

    sealed: bytes
    payload: memoryview


@dataclass(frozen=True)
class RootCame:
    """A signed root, unverified."""

    sealed: bytes


@dataclass(frozen=True)
class Garbled:
    """The cloud sent something that is not of this protocol, or not an answer to what was asked; ignored."""

    error: WireError


Event = Connect | Online | Lost | Acknowledged | Held | GivenUp | HeadCame | PatchCame | RootCame | Garbled
