"""How a link to the cloud lives: its phases, and what moves it from one to the next."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto


class Phase(Enum):
    """How far the link is."""

    WAITING = auto()
    CONNECTING = auto()
    GREETING = auto()
    ONLINE = auto()
    CLOSED = auto()


class Signal(Enum):
    """What moves a link from one phase to the next."""

    DUE = auto()
    CONNECTED = auto()
    WELCOME = auto()
    FORGOTTEN = auto()
    LOST = auto()
    CLOSE = auto()


# The whole life of a link. A signal that a phase does not list leaves the phase as it is.
TRANSITIONS: Mapping[Phase, Mapping[Signal, Phase]] = {
    Phase.WAITING: {Signal.DUE: Phase.CONNECTING, Signal.CLOSE: Phase.CLOSED},
    Phase.CONNECTING: {
        Signal.CONNECTED: Phase.GREETING,
        Signal.LOST: Phase.WAITING,
        Signal.CLOSE: Phase.CLOSED,
    },
    Phase.GREETING: {Signal.WELCOME: Phase.ONLINE, Signal.LOST: Phase.WAITING, Signal.CLOSE: Phase.CLOSED},
    Phase.ONLINE: {
        Signal.FORGOTTEN: Phase.GREETING,
        Signal.LOST: Phase.WAITING,
        Signal.CLOSE: Phase.CLOSED,
    },
    Phase.CLOSED: {},
}
